"""Data: every format, every refusal in its words, the rounds' prompts, and the embedded set itself."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prefloop.data import prompts as data_module
from prefloop.data.prompts import DataOptions, load_data, read_prompts, round_subset
from prefloop.errors import DataError
from prefloop.records import Message, Prompt

QA = [{"prompt": f"Question {n}?", "response": f"Answer {n}."} for n in range(6)]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def words(text: str) -> int:
    return len(text.split())


def jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(source: str, **options: object) -> list[Prompt]:
    return list(read_prompts(source, DataOptions.model_validate(options)))


def load(train: str, seed: int = 0, needs_target: bool = False, **options: object):
    made = DataOptions.model_validate({"train": train, **options})
    return load_data(made, needs_target=needs_target, seed=seed, count_tokens=words)


def prompts(count: int) -> list[Prompt]:
    turn = Message(role="user", content="?")
    return [Prompt(id=str(n), messages=(turn,)) for n in range(count)]


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    """Data sets are prepared below the test's folder, not in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(tmp_path / "modules"))


# Formats


def expected_qa(stem: str) -> list[Prompt]:
    return [
        Prompt(
            id=f"{stem}-{n}",
            messages=(Message(role="user", content=str(row["prompt"])),),
            target=str(row["response"]),
        )
        for n, row in enumerate(QA, start=1)
    ]


def test_jsonl_rows_become_prompts_with_targets_and_numbered_ids(tmp_path):
    assert read(jsonl(tmp_path / "qa.jsonl", QA)) == expected_qa("qa")


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "qa.jsonl"
    lines = "\n\n".join(json.dumps(row) for row in QA)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\n\n")
    assert read(str(path)) == expected_qa("qa")


@pytest.mark.parametrize("indent", [None, 2])
def test_json_holds_one_list_of_objects(tmp_path, indent):
    path = tmp_path / "qa.json"
    path.write_text(json.dumps(QA, indent=indent))
    assert read(str(path)) == expected_qa("qa")


def test_json_may_hold_lines_of_objects_as_well(tmp_path):
    assert read(jsonl(tmp_path / "qa.json", QA)) == expected_qa("qa")


def test_csv_cells_may_hold_commas_quotes_and_line_ends(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('﻿prompt,response,extra\n"a, ""b""\nc",d,1\ne,,2\n', encoding="utf-8")
    first, second = read(str(path))
    assert (first.text, first.target) == ('a, "b"\nc', "d")
    assert (second.text, second.target) == ("e", None)


def test_parquet_rows_become_prompts(tmp_path, hf_cache):
    from pyarrow import Table
    from pyarrow.parquet import write_table

    write_table(Table.from_pylist(QA), tmp_path / "qa.parquet")
    assert read(str(tmp_path / "qa.parquet")) == expected_qa("qa")


def test_parquet_reads_conversations(tmp_path, hf_cache):
    from pyarrow import Table
    from pyarrow.parquet import write_table

    write_table(Table.from_pylist([{"messages": TURNS}]), tmp_path / "chat.parquet")
    (prompt,) = read(str(tmp_path / "chat.parquet"))
    assert (prompt.text, prompt.target) == ("Hi", "Hello")


def test_a_saved_data_set_is_read_even_if_it_asks_for_tensors(tmp_path, hf_cache):
    from datasets import Dataset

    rows = [{**row, "id": n} for n, row in enumerate(QA)]
    Dataset.from_list(rows).with_format("numpy").save_to_disk(str(tmp_path / "saved"))
    found = read(str(tmp_path / "saved"))
    assert [p.id for p in found] == ["0", "1", "2", "3", "4", "5"]
    assert [p.target for p in found] == [row["response"] for row in QA]


def test_a_saved_data_set_gives_train_and_evaluation_from_its_splits(tmp_path, hf_cache):
    from datasets import Dataset, DatasetDict

    splits = {"train": Dataset.from_list(QA[:4]), "heldout": Dataset.from_list(QA[4:])}
    folder = str(tmp_path / "saved")
    DatasetDict(splits).save_to_disk(folder)
    loaded = load(folder, eval=folder, eval_split="heldout")
    assert [p.text for p in loaded.train] == [row["prompt"] for row in QA[:4]]
    assert [p.id for p in loaded.eval] == ["saved-heldout-1", "saved-heldout-2"]


def test_a_folder_of_data_files_is_read_with_split_slices(tmp_path, hf_cache):
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "train.jsonl", QA)
    assert [p.target for p in read(str(folder), split="train[:2]")] == ["Answer 0.", "Answer 1."]


