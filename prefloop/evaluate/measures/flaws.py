"""What flaws a method plants, and how subtle they are (AROP section 5.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from pydantic import Field

from prefloop.data.preferences import read_preferences
from prefloop.data.text_distance import edit_share
from prefloop.errors import DataError
from prefloop.evaluate.agreement import cohen_kappa
from prefloop.evaluate.cache import cached_records, digest
from prefloop.evaluate.flaw_rules import KINDS, REWRITTEN_FROM, RULES, Kind, flaw_kind
from prefloop.evaluate.measures import Better, Item, Measure, Outcome, Subject
from prefloop.evaluate.questions import drawn, read_rows, text_of
from prefloop.evaluate.stats import Estimate, bootstrap_mean, wilson
from prefloop.evaluate.win_rates import points
from prefloop.generate.engine import MIN_MASS, Engine, among
from prefloop.records import Candidates, Message, Pair, Prompt, Record, Request, Response
from prefloop.run_folder import RoundDir, read_run

STATIC = "static"
"""Group of a file's pairs, and the beginning of their measures' names."""
_LETTERS = "ABCDEFGHI"
"""One for each of KINDS, in their order."""
_QUESTION = """Question:
{question}

Good answer:
{chosen}

Flawed answer:
{rejected}

Which flaw does the flawed answer have?
A. a fact or a word's meaning is wrong
B. a number is wrong
C. it hedges more than it should
D. its tone is wrong
E. something is left out
F. it refuses to answer
G. it is offensive
H. it is another answer altogether
I. none of these
Answer with one letter."""


class _Row(Record):
    """One flawed answer beside the answer that it was made from."""

    id: str
    group: str
    prompt: Prompt
    chosen: Response
    rejected: Response


class Flaws(Measure):
    """Kinds of the flaws in a run's pairs, and how subtle these are: share of words, likelihood, a judge's eye.

    Kinds are told by rules on words, which know no synonyms and no facts. Answers are scored as texts.
    """

    better: ClassVar[Mapping[str, Better]] = {
        name: "neither"
        for kind in (*KINDS, "edit_share", "gap", "unseen", "judge_sees", "no_verdict")
        for name in (kind, f"{STATIC}_{kind}")
    }
    asks_judge: ClassVar[bool] = True

    of: str | None = None
    """Folder of the run whose planted flaws are read, of all its rounds; null: the subject's own run."""
    pairs: str | None = None
    """A file of labelled pairs made otherwise, such as once by a fixed model: measured beside the run's, as static_ ..."""
    labels: str | None = None
    """Rows with chosen, rejected and label, a kind that an annotator gave: how far rules (and classifier) agree with it."""
    classifier: str | None = None
    """Folder, Hub id or embedded:NAME of a model that is asked for the kind as well."""
    rewritten_from: float = Field(default=REWRITTEN_FROM, ge=0.0, le=1.0)
    """Share of differing words above which a flawed answer counts as rewritten."""
    limit: int | None = Field(default=None, ge=1)
    """Number of pairs, of the run and of the file each, drawn at random, always the same; null: all."""
    chunk: int = Field(default=32, ge=1)
    """Pairs scored per cache file; a killed evaluation repeats at most one file."""

    def check(self) -> None:
        """DataError where a named file holds no pairs or no labels."""
        self._static()
        self._labels()

    def lacks(self, subject: Subject) -> str | None:
        """Pairs, where neither a run with planted flaws nor a file is there."""
        if self.pairs is None and not self._planted():
            return (
                f"{subject.name} has no pairs with planted flaws: name a run of arop in the option of, or a "
                "file in the option pairs"
            )
        return super().lacks(subject)

    def reads(self) -> str:
        """The run's pairs as they are by now."""
        return digest([round_dir.digest("pairs") for round_dir, _ in self._rounds()])

    def run(self, subject: Subject) -> Outcome:
        """Tell kinds, score both answers under the policy, and show them to the judge."""
        sets = [drawn(rows, self.limit, 0, "flaws") for rows in (self._planted(), self._static())]
        rows = [row for part in sets for row in part]

        def work(part: Sequence[_Row], number: int) -> list[Item]:
            return self._measured(part, subject)

        key = digest(rows, self.rewritten_from, self.chunk)
        items = cached_records(subject.folder / key, rows, Item, work, chunk=self.chunk)
        estimates: dict[str, Estimate] = {}
        for prefix in ("", f"{STATIC}_"):
            own = [item for item in items if (item.group == STATIC) == bool(prefix)]
            estimates |= _estimates(own, prefix, subject.seed)
        return Outcome(estimates, tuple(items), self._facts(rows, items, subject))

    # The pairs.

    def _rounds(self) -> list[tuple[RoundDir, Iterator[Pair]]]:
        return [] if self.of is None else read_run(Path(self.of)).pairs()

    def _planted(self) -> list[_Row]:
        """The run's pairs whose rejected answer is a flawed copy."""
        return [row for round_dir, pairs in self._rounds() for row in _planted(round_dir, pairs)]

    def _static(self) -> list[_Row]:
        if self.pairs is None:
            return []
        given = [pair for pair in read_preferences(self.pairs).pairs if not pair.tie]
        if not given:
            raise DataError(f"{self.pairs} holds ties only; name pairs with a better answer")
        return [
            _Row(
                id=f"{number}/{pair.id}",
                group=STATIC,
                prompt=pair.prompt,
                chosen=Response(text=pair.chosen),
                rejected=Response(text=pair.rejected),
            )
            for number, pair in enumerate(given)
        ]

    def _labels(self) -> list[tuple[_Row, str]]:
        """What the annotator said of each labelled pair. Raises DataError for an unknown kind."""
        labelled: list[tuple[_Row, str]] = []
        for row in read_rows(self.labels, "labels") if self.labels else ():
            label = text_of(row, "label")
            if label not in KINDS:
                raise DataError(f"{row[0]} has the label {label!r}; there are: {', '.join(KINDS)}")
            question = Message(role="user", content=text_of(row, "prompt"))
            pair = _Row(
                id=row[0],
                group="labels",
                prompt=Prompt(id=row[0], messages=(question,)),
                chosen=Response(text=text_of(row, "chosen")),
                rejected=Response(text=text_of(row, "rejected")),
            )
            labelled.append((pair, label))
        return labelled

    # What is measured.

    def _measured(self, rows: Sequence[_Row], subject: Subject) -> list[Item]:
        asks = [Request(messages=row.prompt.messages) for row in rows] * 2
        answers = [row.chosen for row in rows] + [row.rejected for row in rows]
        scores = [scored.mean_logprob for scored in subject.engine.score(asks, answers)]
        sight = _judge_sight(rows, subject)
        items = []
        for number, row in enumerate(rows):
            gap = scores[number] - scores[number + len(rows)]
            kind = self._kind(row)
            values: dict[str, float] = {name: float(name == kind) for name in KINDS}
            values |= {
                "edit_share": edit_share(row.chosen.text, row.rejected.text),
                "gap": gap,
                "unseen": float(gap <= 0),
                **sight[number],
            }
            prefix = f"{STATIC}_" if row.group == STATIC else ""
            texts = {
                "prompt": row.prompt.text,
                "chosen": row.chosen.text,
                "rejected": row.rejected.text,
                "kind": kind,
            }
            named = {f"{prefix}{name}": value for name, value in values.items()}
            items.append(Item(id=row.id, group=row.group, values=named, texts=texts))
        return items

    def _kind(self, row: _Row) -> Kind:
        return flaw_kind(row.chosen.text, row.rejected.text, rewritten_from=self.rewritten_from)

    def _facts(
        self, rows: Sequence[_Row], items: Sequence[Item], subject: Subject
    ) -> dict[str, Any]:
        by_group: dict[str, Counter[str]] = {}
        for item in items:
            by_group.setdefault(item.group, Counter())[item.texts["kind"]] += 1
        facts: dict[str, Any] = {
            "rules": RULES,
            "kinds": {group: dict(counts) for group, counts in by_group.items()},
        }
        labelled = self._labels()
        given = [label for _, label in labelled]
        if labelled:
            said = [self._kind(pair) for pair, _ in labelled]
            facts["rules_and_labels"] = agreement_of_kinds(given, said, subject.seed)
        if self.classifier is not None:
            every = [*rows, *(pair for pair, _ in labelled)]
            from prefloop.generate.hf_engine import open_engine

            asked = ask_kinds(open_engine(self.classifier), every)
            rules = [item.texts["kind"] for item in items]
            facts["classifier"] = self.classifier
            facts["classifier_and_rules"] = agreement_of_kinds(
                rules, asked[: len(rows)], subject.seed
            )
            if labelled:
                facts["classifier_and_labels"] = agreement_of_kinds(
                    given, asked[len(rows) :], subject.seed
                )
        return facts


