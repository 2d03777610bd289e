"""Formats: small rows of each as they are published, what three kinds of methods read of them, and docs/data.md."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from prefloop.data.formats import FORMATS
from prefloop.data.preferences import read_preferences
from prefloop.data.prompts import DataOptions, read_prompts
from prefloop.errors import DataError

PAGE = Path(__file__).parents[2] / "docs/data.md"
BEGIN, END = "<!-- table: tests/data/test_formats.py -->\n", "<!-- end of table -->\n"
REFUSED = "refused"

Q, A, B = "Name a colour.", "Blue, like the sky.", "Seven."
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", Q), ("assistant", A), ("assistant", B))
)
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
HUMAN, GPT, WRONG = (
    {"from": who, "value": text} for who, text in (("human", Q), ("gpt", A), ("gpt", B))
)
HH = f"\n\nHuman: {Q}\n\nAssistant: "


def rated(text: str, score: float) -> dict[str, object]:
    return {"response": text, "overall_score": score, "model": "m"}


class Shape(NamedTuple):
    """Rows as one format has them, and what must be read: "p" prompts, "t" targets, "2" pairs."""

    rows: tuple[dict[str, Any], ...]
    reads: str
    system: bool = False
    earlier: bool = False
    remedy: str = ""
    """Where it is refused: what the sentence must name."""
    options: dict[str, Any] = {}  # noqa: RUF012
    """With which it is read after all."""


def one(reads: str, row: dict[str, Any], **facts: Any) -> Shape:
    return Shape((row,), reads, **facts)


PAIR = {"chosen": A, "rejected": B}
SHAPES: dict[str, Shape] = {
    "prompt only": one("p", {"prompt": Q}),
    "prompt, response": one("pt", {"prompt": Q, "response": A}),
    "TRL prompt-completion": one("pt", {"prompt": Q, "completion": A}),
    "TRL prompt-completion, conversational": one("pt", {"prompt": [USER], "completion": [GOOD]}),
    "TRL language modelling, conversational": one("pt", {"messages": [USER, GOOD]}),
    "OpenAI chat with a developer turn": one(
        "pt",
        {"messages": [{"role": "developer", "content": "Be brief."}, USER, GOOD]},
        system=True,
    ),
    "messages with text parts": one(
        "pt",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, GOOD]},
    ),
    "ShareGPT": one("pt", {"conversations": [HUMAN, GPT]}),
    "ShareGPT with a system column": one(
        "pt", {"system": "Be brief.", "conversations": [HUMAN, GPT], "tools": "[]"}, system=True
    ),
    "LMSYS, WildChat": one("pt", {"conversation_id": "1", "conversation": [USER, GOOD]}),
    "Capybara": one("pt", {"conversation": [{"input": Q, "output": A}]}),
    "UltraChat, raw": one("pt", {"id": "1", "data": [Q, A]}),
    "UltraChat 200k": one("pt", {"prompt": Q, "prompt_id": "x", "messages": [USER, GOOD]}),
    "No Robots": one("pt", {"prompt": Q, "messages": [USER, GOOD], "category": "Chat"}),
    "Alpaca": one("pt", {"instruction": Q, "input": "", "output": A, "text": "all of it"}),
    "Alpaca with history and system": one(
        "pt",
        {
            "instruction": Q,
            "output": A,
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
        },
        system=True,
        earlier=True,
    ),
    "Dolly": one("pt", {"instruction": Q, "context": "", "response": A, "category": "open_qa"}),
    "OpenOrca": one("pt", {"system_prompt": "Be brief.", "question": Q, "response": A}, system=True),
    "GSM8K": one("pt", {"question": Q, "answer": A}),
    "MetaMathQA": one("pt", {"query": Q, "response": A, "type": "t"}),
    "MATH": one("pt", {"problem": Q, "solution": A, "level": "1"}),
    "FLAN": one("pt", {"inputs": Q, "targets": A}),
    "input, output": one("pt", {"input": Q, "output": A}),
    "Magpie": one(
        "pt",
        {"instruction": Q, "response": A, "conversations": [HUMAN, GPT], "difficulty": "easy"},
    ),
    "Guanaco": one("pt", {"text": f"### Human: {Q}### Assistant: {A}"}),
    "MT-Bench": one("p", {"turns": [Q, "And another?"], "category": "writing"}),
    "TRL preference": one("pt2", {"prompt": Q, **PAIR}),
    "TRL preference, conversational": one(
        "pt2", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    ),
    "TRL preference, implicit prompt": one("pt2", {"chosen": f"{Q} {A}", "rejected": f"{Q} {B}"}),
    "TRL preference, implicit, conversational": one(
        "pt2", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    ),
    "TRL unpaired preference (KTO)": Shape(
        (
            {"prompt": Q, "completion": A, "label": True},
            {"prompt": Q, "completion": B, "label": False},
        ),
        "pt2",
    ),
    "LLaMA-Factory KTO": Shape(
        (
            {"messages": [USER, GOOD], "kto_tag": True},
            {"messages": [USER, BAD], "kto_tag": False},
        ),
        "pt2",
    ),
    "LLaMA-Factory ranking, ShareGPT": one(
        "pt2", {"conversations": [HUMAN], "chosen": GPT, "rejected": WRONG}
    ),
    "LLaMA-Factory ranking, Alpaca": one("pt2", {"instruction": Q, "input": "", **PAIR}),
    "chosen and rejected as one turn": one("pt2", {"prompt": Q, "chosen": GOOD, "rejected": BAD}),
    "prompt a text, answers whole conversations": one(
        "pt2",
        {
            "prompt": Q,
            "chosen": [SYSTEM, *EARLIER, USER, GOOD],
            "rejected": [SYSTEM, *EARLIER, USER, BAD],
        },
        system=True,
        earlier=True,
    ),
    "HH-RLHF": one("pt2", {"chosen": HH + A, "rejected": HH + B}),
    "HH-RLHF with a prompt": one("pt2", {"prompt": HH, "response": A, **PAIR}),
    "UltraFeedback binarized": one(
        "pt2",
        {
            "prompt": Q,
            "prompt_id": "x",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "messages": [USER, GOOD],
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        },
    ),
    "UltraFeedback, raw": one(
        "pt2",
        {"instruction": Q, "completions": [rated(B, 2.0), rated(A, 9.0), rated("Red.", 5.0)]},
    ),
    "Orca pairs": one("pt2", {"system": "Be brief.", "question": Q, **PAIR}, system=True),
    "Distilabel Orca pairs": one(
        "pt2",
        {"system": "Be brief.", "input": Q, **PAIR, "generations": [A, B], "rating": [9.0, 3.0]},
        system=True,
    ),
    "OpenAI preference": one(
        "pt2",
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
    ),
    "Nectar": one(
        "pt2",
        {
            "prompt": HH,
            "answers": [{"answer": B, "rank": 7.0}, {"answer": A, "rank": 1.0}],
            "turns": 1,
        },
    ),
    "RewardBench": one("pt2", {"prompt": Q, "chosen_model": "m", **PAIR, "subset": "s", "id": 1}),
    "RewardBench 2": one("pt2", {"prompt": Q, "chosen": [A], "rejected": [B], "num_correct": 1}),
    "SPIN": one("pt2", {"real": [USER, GOOD], "generated": [USER, BAD]}),
    "PandaLM": one(
        "pt2", {"prompt": Q, "response_1": B, "response_2": A, "annotators": [2, 2, 1]}
    ),
    "HelpSteer": one("pt", {"prompt": Q, "response": A, "helpfulness": 4}),
    "HelpSteer2 preference": one(
        "pt2", {"prompt": Q, "response_1": A, "response_2": B, "preference_strength": -2}
    ),
    "HelpSteer3": one(
        "pt2", {"context": [USER], "response1": B, "response2": A, "overall_preference": 2}
    ),
    "PKU-SafeRLHF": one(
        "pt2", {"prompt": Q, "response_0": A, "response_1": B, "better_response_id": 0}
    ),
    "AlpacaEval": one("pt2", {"prompt": Q, "output_1": B, "output_2": A, "preference": 2.0}),
    "Chatbot Arena": one(
        "pt2",
        {"conversation_a": [USER, GOOD], "conversation_b": [USER, BAD], "winner": "model_a"},
    ),
    "SHP": one("pt2", {"history": Q, "human_ref_A": A, "human_ref_B": B, "labels": 1}),
    "StackExchange paired": one("pt2", {"question": Q, "response_j": A, "response_k": B}),
    "own column names": one(
        "",
        {"ask": Q, "good": A, "bad": B},
        remedy="data.prompt_field",
        options={"prompt_field": "ask", "chosen_field": "good", "rejected_field": "bad"},
    ),
    "multiple choice": one(
        "", {"question": Q, "choices": [A, B], "gold": 0}, remedy="data.ignore: [choices]",
        options={"ignore": ["choices"]},
    ),
    "an answer with a label in words": one(
        "", {"prompt": Q, "response": A, "label": "safe"}, remedy="data.ignore: [label]",
        options={"ignore": ["label"]},
    ),
    "images": one(
        "", {"prompt": Q, "response": A, "images": ["a.png"]}, remedy="data.ignore: [images]",
        options={"ignore": ["images"]},
    ),
    "tool calls": one(
        "",
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        remedy="remove conversations with tools",
    ),
    "plain text": one("", {"text": "Once upon a time."}, remedy="data.prompt_field"),
    "OASST trees": one(
        "", {"message_id": "a", "parent_id": None, "text": Q, "role": "prompter"},
        remedy="data.prompt_field",
    ),
    "axolotl segments": one(
        "", {"segments": [{"label": True, "text": A}]}, remedy="data.prompt_field"
    ),
}  # fmt: skip


def written(folder: Path, rows: tuple[dict[str, Any], ...]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def outcome(source: str, use: str, **options: Any) -> str | list[Any]:
    """The prompts that a method of one kind gets, or why it gets none."""
    try:
        return list(
            read_prompts(
                source,
                DataOptions.model_validate(options),
                needs_target=use == "t",
                needs_pairs=use == "2",
            )
        )
    except DataError as error:
        return str(error)


def wanted_turns(shape: Shape) -> list[str]:
    return [
        *(["Be brief."] if shape.system else []),
        *(["Hi", "Hello"] if shape.earlier else []),
        Q,
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_gives_its_whole_conversation_and_the_right_answers_or_a_sentence(
    name: str, tmp_path: Path
) -> None:
    shape = SHAPES[name]
    source = written(tmp_path, shape.rows)
    for use in "pt2":
        found = outcome(source, use)
        if use not in shape.reads:
            assert isinstance(found, str), (use, found)
            assert found.startswith(f"{source}:1")
            assert not shape.remedy or shape.remedy in found
            continue
        assert isinstance(found, list), found
        assert [turn.content for turn in found[0].messages] == wanted_turns(shape)
        if use == "t":
            assert [prompt.target for prompt in found] == [A]
        if use == "2":
            assert [(p.chosen, p.rejected) for p in found] == [(A, B)]


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if "2" in shape.reads])
def test_a_reward_model_reads_the_same_pairs(name: str, tmp_path: Path) -> None:
    (pair,) = read_preferences(written(tmp_path, SHAPES[name].rows)).pairs
    assert [turn.content for turn in pair.messages] == wanted_turns(SHAPES[name])
    assert (pair.chosen, pair.rejected) == (A, B)


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.options])
def test_what_is_refused_is_read_with_the_options_that_the_sentence_names(
    name: str, tmp_path: Path
) -> None:
    shape = SHAPES[name]
    (prompt,) = outcome(written(tmp_path, shape.rows), "p", **shape.options)
    assert prompt.text == Q


def test_every_format_of_the_table_has_a_shape_here(tmp_path: Path) -> None:
    from prefloop.data.entries import Tally

    seen = set()
    for shape in SHAPES.values():
        if shape.reads:
            tally = Tally()
            list(read_prompts(written(tmp_path, shape.rows), DataOptions(), tally=tally))
            seen |= set(tally.formats)
    assert seen == {format.name for format in FORMATS}


# Files.


def _csv(path: Path, mark: str) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=mark).writerows([["prompt", "response"], [Q, A]])


def _table() -> Any:
    from pyarrow import Table

    return Table.from_pylist([{"prompt": Q, "response": A}])


def _parquet(path: Path) -> None:
    from pyarrow.parquet import write_table

    write_table(_table(), path)


def _feather(path: Path) -> None:
    from pyarrow.feather import write_feather

    write_feather(_table(), path)


def _stream(path: Path) -> None:
    import pyarrow as pa

    with pa.ipc.new_stream(str(path), _table().schema) as stream:
        stream.write_table(_table())


def _zst(path: Path) -> None:
    import pyarrow as pa

    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(LINE)


LINE = json.dumps({"prompt": Q, "response": A}).encode()
FILES: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(LINE),
    "rows.ndjson": lambda path: path.write_bytes(LINE),
    "rows.json": lambda path: path.write_bytes(b"[" + LINE + b"]"),
    "data.json": lambda path: path.write_bytes(b'{"version": 1, "data": [\n' + LINE + b"]}"),
    "one.json": lambda path: path.write_text(json.dumps({"prompt": Q, "response": A}, indent=2)),
    "rows.csv": lambda path: _csv(path, ","),
    "semicolons.csv": lambda path: _csv(path, ";"),
    "rows.tsv": lambda path: _csv(path, "\t"),
    "rows.parquet": _parquet,
    "rows.feather": _feather,
    "rows.arrow": _stream,
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINE)),
    "rows.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINE)),
    "rows.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINE)),
    "rows.jsonl.zst": _zst,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_kind_is_read(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    (prompt,) = read_prompts(str(tmp_path / name), DataOptions())
    assert (prompt.text, prompt.target) == (Q, A)
    assert prompt.id == f"{name.partition('.')[0]}-1"


# The page.


def table(folder: Path) -> str:
    """The page's table, out of what reading gives."""
    lines = [
        "| format | columns | prompts | targets | pairs | else |",
        "|---|---|---|---|---|---|",
    ]
    for name, shape in SHAPES.items():
        source = written(folder, shape.rows)
        cells, said = [], ""
        for use in "pt2":
            found = outcome(source, use)
            cells.append("yes" if isinstance(found, list) else "refused" if use == "p" else "no")
            if isinstance(found, str) and use == "p":
                said = found.removeprefix(source).removeprefix(":1").lstrip(": ")
        columns = ", ".join(f"`{column}`" for column in shape.rows[0])
        lines.append(f"| {name} | {columns} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_what_reading_gives(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    between = page.partition(BEGIN)[2].partition(END)[0]
    expected = table(tmp_path)
    assert between == expected, "run python tests/data/test_formats.py"


def test_the_page_names_every_format() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [one.name for one in FORMATS if f"| `{one.name}` |" not in page] == []
    assert len(SHAPES) >= 40


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(
            head + BEGIN + table(Path(place)) + END + rest.partition(END)[2], encoding="utf-8"
        )
