"""The page in a real browser: a round of votes with a kill in the middle, hostile text, keys.

Skipped where there is no browser.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefloop.annotate.items import read_comparison
from prefloop.annotate.votes import read_votes
from tests.annotate.conftest import Command, write_answers
from tests.browser import chromium, expect

Start = Callable[..., Command]


class Visitor:
    """Somebody at the page, with everything that it complained about or asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", lambda request: self.requests.append(request.url))

    def joins(self, link: str, name: str = "Ann") -> None:
        self.page.goto("about:blank")  # a new fragment alone would load no page
        self.page.goto(link)
        self.page.fill("#name", name)
        self.page.keyboard.press("Enter")
        expect(self.page.locator("#bar")).to_be_visible()
        if self.page.locator("#help-dialog").is_visible():
            self.page.keyboard.press("Enter")

    def settles(self) -> None:
        self.page.wait_for_timeout(170)  # votes within 150 ms of a new item are not taken

    def shows(self, done: int, total: int) -> None:
        expect(self.page.locator("#count")).to_have_text(f"{done} of {total}")

    @property
    def item(self) -> str:
        return str(self.page.locator("body").get_attribute("data-item"))

    def text(self, place: str) -> str:
        return str(self.page.locator(place).text_content())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def ann(browser: Any) -> Iterator[Visitor]:
    context = browser.new_context()
    yield Visitor(context.new_page())
    context.close()


KEYS = {"1": "first", "ArrowLeft": "first", "2": "second", "ArrowRight": "second", "0": "tie"}


class Round:
    """A scripted round: what the votes must come to is written down beside."""

    def __init__(self, ann: Visitor, total: int) -> None:
        self.ann, self.total = ann, total
        self.expected: dict[str, str] = {}
        self.random = random.Random(0)

    def votes(self) -> None:
        """One decision, by key or by button; now and then a skip, or a vote that is undone."""
        ann, place = self.ann, len(self.expected)
        item, key = ann.item, self.random.choice(list(KEYS))
        self.expected[item] = self.choice(key)
        ann.settles()
        if place % 10 == 4:
            ann.page.keyboard.press("s")
            ann.page.keyboard.press("2")
            self.expected[item] = "skip"
        elif place % 10 == 7:
            ann.page.click(f"#vote-{KEYS[key]}")
        else:
            ann.page.keyboard.press(key)
        ann.shows(place + 1, self.total)
        if place % 10 == 2:
            ann.page.keyboard.press("u")
            ann.shows(place, self.total)
            assert ann.item == item
            ann.settles()
            ann.page.keyboard.press("0")
            self.expected[item] = "tie"
            ann.shows(place + 1, self.total)

    def choice(self, key: str) -> str:
        answer = KEYS[key]
        return answer if answer == "tie" else self.ann.text(f"#{answer}")[0]


