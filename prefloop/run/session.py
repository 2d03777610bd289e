"""What the stages of a run share: data, policy, engine, judge and trainer, each made when first needed.

The policy in memory is the one after some round. Asking for that of another round loads it from that
round's folder, so a resumed run and an unbroken one go through the same weights.
"""

from __future__ import annotations

import gc
import logging
import shutil
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch

from prefloop.data.prompt_store import PromptStore
from prefloop.data.prompts import LoadedData, load_data, round_subset
from prefloop.errors import DataError
from prefloop.evaluate.curves import win_rate_curve
from prefloop.generate.engine import Engine, OutsideEngine
from prefloop.generate.hf_engine import HFEngine
from prefloop.generate.templates import PromptSet
from prefloop.generate.weight_check import probe
from prefloop.judges import (
    CachedJudge,
    Judge,
    NoVerdict,
    OpenJudge,
    Verdict,
    score_responses,
)
from prefloop.judges.similarity import Similarity
from prefloop.machine import Bar, Stopwatch, keep_freed_memory
from prefloop.methods import Actors, Trains
from prefloop.models.adapter import Share
from prefloop.models.chat_template import set_template_date
from prefloop.models.policy import Policy
from prefloop.models.sources import quiet
from prefloop.recipe import Recipe, initial_source
from prefloop.records import Candidates, Pair, Prompt, Request, Response, derive_seed
from prefloop.run.engine import Metered, RunEngine
from prefloop.run.held_out import HeldOut, TrainingCurve
from prefloop.run.inputs import rows
from prefloop.run.launch import Stage, run_processes
from prefloop.run.self_check import check_policy
from prefloop.run.tracking import Trackers
from prefloop.run_folder import RoundDir, RunDir, replace_folder
from prefloop.train import checkpoint, losses
from prefloop.train.batches import encode_pairs
from prefloop.train.example_store import ExampleStore
from prefloop.train.losses import GroupLogps, LossOutput
from prefloop.train.options import TrainOptions
from prefloop.train.ppo import TokenMethod
from prefloop.train.ppo_trainer import PPOTrainer
from prefloop.train.trainer import Job, Trainer

log = logging.getLogger(__name__)

OPTIMIZER = "optimizer.safetensors"
_TRAINERS = {"groups": Trainer, "tokens": PPOTrainer}


