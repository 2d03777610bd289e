"""MT-Bench: questions with a follow-up, answered in two turns and scored by a judge (Zheng et al. 2023)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from prefloop.data.rows import Located
from prefloop.errors import DataError, JudgeError
from prefloop.evaluate.cache import cached_chunks, chunks_of, digest
from prefloop.evaluate.measures import Item, Measure, Outcome, Subject
from prefloop.evaluate.questions import drawn, id_of, read_questions, text_of
from prefloop.evaluate.stats import Estimate, bootstrap_mean
from prefloop.records import Message, Prompt, Record, Request, Response, Sampling, derive_seed

if TYPE_CHECKING:
    from prefloop.judges import OpenJudge

TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""FastChat's temperature for each category; others are drawn at OTHER_TEMPERATURE, as there."""
OTHER_TEMPERATURE = 0.7
SCALE_LOW, SCALE_HIGH = 1.0, 10.0
TURNS = 2


WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose reference answers the judge sees (FastChat's NEED_REF_CATS); elsewhere it must not lean on one."""


class _Question(Record):
    id: str
    category: str
    turns: tuple[str, str]
    references: tuple[str | None, str | None]


class MtBench(Measure):
    """Two turns per question, each answer scored by itself; the mean overall, by turn and by category.

    The protocol is that of Zheng et al. (2023, arXiv:2306.05685, single-answer grading); results are comparable
    to published ones only with the same judge (GPT-4), which rates from 1 to 10.
    """

    needs_judge: ClassVar[bool] = True

    data: str | None = None
    """File with rows {"id", "category", "turns": [first, second], "reference": [..., ...]}; the reference may
    be empty, and is read for math, reasoning and coding only, as in FastChat. FastChat's question.jsonl with its
    reference answers put in."""
    limit: int | None = Field(default=None, ge=1)
    """Number of questions, drawn at random by seed `draw`; null: all."""
    draw: int = 0
    """Seed of that draw; not the evaluation's own, so that all models meet the same questions."""
    judge_range: tuple[float, float] | None = None
    """Lowest and highest score that the judge can give: [1, 5] for self_judge and api with mode pointwise.
    Scores are then put on MT-Bench's scale, 1 to 10, in proportion, and called `mt_bench`. null: they stay in
    the judge's own units and are called `judge_score`, which is no MT-Bench score."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Tokens of an answer, as in FastChat."""
    chunk: int = Field(default=8, ge=1)
    """Questions of one category asked and judged per cache file; a killed evaluation repeats at most one file."""

    @property
    def name(self) -> str:
        """The metric's name."""
        return "judge_score" if self.judge_range is None else "mt_bench"

    def check(self) -> None:
        """DataError for the file, JudgeError for an empty `judge_range`."""
        self._questions()
        if self.judge_range is not None and not self.judge_range[0] < self.judge_range[1]:
            raise JudgeError(
                f"mt_bench.judge_range {list(self.judge_range)} must go from the lowest score to the highest"
            )

    def run(self, subject: Subject) -> Outcome:
        """Answer both turns of each question, and score both answers."""
        if subject.judge is None:
            raise JudgeError("mt_bench needs a judge; name one that scores a single answer")
        judge = subject.judge
        questions = self._questions()

        def work(chunk: Sequence[_Question], number: int) -> list[Item]:
            conversations: list[tuple[Message, ...]] = [() for _ in chunk]
            rows: list[list[tuple[Response, float | str]]] = []
            for turn in range(TURNS):
                conversations = [
                    (*before, Message(role="user", content=question.turns[turn]))
                    for before, question in zip(conversations, chunk, strict=True)
                ]
                answers = self._answers(subject, chunk[0].category, conversations, number, turn)
                scores = self._scores(judge, chunk, conversations, answers, turn)
                rows.append(list(zip(answers, scores, strict=True)))
                conversations = [
                    (*before, Message(role="assistant", content=answer.text))
                    for before, answer in zip(conversations, answers, strict=True)
                ]
            return [
                self._item(q, row) for q, row in zip(chunk, zip(*rows, strict=True), strict=True)
            ]

        key = ("mt_bench", self.model_dump(), subject.seed)
        chunks = self._chunks(questions)
        cache_folder = subject.folder / digest(key, chunks)
        items = tuple(cached_chunks(cache_folder, chunks, Item, work))
        return Outcome(self._estimates(items, subject.seed), items, self._facts(questions, items))

    def _questions(self) -> list[_Question]:
        if self.data is None:
            raise DataError(
                "mt_bench.data names no file; name one with MT-Bench's questions (docs/metrics.md says which)"
            )
        questions = read_questions(self.data, "mt_bench.data", _question)
        return drawn(questions, self.limit, self.draw, "mt_bench")

    def _chunks(self, questions: Sequence[_Question]) -> list[Sequence[_Question]]:
        """Chunks of one category each, as answers of one chunk are drawn at one temperature."""
        return [
            chunk
            for category in dict.fromkeys(question.category for question in questions)
            for chunk in chunks_of([q for q in questions if q.category == category], self.chunk)
        ]

    def _answers(
        self,
        subject: Subject,
        category: str,
        conversations: Sequence[tuple[Message, ...]],
        number: int,
        turn: int,
    ) -> list[Response]:
        sampling = Sampling(
            temperature=TEMPERATURES.get(category, OTHER_TEMPERATURE),
            max_new_tokens=self.max_new_tokens,
        )
        return subject.engine.sample(
            [Request(messages=messages) for messages in conversations],
            sampling,
            seed=derive_seed(subject.seed, "mt_bench", number, turn),
            label=f"mt_bench turn {turn + 1}",
        )

    def _scores(
        self,
        judge: OpenJudge,
        chunk: Sequence[_Question],
        conversations: Sequence[tuple[Message, ...]],
        answers: Sequence[Response],
        turn: int,
    ) -> list[float | str]:
        """Each answer's score on the reported scale, or the reason why there is none."""
        prompts = [
            Prompt(
                id=f"{question.id}/{turn + 1}", messages=messages, target=question.references[turn]
            )
            for question, messages in zip(chunk, conversations, strict=True)
        ]
        verdicts = judge.score(prompts, [[answer.text] for answer in answers])
        return [self._scaled(v[0]) if isinstance(v, tuple) else v.reason for v in verdicts]

    def _scaled(self, score: float) -> float:
        if self.judge_range is None:
            return score
        low, high = self.judge_range
        if not low <= score <= high:
            raise JudgeError(
                f"mt_bench: the judge gave {score:.4g}, outside judge_range [{low:g}, {high:g}]; correct "
                "the range, or leave it out for a judge whose scores have none"
            )
        return SCALE_LOW + (SCALE_HIGH - SCALE_LOW) * (score - low) / (high - low)

    def _item(self, question: _Question, turns: Sequence[tuple[Response, float | str]]) -> Item:
        values: dict[str, float] = {}
        texts: dict[str, str] = {}
        for turn, (answer, score) in enumerate(turns, start=1):
            texts |= {
                f"asked_{turn}": question.turns[turn - 1],
                f"answer_{turn}": answer.text,
                f"finish_{turn}": answer.finish,
            }
            if isinstance(score, str):
                texts[f"no_verdict_{turn}"] = score
            else:
                values[f"{self.name}_turn_{turn}"] = score
        if len(values) == TURNS:
            values[self.name] = sum(values.values()) / TURNS
        return Item(id=question.id, values=values, group=question.category, texts=texts)

    def _estimates(self, items: Sequence[Item], seed: int) -> dict[str, Estimate]:
        """Means over questions: of both turns, of each turn, and by category."""
        names = [self.name, *(f"{self.name}_turn_{turn + 1}" for turn in range(TURNS))]
        values = {name: [i.values[name] for i in items if name in i.values] for name in names}
        for category in dict.fromkeys(item.group for item in items):
            values[f"{self.name}_{category}"] = [
                i.values[self.name] for i in items if i.group == category and self.name in i.values
            ]
        estimates = {name: bootstrap_mean(rows, seed=seed) for name, rows in values.items()}
        if estimates[self.name] is None:
            reasons = {
                text for item in items for key, text in item.texts.items() if "verdict" in key
            }
            raise JudgeError(
                f"mt_bench: the judge scored no question in both turns ({', '.join(sorted(reasons))}); "
                "use one that scores a single answer, such as self_judge or api with mode pointwise"
            )
        return {name: estimate for name, estimate in estimates.items() if estimate is not None}

    def _facts(self, questions: Sequence[_Question], items: Sequence[Item]) -> dict[str, Any]:
        reasons = Counter(t for i in items for key, t in i.texts.items() if "verdict" in key)
        own = "the judge's own units; no MT-Bench score"
        scale = (
            own
            if self.judge_range is None
            else (
                f"1 to 10, in proportion to the judge's {self.judge_range[0]:g} to {self.judge_range[1]:g}"
            )
        )
        return {
            "questions": len(questions),
            "data": digest(questions),
            "scale": scale,
            "no_verdict": dict(reasons),
            "cut_off": sum(
                i.texts[f"finish_{t + 1}"] == "length" for i in items for t in range(TURNS)
            ),
            "temperatures": {
                q.category: TEMPERATURES.get(q.category, OTHER_TEMPERATURE) for q in questions
            },
            "max_new_tokens": self.max_new_tokens,
        }


def _question(row: Located) -> _Question:
    turns, references = row[1].get("turns"), row[1].get("reference") or []
    if (
        not isinstance(turns, list)
        or len(turns) != TURNS
        or not all(isinstance(t, str) and t.strip() for t in turns)
    ):
        raise DataError(f"{row[0]} has no list of two texts in field 'turns'; MT-Bench's rows have")
    if not isinstance(references, list) or len(references) not in (0, TURNS):
        raise DataError(
            f"{row[0]} has a reference that is neither empty nor one for each turn; correct it"
        )
    category = text_of(row, "category")
    shown = references if category in WITH_REFERENCE else []
    filled = [str(text) if text else None for text in shown] or [None] * TURNS
    return _Question(
        id=id_of(row, turns[0]),
        category=category,
        turns=(turns[0], turns[1]),
        references=(filled[0], filled[1]),
    )
