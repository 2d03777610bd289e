"""A pair's chain on a console, and for programs."""

import io
import json
from pathlib import Path

from rich.console import Console

from prefloop.report.summary import run_json, show_run
from tests.report.conftest import make_run
from tests.report.test_html import HOSTILE, hostile_text


def shown(folder: Path, pair: str) -> str:
    console = Console(file=io.StringIO(), width=60)
    show_run(folder, console, pair=pair, count=0)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_chain_is_told_step_by_step_with_differences_from_what_each_was_made_from(
    made_run: Path,
) -> None:
    text = shown(made_run, "0000/p0")
    names = ["user", "draft a", "draft b", "critique", "refined (chosen", "flawed (rejected"]
    places = [text.index(f"\n{name}") for name in names]
    assert places == sorted(places)
    assert "The [-draft_a-]{+refined+} answer to p0 in round 0 says seven.\n" in text
    assert "The [-refined-]{+flawed+} answer to p0" in text
    assert "severity_honesty 2" in text


def test_what_training_changed_names_the_tokens_that_changed_most(made_run: Path) -> None:
    text = shown(made_run, "0000/p0")
    assert "what training changed in rejected\nr = -4 nats over 2 tokens; most in\n" in text
    assert "   -4.00  end of turn  (-0.50 before, -4.50 after)\n" in text
    assert "what training changed" not in shown(made_run, "0001/p0")


def test_a_reject_can_be_asked_for_by_its_prompt(made_run: Path) -> None:
    text = shown(made_run, "p3")
    assert text.count("reject 000") == 2
    assert "rejected by pair: cut off: after 48 tokens" in text


def test_hostile_text_steers_no_terminal(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", names=[*HOSTILE], text=hostile_text, reject="link")
    text = shown(run, "0000/bidi")
    assert "pay ⟨U+202E⟩001 $⟨U+202C⟩ now" in text
    assert not {"\x1b", "\u202e", "\x00"} & set(text)
    assert HOSTILE["script"] in text


def test_the_same_for_programs(made_run: Path) -> None:
    found = json.loads(run_json(made_run, pair=None, count=2))
    assert [pair["id"] for pair in found["pairs"]] == ["0001/p2", "0001/p1"]
    assert found["rejects"]["1"] == {"cut off": 1}
    assert found["results"][0]["measures"]["score"] == 1.0
    (chain,) = json.loads(run_json(made_run, pair="0000/p1", count=0))["chains"]
    assert chain["steps"][3]["roles"] == ["chosen"]
