"""What the stages of a run share: data, policy, engine, judge and trainer, each made when first needed.

The policy in memory stands at the end of some round. Asking for another place loads it from that
round's folder, so a resumed run and an unbroken one go through the same weights.
"""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch

from prefloop.data.prompt_store import Spool
from prefloop.data.prompts import LoadedData, load_data, round_subset
from prefloop.errors import DataError
from prefloop.generate.engine import Engine
from prefloop.generate.hf_engine import HFEngine
from prefloop.generate.templates import PromptSet
from prefloop.generate.weight_check import probe
from prefloop.judges import Judge, NoVerdict, OpenJudge, Remembering, Verdict
from prefloop.judges.similarity import Similarity
from prefloop.memory import keep_freed_memory
from prefloop.methods import Actors, Trains
from prefloop.models.policy import Policy
from prefloop.models.sources import quiet
from prefloop.progress import Bar
from prefloop.recipe import Recipe, TrainOptions
from prefloop.records import Pair, Prompt
from prefloop.run.engine import Metered
from prefloop.run.held_out import TrainingCurve
from prefloop.run.launch import Stage, run_processes
from prefloop.run.outside import Outside, initial_source
from prefloop.run_folder import RoundDir, RunDir, replace_folder
from prefloop.seeds import derive_seed
from prefloop.train import checkpoint, losses
from prefloop.train.batches import encode_pairs
from prefloop.train.losses import GroupLogps, LossOutput
from prefloop.train.ppo import TokenMethod
from prefloop.train.ppo_trainer import PPOTrainer
from prefloop.train.trainer import Job, Trainer, read_metrics

OPTIMIZER = "optimizer.safetensors"
_TRAINERS = {"groups": Trainer, "tokens": PPOTrainer}


