"""The closed loop: the only file that knows the order of the stages.

    prompts -> generate -> rank -> pair -> train -> evaluate -> the next round, with the new policy

Every stage reads what the one before wrote and leaves records and a manifest in the run's folder; a
stage whose manifest is there is not run again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from prefloop.errors import GuardStop
from prefloop.evaluate.answers import ANSWER, answer_measures
from prefloop.evaluate.health import check_guards
from prefloop.judges import NoVerdict
from prefloop.machine import Stopwatch
from prefloop.recipe import Recipe
from prefloop.recipe.check import check_curve
from prefloop.records import Candidates, Prompt, Record, Request, RoundResult, write_jsonl
from prefloop.report.console import glance, stage_line
from prefloop.run.chunks import Parts
from prefloop.run.cost import spent
from prefloop.run.publish import publish
from prefloop.run.session import Session
from prefloop.run_folder import Journal, RoundDir, RunDir, open_run
from prefloop.seeds import derive_seed

log = logging.getLogger(__name__)

Work = Callable[[Sequence[Any], int], Iterable[Record]]


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves to look at."""

    folder: Path
    policy: Path
    """The policy that the run recommends: the last round's, or the best one's under `best_round`."""
    results: list[RoundResult]
    """Measures of the start (-1) and of each measured round."""


def run(recipe: Recipe, folder: Path, console: Console) -> Outcome:
    """Play all rounds that are not played yet; continuing a killed run is the same call."""
    check_curve(recipe)
    with open_run(folder, recipe.dump()) as rundir:
        rundir.event("begin")
        loop = _Loop(recipe, rundir, console)
        with closing(loop.session.outside):
            results = loop.play()
            policy = loop.finish(results)
        rundir.event("end")
    return Outcome(folder, policy, results)


