"""Several training sources and evaluation sets in a run: mixed for training, measured together and apart."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from prefloop.records import Candidates
from tests.run.test_loop import play, recipe


def rows(folder: Path, name: str, count: int) -> str:
    path = folder / f"{name}.jsonl"
    lines = [{"prompt": f"{name} {n}?", "response": f"{name} is {n}."} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_run_mixes_its_sources_and_measures_each_evaluation_set(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    chat, maths = rows(tmp_path, "chat", 6), rows(tmp_path, "maths", 9)
    data = {
        "train": [{"source": chat, "take": 3}, {"source": maths, "take": 5}],
        "eval": [{"name": "talk", "source": chat}, {"name": "sums", "source": maths}],
    }
    made = recipe(
        model_folder,
        "ial",
        data=data,
        loop={"rounds": 1},
        evaluate={"prompts": 2, "introspection": False},
    )
    outcome = play(made, tmp_path / "run")
    round_dir = outcome.folder / "rounds" / "start"
    lines = (round_dir / "answers.jsonl").read_text().splitlines()
    answers = [Candidates.model_validate_json(line) for line in lines]
    assert [a.prompt.id for a in answers] == [
        "talk:chat-1",
        "talk:chat-2",
        "sums:maths-1",
        "sums:maths-2",
    ]
    measures = outcome.results[0].measures
    for name in ("talk", "sums"):
        own = [a.scores["answer"] for a in answers if a.prompt.id.startswith(name)]
        assert measures[f"score_on_{name}"] == pytest.approx(fmean(own))
    both = (measures["score_on_talk"] + measures["score_on_sums"]) / 2
    assert measures["score"] == pytest.approx(both)
    events = [
        json.loads(line) for line in (outcome.folder / "events.jsonl").read_text().splitlines()
    ]
    (read,) = [
        event for event in events if event.get("event") == "data" or event.get("name") == "data"
    ][:1]
    assert read["train"] == 8
    assert any("6 rows read as prompt_response" in note for note in read["notes"])
