"""Local files converted to the columns of the Hub's data sets, for lm-eval's own task definitions.

The YAML files in this folder name these functions; lm-eval calls them with the task's metadata, of which
`folder` is ours. docs/leaderboard.md shows the files' fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from prefloop.data.files import DataFile, Located, read_file
from prefloop.errors import DataError

Row = dict[str, Any]

# Only HellaSwag's validation set is used here: few-shot examples are its first rows, questions the others.
HELLASWAG_EXAMPLES = 100


def arc_challenge(folder: str, **_: Any) -> Mapping[str, Dataset]:
    """Few-shot examples come from the training and validation sets together."""
    return {
        "train": _read(folder, "arc_challenge_trainval.jsonl", _arc),
        "test": _read(folder, "arc_challenge_test.jsonl", _arc),
    }


def hellaswag(folder: str, **_: Any) -> Mapping[str, Dataset]:
    """Few-shot examples are the first 100 rows (half of a shorter file), questions the others."""
    rows = _read(folder, "hellaswag_val.jsonl", _hellaswag)
    examples = min(HELLASWAG_EXAMPLES, len(rows) // 2)
    return {
        "train": rows.select(range(examples)),
        "validation": rows.select(range(examples, len(rows))),
    }


def winogrande(folder: str, **_: Any) -> Mapping[str, Dataset]:
    """Training and validation rows; they need no change."""
    return {
        "train": _read(folder, "winogrande_train.jsonl", _winogrande),
        "validation": _read(folder, "winogrande_val.jsonl", _winogrande),
    }


def gsm8k(folder: str, **_: Any) -> Mapping[str, Dataset]:
    """Training and test rows; they need no change."""
    return {
        "train": _read(folder, "gsm8k_train.jsonl", _gsm8k),
        "test": _read(folder, "gsm8k_test.jsonl", _gsm8k),
    }


def truthfulqa_mc2(folder: str, **_: Any) -> Mapping[str, Dataset]:
    """Questions only: the six few-shot examples are part of lm-eval's prompt."""
    return {"validation": _read(folder, "truthfulqa_mc.jsonl", _truthfulqa)}


def mmlu(folder: str, config_source: str, **_: Any) -> Mapping[str, Dataset]:
    """One subject's rows; `config_source` is the path of lm-eval's file on it (mmlu_SUBJECT.yaml)."""
    subject = Path(config_source).stem.removeprefix("mmlu_")

    def of_subject(row: Row) -> Row | None:
        return _mmlu(row) if row["subject"] == subject else None

    return {
        "dev": _read(folder, "mmlu_dev.jsonl", of_subject),
        "test": _read(folder, "mmlu_test.jsonl", of_subject),
    }


def _arc(row: Row) -> Row:
    labels = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    return {
        "question": row["question"],
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def _hellaswag(row: Row) -> Row:
    """Rows without `ctx_a` and `ctx_b` hold the whole, cleaned context in `ctx`."""
    return {
        "activity_label": row["activity"],
        "ctx_a": row.get("ctx_a", row["ctx"]),
        "ctx_b": row.get("ctx_b", ""),
        "endings": row["endings"],
        "label": str(row["gold"]),
    }


def _winogrande(row: Row) -> Row:
    return {name: row[name] for name in ("sentence", "option1", "option2", "answer")}


def _gsm8k(row: Row) -> Row:
    return {name: row[name] for name in ("question", "answer")}


def _truthfulqa(row: Row) -> Row:
    def targets(answers: Mapping[str, int]) -> Row:
        return {"choices": list(answers), "labels": list(answers.values())}

    return {
        "question": row["question"],
        "mc1_targets": targets(row["mc1"]),
        "mc2_targets": targets(row["mc2"]),
    }


def _mmlu(row: Row) -> Row:
    return {
        "question": row["question"],
        "subject": row["subject"],
        "choices": row["choices"],
        "answer": row["gold"],
    }


def _read(folder: str, name: str, convert: Callable[[Row], Row | None]) -> Dataset:
    """The rows of a file, converted by `convert`; rows that become None are left out."""
    path = Path(folder) / name
    rows = []
    try:
        located = _located(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); put it there, or leave out `folder` to use "
            "the hub's data"
        ) from error
    for where, row in located:
        try:
            rows.append(convert(dict(row)))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(
                f"{where} is no row of this benchmark ({type(error).__name__}: {error}); "
                "docs/leaderboard.md shows the fields"
            ) from error
    if not any(rows):
        raise DataError(
            f"{path} holds no rows that are asked for; docs/leaderboard.md shows the fields"
        )
    return Dataset.from_list([row for row in rows if row is not None])


@lru_cache(maxsize=2)
def _located(path: Path, changed_ns: int) -> tuple[Located, ...]:
    """A file's rows with their locations; cached, as MMLU's 57 subjects read the same file."""
    return tuple(read_file(DataFile(path, str(path), ".jsonl", "")))