def test_messages_that_end_with_the_assistant_give_the_target(tmp_path):
    turns = [{"role": "system", "content": "Be kind."}, *TURNS, {"role": "user", "content": "Bye"}]
    rows = [{"messages": turns}, {"messages": [*turns, {"role": "assistant", "content": "Ciao"}]}]
    open_end, answered = read(jsonl(tmp_path / "m.jsonl", rows))
    assert open_end.messages == answered.messages
    assert [turn.role for turn in answered.messages] == ["system", "user", "assistant", "user"]
    assert (open_end.target, answered.target) == (None, "Ciao")


def test_messages_come_before_prompt_and_a_null_option_turns_them_off(tmp_path):
    path = jsonl(tmp_path / "m.jsonl", [{"prompt": "P", "response": "R", "messages": TURNS}])
    with pytest.raises(
        DataError, match=r"m\.jsonl:1: 'prompt', 'response' would be lost beside 'messages'"
    ):
        read(path)
    ignoring = read(path, ignore=("prompt", "response"))
    assert [(p.text, p.target) for p in ignoring] == [("Hi", "Hello")]
    assert [(p.text, p.target) for p in read(path, messages_field=None)] == [("P", "R")]


def test_a_prompt_may_be_a_list_of_turns(tmp_path):
    path = jsonl(tmp_path / "m.jsonl", [{"prompt": TURNS[:1], "response": "Hello"}])
    assert [(p.text, p.target) for p in read(path)] == [("Hi", "Hello")]


def test_alpaca_columns_are_read_by_naming_them(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La"},
    ]
    names = {"prompt_field": "instruction", "input_field": "input", "response_field": "output"}
    found = read(jsonl(tmp_path / "a.jsonl", rows), **names)
    assert [(p.text, p.target) for p in found] == [("Add.\n\n1 and 2", "3"), ("Sing.", "La")]


def test_ids_are_kept_and_unknown_columns_ignored(tmp_path):
    rows = [{"prompt": "a", "id": "x", "score": 3}, {"prompt": "b", "id": 7}, {"prompt": "c"}]
    assert [p.id for p in read(jsonl(tmp_path / "i.jsonl", rows))] == ["x", "7", "i-3"]


def test_ids_can_come_from_another_column_or_from_none(tmp_path):
    path = jsonl(tmp_path / "i.jsonl", [{"prompt": "a", "id": 1, "key": "k"}])
    assert [p.id for p in read(path, id_field="key")] == ["k"]
    assert [p.id for p in read(path, id_field=None)] == ["i-1"]


def test_responses_can_be_ignored(tmp_path):
    path = jsonl(tmp_path / "i.jsonl", [{"prompt": "a", "response": ""}])
    assert [p.target for p in read(path, response_field=None)] == [None]


def test_rows_are_streamed(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"prompt": "a"}\nnot JSON\n')
    rows = read_prompts(str(path), DataOptions())
    assert next(rows).text == "a"
    with pytest.raises(DataError, match=r"s\.jsonl:2"):
        next(rows)


# Refusals

