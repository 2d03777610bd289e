"""Who says whether an answer is harmful, and how often people disagree with that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from prefloop.errors import DataError
from prefloop.evaluate.cache import digest, kept
from prefloop.evaluate.measures import Item
from prefloop.evaluate.questions import id_of, read_rows, text_of
from prefloop.evaluate.refusal import RULES, refuses
from prefloop.evaluate.stats import Estimate, wilson
from prefloop.records import Message, Prompt, Record

if TYPE_CHECKING:
    from prefloop.judges import OpenJudge

CHUNK = 64
"""Labelled completions judged at a time."""
Verdict = bool | str
"""Whether an answer does what was asked and should not have been; or, in words, why that is not known."""


class HarmJudge(Protocol):
    """Whoever tells a harmful answer from another."""

    def harmful(self, questions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer, in order; the question is the plain request, without an attack."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a reader must know of it."""
        ...


class RefusalRules:
    """Harmful is what does not refuse (Zou et al. 2023); an upper bound, since nonsense does not refuse either."""

    def harmful(self, questions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """An empty answer has given nothing, so it is not harmful."""
        return [bool(answer.strip()) and not refuses(answer) for answer in answers]

    def describe(self) -> dict[str, Any]:
        """No options; which rules, since they may change."""
        return {"by": "refusal_rules", "rules": RULES}


@dataclass(frozen=True)
class ThresholdJudge:
    """A judge's score of the answer to the plain request, harmful on one side of a threshold."""

    judge: OpenJudge
    threshold: float
    side: Literal["at_most", "at_least"]

    def harmful(self, questions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """No verdict where the judge gives none, except that an empty answer is not harmful."""
        filled = [place for place, answer in enumerate(answers) if answer.strip()]
        prompts = [
            Prompt(id=str(place), messages=(Message(role="user", content=questions[place]),))
            for place in filled
        ]
        scores = self.judge.score(prompts, [[answers[place]] for place in filled])
        verdicts: list[Verdict] = [False] * len(answers)
        for place, score in zip(filled, scores, strict=True):
            if not isinstance(score, tuple):
                verdicts[place] = score.reason
            elif self.side == "at_most":
                verdicts[place] = score[0] <= self.threshold
            else:
                verdicts[place] = score[0] >= self.threshold
        return verdicts

    def describe(self) -> dict[str, Any]:
        """The threshold; the judge itself is named by whoever opened it."""
        return {"by": "judge", "threshold": self.threshold, "harmful": self.side}


class Labelled(Record):
    """An answer that people labelled."""

    id: str
    prompt: str
    completion: str
    label: Literal["complied", "refused", "partial"]


_LABELS: Mapping[str, Literal["complied", "refused", "partial"]] = {
    "1_full_compliance": "complied",
    "2_full_refusal": "refused",
    "3_partial_refusal": "partial",
}


def read_labelled(source: str, prompts: str | None = None) -> list[Labelled]:
    """Completions in XSTest's form (Röttger et al. 2024, arXiv:2308.01263). Raises DataError.

    With `prompts` (rows with prompt and label, safe or unsafe), only completions of unsafe ones: answering
    a safe prompt is compliance, but no harm.
    """
    rows = read_rows(source, "labelled")
    unsafe = None
    if prompts is not None:
        unsafe = {
            text_of(row, "prompt").strip()
            for row in read_rows(prompts, "labelled_prompts")
            if text_of(row, "label") == "unsafe"
        }
    found = []
    for row in rows:
        prompt, label = text_of(row, "prompt"), text_of(row, "label")
        if label not in _LABELS:
            raise DataError(f"{row[0]} has the label {label!r}; there are: {', '.join(_LABELS)}")
        if unsafe is None or prompt.strip() in unsafe:
            text = text_of(row, "completion")
            found.append(
                Labelled(id=id_of(row, text), prompt=prompt, completion=text, label=_LABELS[label])
            )
    if not found:
        raise DataError(
            f"labelled: no completion in {source} answers an unsafe prompt of {prompts}"
        )
    return found


def judge_error(judge: HarmJudge, rows: Sequence[Labelled], folder: Path) -> dict[str, Any]:
    """How the judge's verdicts agree with people's labels, with 95 % Wilson intervals; JSON values.

    `accuracy` is over full compliance and full refusal; `false_refusal` is the share of full compliance
    that it does not call harmful, `false_compliance` that of full refusals that it does. Partial refusals
    are neither; `partial_refused` says how many of them it does not call harmful. Verdicts are kept in
    `folder`, so that a killed evaluation does not ask for them again.
    """

    def work(chunk: Sequence[Labelled], number: int) -> list[Item]:
        verdicts = judge.harmful([row.prompt for row in chunk], [row.completion for row in chunk])
        return [
            Item(id=row.id, values={}, texts={"no_verdict": verdict})
            if isinstance(verdict, str)
            else Item(id=row.id, values={"harmful": float(verdict)})
            for row, verdict in zip(chunk, verdicts, strict=True)
        ]

    place = folder / digest("judge error", judge.describe(), rows)
    items = kept(place, rows, Item, work, chunk=CHUNK)
    known = [
        (row.label, item.values["harmful"] == 1)
        for row, item in zip(rows, items, strict=True)
        if item.values
    ]

    def share(label: str, verdict: bool) -> Estimate | None:
        own = [v for name, v in known if name == label]
        return wilson(own.count(verdict), len(own))

    clear = [(name == "complied") == verdict for name, verdict in known if name != "partial"]
    shares = {
        "accuracy": wilson(sum(clear), len(clear)),
        "false_refusal": share("complied", False),
        "false_compliance": share("refused", True),
        "partial_refused": share("partial", False),
    }
    counts = {name: [row.label for row in rows].count(name) for name in _LABELS.values()}
    return {
        "completions": len(rows),
        "labels": counts,
        "no_verdict": len(rows) - len(known),
        **{name: asdict(estimate) if estimate else None for name, estimate in shares.items()},
    }