class Session:
    """The run's state in memory."""

    def __init__(self, recipe: Recipe, rundir: RunDir, *, on_cpu: bool = False) -> None:
        """`on_cpu`: policies stay there until they are sharded."""
        keep_freed_memory()
        self._on_cpu = on_cpu
        self.recipe = recipe
        self.rundir = rundir
        set_template_date(rundir.first_day())
        self._template_logged = False
        self._policy: Policy | None = None
        self._engine: HFEngine | None = None
        self._trainer: Trainer | None = None
        self._judges: dict[int, OpenJudge] = {}
        """Judges that ask the policy, by the id of the engine that they ask and keep."""
        self.outside = RunEngine(recipe, rundir)
        self.trackers = Trackers(recipe, rundir.path)
        self.counts: Counter[str] = Counter()
        """Tokens that methods have had generated and read."""
        self._policy_dir: Path | None = None
        """Folder of the policy that memory holds; None for the initial one."""

    # Data.

    @cached_property
    def data(self) -> LoadedData:
        """Prompts for training and evaluation, over-long ones dropped."""
        chat = self.engine_at(self._policy_dir).chat
        data = load_data(
            self.recipe.data,
            needs_target=self.recipe.needs_target,
            needs_pairs=self.recipe.method.needs_pairs,
            seed=self.recipe.seed,
            count_tokens=chat.count,
            folder=self.rundir.path,
        )
        self.rundir.same_inputs({"data.train": rows(data.train), "data.eval": rows(data.eval)})
        self.rundir.event(
            "data",
            train=len(data.train),
            eval=len(data.eval),
            dropped=dict(data.dropped),
            notes=list(data.notes),
        )
        return data

    def prompts(self, round: int) -> PromptStore:
        """The round's subset of the training prompts."""
        everything, size = self.data.train, self.recipe.loop.prompts_per_round
        chosen = round_subset(len(everything), round=round, size=size, seed=self.recipe.seed)
        return everything.picked(chosen)

    def held_out(self) -> PromptStore:
        """The evaluation prompts: the first ones of the evaluation data, of each set where there are several."""
        if not self.data.eval:
            raise DataError(
                "there are no evaluation prompts; name a file in data.eval, or hold some out with data.holdout"
            )
        most = self.recipe.evaluate.prompts
        if sets := self.data.eval_sets.values():
            return self.data.eval.picked(chain.from_iterable(places[:most] for places in sets))
        return self.data.eval[:most]

    # The policy, before and after each round.

    def policy_at(self, policy_dir: Path | None) -> Policy:
        """The policy saved in `policy_dir` (None: the initial one); kept in memory until another is needed."""
        if self._policy is None or self._policy_dir != policy_dir:
            # One copy at a time: the old one goes before the new one comes.
            self._forget()
            if policy_dir is not None:
                self._round_of(policy_dir).verify_policy()
            self._policy = Policy.load(
                initial_source(self.recipe, self.rundir),
                policy_dir,
                seed=self.recipe.seed,
                on_cpu=self._on_cpu,
            )
            self._policy_dir = policy_dir
        return self._policy

    def check_policy(self) -> Share | None:
        """Once a run, before its first stage: run the self-check; returns what the adapter reaches."""
        if any(event["event"] == "self_check" for event in self.rundir.events()):
            return None
        watch, policy = Stopwatch(), self.policy_at(None)
        if share := policy.share():
            self.rundir.event("adapter", **share._asdict())
        distances = check_policy(policy, self.recipe.train, self.rundir.path)
        rounded = {way: float(f"{distance:.2g}") for way, distance in distances.items()}
        self.rundir.event("self_check", **rounded, seconds=watch.seconds)
        return share

    def _round_of(self, policy_dir: Path) -> RoundDir:
        return next(r for r in (self.rundir.start, *self.rundir.rounds()) if r.policy == policy_dir)

    def _forget(self) -> None:
        """Drop the policy and all that refers to it, so that its memory is freed."""
        self._policy = self._engine = self._trainer = None
        self._judges.clear()

    @property
    def policy_dir(self) -> Path | None:
        """Folder of the policy in memory (None: the initial one); during training the folder it will be saved in."""
        return self._policy_dir

    def policy_after(self, round_dir: RoundDir) -> Policy:
        """The policy at the end of a round; of `start`, the initial one."""
        return self.policy_at(None if round_dir.number < 0 else round_dir.policy)

    def policy_before(self, round_dir: RoundDir) -> Policy:
        """The policy at the start of a round."""
        return self.policy_after(self.rundir.round(round_dir.number - 1))

    def engine_at(self, policy_dir: Path | None) -> HFEngine:
        """The engine in process over `policy_at(policy_dir)`."""
        policy = self.policy_at(policy_dir)
        if self._engine is None:
            size = self.recipe.generate.batch_size
            self._engine = HFEngine(
                policy.model,
                policy.tokenizer,
                batch_size=size,
                template_kwargs=policy.options.chat_template_kwargs,
            )
            self._log_template()
        return self._engine

    def _log_template(self) -> None:
        """Say once in a run's diary in what prompts and completions are not the template's own text."""
        assert self._engine is not None
        if self._template_logged or not (said := self._engine.chat.differences()):
            return
        self._template_logged = True
        if not any(event["event"] == "template" for event in self.rundir.events()):
            log.warning("%s", said)
            self.rundir.event("template", sentence=said)

    def engine_after(self, round_dir: RoundDir) -> HFEngine:
        """The engine in process over the policy at the end of a round."""
        self.policy_after(round_dir)
        return self.engine_at(self._policy_dir)

    def initial_policy(self) -> AbstractContextManager[None]:
        """Inside, the policy in memory is the initial one."""
        if self._policy_dir is None or self._policy is None:
            return nullcontext()
        return self._policy.at_start()

    @contextmanager
    def initial_engine(self) -> Iterator[HFEngine]:
        """Inside, the engine answers as the initial policy."""
        with self.initial_policy():
            yield self.engine_at(self._policy_dir)

    # Engines and judges.

    @property
    def _played_outside(self) -> OutsideEngine | None:
        """The engine outside that plays the policy; None where this process does, whatever engine generates."""
        outside = self.outside.engine(self.policy_at(self._policy_dir), self._chat)
        return outside if self.recipe.engine.plays_policy else None

    def sampling_tells_logprobs(self, round_dir: RoundDir) -> bool:
        """Whether the log-probs that a round's answers come with stand for those that scoring would give.

        They were sampled here, in float32. In half precision they depend on the shape of a step, so two policies are
        compared by two passes of one shape; the start is compared with itself alone.
        """
        model: Any = self.policy_at(self._policy_dir).model
        exact = model.dtype == torch.float32 or round_dir.number < 0
        return self._played_outside is None and exact

    @contextmanager
    def player(self, *, initial: bool = False) -> Iterator[Engine]:
        """Inside, the engine that plays the policy in memory, or the initial policy."""
        outside = self._played_outside
        if outside is None:
            with self.initial_policy() if initial else self.policy_at(self._policy_dir).merged():
                yield self.engine_at(self._policy_dir)
            return

        def trainer() -> list[float]:
            with self.initial_policy() if initial else nullcontext():
                return probe(self.engine_at(self._policy_dir))

        self.outside.load_weights(None if initial else self._policy_dir, trainer)
        yield outside

    @cached_property
    def prompt_set(self) -> PromptSet:
        """The prompts that the recipe names."""
        return PromptSet(self.recipe.method.prompt_set)

    @contextmanager
    def generator(self, round_dir: RoundDir) -> Iterator[Callable[[int], Actors]]:
        """Actors for a round's generation, by chunk seed: the current policy, or the frozen initial one."""
        self.policy_before(round_dir)
        with self.player(initial=self.recipe.method.generator == "frozen") as player:
            outside = self.outside.engine(self.policy_at(self._policy_dir), self._chat)
            yield self._actors(outside or player, player, round_dir)

    @contextmanager
    def measured(self, round_dir: RoundDir) -> Iterator[Callable[[int], Actors]]:
        """Actors, by chunk seed, with the policy at the end of a round, for measuring it."""
        self.policy_after(round_dir)
        with self.player() as player:
            yield self._actors(player, player, round_dir)

    def _actors(
        self, writer: Engine, policy: Engine, round_dir: RoundDir
    ) -> Callable[[int], Actors]:
        judge, prompts = self._judge(policy), self.prompt_set
        counted = Metered(writer, self._chat, self.counts)
        return lambda seed: Actors(
            counted, judge, prompts, round_dir.number, seed, self._beside_initial
        )

    def _beside_initial(self, judge: Judge) -> OpenJudge:
        return judge.open(self.engine_at(self._policy_dir), self.prompt_set, self.initial_engine)

    def _judge(self, policy: Engine) -> OpenJudge | None:
        judge = self.recipe.judge
        if judge is None:
            return None
        if not judge.needs_policy:
            return self._lasting_judge
        if judge.needs_moved_policy:
            # It compares log-probs with the initial policy's, which are computed here: so must both be.
            policy = self.engine_at(self._policy_dir)
        if id(policy) not in self._judges:
            self._judges[id(policy)] = judge.open(policy, self.prompt_set, self.initial_engine)
        # Its weights change under it, so what it said is remembered no longer than for one chunk.
        return CachedJudge(self._judges[id(policy)])

    @cached_property
    def _lasting_judge(self) -> OpenJudge:
        assert self.recipe.judge is not None
        with quiet():
            return CachedJudge(self.recipe.judge.open(None, self.prompt_set))

    @cached_property
    def _eval_judge(self) -> OpenJudge | None:
        """The judge of held-out answers alone; None where the recipe names none."""
        if self.recipe.eval_judge is None:
            return None
        with quiet():
            return CachedJudge(self.recipe.eval_judge.open(None, self.prompt_set))

    def score_answers(
        self, prompts: Sequence[Prompt], answers: Sequence[Response]
    ) -> list[Verdict]:
        """The scores of held-out answers by `eval_judge`, else the judge; without a judge, similarity to the targets."""
        judge = self._eval_judge or self._judge(self.engine_at(self._policy_dir))
        if judge is None:
            if not all(prompt.target for prompt in prompts):
                return [NoVerdict("no judge, no target")] * len(prompts)
            judge = Similarity().open(None, self.prompt_set)
        return score_responses(judge, prompts, [(answer,) for answer in answers])

    def _in_training(self) -> HeldOut:
        """How the policy is measured between two training steps; its training state is kept."""
        engine, policy_dir = self.engine_at(self._policy_dir), self._policy_dir
        sampling = self.recipe.evaluate.sampling or self.recipe.method.sampling

        def sample(asks: list[Request], seed: int) -> list[Response]:
            with self.policy_at(policy_dir).merged():
                return engine.sample(asks, sampling, seed=seed, label="win rate")

        return HeldOut(
            prompts=self.held_out,
            start=lambda: self.rundir.round(-1).stream("answers", Candidates),
            sample=sample,
            score=self.score_answers,
            release=engine.release,
        )

    # Training.

    def trainer(self, options: TrainOptions, trains: Trains = "groups") -> Trainer:
        """The trainer of the policy in memory."""
        kind = _TRAINERS[trains]
        old = self._trainer
        if old is None or old.options != options or type(old) is not kind:
            assert self._policy is not None
            self._trainer = kind(self._policy, options, self.trackers.step)
        assert self._trainer is not None
        return self._trainer

    def steps_before(self, round_dir: RoundDir) -> int:
        """Optimiser steps of the rounds before; the fine-tuning of round 0 counts from 0 on its own."""
        return sum(r.steps() for r in self.rundir.rounds() if r.number < round_dir.number)

    def training_pairs(self, round_dir: RoundDir) -> Iterator[Pair]:
        """What the round trains on, one by one: its own pairs, after the previous round's where they are mixed."""
        mixed = self.recipe.loop.mix_previous and round_dir.number > 0
        numbers = [round_dir.number - 1, round_dir.number] if mixed else [round_dir.number]
        return chain.from_iterable(self.rundir.round(n).stream("pairs", Pair) for n in numbers)

    def _picked(self, round_dir: RoundDir, places: Sequence[int]) -> list[Pair]:
        """The training pairs of some places, in their order; asked for once a round, so they are read again."""
        wanted = set(places)
        found = {n: p for n, p in enumerate(self.training_pairs(round_dir)) if n in wanted}
        return [found[place] for place in places]

    def train(self, round_dir: RoundDir) -> dict[str, Any]:
        """Train the round's policy on its pairs and save it."""
        if self.recipe.launch is not None:
            return self._launched(round_dir, "train")
        self.outside.offload()
        policy, loop = self.policy_before(round_dir), self.recipe.loop
        method = self.recipe.method.in_round(round_dir.number)
        if self._engine is not None:
            self._engine.release()
        trainer = self.trainer(self.recipe.train, method.trains)
        if not loop.carry_optimizer:
            trainer.renew_optimizer()
        elif round_dir.number > 0:
            before = self.rundir.round(round_dir.number - 1)
            before.manifest("train")
            trainer.load_optimizer(before.train / OPTIMIZER)
        first_step = self.steps_before(round_dir)
        equal_to_reference = method.reference == "round_start" or round_dir.number == 0
        encoded = encode_pairs(
            self._chat, self.training_pairs(round_dir), method.roles, self._window(policy)
        )
        examples = ExampleStore(encoded, round_dir.path)
        earlier = [p for p in win_rate_curve(self.rundir) if p.round < round_dir.number]
        # From here on the weights in memory are those that will be saved there, and the curve measures them.
        self._policy_dir = round_dir.policy
        curve = TrainingCurve(self.recipe, self._in_training(), round_dir, first_step, earlier)
        facts = trainer.run(
            Job(
                examples=examples,
                roles=method.roles,
                loss=method.loss,
                folder=round_dir.train,
                seed=derive_seed(self.recipe.seed, round_dir.number, "train"),
                reference=method.reference if method.needs_reference else None,
                rate=loop.rate_factor(round_dir.number),
                first_step=first_step,
                span=(round_dir.number / loop.rounds, (round_dir.number + 1) / loop.rounds)
                if loop.carry_optimizer
                else (0.0, 1.0),
                loss_at_start=(lambda chosen: method.loss_at_start(self._picked(round_dir, chosen)))
                if equal_to_reference
                else (lambda chosen: None),
                tokens=cast(TokenMethod, method) if method.trains == "tokens" else None,
                before=self.rundir.round(round_dir.number - 1).train if round_dir.number else None,
                after_step=curve,
                is_over=curve.is_over,
            )
        )
        if loop.carry_optimizer:
            trainer.save_optimizer(round_dir.train / OPTIMIZER)
        if whole := trainer.whole_policy():
            whole.save(round_dir.policy)
        return facts

    def _launched(self, round_dir: RoundDir, stage: str) -> dict[str, Any]:
        """Run a training stage in the recipe's processes, after freeing this process's memory."""
        self.release()
        assert self.recipe.launch is not None
        with Bar(stage, None) as bar:

            def watch() -> None:
                bar.at(round_dir.steps())

            work = Stage(self.rundir.path, round_dir.number, stage, round_dir.train)
            facts = run_processes(self.recipe.launch, work, watch)
        # Their trackers are this process's: one run there, whoever trains.
        first = self.steps_before(round_dir)
        for row in round_dir.metrics():
            self.trackers.step(row, first + row["step"])
        return facts

    def launch_workers(self, round_dir: RoundDir, stage: str) -> None:
        """Let the recipe's processes generate the stage's chunks, with `launch.generate`."""
        if self.recipe.launch is None or not self.recipe.launch.generate:
            return
        self.release()
        work = Stage(self.rundir.path, round_dir.number, stage, round_dir.path)
        run_processes(self.recipe.launch, work, lambda: None)

    def release(self) -> None:
        """Give back the memory of models; each is loaded again when it is next needed."""
        self.outside.offload()
        self._forget()
        for judge in ("_lasting_judge", "_eval_judge"):
            self.__dict__.pop(judge, None)
        gc.collect()
        torch.cuda.empty_cache()

    def supervise(self, round_dir: RoundDir) -> dict[str, Any]:
        """Supervised fine-tuning on all training prompts; the result becomes the initial policy."""
        if self.recipe.launch is not None:
            return self._launched(round_dir, "sft")
        options = self.recipe.sft_train
        assert options is not None
        policy = self.policy_at(None)
        pairs = (
            Pair(prompt_id=p.id, round=-1, prompt=p.messages, chosen=p.target, rejected="")
            for p in self.data.train
            if p.target
        )
        encoded = encode_pairs(self._chat, pairs, ("chosen",), self._window(policy))
        trainer = self.trainer(options)
        facts = trainer.run(
            Job(
                examples=ExampleStore(encoded, round_dir.path),
                roles=("chosen",),
                loss=_sft_loss,
                folder=round_dir.train,
                seed=derive_seed(self.recipe.seed, "sft"),
            )
        )
        if whole := trainer.whole_policy():
            merged = whole.merge()
            temporary = round_dir.path / ".policy"
            shutil.rmtree(temporary, ignore_errors=True)
            with quiet():
                merged.save_pretrained(temporary)
                whole.tokenizer.save_pretrained(temporary)
            replace_folder(temporary, round_dir.policy)
        # The next question for a policy loads the merged one.
        self._forget()
        return facts

    def tidy(self, round_dir: RoundDir) -> None:
        """Remove what a finished training stage no longer needs, and what killed ones left half-made."""
        checkpoint.drop_checkpoints(round_dir.train)
        shutil.rmtree(round_dir.train / "processes", ignore_errors=True)
        for part in round_dir.path.glob(f".{round_dir.policy.name}*"):
            shutil.rmtree(part)

    def training_measures(self, round_dir: RoundDir) -> dict[str, float | None]:
        """Means over the round's last epoch of what the loss reports (Margin, Real Reward ...)."""
        if round_dir.number < 0 or not (steps := round_dir.steps()):
            return {}
        last = max(1, steps // self.recipe.train.epochs)
        columns: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
        for row in islice(round_dir.metrics(), steps - last, None):
            for key, value in row.items():
                columns[key].append(value)
        skip = {"step", "lr", "tokens"}
        return {f"train_{key}": fmean(column) for key, column in columns.items() if key not in skip}

    @property
    def _chat(self) -> Any:
        return self.engine_at(self._policy_dir).chat

    @staticmethod
    def _window(policy: Policy) -> int | None:
        return getattr(policy.model.config, "max_position_embeddings", None)


def _sft_loss(logps: GroupLogps, progress: float) -> LossOutput:
    return LossOutput(losses.sft(logps.policy["chosen"], logps.lengths["chosen"]), {})
