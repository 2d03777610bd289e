"""Win rate against a fixed opponent, by any judge, in both orders, and at equal lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from prefloop.data.prompts import DataOptions, read_prompts
from prefloop.data.rows import is_data_file
from prefloop.errors import DataError, JudgeError
from prefloop.evaluate.cache import answers_of, cached_records, digest, held_out_prompts
from prefloop.evaluate.measures import Better, Item, Measure, Outcome, Subject, Suite
from prefloop.evaluate.stats import Estimate, bootstrap_mean, wilson
from prefloop.evaluate.win_rates import length_controlled, points
from prefloop.records import Prompt, Record, Sampling

START, TARGETS = "start", "targets"


class _Row(Record):
    """One prompt with both sides' answers."""

    prompt: Prompt
    own: str
    other: str


class WinRate(Measure):
    """Proportion of prompts where the judge prefers the answer to a fixed opponent's; ties count one half.

    AROP section 5.1. The judge sees both answers in both orders unless `both_orders` is off; a prompt's points are
    the mean of the two. `lc_win_rate` is the rate that a logistic fit predicts at equal lengths (characters).
    """

    suites: ClassVar[tuple[Suite, ...]] = ("quick",)
    better: ClassVar[Mapping[str, Better]] = {
        "win_rate": "higher",
        "lc_win_rate": "higher",
        "length_difference": "neither",
        "no_verdict": "lower",
        "order_changes": "lower",
    }
    needs_judge: ClassVar[bool] = True

    held_out: str | None = None
    """Source of the prompts; null: those of --data, else the run's held-out prompts."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first `limit` prompts; null: all."""
    opponent: str = Field(default=START, min_length=1)
    """"start", the model from which training started; "targets", the prompts' own responses; a file of rows with
    prompt and response, matched by prompt; or a model: a folder, Hub id or embedded:NAME."""
    sampling: Sampling = Sampling()
    """How answers are drawn, the opponent's too where it is a model."""
    both_orders: bool = True
    """Ask the judge twice, with the answers exchanged; not needed for a judge that scores single answers."""
    chunk: int = Field(default=32, ge=1)
    """Prompts answered and judged per cache file; a killed evaluation repeats at most one file."""

    def check(self) -> None:
        """DataError where there are no prompts, or the opponent's stored answers do not fit them."""
        prompts = held_out_prompts(self.held_out, self.limit)
        if self._has_stored_answers:
            self._stored_answers(prompts)

    def lacks(self, subject: Subject) -> str | None:
        """A missing judge, or a missing initial model where that is the opponent."""
        if self.opponent == START and subject.initial is None:
            return (
                f"{subject.name} is no run's policy, so it has no start to win against: name the model that "
                "it started from with --initial, or set the option opponent"
            )
        return super().lacks(subject)

    def run(self, subject: Subject) -> Outcome:
        """Sample the policy's and the opponent's answers, and judge them."""
        prompts = held_out_prompts(self.held_out, self.limit)
        own = self._sample(subject.engine, prompts, subject, subject.answers or subject.folder)
        others = self._opponent_answers(prompts, subject)
        rows = [
            _Row(prompt=prompt, own=own_answer, other=other)
            for prompt, own_answer, other in zip(prompts, own, others, strict=True)
        ]

        def work(part: Sequence[_Row], number: int) -> list[Item]:
            return self._judged(part, subject)

        key = digest(rows, self.both_orders)
        items = cached_records(subject.folder / key, rows, Item, work, chunk=self.chunk)
        reasons = Counter(item.texts["no_verdict"] for item in items if "no_verdict" in item.texts)
        judged = [item for item in items if "win_rate" in item.values]
        if not judged:
            reason = reasons.most_common(1)[0][0]
            raise JudgeError(
                f"win_rate: the judge has no verdict on any of the {len(items)} prompts ({reason}); "
                "choose another judge, or look at the answers"
            )
        return Outcome(
            estimates=self._estimates(judged, len(items), subject.seed),
            items=tuple(items),
            facts={
                "prompts": len(prompts),
                "opponent": self.opponent,
                "sampling": self.sampling.model_dump(mode="json"),
                "both_orders": self.both_orders,
                "no_verdict": dict(reasons),
                "ties": sum(item.values["win_rate"] == 0.5 for item in judged),
            },
        )

    def _estimates(self, judged: Sequence[Item], count: int, seed: int) -> dict[str, Estimate]:
        points_by_prompt = [item.values["win_rate"] for item in judged]
        lengths = [item.values["length_difference"] for item in judged]
        estimates: dict[str, Estimate | None] = {
            "win_rate": bootstrap_mean(points_by_prompt, seed=seed),
            "lc_win_rate": length_controlled(points_by_prompt, lengths, seed=seed),
            "length_difference": bootstrap_mean(lengths, seed=seed),
            "no_verdict": wilson(count - len(judged), count),
        }
        if self.both_orders:
            changes = [item.values["order_changes"] for item in judged]
            estimates["order_changes"] = wilson(int(sum(changes)), len(changes))
        return {name: estimate for name, estimate in estimates.items() if estimate is not None}

    # The opponent.

    @property
    def _has_stored_answers(self) -> bool:
        """Whether the opponent is a file or the targets, not a model; a missing file counts, and is reported later."""
        path = Path(self.opponent).expanduser()
        return self.opponent == TARGETS or (is_data_file(path) and not path.is_dir())

    def _opponent_answers(self, prompts: Sequence[Prompt], subject: Subject) -> list[str]:
        if self._has_stored_answers:
            return self._stored_answers(prompts)
        if self.opponent == START:
            assert subject.initial is not None
            return self._sample(subject.initial, prompts, subject, subject.folder / "opponent")
        from prefloop.generate.hf_engine import open_engine

        engine = open_engine(self.opponent)
        return self._sample(engine, prompts, subject, subject.folder / "opponent")

    def _sample(
        self, engine: Any, prompts: Sequence[Prompt], subject: Subject, folder: Path
    ) -> list[str]:
        answers = answers_of(
            engine, prompts, self.sampling, seed=subject.seed, folder=folder, chunk=self.chunk
        )
        return [answer.text for answer in answers]

    def _stored_answers(self, prompts: Sequence[Prompt]) -> list[str]:
        if self.opponent == TARGETS:
            targets = [prompt.target for prompt in prompts if prompt.target]
            if missing := len(prompts) - len(targets):
                raise DataError(
                    f"opponent targets: {missing} of {len(prompts)} prompts have no response; "
                    "name prompts that have one, or another opponent"
                )
            return targets
        stored = {
            _key(prompt): prompt.target
            for prompt in read_prompts(self.opponent, DataOptions(), part="eval")
            if prompt.target
        }
        unanswered = [prompt for prompt in prompts if _key(prompt) not in stored]
        if unanswered:
            raise DataError(
                f"opponent {self.opponent}: no response to {len(unanswered)} of {len(prompts)} prompts, such as "
                f"{unanswered[0].id!r}; give it a row with prompt and response for each"
            )
        return [stored[_key(prompt)] for prompt in prompts]

    # The judge.

    def _judged(self, rows: Sequence[_Row], subject: Subject) -> list[Item]:
        assert subject.judge is not None
        differing = [index for index, row in enumerate(rows) if row.own != row.other]
        prompts = [rows[index].prompt for index in differing]
        orders = [[(rows[index].own, rows[index].other) for index in differing]]
        if self.both_orders:
            orders.append([(other, own) for own, other in orders[0]])
        verdicts = [subject.judge.score(prompts, groups) for groups in orders] if differing else []
        verdicts_by_row: dict[int, list[Any]] = {
            index: [order[position] for order in verdicts]
            for position, index in enumerate(differing)
        }
        return [self._item(row, verdicts_by_row.get(index)) for index, row in enumerate(rows)]

    def _item(self, row: _Row, verdicts: list[Any] | None) -> Item:
        """`verdicts`: own first, then own last; None where both answers are the same text, which is a tie."""
        texts = {"prompt": row.prompt.text, "answer": row.own, "opponent": row.other}
        failure = next((v.reason for v in verdicts or () if not isinstance(v, tuple)), None)
        if failure is not None:
            return Item(id=row.prompt.id, values={}, texts={**texts, "no_verdict": failure})
        points_by_order = [
            points(verdict[order], verdict[1 - order])
            for order, verdict in enumerate(verdicts or ())
        ] or [0.5]
        values = {
            "win_rate": sum(points_by_order) / len(points_by_order),
            "length_difference": float(len(row.own) - len(row.other)),
        }
        if self.both_orders:
            values["order_changes"] = float(len(set(points_by_order)) > 1)
        return Item(id=row.prompt.id, values=values, texts=texts)


def _key(prompt: Prompt) -> str:
    return "\x1e".join(
        f"{turn.role}\x1f{' '.join(turn.content.split())}" for turn in prompt.messages
    )
