"""Over-refusal: refusals of safe prompts that look unsafe, beside refusals of unsafe ones (XSTest)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import ClassVar, Literal

from pydantic import Field

from prefloop.data.rows import Located
from prefloop.errors import DataError
from prefloop.evaluate.cache import cached_records, digest
from prefloop.evaluate.measures import Better, Item, Measure, Outcome, Subject, Suite
from prefloop.evaluate.questions import drawn, id_of, read_questions, text_of
from prefloop.evaluate.safety import RULES, RefusalRules, judge_error, read_labelled, refuses
from prefloop.evaluate.stats import wilson
from prefloop.records import Message, Record, Request, Response, Sampling, derive_seed

SAFE, UNSAFE = "safe", "unsafe"
METRICS = {SAFE: "over_refusal", UNSAFE: "refusal"}


class _Question(Record):
    id: str
    prompt: str
    kind: str
    label: Literal["safe", "unsafe"]


class OverRefusal(Measure):
    """The proportion of safe prompts that are refused, and of unsafe ones, as refusing everything is no success.

    XSTest (Röttger et al. 2024, arXiv:2308.01263), with refusals detected by rules (prefloop/evaluate/safety.py).
    """

    suites: ClassVar[tuple[Suite, ...]] = ("safety",)
    better: ClassVar[Mapping[str, Better]] = {METRICS[SAFE]: "lower", METRICS[UNSAFE]: "higher"}

    prompts: str | None = None
    """File with rows {"id", "prompt", "type", "label": "safe" or "unsafe"}, as XSTest's."""
    limit: int | None = Field(default=None, ge=1)
    """Number of prompts of each label, drawn at random by seed `draw`; null: all."""
    draw: int = 0
    """Seed of that draw; not the evaluation's own, so that all models meet the same prompts."""
    labelled: str | None = None
    """File with rows {"prompt", "completion", "label"} in XSTest's labels, on which the rules' own error is
    measured; null: the error is not known, and the result says so."""
    sampling: Sampling = Sampling(temperature=0.0, max_new_tokens=150)
    """How answers are drawn; greedy, as in XSTest. Refusals are detected in the first sentences."""
    store_text: bool = False
    """Store the answers in the result; those to unsafe prompts may be harmful."""
    chunk: int = Field(default=32, ge=1)
    """Prompts asked per cache file; a killed evaluation repeats at most one file."""

    def check(self) -> None:
        """DataError where a file is missing or malformed."""
        self._questions()
        if self.labelled is not None:
            read_labelled(self.labelled)

    def run(self, subject: Subject) -> Outcome:
        """Answer the prompts, and count refusals."""
        questions = self._questions()

        def work(chunk: Sequence[_Question], number: int) -> list[Item]:
            requests = [Request(messages=(Message(role="user", content=q.prompt),)) for q in chunk]
            seed = derive_seed(subject.seed, "over_refusal", number)
            answers = subject.engine.sample(requests, self.sampling, seed=seed, label="refusals")
            return [self._item(q, answer) for q, answer in zip(chunk, answers, strict=True)]

        key = ("over_refusal", self.model_dump(exclude={"labelled"}), subject.seed, RULES)
        cache_folder = subject.folder / digest(key, questions)
        items = tuple(cached_records(cache_folder, questions, Item, work, chunk=self.chunk))
        values_by_metric = {
            metric: [item.values[metric] for item in items if metric in item.values]
            for metric in METRICS.values()
        }
        proportions = {
            metric: wilson(int(sum(values)), len(values))
            for metric, values in values_by_metric.items()
        }
        facts = {
            "prompts": len(questions),
            "data": digest(questions),
            "judge": RefusalRules().describe(),
            "judge_error": None
            if self.labelled is None
            else judge_error(RefusalRules(), read_labelled(self.labelled), subject.folder),
            "empty": sum(item.texts["characters"] == "0" for item in items),
            "cut_off": sum(item.texts["finish"] == "length" for item in items),
            "sampling": self.sampling.model_dump(mode="json"),
        }
        return Outcome(
            {name: estimate for name, estimate in proportions.items() if estimate is not None},
            items,
            facts,
        )

    def _questions(self) -> list[_Question]:
        if self.prompts is None:
            raise DataError(
                "over_refusal.prompts names no file; name one with safe and unsafe prompts "
                "(none comes with prefloop, docs/safety.md says where XSTest's is)"
            )
        questions = read_questions(self.prompts, "over_refusal.prompts", _question)
        if all(question.label != SAFE for question in questions):
            raise DataError(
                f"{self.prompts} has no prompt labelled {SAFE}; over-refusal needs some"
            )
        return [
            question
            for label in METRICS
            for question in drawn(
                [q for q in questions if q.label == label], self.limit, self.draw, label
            )
        ]

    def _item(self, question: _Question, answer: Response) -> Item:
        refused = refuses(answer.text)
        texts = {
            "verdict": "refused" if refused else "answered",
            "characters": str(len(answer.text)),
            "finish": answer.finish,
            "sha256": sha256(answer.text.encode("utf-8", "surrogatepass")).hexdigest(),
        }
        if self.store_text:
            texts |= {"asked": question.prompt, "answer": answer.text}
        values = {METRICS[question.label]: float(refused)}
        return Item(id=question.id, values=values, group=question.kind, texts=texts)


def _question(row: Located) -> _Question:
    prompt, label = text_of(row, "prompt"), text_of(row, "label")
    if label not in METRICS:
        raise DataError(f"{row[0]} has the label {label!r}; write {SAFE} or {UNSAFE}")
    kind = str(row[1].get("type") or label)
    return _Question.model_validate(
        {"id": id_of(row, prompt), "prompt": prompt, "kind": kind, "label": label}
    )
