"""Rows that were read wrongly without a word: labelled pairs with whole conversations, options that were passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefloop.data.entries import Tally
from prefloop.data.preferences import read_preferences
from prefloop.data.prompts import DataOptions, load_data, read_prompts
from prefloop.errors import DataError

Turn = dict[str, str]


def said(role: str, text: str) -> Turn:
    return {"role": role, "content": text}


LEAD = [
    said("system", "Answer in one word."),
    said("user", "Capital of France?"),
    said("assistant", "Paris."),
    said("user", "And of Italy?"),
]
OTHER = [
    said("user", "Capital of Spain?"),
    said("assistant", "Madrid."),
    said("user", "And of Italy?"),
]
ROME, MILAN = said("assistant", "Rome."), said("assistant", "Milan.")


def written(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(source: str, **options: Any) -> list[tuple[list[tuple[str, str]], Any, Any]]:
    loaded = load_data(
        DataOptions.model_validate({"train": source, **options}),
        needs_target=False,
        needs_pairs=True,
        seed=0,
        count_tokens=None,
    )
    return [
        ([(turn.role, turn.content) for turn in prompt.messages], prompt.chosen, prompt.rejected)
        for prompt in loaded.train
    ]


# A text for a prompt, beside whole conversations.


@pytest.mark.parametrize("prompt", ["And of Italy?", "Capital of France?"])
def test_earlier_turns_and_the_system_turn_of_the_answers_stay(prompt: str, tmp_path: Path) -> None:
    row = {"prompt": prompt, "chosen": [*LEAD, ROME], "rejected": [*LEAD, MILAN]}
    expected = [(turn["role"], turn["content"]) for turn in LEAD]
    assert pairs(written(tmp_path, row)) == [(expected, "Rome.", "Milan.")]
    (pair,) = read_preferences(written(tmp_path, row)).pairs
    assert [(turn.role, turn.content) for turn in pair.messages] == expected


def test_histories_that_differ_are_dropped_and_counted(tmp_path: Path) -> None:
    row = {"prompt": "And of Italy?", "chosen": [*LEAD, ROME], "rejected": [*OTHER, MILAN]}
    source = written(tmp_path, row, {"prompt": "Hi", "chosen": "a", "rejected": "b"})
    assert read_preferences(source).dropped == {"the histories of the two answers differ": 1}
    with pytest.raises(DataError, match=r"histories of the two answers differ, first .*jsonl:1"):
        pairs(written(tmp_path, row))


def test_a_prompt_that_is_not_in_the_conversation_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "And of Peru?", "chosen": [*LEAD, ROME], "rejected": [*LEAD, MILAN]}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the prompt is not in the conversation"):
        pairs(written(tmp_path, row))


def test_a_list_that_ends_with_the_user_is_no_answer(tmp_path: Path) -> None:
    row = {"prompt": "Hi", "chosen": [said("user", "Hi")], "rejected": [said("user", "Hello")]}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 'chosen' ends with the user's turn"):
        read_preferences(written(tmp_path, row))


# Options, and columns beside the pair.

GOOD = [said("user", "Q"), said("assistant", "good")]
WORSE = [said("user", "Q"), said("assistant", "bad")]


@pytest.mark.parametrize(
    ("row", "options", "turns"),
    [
        ({"prompt": "Q", "chosen": GOOD, "rejected": WORSE, "messages": GOOD}, {}, []),
        (
            {"prompt": "Q", "chosen": GOOD, "rejected": WORSE, "messages": GOOD},
            {"messages_field": None},
            [],
        ),
        (
            {"system": "Be brief.", "question": "Q", "chosen": "good", "rejected": "bad"},
            {"prompt_field": "question"},
            ["Be brief."],
        ),
        (
            {"system": "Be brief.", "prompt": "Q", "chosen": "good", "rejected": "bad"},
            {},
            ["Be brief."],
        ),
        (
            {"sys": "Be brief.", "ask": "Q", "plus": "good", "minus": "bad", "prompt": "not this"},
            {
                "system_field": "sys",
                "prompt_field": "ask",
                "chosen_field": "plus",
                "rejected_field": "minus",
            },
            ["Be brief."],
        ),
    ],
)
def test_labelled_pairs_mind_the_columns_that_options_name(
    row: dict[str, Any], options: dict[str, Any], turns: list[str], tmp_path: Path
) -> None:
    expected = [*(("system", text) for text in turns), ("user", "Q")]
    assert pairs(written(tmp_path, row), **options) == [(expected, "good", "bad")]


def test_material_is_put_below_the_prompt_of_a_pair(tmp_path: Path) -> None:
    row = {"prompt": "Translate.", "about": "Hund", "chosen": "dog", "rejected": "cat"}
    found = pairs(written(tmp_path, row), input_field="about")
    assert found == [([("user", "Translate.\n\nHund")], "dog", "cat")]


def test_a_response_may_be_the_chosen_answer_and_stay_one(tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    options = DataOptions(response_field="chosen")
    (prompt,) = read_prompts(written(tmp_path, row), options, needs_target=True)
    assert prompt.target == "good"
    assert pairs(written(tmp_path, row), response_field="chosen")[0][1:] == ("good", "bad")


# Bad answers are no targets.


def kto(folder: Path) -> str:
    return written(
        folder,
        {"prompt": "Q", "completion": "bad", "label": False},
        {"prompt": "Q", "completion": "good", "label": True},
        {"prompt": "Q", "completion": "better", "label": "True"},
        {"prompt": "R", "completion": "lone", "label": 1},
    )


def test_an_answer_with_a_false_label_is_no_target(tmp_path: Path) -> None:
    tally = Tally()
    found = list(read_prompts(kto(tmp_path), DataOptions(), needs_target=True, tally=tally))
    assert [prompt.target for prompt in found] == ["good", "better", "lone"]
    assert tally.dropped == {"label is false": 1}


def test_unpaired_answers_are_paired_by_prompt_and_what_is_left_is_counted(tmp_path: Path) -> None:
    found = read_preferences(kto(tmp_path))
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("good", "bad")]
    assert found.dropped == {"no answer with the other label to its prompt": 2}


@pytest.mark.parametrize(
    ("column", "value"),
    [("history", [["a", "b"]]), ("images", ["x.png"]), ("tools", [{"name": "f"}])],
)
def test_a_column_with_content_is_read_or_refused(
    column: str, value: object, tmp_path: Path
) -> None:
    source = written(tmp_path, {"prompt": "Q", "response": "A", column: value})
    if column == "history":
        (prompt,) = read_prompts(source, DataOptions())
        assert [turn.content for turn in prompt.messages] == ["a", "b", "Q"]
        return
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: '{column}' would be lost.*data\.ignore"):
        list(read_prompts(source, DataOptions()))


def test_ignored_columns_are_named_once_with_how_rows_were_read(tmp_path: Path) -> None:
    source = written(tmp_path, *[{"prompt": "Q", "response": "A", "score": n} for n in (1, 2)])
    loaded = load_data(DataOptions(train=source), needs_target=True, seed=0, count_tokens=None)
    assert loaded.notes == (
        f"{source}: 2 rows read as prompt_response from prompt, response; ignored: score",
    )


# The same cell in a file and in a folder.

CELLS = ["007", "3.10", "None", "NA", "2024-01-31", "true", "1e5"]


@pytest.fixture
def hf_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.usefixtures("hf_cache")
def test_cells_of_csv_are_the_same_texts_in_a_file_and_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    text = "prompt,response\n" + "".join(f"Q{n},{cell}\n" for n, cell in enumerate(CELLS))
    (folder / "train.csv").write_text(text)
    for source in (str(folder / "train.csv"), str(folder)):
        found = read_prompts(source, DataOptions(), needs_target=True)
        assert [prompt.target for prompt in found] == CELLS


@pytest.mark.usefixtures("hf_cache")
@pytest.mark.parametrize("end", ["", "train.jsonl"])
def test_an_object_for_an_answer_is_refused_in_a_file_and_in_a_folder(
    end: str, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": {"a": 5}}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"train\.jsonl:2: response\[0\] must be an object"):
        list(read_prompts(str(folder / end), DataOptions()))


@pytest.mark.usefixtures("hf_cache")
@pytest.mark.parametrize(
    ("split", "expected"),
    [("train[1:3]", "bc"), ("train[-1:]", "d"), ("train[:50%]+test", "abx"), ("test", "x")],
)
def test_slices_and_sums_of_splits_work_on_text_files(
    split: str, expected: str, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.csv").write_text("prompt\na\nb\nc\nd\n")
    (folder / "test.csv").write_text("prompt\nx\n")
    found = read_prompts(str(folder), DataOptions(split=split))
    assert "".join(prompt.text for prompt in found) == expected


@pytest.mark.usefixtures("hf_cache")
def test_published_splits_stand_for_train_and_test(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    def rows(answer: str) -> Dataset:
        return Dataset.from_list([{"prompt": "Q", "chosen": answer, "rejected": "bad"}])

    names = ("train_prefs", "train_sft", "test_prefs", "test_sft")
    DatasetDict({name: rows(name) for name in names}).save_to_disk(str(tmp_path / "set"))
    source = str(tmp_path / "set")
    for part, wants_pairs, expected in [
        ("train", True, "train_prefs"),
        ("train", False, "train_sft"),
        ("eval", True, "test_prefs"),
        ("eval", False, "test_sft"),
    ]:
        (prompt,) = read_prompts(source, DataOptions(), part=part, needs_pairs=wants_pairs)
        assert prompt.target == expected


def test_a_cell_may_be_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("prompt,response\nQ," + "x" * 200_000 + "\n")
    (prompt,) = read_prompts(str(tmp_path / "long.csv"), DataOptions())
    assert prompt.target == "x" * 200_000


@pytest.mark.parametrize("mark", ["csv", "tsv"])
def test_turns_in_a_table_of_texts_are_written_as_json(mark: str, tmp_path: Path) -> None:
    import csv

    turns, answer = [json.dumps(LEAD), json.dumps([ROME])]
    with (tmp_path / f"a.{mark}").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t" if mark == "tsv" else ",")
        table.writerows([["prompt", "chosen", "rejected"], [turns, answer, "Milan."]])
    ((found, chosen, rejected),) = pairs(str(tmp_path / f"a.{mark}"))
    assert (len(found), chosen, rejected) == (4, "Rome.", "Milan.")


def test_json_in_a_text_of_json_lines_is_a_text(tmp_path: Path) -> None:
    text = json.dumps([ROME])
    (prompt,) = read_prompts(written(tmp_path, {"prompt": text, "response": text}), DataOptions())
    assert (prompt.text, prompt.target) == (text, text)


def test_material_that_the_prompt_holds_already_is_not_put_below_it(tmp_path: Path) -> None:
    row = {"prompt": "Translate: Hund", "input": "Hund", "response": "dog"}
    (prompt,) = read_prompts(written(tmp_path, row), DataOptions())
    assert prompt.text == "Translate: Hund"


def test_lists_of_answers_give_every_pair_but_each_target_once(tmp_path: Path) -> None:
    source = written(tmp_path, {"prompt": "Q", "chosen": ["a", "b"], "rejected": ["x", "y"]})
    assert [found[1:] for found in pairs(source)] == [
        ("a", "x"),
        ("a", "y"),
        ("b", "x"),
        ("b", "y"),
    ]
    targets = read_prompts(source, DataOptions(), needs_target=True)
    assert [prompt.target for prompt in targets] == ["a", "b"]


# Several sources.


def numbered(folder: Path, name: str, count: int) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{name} {n}"}) + "\n" for n in range(count)))
    return str(path)


def mixed(folder: Path, *sources: dict[str, Any], seed: int = 0, **options: Any) -> Any:
    made = DataOptions.model_validate({"train": list(sources), **options})
    return load_data(made, needs_target=False, seed=seed, count_tokens=None)


def test_a_mixture_takes_all_some_or_shares_of_its_sources(tmp_path: Path) -> None:
    a, b, c, d = (numbered(tmp_path, name, 12) for name in "abcd")
    found = mixed(
        tmp_path,
        {"source": a},
        {"source": b, "take": 5},
        {"source": c, "weight": 3},
        {"source": d, "weight": 1},
    ).train
    counts = {name: sum(p.id.startswith(f"{name}:") for p in found) for name in "abcd"}
    assert counts == {"a": 12, "b": 5, "c": 12, "d": 4}
    assert len({prompt.id for prompt in found}) == len(found)


def test_what_a_mixture_takes_depends_on_the_seed_alone(tmp_path: Path) -> None:
    source = {"source": numbered(tmp_path, "a", 50), "take": 5}
    ids = [[p.id for p in mixed(tmp_path, source, seed=seed).train] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


def test_each_source_of_a_list_has_its_own_columns(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"ask": "from x"}\n')
    (tmp_path / "y.jsonl").write_text('{"question": "from y"}\n')
    found = mixed(
        tmp_path,
        {"source": str(tmp_path / "x.jsonl"), "prompt_field": "ask"},
        {"source": str(tmp_path / "y.jsonl"), "name": "why"},
    ).train
    assert [(p.id, p.text) for p in found] == [("x:x-1", "from x"), ("why:y-1", "from y")]


def test_evaluation_sets_keep_their_names_and_places(tmp_path: Path) -> None:
    a, b = numbered(tmp_path, "a", 3), numbered(tmp_path, "b", 2)
    loaded = mixed(
        tmp_path, {"source": a}, eval=[{"name": "one", "source": a}, {"name": "two", "source": b}]
    )
    assert loaded.eval_sets == {"one": range(3), "two": range(3, 5)}
    assert [loaded.eval[place].id for place in loaded.eval_sets["two"]] == ["two:b-1", "two:b-2"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train": [{"source": "a.jsonl", "take": 1, "weight": 1.0}]}, "exclude each other"),
        ({"train": [{"source": "a.jsonl"}, {"source": "b/a.csv"}]}, "two sources 'a'"),
        ({"train": [{"source": "a.jsonl"}], "limit": 3}, "say take in each source"),
        ({"train": []}, "data.train is an empty list"),
        ({"train": 5}, "data.train should be a source, or a list"),
        ({"eval": {"source": "a"}}, "data.eval should be a source, or a list"),
        ({"train": [{"source": "a", "weight": -1}]}, r"data\.train\[0\]\.weight"),
        ({"format": "alpacca"}, "no format 'alpacca'; did you mean 'alpaca'"),
        ({"train": [{"sauce": "a.jsonl"}]}, "sauce"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DataOptions.model_validate(options)


def test_taking_more_than_there_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl has 3 usable rows, and take is 4; lower it"):
        mixed(tmp_path, {"source": numbered(tmp_path, "a", 3), "take": 4})


def test_a_recipe_with_lists_survives_being_dumped(tmp_path: Path) -> None:
    from prefloop.recipe import load_recipe

    text = (
        "method: {name: sft}\ndata:\n  train: [a.jsonl, {source: b.csv, weight: 2, ignore: [x]}]\n"
        "  eval: [{name: one, source: c.jsonl}]\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    (tmp_path / "again.yaml").write_text(recipe.dump())
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
    assert [source.title for source in recipe.data.sources("train")] == ["a", "b"]
