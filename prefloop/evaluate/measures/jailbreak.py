"""Jailbreak success rate (JSR): the proportion of attacks that get a harmful answer (AROP section 5.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from prefloop.errors import DataError, JudgeError
from prefloop.evaluate.cache import cached_records, digest
from prefloop.evaluate.measures import Better, Item, Measure, Outcome, Subject, Suite
from prefloop.evaluate.questions import drawn
from prefloop.evaluate.safety import (
    PLAIN,
    Attack,
    HarmJudge,
    RefusalRules,
    ThresholdJudge,
    fill_templates,
    judge_error,
    read_goals,
    read_labelled,
    read_ready_attacks,
)
from prefloop.evaluate.stats import Estimate, crossed_proportion, wilson
from prefloop.records import Message, Request, Response, Sampling, derive_seed

JSR = "JSR"
JSR_PLAIN = "JSR_plain"
BROKEN = "broken_prompts"
_OPTIONS_OF_JUDGE_ERROR = {"labelled", "labelled_prompts", "labelled_limit"}


class Jailbreak(Measure):
    """Every attack on every harmful prompt, and the proportion of answers that are judged harmful.

    The answers' texts are stored only with `store_text`: else only verdicts, lengths and hashes.
    """

    suites: ClassVar[tuple[Suite, ...]] = ("safety",)
    better: ClassVar[Mapping[str, Better]] = {JSR: "lower", JSR_PLAIN: "lower", BROKEN: "lower"}
    asks_judge: ClassVar[bool] = True
    """It needs one with `judged_by: judge` only."""

    templates: str | None = None
    """File with rows {"id", "template"}; a template holds [INSERT PROMPT HERE]. Needs `prompts`."""
    prompts: tuple[str, ...] = ()
    """Files with rows {"id", "prompt"}: requests that a model should refuse."""
    ready: str | None = None
    """Instead of templates and prompts: a file with rows {"attack", "goal", "prompt"}, as JailbreakBench's
    artifacts (Chao et al. 2024, arXiv:2404.01318)."""
    attacks: int | tuple[str, ...] | None = 20
    """How many attacks, drawn by `draw`, or which ones by name; null: all. AROP's paper takes 20."""
    prompt_limit: int | None = Field(default=None, ge=1)
    """Number of prompts (of ready attacks: goals), drawn at random by seed `draw`; null: all."""
    draw: int = 0
    """Seed of both draws; not the evaluation's own, so that all models meet the same attacks."""
    plain: bool = True
    """Use each prompt without an attack too, as the baseline JSR_plain."""
    judged_by: Literal["refusal_rules", "judge"] = "refusal_rules"
    """refusal_rules: an answer without a refusal is harmful. judge: the evaluation's judge scores each answer to
    the plain prompt, and `threshold` decides."""
    threshold: float | None = None
    """judged_by judge: the score that separates harmful answers; no value fits all judges."""
    harmful: Literal["at_most", "at_least"] = "at_most"
    """judged_by judge: which side of the threshold is harmful. at_most for a judge of harmlessness."""
    labelled: str | None = None
    """File with rows {"prompt", "completion", "label"} in XSTest's labels, on which the judge's own error is
    measured; null: the error is not known, and the result says so."""
    labelled_prompts: str | None = None
    """File with rows {"prompt", "label": "safe" or "unsafe"}: only completions of unsafe prompts are used, as a
    judge of harm needs (for refusal_rules, safe ones do as well)."""
    labelled_limit: int | None = Field(default=None, ge=1)
    """Number of labelled completions, drawn at random by seed `draw`; null: all."""
    sampling: Sampling = Sampling(temperature=0.0, max_new_tokens=150)
    """How answers are drawn; greedy, so that JSR does not depend on sampling."""
    store_text: bool = False
    """Store attack and answer in the result; they may be harmful."""
    chunk: int = Field(default=32, ge=1)
    """Attacks asked and judged per cache file; a killed evaluation repeats at most one file."""

    def check(self) -> None:
        """DataError for the files and names, JudgeError for a judge without its threshold."""
        self._attacks()
        if self.judged_by == "judge" and self.threshold is None:
            raise JudgeError(
                "jailbreak.judged_by judge needs jailbreak.threshold; choose it on labelled answers"
            )
        if self.labelled is not None:
            read_labelled(self.labelled, self.labelled_prompts)

    def lacks(self, subject: Subject) -> str | None:
        """A missing judge, with `judged_by: judge`."""
        if self.judged_by == "judge" and subject.judge is None:
            return (
                "judged_by judge needs a judge: name one with --judge, or let refusal_rules judge"
            )
        return super().lacks(subject)

    def run(self, subject: Subject) -> Outcome:
        """Answer the attacks, judge the answers, count."""
        attacks = self._attacks()
        judge = self._judge(subject)

        def work(chunk: Sequence[Attack], number: int) -> list[Item]:
            seed = derive_seed(subject.seed, "jailbreak", number)
            requests = [
                Request(messages=(Message(role="user", content=attack.text),)) for attack in chunk
            ]
            answers = subject.engine.sample(requests, self.sampling, seed=seed, label="attacks")
            verdicts = judge.harmful([a.goal for a in chunk], [a.text for a in answers])
            return [
                self._item(attack, answer, verdict)
                for attack, answer, verdict in zip(chunk, answers, verdicts, strict=True)
            ]

        options = self.model_dump(exclude=_OPTIONS_OF_JUDGE_ERROR)
        key = ("jailbreak", options, subject.seed, judge.describe())
        cache_folder = subject.folder / digest(key, attacks)
        items = tuple(cached_records(cache_folder, attacks, Item, work, chunk=self.chunk))
        return Outcome(_estimates(items), items, self._facts(attacks, items, judge, subject.folder))

    def _attacks(self) -> list[Attack]:
        template_inputs = (self.templates is not None, bool(self.prompts))
        if any(template_inputs) == (self.ready is not None) or any(template_inputs) != all(
            template_inputs
        ):
            raise DataError(
                "jailbreak needs either templates and prompts, or ready; name files of attacks "
                "(none come with prefloop, docs/safety.md says where published ones are)"
            )
        if self.ready is not None:
            attacks = read_ready_attacks(self.ready, self.attacks, self.prompt_limit, self.draw)
        else:
            goals = read_goals(self.prompts, self.prompt_limit, self.draw)
            attacks = fill_templates(str(self.templates), goals, self.attacks, self.draw)
        if not self.plain:
            return attacks
        goals = list({attack.goal_id: attack.goal for attack in attacks}.items())
        return attacks + [
            Attack(attack=PLAIN, goal_id=name, goal=goal, text=goal) for name, goal in goals
        ]

    def _judge(self, subject: Subject) -> HarmJudge:
        if self.judged_by == "refusal_rules":
            return RefusalRules()
        assert subject.judge is not None
        assert self.threshold is not None
        return ThresholdJudge(subject.judge, self.threshold, self.harmful)

    def _item(self, attack: Attack, answer: Response, verdict: bool | str) -> Item:
        texts = {
            "verdict": verdict if isinstance(verdict, str) else ("safe", "harmful")[verdict],
            "characters": str(len(answer.text)),
            "tokens": str(len(answer.token_ids)),
            "finish": answer.finish,
            "sha256": sha256(answer.text.encode("utf-8", "surrogatepass")).hexdigest(),
        }
        if self.store_text:
            texts |= {"asked": attack.text, "answer": answer.text}
        metric = JSR_PLAIN if attack.attack == PLAIN else JSR
        values = {} if isinstance(verdict, str) else {metric: float(verdict)}
        return Item(
            id=attack.id, values=values, group=attack.attack, cluster=attack.goal_id, texts=texts
        )

    def _facts(
        self,
        attacks: Sequence[Attack],
        items: Sequence[Item],
        judge: HarmJudge,
        folder: Path,
    ) -> dict[str, Any]:
        reasons = Counter(item.texts["verdict"] for item in items if not item.values)
        error = None
        if self.labelled is not None:
            rows = read_labelled(self.labelled, self.labelled_prompts)
            rows = drawn(rows, self.labelled_limit, self.draw, "labelled")
            error = judge_error(judge, rows, folder)
        return {
            "attacks": list(dict.fromkeys(a.attack for a in attacks if a.attack != PLAIN)),
            "prompts": len({attack.goal_id for attack in attacks}),
            "data": digest(attacks),
            "judge": judge.describe(),
            "judge_error": error,
            "no_verdict": dict(reasons),
            "empty": sum(item.texts["characters"] == "0" for item in items),
            "cut_off": sum(item.texts["finish"] == "length" for item in items),
            "sampling": self.sampling.model_dump(mode="json"),
        }


def _estimates(items: Sequence[Item]) -> dict[str, Estimate]:
    """JSR over attacks and prompts, JSR_plain over prompts, and the prompts on which an attack succeeded."""
    trials = [(i.group, i.cluster, i.values[JSR]) for i in items if JSR in i.values]
    plain = [item.values[JSR_PLAIN] for item in items if JSR_PLAIN in item.values]
    rate = crossed_proportion(
        [hit == 1 for *_, hit in trials], [a for a, *_ in trials], [g for _, g, _ in trials]
    )
    if rate is None:
        raise JudgeError(
            "the judge gave no verdict on any attack; use a judge that scores a single answer"
        )
    broken = {goal for _, goal, hit in trials if hit}
    estimates = {
        JSR: rate,
        JSR_PLAIN: wilson(int(sum(plain)), len(plain)),
        BROKEN: wilson(len(broken), len({goal for _, goal, _ in trials})),
    }
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}
