"""The closed loop: the only file that knows the order of the stages.

    prompts -> generate -> rank -> pair -> train -> evaluate -> the next round, with the new policy

Every stage reads what the one before wrote and leaves records and a manifest in the run's folder; a
stage whose manifest is there is not run again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from prefloop.errors import GuardStop, counted
from prefloop.evaluate.answers import (
    ANSWER,
    answer_measures,
    no_verdict_rate,
    set_measures,
)
from prefloop.evaluate.curves import has_ended_early, win_rate_curve
from prefloop.evaluate.guards import check_guards, start_values
from prefloop.machine import Stopwatch
from prefloop.methods import Pairing
from prefloop.methods._gates import REMEDIES, Gates
from prefloop.recipe import Recipe
from prefloop.recipe.check import check_curve
from prefloop.records import (
    Candidates,
    Pair,
    Prompt,
    Record,
    Reject,
    Request,
    Response,
    RoundResult,
    derive_seed,
    write_jsonl,
)
from prefloop.report.console import glance, stage_line
from prefloop.run.chunks import Chunks, ChunkStore, Journal
from prefloop.run.cost import spent
from prefloop.run.dtype import settle_dtype
from prefloop.run.held_out import HELD_OUT, KnownAnswers, answer_and_score
from prefloop.run.inputs import inputs, surroundings
from prefloop.run.publish import publish
from prefloop.run.session import Session
from prefloop.run_folder import Outcome, RoundDir, RunDir, open_run

log = logging.getLogger(__name__)

Work = Callable[[Sequence[Any], int], Iterable[Record]]
_FAILED = "failed: "
"""Prefix of counters of failures; the reason follows."""


def run(recipe: Recipe, folder: Path, console: Console, *, accept_changes: bool = False) -> Outcome:
    """Play all rounds that are not played yet; continuing a killed run is the same call.

    Raises RunFolderError where a model, data or versions are not those of the start, unless changes are accepted.
    """
    check_curve(recipe)
    if recipe.reward is not None:
        # It measures with scipy, which other runs need not wait for.
        from prefloop.run.rlaif import make_reward_model

        make_reward_model(recipe, folder, console, make_pairs)
    with open_run(folder, recipe.dump(), accept_changes=accept_changes) as rundir:
        choice = settle_dtype(recipe, rundir)
        rundir.same_inputs(inputs(recipe))
        if choice is not None:
            console.print(choice.in_words(), highlight=False, soft_wrap=True)
        for change in rundir.same_inputs(surroundings(), decisive=False):
            log.warning(
                "%s: the run's numbers may differ in their last digits from here on", change
            )
        rundir.event("begin")
        loop = _Loop(recipe, rundir, console)
        trackers = loop.session.trackers
        with closing(loop.session.outside), closing(trackers):
            if not rundir.published.path.exists():  # an ended run has told all
                trackers.open()
            try:
                results = loop.play()
            except GuardStop as stop:
                rundir.event("stop", sentence=str(stop))
                raise
            policy = loop.finish(results)
            if trackers.any_open:
                # It draws: matplotlib is not waited for before the first round.
                from prefloop.report.html import write_report

                trackers.report(write_report([rundir.path], rundir.path / "report.html").page)
        rundir.event("end")
    return Outcome(folder, policy, results)


def make_pairs(recipe: Recipe, folder: Path, console: Console) -> list[Pair]:
    """The first round's pairs in a run's folder, not trained on; what is there already is read."""
    with open_run(folder, recipe.dump()) as rundir:
        settle_dtype(recipe, rundir)
        rundir.same_inputs(inputs(recipe))
        loop, first = _Loop(recipe, rundir, console), rundir.round(0)
        with closing(loop.session.outside):
            loop._generate(first)
            loop._rank(first)
            loop._pair(first)
        return first.records("pairs", Pair)


def make_worker_chunks(
    recipe: Recipe, rundir: RunDir, round: int, stage: str, rank: int, ranks: int
) -> None:
    """Make every `ranks`-th chunk of a stage, from chunk `rank` on, for the run to take over."""
    loop = _Loop(recipe, rundir, Console(quiet=True), (rank, ranks))
    stages = {
        "candidates": loop._generate,
        "ranked": loop._rank,
        "answers": loop._answer_held_out,
        "introspection": loop._play_held_out,
    }
    stages[stage](rundir.round(round))


class _Loop:
    """One run in progress or, with `worker` (rank, ranks), one process's chunks of one stage."""

    def __init__(
        self,
        recipe: Recipe,
        rundir: RunDir,
        console: Console,
        worker: tuple[int, int] | None = None,
    ) -> None:
        self.worker = worker
        self.recipe = recipe
        self.rundir = rundir
        self.console = console
        self.session = Session(recipe, rundir)

    def play(self) -> list[RoundResult]:
        """All rounds in order; the measures of each that was measured."""
        start = self.rundir.round(-1)
        if not start.manifest("result") and (share := self.session.check_policy()):
            self.console.print(share.in_words(), highlight=False, soft_wrap=True)
        if self.recipe.sft is not None:
            self._supervise(start)
        results = [self._evaluate(start)]
        self._tell(start, results)
        for number in range(self.recipe.loop.rounds):
            round_dir = self.rundir.round(number)
            self._generate(round_dir)
            self._rank(round_dir)
            self._pair(round_dir)
            self._train(round_dir)
            last = number == self.recipe.loop.rounds - 1 or self._has_ended_early(round_dir)
            last = last or self._has_spent_its_budget(round_dir)
            if self.recipe.evaluate.every_round or last:
                results.append(self._evaluate(round_dir))
                self._tell(round_dir, results)
                self._guard(results)
            self._free_old(results, round_dir)
            if last:
                break
        return results

    def _tell(self, round_dir: RoundDir, results: Sequence[RoundResult]) -> None:
        """Tell trackers of a round, an earlier one too: what they have already, they keep."""
        if not self.session.trackers.any_open:
            return
        step = self.session.steps_before(round_dir) + (
            round_dir.steps() if results[-1].round >= 0 else 0
        )
        pairs = iter(()) if round_dir.number < 0 else round_dir.stream("pairs", Pair)
        self.session.trackers.round(results, pairs, step)

    def _has_spent_its_budget(self, round_dir: RoundDir) -> bool:
        budget = self.recipe.loop.budget
        if budget is None:
            return False
        used = spent(self.rundir, self.recipe).fraction_used(budget)
        self.rundir.event("budget", round=round_dir.number, used=round(used, 3))
        return used >= 1

    def finish(self, results: Sequence[RoundResult]) -> Path:
        """Put the recommended policy, with its card, in the run's folder `policy`."""
        number = self._recommended(results)
        return publish(self.recipe, self.rundir, self.rundir.round(number), results)

    def _recommended(self, results: Sequence[RoundResult]) -> int:
        """The last measured round, or under `best_round` the one with the highest score so far."""
        if self.recipe.guard.action == "best_round":
            scored = [r for r in results if r.measures.get("score") is not None and r.round >= 0]
            if scored:
                return max(scored, key=lambda r: r.measures["score"] or 0.0).round
        return results[-1].round

    def _has_ended_early(self, round_dir: RoundDir) -> bool:
        points = [p for p in win_rate_curve(self.rundir) if p.round <= round_dir.number]
        ended = has_ended_early(points, self.recipe.evaluate)
        if ended:
            self.rundir.event("early stop", round=round_dir.number, step=points[-1].step)
        return ended

    def _free_old(self, results: Sequence[RoundResult], round_dir: RoundDir) -> None:
        """Under `train.keep_last`: delete what no later stage reads, the round to be recommended excepted."""
        keep = self.recipe.train.keep_last
        for old in self.rundir.rounds() if keep is not None else ():
            if old.number <= round_dir.number - (keep or 0):
                old.free(old.weights(policy=old.number != self._recommended(results)))

    # Stages, in the order in which a round plays them.

    def _generate(self, round_dir: RoundDir) -> None:
        def work(prompts: Sequence[Prompt], seed: int) -> Iterable[Record]:
            with self.session.generator(round_dir) as actors:
                return list(self.recipe.method.generate(prompts, actors(seed)))

        self._chunked(round_dir, "candidates", lambda: self.session.prompts(round_dir.number), work)

    def _rank(self, round_dir: RoundDir) -> None:
        def work(groups: Sequence[Candidates], seed: int) -> Iterable[Record]:
            with self.session.generator(round_dir) as actors:
                return list(self.recipe.method.rank(groups, actors(seed)))

        self._chunked(round_dir, "ranked", lambda: round_dir.stream("candidates", Candidates), work)

    def _pair(self, round_dir: RoundDir) -> None:
        @cache
        def pairing() -> Pairing:
            """Made for the first chunk: it may read all that was ranked."""
            ranked = round_dir.stream("ranked", Candidates)
            return self.recipe.method.pairing(ranked, round_dir.number)

        def work(groups: Sequence[Candidates], seed: int) -> Iterable[Record]:
            return list(pairing()(groups))

        self._chunked(round_dir, "pairs", lambda: round_dir.stream("ranked", Candidates), work)
        pairs, reasons = round_dir.count("pairs"), round_dir.reasons()
        total = pairs + reasons.total()
        share = reasons.total() / max(1, total)
        if not pairs or share > self.recipe.guard.max_reject_share:
            raise GuardStop(
                f"round {round_dir.number} made {counted(pairs, 'pair')} of {counted(total, 'prompt')} "
                f"({', '.join(f'{n} {reason}' for reason, n in reasons.most_common())}); see "
                f"{round_dir.path}/rejects.jsonl, and begin a new run with "
                + ", or ".join(self._ways_to_more_pairs(reasons, any_pairs=pairs > 0))
            )

    def _ways_to_more_pairs(self, reasons: Counter[str], *, any_pairs: bool) -> list[str]:
        """Changes of the recipe, the one for the most frequent reason first."""
        gated = isinstance(getattr(self.recipe.method, "gates", None), Gates)
        counts = reasons.most_common() if gated else ()
        ways = [REMEDIES[reason] for reason, _ in counts if reason in REMEDIES]
        judged = self.recipe.method.needs_judge
        ways = ways or ["other prompts" + ", or another judge" * judged]
        return [*ways, *["a higher guard.max_reject_share"] * any_pairs]

    def _train(self, round_dir: RoundDir) -> None:
        if round_dir.verify_made("train"):
            # Once more, for a run that was killed between the manifest and this.
            self.session.tidy(round_dir)
            return
        watch = Stopwatch()
        facts = self.session.train(round_dir)
        round_dir.finish("train", **facts, input=round_dir.digest("pairs"), seconds=watch.seconds)
        self.session.tidy(round_dir)
        self._say(round_dir, "train", {"pairs": facts["examples"], "steps": facts["steps"]}, watch)

    def _supervise(self, round_dir: RoundDir) -> None:
        """Round 0: supervised fine-tuning on the data's targets (IAL's initiation)."""
        if round_dir.verify_made("sft"):
            self.session.tidy(round_dir)
            return
        watch = Stopwatch()
        facts = self.session.supervise(round_dir)
        round_dir.finish("sft", **facts, seconds=watch.seconds)
        self.session.tidy(round_dir)
        self._say(round_dir, "sft", {"prompts": facts["examples"], "steps": facts["steps"]}, watch)

    def _evaluate(self, round_dir: RoundDir) -> RoundResult:
        """Answers to the held-out prompts, and the whole method played on them, measured."""
        if round_dir.verify_made("result") and (
            results := round_dir.records("result", RoundResult)
        ):
            return results[0]
        watch = Stopwatch()
        self._answer_held_out(round_dir)
        start = self.rundir.round(-1).records("answers", Candidates)
        answers = round_dir.records("answers", Candidates)
        measures = answer_measures(answers, start, seed=self.recipe.seed)
        measures |= set_measures(
            self.recipe.data.eval_set_names(), answers, start, seed=self.recipe.seed
        )
        if self.recipe.answers_judge is not None:
            measures["no_verdict"] = no_verdict_rate(answers)
        if self.recipe.evaluate.introspection:
            self._play_held_out(round_dir)
            measures |= self.recipe.method.measures(round_dir.records("introspection", Candidates))
        measures |= self.session.training_measures(round_dir)
        result = RoundResult(round=round_dir.number, measures=measures)
        write_jsonl(round_dir.path / "result.jsonl", [result])
        round_dir.finish("result", input=round_dir.digest("answers"), seconds=watch.seconds)
        unscored = (
            {"without a verdict": n}
            if (n := sum(not g.scores for g in answers)) and self.recipe.answers_judge
            else {}
        )
        self._say(
            round_dir, "evaluate", {"prompts": len(answers), **unscored}, watch, glance(measures)
        )
        return result

    def _answer_held_out(self, round_dir: RoundDir) -> None:
        """An answer to each held-out prompt, scored, with its log-probs under this policy and the initial one."""
        sampling = self.recipe.evaluate.sampling or self.recipe.method.sampling

        def sample(asks: list[Request], seed: int) -> list[Response]:
            with self.session.player() as player:
                return player.sample(asks, sampling, seed=seed, label="evaluate")

        def work(prompts: Sequence[Prompt], seed: int) -> Iterable[Record]:
            engine = self.session.engine_after(round_dir)
            groups, failures = answer_and_score(prompts, sample, self.session.score_answers, seed)
            self._count_failures(failures)
            asks = [Request(messages=prompt.messages) for prompt in prompts]
            answers = [group.responses[ANSWER] for group in groups]
            # Divergence compares two models in process; what sampling there has told is not computed again.
            if self.session.sampling_tells_logprobs(round_dir) and not sampling.stop:
                now = [a.mean_logprob for a in answers if a.mean_logprob is not None]
            else:
                with self.session.policy_after(round_dir).merged():
                    now = [scored.mean_logprob for scored in engine.score(asks, answers)]
            initial = now
            if round_dir.number >= 0:
                with self.session.initial_policy():
                    initial = [scored.mean_logprob for scored in engine.score(asks, answers)]
            for group, current, start in zip(groups, now, initial, strict=True):
                ratings = {"logprob": current, "logprob_initial": start}
                yield group.model_copy(update={"ratings": ratings})

        self._chunked(round_dir, "answers", self.session.held_out, work)

    def _play_held_out(self, round_dir: RoundDir) -> None:
        """The whole method on held-out prompts, for its own measures (R_i, identical rate ...)."""
        method = self.recipe.method
        sampling = self.recipe.evaluate.sampling or method.sampling
        answered = round_dir.stream("answers", Candidates)
        answers = {group.prompt.id: group.responses[ANSWER] for group in answered}

        def work(prompts: Sequence[Prompt], seed: int) -> Iterable[Record]:
            with self.session.measured(round_dir) as actors_for:
                actors = actors_for(seed)
                known = [(prompt.messages, answers[prompt.id]) for prompt in prompts]
                policy = KnownAnswers(actors.policy, sampling, known)
                actors = replace(actors, policy=policy)
                drafted = list(method.generate(prompts, actors))
                groups = [group for group in drafted if isinstance(group, Candidates)]
                ranked = list(method.rank(groups, actors))
            rejects = [item for item in (*drafted, *ranked) if isinstance(item, Reject)]
            self._count_failures(Counter(reject.reason for reject in rejects))
            return [group for group in ranked if isinstance(group, Candidates)]

        self._chunked(round_dir, "introspection", self.session.held_out, work)

    def _count_failures(self, failures: Mapping[str, int]) -> None:
        """For the manifest of a stage that measures: its failures are no rejects, nothing is trained on them."""
        self.session.counts.update({f"{_FAILED}{reason}": n for reason, n in failures.items()})

    def _guard(self, results: Sequence[RoundResult]) -> None:
        start = start_values(results[:-1])
        tripped = check_guards(results[-1].measures, start, self.recipe.guard)
        for sentence in tripped:
            log.warning("round %d: %s", results[-1].round, sentence)
            self.rundir.event("guard", round=results[-1].round, sentence=sentence)
        if tripped and self.recipe.guard.action == "stop":
            raise GuardStop(
                f"guard: {tripped[0]} after round {results[-1].round}; the rounds before it are kept in "
                f"{self.rundir.path}, set guard.action to warn in a new run to go on regardless"
            )

    # What all stages share.

    def _chunked(
        self, round_dir: RoundDir, stage: str, items: Callable[[], Iterable[Any]], work: Work
    ) -> None:
        """Run a stage chunk by chunk unless it is done; each chunk has a seed of its own place."""
        if round_dir.verify_made(stage):
            return
        watch, flow, store = Stopwatch(), items(), ChunkStore(round_dir.path, stage)
        measures = stage in ("answers", "introspection")
        where = HELD_OUT if measures else round_dir.number

        def make(number: int, chunk: list[Any]) -> tuple[list[Record], dict[str, int]]:
            self.session.counts.clear()
            begun = Stopwatch()
            made = list(work(chunk, derive_seed(self.recipe.seed, where, stage, number)))
            log.info(
                "round %d, %s: chunk %d in %.1f s", round_dir.number, stage, number, begun.seconds
            )
            return made, dict(self.session.counts)

        chunks = Chunks(flow, self.recipe.generate.chunk_size, make, store)
        if self.worker is not None:
            chunks.make_for_run(*self.worker)
            return
        journal = Journal(round_dir.path, stage)
        if stage != "pairs" and not store.complete:
            self.session.launch_workers(round_dir, stage)
            store.finish()
        chunks.write(journal)
        made, reasons = round_dir.count(stage), round_dir.reasons()
        failures = {
            key.removeprefix(_FAILED): n for key, n in journal.counts.items() if _FAILED in key
        }
        made_from = {"ranked": "candidates", "pairs": "ranked"}.get(stage)
        round_dir.finish(
            stage,
            records=made,
            **({"input": round_dir.digest(made_from)} if made_from else {}),
            **({"failures": failures} if measures else {"rejects": dict(reasons)}),
            **{key: n for key, n in journal.counts.items() if _FAILED not in key},
            output=round_dir.digest(stage),
            seconds=watch.seconds,
        )
        store.drop()
        if stage in ("candidates", "pairs"):
            self._say(round_dir, stage, {stage: made, "rejects": reasons.total()}, watch)

    def _say(
        self,
        round_dir: RoundDir,
        stage: str,
        counts: dict[str, int],
        watch: Stopwatch,
        about: str = "",
    ) -> None:
        line = stage_line(round_dir.number, stage, counts, watch.seconds, about)
        self.console.print(line, highlight=False, soft_wrap=True)
        self.rundir.event(
            "stage", round=round_dir.number, stage=stage, **counts, seconds=watch.seconds
        )
