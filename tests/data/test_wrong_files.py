"""Sixty and more wrong data files: each is one sentence that names the file, the line and what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from prefloop.data.prompts import DataOptions, read_prompts
from prefloop.errors import DataError

Use = Literal["p", "t", "2"]
FINE = b'{"prompt": "fine", "response": "good", "chosen": "a", "rejected": "b"}\n'
U, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


class Wrong(NamedTuple):
    """A file, where in it the fault lies, and words of the sentence."""

    name: str
    content: bytes
    where: str
    says: str
    use: Use = "p"
    options: dict[str, Any] = {}  # noqa: RUF012


def second(row: object, says: str, use: Use = "p", **options: Any) -> Wrong:
    """A JSON Lines file whose second line is wrong."""
    return Wrong("rows.jsonl", FINE + json.dumps(row).encode(), ":2", says, use, options)


def talk(*turns: object, says: str) -> Wrong:
    return second({"messages": list(turns)}, says)


def pair(says: str, **row: object) -> Wrong:
    return second(row, says, "2")


def raw(name: str, content: str, where: str, says: str, use: Use = "p", **options: Any) -> Wrong:
    return Wrong(name, content.encode(), where, says, use, options)


GZ = gzip.compress(FINE * 50)
WRONG: dict[str, Wrong] = {
    # Bytes and JSON.
    "cut line": raw("a.jsonl", '{"prompt": "a"}\n{"prompt": "b', ":2", "is not JSON"),
    "two objects in a line": raw("a.jsonl", '{"prompt": "a"}{"prompt": "b"}', ":1", "is not JSON"),
    "single quotes": raw("a.jsonl", "{'prompt': 'a'}\n", ":1", "is not JSON"),
    "trailing comma": raw("a.json", '[{"prompt": "a"},]', ":1", "is not JSON"),
    "key twice": raw("a.jsonl", '{"prompt": "a", "prompt": "b"}', ":1", "stands twice"),
    "key twice inside": raw(
        "a.jsonl", '{"messages": [{"role": "user", "role": "user", "content": "a"}]}', ":1",
        "'role' stands twice",
    ),
    "line is a list": raw("a.jsonl", '["a", "b"]\n', ":1", "is not an object"),
    "line is a text": raw("a.jsonl", '"a"\n', ":1", "is not an object"),
    "item is a number": raw("a.json", '[{"prompt": "a"}, 3]', ", item 2", "is not an object"),
    "two lists": raw(
        "a.json", '{"data": [{"prompt": "a"}], "rows": [{"prompt": "b"}]}', ":1", "'data', 'rows'"
    ),
    "nested without end": raw("a.jsonl", "[" * 100_000, ":1", "cannot be read"),
    "latin-1": Wrong("a.jsonl", '{"prompt": "é"}'.encode("latin-1"), ":1", "is not UTF-8"),
    "UTF-16": Wrong("a.csv", "prompt\nä\n".encode("utf-16"), ":1", "is UTF-16; save"),
    "gzip that is none": Wrong("a.jsonl.gz", FINE, ":1", "cannot be unpacked as .gz"),
    "gzip cut short": Wrong("a.jsonl.gz", GZ[:-9], ":", "cannot be unpacked as .gz"),
    "bzip2 cut short": Wrong("a.jsonl.bz2", bz2.compress(FINE)[:-9], ":", "cannot be unpacked"),
    "zstandard that is none": Wrong("a.jsonl.zst", FINE, ":1", "cannot be unpacked as .zst"),
    "zip": Wrong("a.zip", b"PK\x03\x04", "", "unpack or rename it"),
    "spreadsheet": Wrong("a.xlsx", b"PK\x03\x04", "", "convert or rename it"),
    "Parquet that is none": Wrong("a.parquet", b"PAR1 and no more", "", "write the file again"),
    "Arrow that is none": Wrong("a.arrow", b"ARROW1 and no more", "", "write the file again"),
    # CSV.
    "short CSV line": raw("a.csv", "prompt,response\na,b\nc\n", ":3", "fewer cells"),
    "long CSV line": raw("a.csv", "prompt,response\na,b\nc,d,e\n", ":3", "more cells"),
    "open quote": raw("a.csv", 'prompt\na\n"b\nc\n', ":4", "is not CSV"),
    "column twice": raw("a.csv", "prompt,prompt\na,b\n", ":1", "'prompt' twice"),
    "no header": raw("a.csv", "What is up?,Fine.\nAnd you?,Well.\n", ":2", "has no 'prompt'"),
    "empty cell": raw("a.csv", "prompt,response\na,b\n,c\n", ":3", "is empty; fill it in"),
    "empty question": raw(
        "a.csv", "question;answer\na;b\n;c\n", ":3", "'question' is empty; fill it in"
    ),
    "empty column of an option": raw(
        "a.csv", "ask,reply\na,b\n,c\n", ":3", "'ask' is empty; fill it in", prompt_field="ask"
    ),
    "label in CSV": raw("a.csv", "prompt,response,label\na,b,maybe\n", ":2", "'label' is 'maybe'"),
    "Python's repr in CSV": raw(
        "a.csv", "messages\n\"[{'role': 'user', 'content': 'a'}]\"\n", ":2", "must be a filled list"
    ),
    "a prompt of turns as Python prints them": raw(
        "a.csv", "prompt\n\"[{'role': 'user', 'content': 'a'}]\"\n", ":2", "write the cell as JSON"
    ),
    # Prompts and answers.
    "no known column": second({"text": "a"}, "data.prompt_field"),
    "prompt a number": second({"prompt": 5}, "'prompt' is int, not text"),
    "prompt a list of texts": second({"prompt": ["a"]}, "prompt[0] must be an object"),
    "prompt a picture": second(
        {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "is of type 'image_url'",
    ),
    "response a list": second({"prompt": "a", "response": ["b"]}, "'response' is list, not text"),
    "response blank": second({"prompt": "a", "response": "  "}, "'response' is empty"),
    "half a surrogate pair": second({"prompt": "\ud800"}, "half of a surrogate pair"),
    "no target": second({"prompt": "a"}, "has no target response", "t"),
    "two answers": second({"prompt": "a", "response": "b", "output": "c"}, "'output' would be lost"),
    "pictures": second({"prompt": "a", "images": ["x"]}, "'images' would be lost"),
    "tools": second({"prompt": "a", "tools": [{"name": "f"}]}, "'tools' would be lost"),
    "choices": second({"question": "a", "choices": ["b", "c"]}, "data.ignore: [choices]"),
    "history a text": second({"prompt": "a", "history": "b"}, "'history' must be a list"),
    "history of threes": second({"prompt": "a", "history": [["a", "b", "c"]]}, "'history' must"),
    "two system turns": second(
        {"system": "a", "messages": [{"role": "system", "content": "b"}, U]}, "system turn differ"
    ),
    "named column of the wrong kind": raw(
        "a.jsonl", '{"ask": "a"}\n{"ask": 3}', ":2", "'prompt' is int", prompt_field="ask"
    ),
    "format without its columns": Wrong(
        "a.jsonl", FINE, ":1", "has not the columns of data.format messages", "p",
        {"format": "messages"},
    ),
    "id a list": second({"prompt": "a", "id": [1]}, "'id' must be a text or a whole number"),
    # Turns.
    "turns a text": second({"messages": "a"}, "must be a filled list"),
    "no turns": second({"messages": []}, "must be a filled list"),
    "turn without text": talk({"role": "user"}, says="messages[0] must be an object"),
    "assistant first": talk(A, U, says="has the role 'assistant' where 'user' must stand"),
    "user twice": talk(U, U, says="has the role 'user' where 'assistant' must stand"),
    "system late": talk(U, A, {"role": "system", "content": "x"}, says="has the role 'system'"),
    "tool's turn": talk(U, {"role": "tool", "content": "x"}, says="has the role 'tool'"),
    "tool call": talk(
        U, {"role": "assistant", "content": "x", "tool_calls": [{}]}, says="tools are not read"
    ),
    "thoughts": talk(
        U, {"role": "assistant", "content": "x", "reasoning_content": "hm"},
        says="'reasoning_content', which would be lost",
    ),
    "not to be trained on": talk(U, {**A, "weight": 0}, says="not to be trained on"),
    "empty turn": talk({"role": "user", "content": " "}, says="is empty"),
    # Pairs.
    "no pair": pair("has neither 'chosen' and 'rejected'", prompt="a", response="b"),
    "chosen alone": pair("'chosen' would be lost", prompt="a", chosen="b"),
    "no prompt of a pair": pair("has neither 'prompt' nor 'messages'", chosen="x", rejected="y"),
    "chosen a number": pair("'chosen' is int, not text", prompt="a", chosen=1, rejected="b"),
    "rejected null": pair("'rejected' is empty", prompt="a", chosen="b", rejected=None),
    "ends with the user": pair("ends with the user's turn", prompt="a", chosen=[U], rejected=[U]),
    "prompt elsewhere": pair(
        "is not in the conversation", prompt="x", chosen=[U, A],
        rejected=[U, {"role": "assistant", "content": "B"}],
    ),
    "messages beside a pair": pair(
        "'messages' would be lost", prompt="Q", chosen="x", rejected="y", messages=[U, A]
    ),
    "votes of threes": pair(
        "'annotators' must be", prompt="a", response_1="x", response_2="y", annotators=[3]
    ),
    "no vote": pair("has no 'annotators'", prompt="a", response_1="x", response_2="y"),
    "unknown winner": pair(
        "'winner' is 'both'", conversation_a=[U, A], conversation_b=[U, A], winner="both"
    ),
    "unranked answers": pair(
        "answers[0].rank", prompt="a", answers=[{"answer": "x", "rank": "first"}]
    ),
    "completions without a score": pair(
        "completions[0] has no", prompt="a", completions=[{"response": "x"}]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_sentence_with_its_place_and_a_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = WRONG[name]
    monkeypatch.chdir(tmp_path)
    Path(wrong.name).write_bytes(wrong.content)
    with pytest.raises(DataError) as caught:
        list(
            read_prompts(
                wrong.name,
                DataOptions(**wrong.options),
                needs_target=wrong.use == "t",
                needs_pairs=wrong.use == "2",
            )
        )
    said = str(caught.value)
    assert wrong.says in said
    assert said.startswith(wrong.name + wrong.where) or not wrong.where, said
    assert "\n" not in said
    assert len(said) < 400
    remedy = r"; (add|calling|check|convert|correct|cut|end|every|fetch|fill|let|leave|name|pass|remove|rename|save|set|unpack|write|did)"
    assert re.search(remedy, said) or "must be" in said, said


def test_there_are_sixty_of_them() -> None:
    assert len(WRONG) >= 60