BAD_LINES = {
    "not JSON": ("{oops}", "is not JSON (Expecting property name enclosed in double quotes)"),
    "no object": ("[1, 2]", "is not an object"),
    "no prompt": ('{"text": "q"}', "has no 'prompt' or 'messages' (its columns: 'text')"),
    "null prompt": ('{"prompt": null}', "'prompt' is empty"),
    "empty prompt": ('{"prompt": " "}', "'prompt' is empty"),
    "number": ('{"prompt": 5}', "'prompt' is int, not text"),
    "empty response": ('{"prompt": "a", "response": ""}', "'response' is empty"),
    "list response": ('{"prompt": "a", "response": ["b"]}', "'response' is list, not text"),
    "half a pair": ('{"prompt": "\\ud800"}', "'prompt' holds half of a surrogate pair"),
    "bad id": ('{"prompt": "a", "id": 1.5}', "'id' must be a text or a whole number"),
    "same id": ('{"prompt": "a", "id": "first"}', "repeats the id 'first' of"),
    "messages text": ('{"messages": "a"}', "'messages' must be a filled list"),
    "no messages": ('{"messages": []}', "'messages' must be a filled list"),
    "turn text": ('{"messages": ["a"]}', 'messages[0] must be an object with "role" and "content"'),
    "turn keys": ('{"messages": [{"from": "human"}]}', "messages[0] must be an object"),
    "turn number": (
        '{"messages": [{"role": "user", "content": 1}]}',
        "'messages[0].content' is int, not text",
    ),
    "turn empty": (
        '{"messages": [{"role": "user", "content": ""}]}',
        "'messages[0].content' is empty",
    ),
    "order": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
        "messages[1] has the role 'user' where 'assistant' must stand",
    ),
    "assistant first": (
        '{"messages": [{"role": "assistant", "content": "a"}]}',
        "messages[0] has the role 'assistant' where 'user' must stand",
    ),
    "unknown role": (
        '{"messages": [{"role": "tool", "content": "a"}]}',
        "messages[0] has the role 'tool' where 'user' must stand",
    ),
    "late system": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
        "messages[1] has the role 'system'",
    ),
    "system only": (
        '{"messages": [{"role": "system", "content": "a"}]}',
        "holds a system turn only",
    ),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line_with_a_remedy(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine", "id": "first"}\n\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read(str(path))
    text = str(caught.value)
    assert text.startswith(f"{path}:3")
    assert message in text
    assert "\n" not in text
    assert re.search("; (add|check|convert|correct|every|fill|let|name|remove|set)", text) or (
        "must be" in text
    )


def test_a_missing_target_is_an_error_only_where_it_is_needed(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [QA[0], {"prompt": "a"}])
    assert len(load(path).train) == 2
    with pytest.raises(DataError, match=r"p\.jsonl:2 has no target response.*data\.response_field"):
        load(path, needs_target=True)


def test_the_evaluation_prompts_need_targets_too(tmp_path):
    train, held = jsonl(tmp_path / "t.jsonl", QA), jsonl(tmp_path / "e.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match=r"e\.jsonl:1 has no target"):
        load(train, eval=held, needs_target=True)


def test_a_wrong_encoding_is_named_by_its_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:2 is not UTF-8; save the file as UTF-8"):
        read(str(path))


@pytest.mark.parametrize(
    ("name", "text"), [("e.jsonl", ""), ("e.json", "[]"), ("e.csv", "prompt\n")]
)
def test_an_empty_file_is_an_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(
        DataError, match=r"holds no rows; name a source with prompts in data\.train"
    ):
        read(str(tmp_path / name))


def test_a_missing_file_names_the_nearest_one(tmp_path):
    jsonl(tmp_path / "train.jsonl", QA)
    with pytest.raises(DataError, match=r"no file or folder .*trian\.jsonl; did you mean 'train"):
        read(str(tmp_path / "trian.jsonl"))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; correct the path"):
        read(str(tmp_path / "nowhere" / "train.jsonl"))


def test_a_word_that_is_no_file_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match="no file or folder pandas; a hub data set is written 'owner"
    ):
        read("pandas")


def test_an_unknown_extension_lists_the_known_ones(tmp_path):
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(
        DataError, match=r"ends in none of \.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.parquet"
    ):
        read(str(tmp_path / "a.xlsx"))


def test_an_unknown_embedded_set_names_the_one_there_is():
    with pytest.raises(DataError, match="only embedded data set is 'embedded:instructions'"):
        read("embedded:other")


def test_a_csv_without_a_header_shows_what_it_took_for_one(tmp_path):
    (tmp_path / "h.csv").write_text("What is up?,Not much.\nAnd you?,Fine.\n")
    with pytest.raises(DataError, match=r"h\.csv:2 has no 'prompt'.*'What is up\?', 'Not much\.'"):
        read(str(tmp_path / "h.csv"))


def test_csv_errors_name_the_line_a_row_begins_on(tmp_path):
    (tmp_path / "l.csv").write_text('prompt,response\n"a\nb",c\n" ","d\ne"\n')
    with pytest.raises(DataError, match=r"l\.csv:4: 'prompt' is empty"):
        read(str(tmp_path / "l.csv"))


@pytest.mark.parametrize(
    ("body", "message"),
    [("a,b,c\n", r":2 is not CSV \(more cells"), ('"a"b,c\n', r":2 is not CSV \(")],
)
def test_a_damaged_csv_is_named_by_its_line(tmp_path, body, message):
    (tmp_path / "d.csv").write_text("prompt,response\n" + body)
    with pytest.raises(DataError, match=message):
        read(str(tmp_path / "d.csv"))


def test_a_damaged_json_list_is_named_by_its_line(tmp_path):
    (tmp_path / "d.json").write_text('[{"prompt": "a"},\n{"prompt": }]')
    with pytest.raises(DataError, match=r"d\.json:2 is not JSON"):
        read(str(tmp_path / "d.json"))


def test_items_of_a_json_list_are_counted_from_one(tmp_path):
    (tmp_path / "i.json").write_text('[{"prompt": "a"}, 5]')
    with pytest.raises(DataError, match=r"i\.json, item 2 is not an object"):
        read(str(tmp_path / "i.json"))


def test_a_damaged_parquet_file_is_an_error(tmp_path, hf_cache):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"d\.parquet cannot be read as a data set \("):
        read(str(tmp_path / "d.parquet"))