class Session:
    """The run's state in memory."""

    def __init__(self, recipe: Recipe, rundir: RunDir, *, in_main_memory: bool = False) -> None:
        """`in_main_memory`: policies stay there until they are sharded."""
        keep_freed_memory()
        self._in_main_memory = in_main_memory
        self.recipe = recipe
        self.rundir = rundir
        self._policy: Policy | None = None
        self._engine: HFEngine | None = None
        self._trainer: Trainer | None = None
        self._judges: dict[int, OpenJudge] = {}
        """Judges that ask the policy, by the id of the engine that they ask and keep."""
        self.outside = Outside(recipe, rundir)
        self.counts: Counter[str] = Counter()
        """What methods have asked engines for, in tokens."""
        self._place: Path | None = None
        """Folder of the policy that memory holds; None for the initial one."""

    # Data.

    @cached_property
    def data(self) -> LoadedData:
        """Prompts for training and evaluation, over-long ones dropped."""
        chat = self.engine_at(self._place).chat
        data = load_data(
            self.recipe.data,
            needs_target=self.recipe.method.needs_target
            or self.recipe.sft is not None
            or (self.recipe.judge is not None and self.recipe.judge.needs_target),
            needs_pairs=self.recipe.method.needs_pairs,
            seed=self.recipe.seed,
            count_tokens=chat.count,
            folder=self.rundir.path,
        )
        self.rundir.event(
            "data", train=len(data.train), eval=len(data.eval), dropped=dict(data.dropped)
        )
        return data

    def prompts(self, round: int) -> Spool:
        """The round's subset of the training prompts."""
        everything, size = self.data.train, self.recipe.loop.prompts_per_round
        chosen = round_subset(len(everything), round=round, size=size, seed=self.recipe.seed)
        return everything.picked(chosen)

    def held_out(self) -> Spool:
        """The evaluation prompts: the first ones of the evaluation data."""
        if not self.data.eval:
            raise DataError(
                "there are no evaluation prompts; name a file in data.eval, or hold some out with data.holdout"
            )
        return self.data.eval[: self.recipe.evaluate.prompts]

    # The policy, at different places of the run.

    def policy_at(self, place: Path | None) -> Policy:
        """The policy saved in `place` (None: the initial one), from memory if it stands there."""
        if self._policy is None or self._place != place:
            # One copy at a time: the old one goes before the new one comes.
            self._forget()
            self._policy = Policy.load(
                initial_source(self.recipe, self.rundir),
                place,
                seed=self.recipe.seed,
                in_main_memory=self._in_main_memory,
            )
            self._place = place
        return self._policy

    def _forget(self) -> None:
        """Let go of the policy and of all that holds it."""
        self._policy = self._engine = self._trainer = None
        self._judges.clear()

    @property
    def place(self) -> Path | None:
        """The place of the policy in memory, and while it is trained the one that it is on its way to."""
        return self._place

    def policy_after(self, here: RoundDir) -> Policy:
        """The policy at the end of a round; of `start`, the initial one."""
        return self.policy_at(None if here.number < 0 else here.policy)

    def policy_before(self, here: RoundDir) -> Policy:
        """The policy at the start of a round."""
        return self.policy_after(self.rundir.round(here.number - 1))

    def engine_at(self, place: Path | None) -> HFEngine:
        """The engine in process over `policy_at(place)`."""
        policy = self.policy_at(place)
        if self._engine is None:
            size = self.recipe.generate.batch_size
            self._engine = HFEngine(policy.model, policy.tokenizer, batch_size=size)
        return self._engine

    def engine_after(self, here: RoundDir) -> HFEngine:
        """The engine in process over the policy at the end of a round."""
        self.policy_after(here)
        return self.engine_at(self._place)

    def initial_policy(self) -> AbstractContextManager[None]:
        """Inside, the policy in memory is the initial one."""
        if self._place is None or self._policy is None:
            return nullcontext()
        return self._policy.at_start()

    @contextmanager
    def initial_engine(self) -> Iterator[HFEngine]:
        """Inside, the engine answers as the initial policy."""
        with self.initial_policy():
            yield self.engine_at(self._place)

    # Who plays.

    @contextmanager
    def player(self, *, initial: bool = False) -> Iterator[Engine]:
        """Inside, the engine that plays the policy in memory, or the initial policy."""
        outside = self.outside.engine(self.policy_at(self._place), self._chat)
        if outside is None or not self.recipe.engine.plays_policy:
            with self.initial_policy() if initial else self.policy_at(self._place).merged():
                yield self.engine_at(self._place)
            return

        def trainer() -> list[float]:
            with self.initial_policy() if initial else nullcontext():
                return probe(self.engine_at(self._place))

        self.outside.serve(None if initial else self._place, trainer)
        yield outside

    @cached_property
    def prompt_set(self) -> PromptSet:
        """The prompts that the recipe names."""
        return PromptSet(self.recipe.method.prompt_set)

    @contextmanager
    def generator(self, here: RoundDir) -> Iterator[Callable[[int], Actors]]:
        """Actors for a round's generation, by chunk seed: the current policy, or the frozen initial one."""
        self.policy_before(here)
        with self.player(initial=self.recipe.method.generator == "frozen") as player:
            outside = self.outside.engine(self.policy_at(self._place), self._chat)
            yield self._actors(outside or player, player, here)

    @contextmanager
    def measured(self, here: RoundDir) -> Iterator[Callable[[int], Actors]]:
        """Actors, by chunk seed, with the policy at the end of a round, for measuring it."""
        self.policy_after(here)
        with self.player() as player:
            yield self._actors(player, player, here)

    def _actors(self, writer: Engine, policy: Engine, here: RoundDir) -> Callable[[int], Actors]:
        judge, prompts = self._judge(policy), self.prompt_set
        counted = Metered(writer, self._chat, self.counts)
        return lambda seed: Actors(counted, judge, prompts, here.number, seed, self._beside_initial)

    def _beside_initial(self, judge: Judge) -> OpenJudge:
        return judge.open(self.engine_at(self._place), self.prompt_set, self.initial_engine)

    def _judge(self, policy: Engine) -> OpenJudge | None:
        judge = self.recipe.judge
        if judge is None:
            return None
        if not judge.needs_policy:
            return self._lasting_judge
        if judge.needs_moved_policy:
            # It compares log-probs with the initial policy's, which are computed here: so must both be.
            policy = self.engine_at(self._place)
        if id(policy) not in self._judges:
            self._judges[id(policy)] = judge.open(policy, self.prompt_set, self.initial_engine)
        # Its weights change under it, so what it said is remembered no longer than for one chunk.
        return Remembering(self._judges[id(policy)])

    @cached_property
    def _lasting_judge(self) -> OpenJudge:
        assert self.recipe.judge is not None
        with quiet():
            return Remembering(self.recipe.judge.open(None, self.prompt_set))

    def score_answers(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Verdict]:
        """The judge's scores of single answers; without a judge, similarity to the targets there are."""
        judge = self._judge(self.engine_at(self._place))
        if judge is None:
            if not all(prompt.target for prompt in prompts):
                return [NoVerdict("no judge, no target")] * len(prompts)
            judge = Similarity().open(None, self.prompt_set)
        return judge.score(prompts, [(text,) for text in texts])

    # Training.

    def trainer(self, options: TrainOptions, trains: Trains = "groups") -> Trainer:
        """The trainer of the policy in memory."""
        kind = _TRAINERS[trains]
        old = self._trainer
        if old is None or old.options != options or type(old) is not kind:
            assert self._policy is not None
            self._trainer = kind(self._policy, options, self.recipe.track, str(self.rundir.path))
        assert self._trainer is not None
        return self._trainer

    def training_pairs(self, here: RoundDir) -> list[Pair]:
        """What the round trains on: its own pairs, after the previous round's where they are mixed."""
        mixed = self.recipe.loop.mix_previous and here.number > 0
        numbers = [here.number - 1, here.number] if mixed else [here.number]
        return [pair for n in numbers for pair in self.rundir.round(n).records("pairs", Pair)]

    def train(self, here: RoundDir) -> dict[str, Any]:
        """Train the round's policy on its pairs and save it."""
        if self.recipe.launch is not None:
            return self._launched(here, "train")
        self.outside.rest()
        policy, loop = self.policy_before(here), self.recipe.loop
        method = self.recipe.method.in_round(here.number)
        pairs = self.training_pairs(here)
        if self._engine is not None:
            self._engine.release()
        trainer = self.trainer(self.recipe.train, method.trains)
        if not loop.carry_optimizer:
            trainer.renew_optimizer()
        elif here.number > 0:
            trainer.load_optimizer(self.rundir.round(here.number - 1).train / OPTIMIZER)
        first_step = sum(r.steps() for r in self.rundir.rounds() if r.number < here.number)
        equal_to_reference = method.reference == "round_start" or here.number == 0
        examples = encode_pairs(self._chat, pairs, method.roles, self._window(policy))
        # From here on what memory holds is on its way to that place.
        self._place = here.policy
        facts = trainer.run(
            Job(
                examples=examples,
                roles=method.roles,
                loss=method.loss,
                folder=here.train,
                seed=derive_seed(self.recipe.seed, here.number, "train"),
                reference=method.reference if method.needs_reference else None,
                rate=loop.rate_factor(here.number),
                first_step=first_step,
                span=(here.number / loop.rounds, (here.number + 1) / loop.rounds)
                if loop.carry_optimizer
                else (0.0, 1.0),
                loss_at_start=(lambda chosen: method.loss_at_start([pairs[i] for i in chosen]))
                if equal_to_reference
                else (lambda chosen: None),
                tokens=cast(TokenMethod, method) if method.trains == "tokens" else None,
                before=self.rundir.round(here.number - 1).train if here.number else None,
                after_step=TrainingCurve(self, here, first_step),
            )
        )
        if loop.carry_optimizer:
            trainer.save_optimizer(here.train / OPTIMIZER)
        if whole := trainer.whole_policy():
            whole.save(here.policy)
        return facts

    def _launched(self, here: RoundDir, stage: str) -> dict[str, Any]:
        """The same in processes of their own, with the memory of this one given back before."""
        self.release()
        assert self.recipe.launch is not None
        with Bar(stage, None) as bar:

            def watch() -> None:
                bar.at(here.steps())

            work = Stage(self.rundir.path, here.number, stage, here.train)
            return run_processes(self.recipe.launch, work, watch)

    def share(self, here: RoundDir, stage: str) -> None:
        """Let the recipe's processes make the stage's chunks, where it wants that of them."""
        if self.recipe.launch is None or not self.recipe.launch.generate:
            return
        self.release()
        work = Stage(self.rundir.path, here.number, stage, here.path)
        run_processes(self.recipe.launch, work, lambda: None)

    def release(self) -> None:
        """Give back the memory of models; each is loaded again when it is next needed."""
        self.outside.rest()
        self._forget()
        self.__dict__.pop("_lasting_judge", None)
        gc.collect()
        torch.cuda.empty_cache()

    def supervise(self, here: RoundDir) -> dict[str, Any]:
        """Supervised fine-tuning on all training prompts; the result becomes the initial policy."""
        if self.recipe.launch is not None:
            return self._launched(here, "sft")
        options = self.recipe.sft_train
        assert options is not None
        policy = self.policy_at(None)
        pairs = [
            Pair(prompt_id=p.id, round=-1, prompt=p.messages, chosen=p.target, rejected="")
            for p in self.data.train
            if p.target
        ]
        trainer = self.trainer(options)
        facts = trainer.run(
            Job(
                examples=encode_pairs(self._chat, pairs, ("chosen",), self._window(policy)),
                roles=("chosen",),
                loss=_sft_loss,
                folder=here.train,
                seed=derive_seed(self.recipe.seed, "sft"),
            )
        )
        if whole := trainer.whole_policy():
            merged = whole.merge()
            temporary = here.path / ".policy"
            shutil.rmtree(temporary, ignore_errors=True)
            with quiet():
                merged.save_pretrained(temporary)
                whole.tokenizer.save_pretrained(temporary)
            replace_folder(temporary, here.policy)
        # The next question for a policy loads the merged one.
        self._forget()
        return facts

    def tidy(self, here: RoundDir) -> None:
        """Remove what a finished training stage no longer needs, and what killed ones left half-made."""
        checkpoint.drop_checkpoints(here.train)
        shutil.rmtree(here.train / "processes", ignore_errors=True)
        for part in here.path.glob(f".{here.policy.name}*"):
            shutil.rmtree(part)

    def training_measures(self, here: RoundDir) -> dict[str, float | None]:
        """Means over the round's last epoch of what the loss reports (Margin, Real Reward ...)."""
        path = here.train / "metrics.jsonl"
        if here.number < 0 or not path.exists():
            return {}
        rows = read_metrics(path)
        last = rows[-max(1, len(rows) // self.recipe.train.epochs) :]
        skip = {"step", "lr", "tokens"}
        return {
            f"train_{key}": fmean(row[key] for row in last) for key in last[0] if key not in skip
        }

    @property
    def _chat(self) -> Any:
        return self.engine_at(self._place).chat

    @staticmethod
    def _window(policy: Policy) -> int | None:
        return getattr(policy.model.config, "max_position_embeddings", None)


def _sft_loss(logps: GroupLogps, progress: float) -> LossOutput:
    return LossOutput(losses.sft(logps.policy["chosen"], logps.lengths["chosen"]), {})
