"""The page as a file: what is in it, what is left beside it, and that nothing in it can act."""

import base64
import gzip
import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prefloop.errors import RunFolderError
from prefloop.report.facts import read_evaluation, read_facts
from prefloop.report.formats import visible
from prefloop.report.html import write_report
from prefloop.report.page_tables import about, measures, notices, recipe_differences, rejects
from prefloop.report.watch import watch_run
from tests.report.conftest import RECIPE, make_run, write_metrics

HOSTILE = {
    "script": "<script>window.hurt = 1</script>",
    "end": "</script><script>window.hurt = 2</script><!-- <script>",
    "image": '<img src="https://example.invalid/x.png" onerror="window.hurt = 3">',
    "style": "</style><style>body{display:none}</style>",
    "link": "[click](javascript:alert(1)) javascript:alert(2) https://example.invalid/a",
    "bidi": "pay \u202e001 $\u202c now \u2066hidden\u2069",
    "invisible": "a\u200bb\ufeffc\x1b[31md\x00e",
    "template": "{{ 7 * 7 }} {% raw %} ${1+1} {# x #}",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 日本語 عربى",
    "lines": "one\u2028two\u2029three\r\nfour",
}


def hostile_text(prompt: str, round: int, name: str) -> str:
    """Every kind of mischief in every text; the prompt's id says which comes first."""
    first = HOSTILE.get(prompt, "")
    return " ".join([first, *HOSTILE.values(), f"{name}-{round}"])