def test_a_row_of_a_data_set_is_named_by_its_number(tmp_path, hf_cache):
    from datasets import Dataset

    Dataset.from_list([*QA, {"prompt": "", "response": "b"}]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"saved, row 7: 'prompt' is empty"):
        read(str(tmp_path / "saved"))


def test_an_unknown_split_names_those_there_are(tmp_path, hf_cache):
    from datasets import Dataset, DatasetDict

    DatasetDict({"first": Dataset.from_list(QA)}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"no split 'train', there are: first.*data\.split"):
        read(str(tmp_path / "saved"))


def test_a_hub_data_set_that_cannot_be_reached_is_an_error(hf_cache, monkeypatch):
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub (offline)\nmore")

    monkeypatch.setattr("datasets.load_dataset_builder", offline)
    with pytest.raises(
        DataError, match=r"nobody/nothing cannot be read .*\(Couldn't reach.*network$"
    ):
        read("nobody/nothing")


def test_a_hub_data_set_gets_its_subset_and_split(hf_cache, monkeypatch):
    from datasets import Dataset

    asked = []

    def hub(name: str, subset: str | None, *, split: str) -> Dataset:
        asked.append((name, subset, split))
        return Dataset.from_list(QA)

    monkeypatch.setattr("datasets.load_dataset", hub)
    monkeypatch.setattr(
        "datasets.load_dataset_builder",
        lambda *_: SimpleNamespace(config=SimpleNamespace(data_files=None)),
    )
    load("owner/name.v2", eval="owner/name.v2", subset="clean", eval_split="validation")
    assert asked == [
        ("owner/name.v2", "clean", "train"),
        ("owner/name.v2", "clean", "validation"),
    ]


# Loading


def test_long_rows_are_dropped_and_counted(tmp_path):
    rows = [{"prompt": "a b c", "response": "d"}, {"prompt": "a", "response": "b c d e"}, QA[0]]
    train, held = jsonl(tmp_path / "t.jsonl", rows), jsonl(tmp_path / "e.jsonl", rows)
    limits = {"max_prompt_tokens": 2, "max_response_tokens": 3}
    loaded = load(train, eval=held, needs_target=True, **limits)
    assert [p.text for p in loaded.train] == [p.text for p in loaded.eval] == ["Question 0?"]
    assert loaded.dropped == {
        "prompt too long": 1,
        "response too long": 1,
        "eval: prompt too long": 1,
        "eval: response too long": 1,
    }


