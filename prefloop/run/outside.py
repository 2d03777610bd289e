"""The recipe's engine, where that is not this process: opened when first needed, ended with the run."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel

from prefloop.generate.engines import OutsideEngine, Probe, Setting, Weights
from prefloop.models.chat import Chat
from prefloop.models.policy import Policy
from prefloop.models.sources import ModelOptions, local_folder, resolve_source
from prefloop.recipe import Recipe
from prefloop.run_folder import RunDir


class Outside:
    """What there is of it in a run."""

    def __init__(self, recipe: Recipe, rundir: RunDir) -> None:
        """Opens nothing."""
        self._recipe = recipe
        self._rundir = rundir
        self._engine: OutsideEngine | None = None
        self._opened = False

    def engine(self, policy: Policy, chat: Chat) -> OutsideEngine | None:
        """The engine, opened; None where the recipe's is this process."""
        if not self._opened:
            model = self._recipe.model
            self._engine = self._recipe.engine.open(
                Setting(
                    chat=chat,
                    dtype=str(policy.model.dtype).removeprefix("torch."),
                    lora_rank=model.lora.r if model.tuning == "lora" else None,
                    lora_modules=_adapted(policy),
                    trust_remote_code=model.trust_remote_code,
                    log=self._rundir.path / "engine.log",
                )
            )
            self._opened = True
        return self._engine

    def serve(self, place: Path | None, probe: Probe) -> None:
        """Let it answer with the policy saved in `place` (None: the initial one)."""
        assert self._engine is not None
        source = initial_source(self._recipe, self._rundir)
        if place is not None and source.tuning == "full":
            weights = Weights(place.resolve())
        else:
            base = local_folder(resolve_source(source.source), source).resolve()
            weights = Weights(base, None if place is None else place.resolve())
        self._engine.serve(weights, probe)

    def rest(self) -> None:
        """Before training: it may give back memory."""
        if self._engine is not None:
            self._engine.rest()

    def close(self) -> None:
        """End what was started."""
        if self._engine is not None:
            self._engine.close()


def _adapted(policy: Policy) -> tuple[str, ...]:
    if not isinstance(policy.model, PeftModel):
        return ()
    config = policy.model.peft_config[policy.model.active_adapter]
    assert isinstance(config, LoraConfig)
    names = config.target_modules or ()
    return tuple(sorted({name.rpartition(".")[2] for name in names}))


def initial_source(recipe: Recipe, run: RunDir) -> ModelOptions:
    """The recipe's model; after round 0 its supervised fine-tune takes the initial policy's place."""
    start = run.round(-1)
    if recipe.sft is not None and start.manifest("sft"):
        return recipe.model.model_copy(update={"source": str(start.policy.resolve())})
    return recipe.model