def share(recipe: Recipe, rundir: RunDir, round: int, stage: str, rank: int, ranks: int) -> None:
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
    """One run in progress, or, with `share`, one process's part of one stage."""

    def __init__(
        self,
        recipe: Recipe,
        rundir: RunDir,
        console: Console,
        share: tuple[int, int] | None = None,
    ) -> None:
        self.share = share
        self.recipe = recipe
        self.rundir = rundir
        self.console = console
        self.session = Session(recipe, rundir)

    def play(self) -> list[RoundResult]:
        """All rounds in order; the measures of each that was measured."""
        start = self.rundir.round(-1)
        if self.recipe.sft is not None:
            self._supervise(start)
        results = [self._evaluate(start)]
        for number in range(self.recipe.loop.rounds):
            here = self.rundir.round(number)
            self._generate(here)
            self._rank(here)
            self._pair(here)
            self._train(here)
            last = number == self.recipe.loop.rounds - 1 or self._has_spent_its_budget(here)
            if self.recipe.evaluate.every_round or last:
                results.append(self._evaluate(here))
                self._guard(results)
            if last:
                break
        return results

    def _has_spent_its_budget(self, here: RoundDir) -> bool:
        budget = self.recipe.loop.budget
        if budget is None:
            return False
        used = spent(self.rundir, self.recipe).share_of(budget)
        self.rundir.event("budget", round=here.number, used=round(used, 3))
        return used >= 1

    def finish(self, results: Sequence[RoundResult]) -> Path:
        """Put the recommended policy, with its card, where people look for it."""
        number = results[-1].round
        if self.recipe.guard.action == "best_round":
            scored = [r for r in results if r.measures.get("score") is not None and r.round >= 0]
            if scored:
                number = max(scored, key=lambda r: r.measures["score"] or 0.0).round
        return publish(self.recipe, self.rundir, self.rundir.round(number), results)

    # Stages, in the order in which a round plays them.

    def _generate(self, here: RoundDir) -> None:
        def work(prompts: Sequence[Prompt], seed: int) -> Iterable[Record]:
            with self.session.generator(here) as actors:
                return list(self.recipe.method.generate(prompts, actors(seed)))

        self._chunked(here, "candidates", lambda: self.session.prompts(here.number), work)

    def _rank(self, here: RoundDir) -> None:
        def work(groups: Sequence[Candidates], seed: int) -> Iterable[Record]:
            with self.session.generator(here) as actors:
                return list(self.recipe.method.rank(groups, actors(seed)))

        self._chunked(here, "ranked", lambda: here.stream("candidates", Candidates), work)

    def _pair(self, here: RoundDir) -> None:
        def work(groups: Sequence[Candidates], seed: int) -> Iterable[Record]:
            return list(self.recipe.method.pair(groups, here.number))

        self._chunked(here, "pairs", lambda: here.stream("ranked", Candidates), work)
        pairs, reasons = here.count("pairs"), here.reasons()
        total = pairs + reasons.total()
        share = reasons.total() / max(1, total)
        if not pairs or share > self.recipe.guard.max_reject_share:
            raise GuardStop(
                f"round {here.number} made {pairs} pairs of {total} prompts "
                f"({', '.join(f'{n} {reason}' for reason, n in reasons.most_common())}); see "
                f"{here.path}/rejects.jsonl, and change the method's gates or prompts, "
                "or guard.max_reject_share"
            )

    def _train(self, here: RoundDir) -> None:
        if here.manifest("train"):
            # Once more, for a run that was killed between the manifest and this.
            self.session.tidy(here)
            return
        watch = Stopwatch()
        facts = self.session.train(here)
        here.finish("train", **facts, input=here.digest("pairs"), seconds=watch.seconds)
        self.session.tidy(here)
        self._say(here, "train", {"pairs": facts["examples"], "steps": facts["steps"]}, watch)

    def _supervise(self, here: RoundDir) -> None:
        """Round 0: supervised fine-tuning on the data's targets (IAL's initiation)."""
        if here.manifest("sft"):
            self.session.tidy(here)
            return
        watch = Stopwatch()
        facts = self.session.supervise(here)
        here.finish("sft", **facts, seconds=watch.seconds)
        self.session.tidy(here)
        self._say(here, "sft", {"prompts": facts["examples"], "steps": facts["steps"]}, watch)

    def _evaluate(self, here: RoundDir) -> RoundResult:
        """Answers to the held-out prompts, and the whole method played on them, measured."""
        if here.manifest("result") and (found := here.records("result", RoundResult)):
            return found[0]
        watch = Stopwatch()
        self._answer_held_out(here)
        start = self.rundir.round(-1).records("answers", Candidates)
        answers = here.records("answers", Candidates)
        measures = answer_measures(answers, start, seed=self.recipe.seed)
        if self.recipe.evaluate.introspection:
            self._play_held_out(here)
            measures |= self.recipe.method.measures(here.records("introspection", Candidates))
        measures |= self.session.training_measures(here)
        result = RoundResult(round=here.number, measures=measures)
        write_jsonl(here.path / "result.jsonl", [result])
        here.finish("result", input=here.digest("answers"), seconds=watch.seconds)
        self._say(here, "evaluate", {"prompts": len(answers)}, watch, glance(measures))
        return result

    def _answer_held_out(self, here: RoundDir) -> None:
        self._chunked(here, "answers", self.session.held_out, self._answer(here))

    def _answer(self, here: RoundDir) -> Work:
        sampling = self.recipe.evaluate.sampling or self.recipe.method.sampling

        def work(prompts: Sequence[Prompt], seed: int) -> Iterable[Record]:
            engine = self.session.engine_after(here)
            asks = [Request(messages=prompt.messages) for prompt in prompts]
            with self.session.player() as player:
                answers = player.sample(asks, sampling, seed=seed, label="evaluate")
            texts = [answer.text for answer in answers]
            # Divergence compares two models: both are asked in process.
            with self.session.policy_after(here).merged():
                now = engine.score(asks, texts)
            with self.session.initial_policy():
                initial = engine.score(asks, texts)
            verdicts = self.session.score_answers(prompts, texts)
            for n, prompt in enumerate(prompts):
                verdict = verdicts[n]
                yield Candidates(
                    prompt=prompt,
                    responses={ANSWER: answers[n]},
                    scores={} if isinstance(verdict, NoVerdict) else {ANSWER: verdict[0]},
                    ratings={
                        "logprob": now[n].mean_logprob,
                        "logprob_initial": initial[n].mean_logprob,
                    },
                )

        return work

    def _play_held_out(self, here: RoundDir) -> None:
        """The whole method on held-out prompts, for its own measures (R_i, identical rate ...)."""
        method = self.recipe.method

        def work(prompts: Sequence[Prompt], seed: int) -> Iterable[Record]:
            with self.session.measured(here) as actors_for:
                actors = actors_for(seed)
                groups = [g for g in method.generate(prompts, actors) if isinstance(g, Candidates)]
                return [g for g in method.rank(groups, actors) if isinstance(g, Candidates)]

        self._chunked(here, "introspection", self.session.held_out, work)

    def _guard(self, results: Sequence[RoundResult]) -> None:
        tripped = check_guards(results[-1].measures, results[0].measures, self.recipe.guard)
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
        self, here: RoundDir, stage: str, items: Callable[[], Iterable[Any]], work: Work
    ) -> None:
        """Run a stage chunk by chunk unless it is done; each chunk has a seed of its own place."""
        if here.manifest(stage):
            return
        watch, flow, parts = Stopwatch(), items(), Parts(here.path, stage)
        # Held-out prompts meet the same random numbers after every round, so that rounds compare.
        place = "held-out" if stage in ("answers", "introspection") else here.number
        chunks = enumerate(_chunks(flow, self.recipe.generate.chunk_size))

        def make(number: int, chunk: list[Any]) -> tuple[list[Record], dict[str, int]]:
            self.session.counts.clear()
            made = list(work(chunk, derive_seed(self.recipe.seed, place, stage, number)))
            return made, dict(self.session.counts)

        if self.share is not None:
            for number, chunk in islice(chunks, self.share[0], None, self.share[1]):
                if not parts.has(number):
                    parts.write(number, *make(number, chunk))
            return
        journal = Journal(here.path, stage)
        if stage != "pairs" and not parts.complete:
            self.session.share(here, stage)
            parts.finish()
        for number, chunk in islice(chunks, journal.chunks, None):
            journal.append(*(parts.read(number) if parts.has(number) else make(number, chunk)))
        made, reasons = here.count(stage), here.reasons()
        here.finish(
            stage,
            records=made,
            rejects=dict(reasons),
            **journal.counts,
            output=here.digest(stage),
            seconds=watch.seconds,
        )
        parts.drop()
        if stage in ("candidates", "pairs"):
            self._say(here, stage, {stage: made, "rejects": reasons.total()}, watch)

    def _say(
        self,
        here: RoundDir,
        stage: str,
        counts: dict[str, int],
        watch: Stopwatch,
        about: str = "",
    ) -> None:
        line = stage_line(here.number, stage, counts, watch.seconds, about)
        self.console.print(line, highlight=False, soft_wrap=True)
        self.rundir.event("stage", round=here.number, stage=stage, **counts, seconds=watch.seconds)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one of what is left."""
    flow = iter(items)
    return iter(lambda: list(islice(flow, size)), [])
