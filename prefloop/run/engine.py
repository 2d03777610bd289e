"""The recipe's engine in a run: opened on first use, closed with the run, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

from prefloop.generate.engine import Engine, EngineContext, OutsideEngine, Probe, Weights
from prefloop.models.chat import Chat
from prefloop.models.policy import Policy
from prefloop.models.sources import local_folder, resolve_source
from prefloop.recipe import Recipe, initial_source
from prefloop.records import GENERATED, READ, Request, Response, Sampling, Scored
from prefloop.run_folder import RunDir


class Metered:
    """An Engine that adds to `counts` what passes through it: tokens drawn, and tokens read.

    Tokens read are those of every prompt and of every scored answer, counted at each call, whether or not
    the engine has them cached.
    """

    def __init__(self, engine: Engine, chat: Chat, counts: Counter[str]) -> None:
        self._engine = engine
        self._chat = chat
        self._counts = counts

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """As the engine does; counted."""
        responses = self._engine.sample(requests, sampling, seed=seed, label=label)
        self._counts[GENERATED] += sum(len(response.token_ids) for response in responses)
        self._read(requests)
        return responses

    def score(
        self,
        requests: Sequence[Request],
        answers: Sequence[Response],
        *,
        top: int = 0,
        at: Sequence[Collection[int]] | None = None,
    ) -> list[Scored]:
        """As the engine does; counted."""
        scored = self._engine.score(requests, answers, top=top, at=at)
        self._counts[READ] += sum(len(answer.token_ids) for answer in scored)
        self._read(requests)
        return scored

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """As the engine does; counted."""
        rows = self._engine.choose(requests, options)
        self._read(requests)
        return rows

    def _read(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._counts[READ] += len(self._chat.prompt_ids(request.messages, request.prefix))


class RunEngine:
    """The recipe's external engine: opened on first use, closed with the run."""

    def __init__(self, recipe: Recipe, rundir: RunDir) -> None:
        """Open nothing yet."""
        self._recipe = recipe
        self._rundir = rundir
        self._engine: OutsideEngine | None = None
        self._opened = False

    def engine(self, policy: Policy, chat: Chat) -> OutsideEngine | None:
        """The engine, opened; None where the recipe's is this process."""
        if not self._opened:
            model = self._recipe.model
            self._engine = self._recipe.engine.open(
                EngineContext(
                    chat=chat,
                    dtype=str(policy.model.dtype).removeprefix("torch."),
                    lora_rank=model.lora.saved_rank if model.tuning == "lora" else None,
                    lora_modules=_adapted(policy),
                    trust_remote_code=model.trust_remote_code,
                    log=self._rundir.path / "engine.log",
                    lora_others=_adapted_otherwise(policy),
                )
            )
            self._opened = True
        return self._engine

    def load_weights(self, policy_dir: Path | None, probe: Probe) -> None:
        """Let it answer with the policy saved in `policy_dir` (None: the initial one)."""
        assert self._engine is not None
        source = initial_source(self._recipe, self._rundir)
        if policy_dir is not None and source.tuning == "full":
            weights = Weights(policy_dir.resolve())
        else:
            base = local_folder(resolve_source(source.source), source).resolve()
            weights = Weights(base, None if policy_dir is None else policy_dir.resolve())
        self._engine.load_weights(weights, probe)

    def offload(self) -> None:
        """Let the engine give back memory before training."""
        if self._engine is not None:
            self._engine.offload()

    def close(self) -> None:
        """Close the engine, where it was opened."""
        if self._engine is not None:
            self._engine.close()


def _adapted(policy: Policy) -> tuple[str, ...]:
    """Last names of the linear modules that have an adapter."""
    names = {
        name.rpartition(".")[2]
        for name, module in policy.model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
    }
    return tuple(sorted(names))


def _adapted_otherwise(policy: Policy) -> tuple[str, ...]:
    """Parameters with an adapter of their own, and modules that are trained whole."""
    if not isinstance(policy.model, PeftModel):
        return ()
    config = policy.model.peft_config[policy.model.active_adapter]
    assert isinstance(config, LoraConfig)
    return (*(config.target_parameters or ()), *(config.modules_to_save or ()))