def agreement_of_kinds(
    first: Sequence[str], second: Sequence[str | None], seed: int
) -> dict[str, Any]:
    """Accuracy, Cohen's kappa and the confusion of two namings of the same pairs; JSON values.

    None in `second` is no answer: counted, and in no other figure.
    """
    known = [(a, b) for a, b in zip(first, second, strict=True) if b is not None]
    same = wilson(sum(a == b for a, b in known), len(known))
    kappa = cohen_kappa([a for a, _ in known], [b for _, b in known], seed=seed)
    confusion: dict[str, Counter[str]] = {}
    for a, b in known:
        confusion.setdefault(a, Counter())[b] += 1
    return {
        "pairs": len(first),
        "no_answer": len(first) - len(known),
        "accuracy": asdict(same) if same else None,
        "kappa": asdict(kappa) if kappa else None,
        "confusion": {a: dict(counts) for a, counts in confusion.items()},
    }


def ask_kinds(engine: Engine, rows: Sequence[_Row]) -> list[Kind | None]:
    """The kind that a model finds likeliest; None where it would say none of the letters."""
    asks = [
        Request(
            messages=(
                Message(
                    role="user",
                    content=_QUESTION.format(
                        question=row.prompt.text,
                        chosen=row.chosen.text,
                        rejected=row.rejected.text,
                    ),
                ),
            )
        )
        for row in rows
    ]
    found = [among(row, MIN_MASS) for row in engine.choose(asks, tuple(_LETTERS))]
    return [None if row is None else KINDS[row.index(max(row))] for row in found]