@pytest.mark.parametrize("total", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_round_with_a_kill_in_the_middle_loses_no_vote(
    total: int, folder: Path, command: Start, ann: Visitor
) -> None:
    write_answers(total)
    server = command()
    ann.joins(server.link)
    script = Round(ann, total)
    for _ in range(total // 2):
        script.votes()

    server.process.kill()
    server.process.wait()
    ann.settles()
    lost = ann.item
    ann.page.keyboard.press("1")
    expect(ann.page.locator("#trouble")).to_contain_text("Not saved: the server does not")
    ann.shows(total // 2, total)
    own = [f"http://127.0.0.1:{server.link.split(':')[2].partition('/')[0]}/"]

    server = command()
    own.append(server.link.partition("#")[0])
    ann.joins(server.link)
    ann.shows(total // 2, total)
    assert ann.item == lost
    while len(script.expected) < total:
        script.votes()
    expect(ann.page.locator("#done")).to_be_visible()

    stored = read_votes(
        Path("annotations/a-vs-b.jsonl"), read_comparison("a.jsonl", "b.jsonl")
    ).ballots.votes("ann")
    assert {item: vote.choice for item, vote in stored.items()} == script.expected
    assert len(stored) == total
    lines = Path("annotations/a-vs-b.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds.count("vote") == total + kinds.count("undo")
    assert ann.requests
    assert not [url for url in ann.requests if not url.startswith((*own, "about:"))]
    assert [text for text in ann.complaints if "ERR_CONNECTION_REFUSED" not in text] == []


HOSTILE = [
    "<script>window.hacked = 1; fetch('http://example.com/')</script>",
    '<img src="http://example.com/x.png" onerror="window.hacked = 2">',
    "</div></section><iframe src='javascript:parent.hacked=3'></iframe>",
    "[link](javascript:window.hacked=4) ![](http://example.com/y.png)",
    "\u202e reversed \u2066 never closed",
    "&lt;b&gt; stays as it is & so does this; \u0000 too",
    "x" * 3000,
    "\U0001f600 emoji \u200d\U0001f468\u200d\U0001f469",
]


def test_hostile_text_is_shown_as_text_and_nothing_runs(
    folder: Path, command: Start, ann: Visitor
) -> None:
    write_answers(len(HOSTILE), {n: (text, f"plain {n}") for n, text in enumerate(HOSTILE)})
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    for name in "ab":
        others = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
        for row, other in zip(rows, others, strict=True):
            other["prompt"] += row["answer"]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    Path("how.md").write_text(HOSTILE[0] + HOSTILE[1])
    server = command("--instructions", "how.md")
    ann.page.set_viewport_size({"width": 390, "height": 700})
    ann.joins(server.link, "<img src=x onerror=alert(1)>")
    assert ann.text("#instructions") == HOSTILE[0] + HOSTILE[1]
    assert ann.text("#who") == "<img src=x onerror=alert(1)>"
    seen = set()
    for done in range(len(HOSTILE)):
        texts = {ann.text("#first"), ann.text("#second")}
        seen |= texts
        (odd,) = texts & set(HOSTILE)
        assert ann.text("#prompt .text").endswith(odd)
        assert ann.page.locator("#work :is(script, img, iframe, a)").count() == 0
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert ann.page.evaluate(wide) == 0
        isolated = "getComputedStyle(document.getElementById('first')).unicodeBidi"
        assert ann.page.evaluate(isolated) in ("isolate", "plaintext")
        ann.settles()
        ann.page.keyboard.press("1")
        ann.shows(done + 1, len(HOSTILE))
    assert set(HOSTILE) <= seen
    assert ann.page.evaluate("window.hacked") is None
    own = server.link.partition("#")[0]
    assert not [url for url in ann.requests if not url.startswith((own, "about:"))]
    assert ann.complaints == []


@pytest.mark.slow
def test_a_policy_of_the_browser_stands_behind_the_page(
    folder: Path, command: Start, ann: Visitor
) -> None:
    """Even a mistake in the page could not make markup of text: the browser refuses to."""
    ann.joins(command().link)
    for attempt in (
        "document.getElementById('first').innerHTML = '<b>x</b>'",
        "document.body.setAttribute('onclick', 'window.hacked=1'); document.body.click()",
    ):
        ann.page.evaluate(f"() => {{ try {{ {attempt} }} catch (error) {{}} }}")
    ann.page.evaluate("() => { fetch('http://127.0.0.1:9/').catch(() => {}) }")
    ann.page.wait_for_timeout(100)
    assert ann.page.locator("#first b").count() == 0
    assert ann.page.evaluate("window.hacked") is None
    assert any("Trusted" in text for text in ann.complaints)
    assert any("connect-src" in text for text in ann.complaints)


@pytest.mark.slow
def test_only_deliberate_keys_vote(folder: Path, command: Start, ann: Visitor) -> None:
    ann.page.goto(command().link)
    ann.page.fill("#name", "")
    ann.page.keyboard.type("A1 0")  # letters of a name are no votes
    ann.page.keyboard.press("Enter")
    ann.shows(0, 6)
    ann.settles()
    ann.page.keyboard.down("1")
    ann.shows(1, 6)
    ann.settles()
    ann.page.keyboard.down("1")  # still held: the browser repeats it
    ann.page.keyboard.up("1")
    ann.page.keyboard.press("Control+0")
    ann.page.keyboard.press("?")
    ann.page.keyboard.press("2")  # read the instructions first
    ann.page.keyboard.press("Escape")
    ann.page.keyboard.press("s")
    ann.page.keyboard.press("Escape")
    ann.page.wait_for_timeout(100)
    ann.shows(1, 6)
    ann.page.keyboard.press("s")
    ann.page.fill("#reason", "both 1 and 2 are cut off")
    ann.page.keyboard.press("Enter")
    ann.shows(2, 6)
    stored = read_votes(Path("annotations/a-vs-b.jsonl"), read_comparison("a.jsonl", "b.jsonl"))
    votes = list(stored.ballots.votes("a1 0").values())
    assert votes[1].reason == "both 1 and 2 are cut off"
    assert ann.complaints == []


def test_a_key_that_was_meant_for_the_last_item_does_not_decide_the_next(
    folder: Path, command: Start, ann: Visitor
) -> None:
    ann.joins(command().link)
    ann.settles()
    press = "document.dispatchEvent(new KeyboardEvent('keydown', {key: '1'}))"
    watch = "observe(document.body, {attributes: true, attributeFilter: ['data-item']})"
    ann.page.evaluate(f"() => new MutationObserver(() => {press}).{watch}")
    ann.page.keyboard.press("1")
    ann.shows(1, 6)
    ann.page.wait_for_timeout(100)
    ann.shows(1, 6)
    ann.settles()
    ann.page.evaluate(press)
    ann.shows(2, 6)


@pytest.mark.slow
def test_a_link_without_its_secret_shows_no_prompt(
    folder: Path, command: Start, ann: Visitor
) -> None:
    link = command().link
    ann.page.goto(link.partition("#")[0])
    expect(ann.page.locator("#locked")).to_be_visible()
    ann.page.goto("about:blank")
    ann.page.goto(link[:-3])
    ann.page.fill("#name", "Ann")
    ann.page.keyboard.press("Enter")
    expect(ann.page.locator("#trouble")).to_contain_text("not of this session")
    assert not ann.page.locator("#work").is_visible()


@pytest.mark.slow
def test_two_people_get_their_own_order_and_meet_in_the_report(
    folder: Path, command: Start, browser: Any
) -> None:
    server = command()
    orders = {}
    for name in ("Ann", "Bob"):
        context = browser.new_context()
        visitor = Visitor(context.new_page())
        visitor.joins(server.link, name)
        orders[name] = []
        for done in range(6):
            orders[name].append((visitor.item, visitor.text("#first")[0]))
            visitor.settles()
            visitor.page.keyboard.press("1" if visitor.text("#first")[0] == "a" else "2")
            visitor.shows(done + 1, 6)
        context.close()
    assert orders["Ann"] != orders["Bob"]
    assert sorted(item for item, _ in orders["Ann"]) == sorted(item for item, _ in orders["Bob"])
    code, out = server.end(signal.SIGINT)
    assert code == 0
    assert "Ann is done with all 6" in out
    assert "the same vote in 1.000 of the cases" in out