class Page(HTMLParser):
    """A page's elements, as a browser without scripts would find them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or tag

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def chains(self) -> list[dict[str, Any]]:
        packed = base64.b64decode(self.texts["chains"])
        found: list[dict[str, Any]] = json.loads(gzip.decompress(packed))
        return found


def test_a_small_run_is_whole_in_its_page(made_run: Path, tmp_path: Path) -> None:
    written = write_report([made_run], tmp_path / "page.html")
    assert (written.shown, written.total, written.chains_file) == (10, 10, None)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    page = Page(written.page)
    assert [chain["kind"] for chain in page.chains] == [
        *(["pair"] * 3 + ["reject"]) * 2,
        *["held-out"] * 2,
    ]
    assert page.chains[0]["steps"][4]["ratios"]["policy"] == [-1.0, -4.5]
    text = written.page.read_text("utf-8")
    assert "distinct_2 fell to half" in text
    assert "All 10 pairs, rejects and held-out prompts are in this page." in text
    assert page.count("svg") == len(json.loads(page.texts["facts"])["charts"]) + 2


def test_what_a_page_cannot_carry_lies_beside_it_and_a_fair_sample_is_in_it(
    tmp_path: Path,
) -> None:
    names = [f"p{n}" for n in range(40)]
    run = make_run(tmp_path / "run", names=names, rounds=2, reject="p39")
    written = write_report([run], tmp_path / "page.html", limit=20)
    assert (written.shown, written.total) == (20, 82)
    assert written.chains_file == tmp_path / "page.pairs.jsonl.gz"
    with gzip.open(written.chains_file, "rt") as file:
        everything = [json.loads(line) for line in file]
    assert len(everything) == 82
    shown = Page(written.page).chains
    assert all(chain in everything for chain in shown)
    of_rounds = Counter(chain["round"] for chain in shown if chain["kind"] != "held-out")
    assert min(of_rounds[0], of_rounds[1]) >= 9, "evenly picked over the rounds"


def test_a_report_that_fails_leaves_the_older_one_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", names=[f"p{n}" for n in range(40)])
    old = write_report([run], tmp_path / "page.html", limit=20)
    assert old.chains_file is not None
    before = old.page.read_bytes(), old.chains_file.read_bytes()
    (run / "rounds/0001/ranked.jsonl").write_text("no record\n")
    with pytest.raises(RunFolderError, match=r"ranked\.jsonl is 10 bytes long"):
        write_report([run], tmp_path / "page.html", limit=20)
    assert (old.page.read_bytes(), old.chains_file.read_bytes()) == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "run",
        old.page.name,
        old.chains_file.name,
    }


def test_texts_that_do_not_pack_are_left_out_until_the_page_is_small_enough(
    tmp_path: Path,
) -> None:
    def noise(prompt: str, round: int, name: str) -> str:
        return random.Random(f"{prompt}{round}{name}").randbytes(9000).hex()

    run = make_run(tmp_path / "run", names=[f"p{n}" for n in range(60)], rounds=1, text=noise)
    written = write_report([run], tmp_path / "page.html")
    assert written.page.stat().st_size < 3_000_000
    assert 20 <= written.shown < written.total
    assert written.chains_file is not None


def test_an_answer_of_a_megabyte_is_cut_in_the_page_and_whole_beside_it(tmp_path: Path) -> None:
    long = "word " * 200_000

    def text(prompt: str, round: int, name: str) -> str:
        return long if (prompt, name) == ("p0", "refined") else "short"

    run = make_run(tmp_path / "run", rounds=1, text=text)
    written = write_report([run], tmp_path / "page.html")
    assert written.chains_file is not None
    step = Page(written.page).chains[0]["steps"][3]
    assert (len(step["text"]), step["cut"]) == (20_000, 1_000_000)
    with gzip.open(written.chains_file, "rt") as file:
        assert json.loads(next(file))["steps"][3]["text"] == long


def test_a_prompt_of_a_megabyte_is_cut_in_the_page_and_whole_beside_it(tmp_path: Path) -> None:
    long = "word " * 200_000

    def text(prompt: str, round: int, name: str) -> str:
        return long if (prompt, name) == ("p0", "question") else "short"

    written = write_report(
        [make_run(tmp_path / "run", rounds=1, text=text)], tmp_path / "page.html"
    )
    assert "1 have a text that is cut short in it." in written.page.read_text("utf-8")
    ((role, start, whole),) = Page(written.page).chains[0]["prompt"]
    assert (role, len(start), whole) == ("user", 20_000, 1_000_000)
    assert written.chains_file is not None
    with gzip.open(written.chains_file, "rt") as file:
        assert json.loads(next(file))["prompt"] == [["user", long]]


def test_nothing_a_model_or_recipe_says_becomes_part_of_the_page(tmp_path: Path) -> None:
    """The same elements as with harmless texts, and every text comes out as it went in."""
    evil = f"<script>hurt</script> {HOSTILE['image']}"
    recipe = RECIPE.replace("a-model", json.dumps(evil)).replace("prompts.jsonl", "'</title><b>'")
    names = [*HOSTILE]
    run = make_run(
        tmp_path / "<i>run<i>", names=names, text=hostile_text, reject="link", recipe=recipe
    )
    tame = make_run(tmp_path / "_i_run_i_", names=names, reject="link")
    page, quiet = (
        Page(write_report([folder], tmp_path / f"{n}.html").page)
        for n, folder in enumerate((run, tame))
    )
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in quiet.tags]
    chains = {chain["id"]: chain for chain in page.chains}
    for name in HOSTILE:
        steps = {step["name"]: step for step in chains[f"0001/{name}"]["steps"]}
        assert steps["refined"]["text"] == hostile_text(name, 1, "refined")


def test_the_policy_allows_this_pages_own_style_and_script_and_nothing_else(
    made_run: Path, tmp_path: Path
) -> None:
    page = Page(write_report([made_run], tmp_path / "page.html").page)
    text = (tmp_path / "page.html").read_text("utf-8")
    (policy,) = [
        attributes["content"] or ""
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for kind, body in (
        ("style", re.findall(r"<style>(.*?)</style>", text, re.DOTALL)),
        ("script", re.findall(r"<script>(.*?)</script>", text, re.DOTALL)),
    ):
        (only,) = body
        digest = base64.b64encode(hashlib.sha256(only.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]
        assert "src" not in attributes
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_half_a_surrogate_pair_in_a_recipe_or_diary_does_not_stop_the_report(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", rounds=1)
    with (run / "events.jsonl").open("a") as file:
        event = {"time": "2026-01-01T00:00:00+00:00", "event": "guard", "round": 0}
        file.write(json.dumps({**event, "sentence": "half \ud83d"}) + "\n")
    assert "half ⟨U+D83D⟩" in write_report([run], tmp_path / "page.html").page.read_text("utf-8")


def test_hidden_characters_are_shown_by_number_and_emoji_left_whole() -> None:
    assert visible("a\u202eb\x1bc\ud800") == "a⟨U+202E⟩b⟨U+001B⟩c⟨U+D800⟩"
    assert visible(HOSTILE["emoji"]) == HOSTILE["emoji"]
    assert visible("tab\tand\nline") == "tab\tand\nline"


def test_a_run_that_is_going_on_has_a_report_that_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=2)
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(lines[:-1]) + '{"time": "2026-01')
    for path in [*(run / "rounds/0001").glob("*.done.json"), run / "rounds/0000/train.done.json"]:
        path.unlink()
    with (run / "rounds/0000/train/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    text = write_report([run], tmp_path / "page.html").page.read_text("utf-8")
    assert "This run has not ended" in text


def test_a_run_without_any_round_yet_has_a_report(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    (run / "recipe.yaml").write_text(RECIPE)
    written = write_report([run], tmp_path / "page.html")
    assert (written.shown, written.total) == (0, 0)
    assert "No round has been measured yet" in written.page.read_text("utf-8")


def test_tables_count_what_the_rounds_hold(made_run: Path) -> None:
    facts = read_facts(made_run)
    assert rejects(facts) == [
        {"name": "pairs", "cells": [3, 3], "total": 6, "share": 0.75},
        {"name": "pair: cut off", "cells": [1, 1], "total": 2, "share": 0.25},
    ]
    table = measures(facts, training=False)
    assert table["head"] == ["", "start", "0", "1", "change"]
    rows = {row["name"]: row for row in table["rows"]}
    assert [*rows] == ["score", "win_rate", "kl"]
    assert rows["win_rate"]["cells"][1] == ("0.30 to 0.80", "0.600↑")
    assert rows["score"]["change"] == "+2"
    assert [notice["kind"] for notice in notices(facts)] == ["bad"]
    assert facts.seconds == {
        "evaluate": 4.5,
        "generate": 4.0,
        "rank": 2.0,
        "pair": 0.2,
        "train": 8.0,
    }


def test_the_time_is_told_by_stages_that_took_longer_than_a_second(made_run: Path) -> None:
    facts = read_facts(made_run)
    rows = dict(about([facts]))
    assert rows["time"] == ["19 s (evaluate 4.5 s, generate 4.0 s, rank 2.0 s, train 8.0 s)"]
    quick = replace(facts, rounds=[], start_seconds={"evaluate": 0.5})
    assert dict(about([quick]))["time"] == ["0.5 s"]


def test_two_runs_are_compared_where_their_recipes_differ(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", recipe=RECIPE.replace("0.0001", "0.5"))
    facts = [read_facts(one), read_facts(two)]
    assert recipe_differences(facts) == [("train.lr", ["0.0001", "0.5"])]
    page = Page(write_report([one, two], tmp_path / "page.html").page)
    assert {chain["run"] for chain in page.chains} == {0, 1}
    assert json.loads(page.texts["facts"])["runs"] == ["one", "two"]


def test_an_evaluation_is_shown_beside_the_runs_it_measured(made_run: Path, tmp_path: Path) -> None:
    estimate = {"value": 0.625, "low": 0.5, "high": 0.75, "count": 40}
    measures = {"win_rate": {"estimates": {"raw": estimate}}}
    subjects = {
        "made@1": {"source": f"{made_run}@1", "measures": measures},
        "made": {"source": str(made_run), "measures": {}},
        "<b>other": {"source": "a/model", "measures": {}},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps({"subjects": subjects}))
    found = read_evaluation(tmp_path, [read_facts(made_run)])
    assert [(one.subject, one.run) for one in found] == [
        ("made@1", 0),
        ("made", 0),
        ("<b>other", None),
    ]
    page = write_report([made_run], tmp_path / "page.html", evaluations=[tmp_path]).page
    text = page.read_text("utf-8")
    assert "0.625" in text
    assert "0.500 to 0.750, 40" in text
    assert "&lt;b&gt;other" in text
    holes = {"a": {"source": "b", "measures": {"m": {"estimates": {"n": {"value": 1.0}}}}}}
    for damaged in ({"a": 1}, holes):
        (tmp_path / "evaluation.json").write_text(json.dumps({"subjects": damaged}))
        with pytest.raises(RunFolderError, match="no evaluation that prefloop wrote"):
            read_evaluation(tmp_path, [])
    with pytest.raises(RunFolderError, match="name what an evaluation wrote"):
        read_evaluation(tmp_path / "absent", [])


@pytest.mark.parametrize("recipe", [b"name: \xff", b"[1"])
@pytest.mark.parametrize("look", [read_facts, lambda folder: watch_run(folder, Console())])
def test_a_damaged_recipe_is_a_sentence(recipe: bytes, look: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=1)
    (run / "recipe.yaml").write_bytes(recipe)
    (run / "environment.json").unlink()  # else it says so first
    with pytest.raises(RunFolderError, match=r"recipe\.yaml is damaged"):
        look(run)


def test_a_damaged_line_of_metrics_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=1)
    write_metrics(run, b'{"step": 0}\n\xff\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2 is damaged"):
        read_facts(run)


def test_a_folder_in_the_pages_place_is_refused(made_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="name a file with --out"):
        write_report([made_run], tmp_path)
    with pytest.raises(RunFolderError, match=r"no recipe\.yaml"):
        write_report([tmp_path], tmp_path / "page.html")
