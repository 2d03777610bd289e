"""The page in a real browser, from disk: people's way through it, and that hostile text stays text.

One browser for all of it. Skipped where there is no browser.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefloop.report.html import write_report
from tests.browser import chromium, expect
from tests.report.conftest import make_run
from tests.report.test_html import HOSTILE, hostile_text


class Visit:
    """A page that is open, with everything it complained about or asked for."""

    def __init__(self, page: Any, path: Path, address: str = "") -> None:
        self.page = page
        self.wrong: list[str] = []
        page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: self.wrong.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: self.requested.append(request.url))
        self.requested: list[str] = []
        page.goto(f"file://{path}{address}")
        self.waits_for(" of ")

    def waits_for(self, count: str) -> None:
        # Not by a script in the page: its policy refuses to evaluate one.
        expect(self.page.locator("#count")).to_contain_text(count)

    @property
    def count(self) -> str:
        return str(self.page.inner_text("#count"))

    @property
    def detail(self) -> str:
        return str(self.page.inner_text("#detail"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    one, two = make_run(folder / "one"), make_run(folder / "two", rounds=1)
    evil = make_run(folder / "<u>evil", names=[*HOSTILE], text=hostile_text, reject="link")
    empty = make_run(folder / "empty", text=lambda prompt, round, name: "" if round < 1 else "yes")
    many = make_run(folder / "many", names=[f"p{n}" for n in range(60)], rounds=1, reject="p59")
    return {
        "two": write_report([one, two], folder / "two.html").page,
        "evil": write_report([evil], folder / "evil.html").page,
        "empty": write_report([empty], folder / "empty.html").page,
        "many": write_report([many], folder / "many.html", limit=20).page,
    }


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    yield context.new_page()
    context.close()


def test_the_way_through_the_page(page: Any, pages: dict[str, Path]) -> None:
    visit = Visit(page, pages["two"])
    assert visit.count == "16 of 16"
    page.select_option("#kind", "reject")
    visit.waits_for("3 of ")
    page.click("#list .row >> nth=0")
    assert "Rejected by pair: cut off. after 48 tokens" in visit.detail
    page.click("text=Clear")
    page.fill("#search", "FLAWED answer to p1")
    visit.waits_for("3 of ")
    page.click("#list .row >> nth=1")
    assert page.inner_text("#detail h3 >> nth=0") == "pair 0001/p1"
    assert page.inner_text(".step.rejected ins") == "flawed"
    assert page.inner_text(".step.rejected del") == "refined"
    page.keyboard.press("d")
    assert not page.is_visible(".step.rejected del")
    page.click("text=Clear")
    page.uncheck("input[data-run='0']")
    visit.waits_for("6 of ")
    assert page.locator(".of-run.of-0:visible").count() == 0
    assert page.locator("svg .of-run.of-1:visible").count() > 0
    page.select_option("#sort", "margin")
    page.click("#list .row >> nth=0")
    assert "M 0.75" in page.inner_text(".row[aria-selected=true]")
    page.fill("#margin-to", "0.5")
    visit.waits_for("2 of ")
    assert visit.wrong == []
    assert visit.requested == [f"file://{pages['two']}"]


def test_the_keyboard_alone_is_enough(page: Any, pages: dict[str, Path]) -> None:
    visit = Visit(page, pages["two"])
    page.keyboard.press("/")
    page.keyboard.type("p2")
    visit.waits_for("3 of ")
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.inner_text("#detail h3 >> nth=0") == "pair 0001/p2"
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("k")
    assert page.inner_text("#detail h3 >> nth=0") == "pair 0000/p2"
    assert visit.page.url.endswith("#pair=0/0000%2Fp2")


def test_an_address_opens_its_pair_and_tokens_say_what_training_changed(
    page: Any, pages: dict[str, Path]
) -> None:
    visit = Visit(page, pages["two"], "#pair=0/0000%2Fp0")
    assert "What training changed" in visit.detail
    page.hover(".learnt .step.rejected .tokens span >> nth=1")
    reading = page.inner_text(".token-reading")
    assert reading == "end of turn: policy -4.5, reference -0.5, change -4 nats"
    assert page.get_attribute(".learnt .step.rejected .tokens span >> nth=1", "class") == "down-4"


def test_values_can_be_read_off_a_picture(page: Any, pages: dict[str, Path]) -> None:
    Visit(page, pages["two"])
    picture = page.locator("#rounds svg >> nth=0")
    box = picture.bounding_box()
    picture.hover(position={"x": box["width"] - 8, "y": box["height"] / 2})
    assert page.inner_text("#rounds .reading >> nth=0").split() == ["round", "1:", "3"]


def test_hostile_text_is_shown_and_does_nothing(page: Any, pages: dict[str, Path]) -> None:
    visit = Visit(page, pages["evil"], "#pair=0/0000%2Fscript")
    for _ in range(12):
        page.keyboard.press("j")
    page.keyboard.press("k")
    assert page.evaluate("window.hurt === undefined")
    for text in (HOSTILE["script"], HOSTILE["image"], HOSTILE["link"], HOSTILE["template"]):
        assert text in visit.detail
    assert HOSTILE["emoji"] in visit.detail
    assert "pay U+202E001 $U+202C now" in visit.detail
    assert "aU+200BbU+FEFFcU+001B[31mdU+0000e" in visit.detail
    assert page.locator("#detail img, #detail a, #detail script, #detail style").count() == 0
    assert page.evaluate("getComputedStyle(document.body).display") == "block"
    assert page.inner_text("h1").endswith("<u>evil")
    assert visit.wrong == []
    assert len(visit.requested) == 1


def test_the_policy_stops_what_would_get_past_the_escapes(
    page: Any, pages: dict[str, Path]
) -> None:
    """A style, a request and markup that are put into the page on purpose are refused."""
    visit = Visit(page, pages["evil"])
    refused: list[str] = []
    page.on("requestfailed", lambda request: refused.append(f"{request.url} {request.failure}"))
    page.evaluate(
        """() => {
        const script = document.createElement('img');
        script.src = 'https://example.invalid/x.png';
        document.body.append(script);
        const style = document.createElement('style');
        style.textContent = 'body { display: none }';
        document.head.append(style);
        try { document.body.innerHTML = '<p>gone</p>'; } catch { }
    }"""
    )
    page.wait_for_timeout(100)
    assert page.evaluate("getComputedStyle(document.body).display") == "block"
    assert page.is_visible("h1")
    assert any("Content Security Policy" in text for text in visit.wrong)
    assert refused == ["https://example.invalid/x.png csp"]


def test_half_a_surrogate_pair_and_a_megabyte_are_shown(page: Any, pages: dict[str, Path]) -> None:
    visit = Visit(page, pages["many"])
    lines = [
        '{"id": "0/half", "kind": "pair", "round": 0, "run": 0, "prompt": [["user", "\\ud83d!"]]}',
        '{"id": "0/long", "kind": "pair", "round": 0, "run": 0, "steps": [{"name": "draft", '
        f'"text": "{"word " * 200_000}"}}]}}',
        '{"id": "0/cut", "kind": "pair", "round": 0, "run": 0, "prompt": [["user", "begins", 1000000]]}',
    ]
    file = {"name": "all.jsonl", "mimeType": "text/plain", "buffer": "\n".join(lines).encode()}
    page.set_input_files("#open-all", files=[file])
    visit.waits_for("3 of 3")
    page.click("#list .row >> nth=2")
    assert "begins\n\nCut here; the whole text has 1,000,000 characters" in visit.detail
    page.click("#list .row >> nth=0")
    assert "U+D83D!" in visit.detail
    page.keyboard.press("j")
    assert len(visit.detail) < 30_000
    page.click("text=show all 1,000,000 characters")
    assert page.evaluate("document.getElementById('detail').textContent.length") > 1_000_000
    assert visit.wrong == []


def test_what_was_made_from_an_empty_answer_is_marked_as_new(
    page: Any, pages: dict[str, Path]
) -> None:
    visit = Visit(page, pages["empty"], "#pair=0/eval-0")
    assert page.inner_text("#detail .step ins") == "yes"
    assert visit.detail.count("(empty)") == 2
    assert visit.wrong == []


def test_a_pair_of_which_one_answer_has_no_tokens_is_sorted_by_the_others(
    page: Any, pages: dict[str, Path]
) -> None:
    visit = Visit(page, pages["many"])
    ratios = {"pieces": ["no", ""], "policy": [-1.0, -2.0], "reference": [-1.0, -1.0]}
    rejected = {"name": "flawed", "text": "no", "roles": ["rejected"], "ratios": ratios}
    steps = [{"name": "draft", "text": "", "roles": ["chosen"]}, rejected]
    chains = [{"id": "0/a", "kind": "pair", "round": 0, "run": 0, "steps": steps[:1]}]
    chains.append({**chains[0], "id": "0/b", "steps": steps})
    lines = "\n".join(map(json.dumps, chains)).encode()
    file = {"name": "all.jsonl", "mimeType": "text/plain", "buffer": lines}
    page.set_input_files("#open-all", files=[file])
    visit.waits_for("2 of 2")
    page.select_option("#sort", "learnt")
    page.click("#list .row >> nth=0")
    assert "r = -1 nats over 2 tokens" in visit.detail
    assert visit.wrong == []


def test_all_pairs_can_be_opened_from_beside_the_page(page: Any, pages: dict[str, Path]) -> None:
    visit = Visit(page, pages["many"])
    assert visit.count == "20 of 20"
    page.set_input_files("#open-all", pages["many"].with_name("many.pairs.jsonl.gz"))
    visit.waits_for("62 of 62")
    # Only what is in sight exists.
    assert page.locator("#list .row").count() < 30
    page.focus("#list")
    page.keyboard.press("End")
    assert page.inner_text("#detail h3 >> nth=0").startswith("held-out eval-1")
    assert visit.wrong == []


def test_a_phone_has_no_sideways_scroll_and_dark_is_dark(
    browser: Any, pages: dict[str, Path]
) -> None:
    size = {"width": 390, "height": 844}
    context = browser.new_context(viewport=size, color_scheme="dark")
    visit = Visit(context.new_page(), pages["two"])
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 390
    background = "getComputedStyle(document.body).backgroundColor"
    assert visit.page.evaluate(background) == "rgb(18, 22, 27)"
    visit.page.click("#theme")
    assert visit.page.evaluate(background) == "rgb(255, 255, 255)"
    visit.page.emulate_media(media="print")
    assert not visit.page.is_visible("#filters")
    context.close()