def _planted(round_dir: RoundDir, pairs: Iterable[Pair]) -> Iterator[_Row]:
    flawed = [pair for pair in pairs if pair.origin.get("rejected") == "flawed"]
    if not flawed:
        return
    # Judges may compare with targets, which pairs do not hold.
    prompts = {group.prompt.id: group.prompt for group in round_dir.stream("ranked", Candidates)}
    for pair in flawed:
        yield _Row(
            id=pair.id,
            group=f"round {pair.round}",
            prompt=prompts[pair.prompt_id],
            chosen=_as_text(pair.answer("chosen")),
            rejected=_as_text(pair.answer("rejected")),
        )


def _as_text(answer: Response) -> Response:
    """Both sides encoded the same way, whoever sampled which."""
    return Response(text=answer.text, finish=answer.finish)


def _judge_sight(rows: Sequence[_Row], subject: Subject) -> list[dict[str, float]]:
    """Whether the judge prefers the chosen answer, over both orders; "no_verdict" where it says nothing."""
    if subject.judge is None:
        return [{} for _ in rows]
    prompts = [row.prompt for row in rows]
    texts = [(row.chosen.text, row.rejected.text) for row in rows]
    forward = subject.judge.score(prompts, texts)
    backward = subject.judge.score(prompts, [(b, a) for a, b in texts])
    sight = []
    for one, other in zip(forward, backward, strict=True):
        if isinstance(one, tuple) and isinstance(other, tuple):
            seen = fmean([points(one[0], one[1]), points(other[1], other[0])])
            sight.append({"judge_sees": seen, "no_verdict": 0.0})
        else:
            sight.append({"no_verdict": 1.0})
    return sight


def _estimates(items: Sequence[Item], prefix: str, seed: int) -> dict[str, Estimate]:
    found: dict[str, Estimate | None] = {}
    for name in (*KINDS, "unseen", "no_verdict"):
        values = [v for item in items if (v := item.values.get(f"{prefix}{name}")) is not None]
        found[f"{prefix}{name}"] = wilson(int(sum(values)), len(values))
    for name in ("edit_share", "gap", "judge_sees"):
        values = [v for item in items if (v := item.values.get(f"{prefix}{name}")) is not None]
        found[f"{prefix}{name}"] = bootstrap_mean(values, seed=seed)
    return {name: estimate for name, estimate in found.items() if estimate is not None}