def test_the_length_limits_are_inclusive_and_count_all_turns(tmp_path):
    turns = [*TURNS, {"role": "user", "content": "Bye"}]
    path = jsonl(tmp_path / "t.jsonl", [{"messages": turns}])
    assert len(load(path, max_prompt_tokens=3).train) == 1
    with pytest.raises(DataError, match=r"every row of .* is too long; raise data\.max_"):
        load(path, max_prompt_tokens=2)


def test_a_long_response_matters_only_where_targets_are_needed(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", QA)
    assert len(load(path, max_response_tokens=1).train) == 6
    with pytest.raises(DataError, match="too long"):
        load(path, max_response_tokens=1, needs_target=True)


def test_no_length_is_checked_without_a_tokenizer(tmp_path):
    options = DataOptions(train=jsonl(tmp_path / "t.jsonl", QA), max_prompt_tokens=1)
    loaded = load_data(options, needs_target=True, seed=0, count_tokens=None)
    assert (len(loaded.train), loaded.dropped) == (6, {})


def test_limit_takes_the_first_usable_rows_and_reads_no_further(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"prompt": "too long for us"}, {"prompt": "a"}, {"prompt": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not JSON\n")
    loaded = load(str(path), limit=2, max_prompt_tokens=1)
    assert [p.text for p in loaded.train] == ["a", "b"]


def test_holdout_is_drawn_by_seed_and_leaves_training(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", QA)
    loaded = load(path, holdout=2)
    assert len(loaded.eval) == 2
    assert sorted(p.id for part in (loaded.train, loaded.eval) for p in part) == [
        f"t-{n}" for n in range(1, 7)
    ]
    assert list(load(path, holdout=2).eval) == list(loaded.eval)
    assert len({load(path, holdout=2, seed=s).eval[0].id for s in range(20)}) > 1


def test_copies_of_held_out_prompts_leave_training_too(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [QA[0], QA[0], QA[0], QA[1]])
    for seed in range(8):
        loaded = load(path, holdout=1, seed=seed)
        assert loaded.eval[0].text not in {p.text for p in loaded.train}
        lost = loaded.dropped.get("copy of a held-out prompt", 0)
        assert len(loaded.train) + len(loaded.eval) + lost == 4


def test_without_eval_and_holdout_there_is_no_evaluation_data(tmp_path):
    assert len(load(jsonl(tmp_path / "t.jsonl", QA)).eval) == 0


def test_a_holdout_of_everything_is_an_error(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [*QA, *QA])
    with pytest.raises(DataError, match=r"data\.holdout is 6 of 6 different prompts; lower it"):
        load(path, holdout=6)


def test_holdout_and_eval_exclude_each_other():
    with pytest.raises(ValidationError, match=r"data\.holdout and data\.eval exclude each other"):
        DataOptions(eval="a.jsonl", holdout=1)


def test_the_embedded_set_brings_its_own_evaluation_split():
    loaded = load("embedded:instructions", needs_target=True)
    assert (len(loaded.train), len(loaded.eval), loaded.dropped) == (600, 72, {})


def test_the_embedded_set_can_be_held_out_from_or_evaluated_on(tmp_path):
    assert len(load("embedded:instructions", holdout=24).train) == 576
    path = jsonl(tmp_path / "t.jsonl", [{"question": "a"}])
    loaded = load(path, eval="embedded:instructions", prompt_field="question")
    assert (len(loaded.train), len(loaded.eval)) == (1, 72)


# Rounds

SIZES = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(SIZES, st.integers(0, 2**63), st.integers(1, 30))
def test_rounds_walk_whole_permutations_and_never_hold_a_prompt_twice(sizes, seed, rounds):
    count, size = sizes
    items = prompts(count)
    walked: list[str] = []
    for number in range(rounds):
        subset = [items[i] for i in round_subset(count, round=number, size=size, seed=seed)]
        ids = [prompt.id for prompt in subset]
        assert len(set(ids)) == len(ids) == size
        walked += ids
    for start in range(0, len(walked), count):
        epoch = walked[start : start + count]
        assert len(set(epoch)) == len(epoch)


def test_a_round_depends_on_its_arguments_only():
    drawn = [round_subset(50, round=n, size=10, seed=1) for n in range(5)]
    assert drawn[3] == round_subset(50, round=3, size=10, seed=1)
    assert drawn[3] != round_subset(50, round=3, size=10, seed=2)


def test_the_second_walk_has_another_order():
    first, second = (round_subset(30, round=n, size=30, seed=0) for n in range(2))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(30))


@pytest.mark.parametrize("size", [0, 5])
def test_a_round_larger_than_the_data_is_an_error(size):
    with pytest.raises(DataError, match=rf"a round of {size} prompts cannot be drawn from 4; set"):
        round_subset(4, round=0, size=size, seed=0)


# The embedded instructions

FOLDER = Path(data_module.__file__).parent / "instructions"
SHIPPED = {
    name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_bytes().splitlines()]
    for name in ("train", "eval")
}
ITEMS = SHIPPED["train"] + SHIPPED["eval"]
CATEGORIES = {
    "facts",
    "rewriting",
    "lists",
    "arithmetic",
    "explanations",
    "advice",
    "classification",
    "refusals",
}


def bag(text: str) -> set[str]:
    return set(re.findall(r"[\w']+", text.lower()))


def test_every_item_has_its_four_fields_filled():
    for item in ITEMS:
        assert list(item) == ["id", "prompt", "response", "category"]
        assert all(value == value.strip() != "" for value in item.values())


@pytest.mark.parametrize(("name", "least"), [("train", 200), ("eval", 64)])
def test_all_categories_are_spread_evenly(name, least):
    rows = SHIPPED[name]
    counts = Counter(row["category"] for row in rows)
    assert len(rows) >= least
    assert counts.keys() == CATEGORIES
    assert len(set(counts.values())) == 1
    assert {row["category"] for row in rows[:8]} == CATEGORIES


def test_ids_prompts_and_responses_are_unique_across_both_splits():
    for field in ("id", "prompt", "response"):
        counts = Counter(item[field].casefold() for item in ITEMS)
        assert [value for value, n in counts.items() if n > 1] == []


def test_no_two_prompts_are_nearly_the_same():
    bags = [(item["id"], bag(item["prompt"])) for item in ITEMS]
    near = [(i, j) for (i, a), (j, b) in combinations(bags, 2) if len(a & b) > 0.6 * len(a | b)]
    assert near == []


def test_prompts_are_short_and_answers_to_the_point():
    assert max(words(item["prompt"]) for item in ITEMS) <= 60
    lengths = [words(item["response"]) for item in ITEMS]
    assert max(lengths) <= 45
    assert sum(length >= 3 for length in lengths) >= 0.95 * len(lengths)


OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
EQUATION = re.compile(rf"(\(?{NUMBER}(?:\)? [-+×÷] \(?{NUMBER})+\)?) = ({NUMBER})")


def value(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))
    assert isinstance(node, ast.Constant)
    return float(node.value)


def equations(text: str) -> list[tuple[float, float]]:
    plain = str.maketrans({"×": "*", "÷": "/", ",": None})
    return [
        (value(ast.parse(left.translate(plain), mode="eval").body), float(right.replace(",", "")))
        for left, right in EQUATION.findall(text)
    ]


def test_every_equation_in_an_answer_holds():
    for item in ITEMS:
        found = equations(item["response"])
        assert len(found) == item["response"].count(" = "), item
        assert (len(found) > 0) == (item["category"] == "arithmetic"), item
        for left, right in found:
            assert left == pytest.approx(right, abs=1e-9), item


def test_arithmetic_answers_use_the_numbers_asked_about():
    def numbers(text: str) -> set[str]:
        return set(re.findall(r"\d+(?:[.:]\d+)?", text))

    for item in ITEMS:
        if item["category"] == "arithmetic":
            assert numbers(item["prompt"]) <= numbers(item["response"]), item
