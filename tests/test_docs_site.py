"""The documentation as a site: it builds without a warning, asks nothing of the network, and its lines are right."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

from tests.browser import chromium, expect

pytest.importorskip("material", reason="needs the extra docs, which make setup installs")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_functions_line_is_found_by_its_name(hooks: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(
        "import re\n\n\n@final\nclass A:\n    def f(self):\n        pass\n\n\ndef f():\n    pass\n"
    )
    assert hooks.line_of(path, "`A`") == 5
    assert hooks.line_of(path, "`A.f`") == 6
    assert hooks.line_of(path, "`f`") == 10
    assert [hooks.line_of(path, text) for text in ("`A.g`", "`code.py`", "a text")] == [None] * 3


def test_links_lead_to_the_sites_pages_and_code_blocks_are_left_alone(hooks: ModuleType) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="methods/ial.md"))
    text = (
        "[log](../log.md#one) [`IAL.generate`](../../prefloop/methods/ial.py) [x](https://e.org/a.md) "
        "[me](../../CONTRIBUTING.md#adding-a-judge) [none](../none.md)\n"
        "```\n[log](../../prefloop/run/loop.py)\n```\n"
    )
    found = hooks.on_page_markdown(text, page)
    line = hooks.line_of(ROOT / "prefloop/methods/ial.py", "`IAL.generate`")
    source = "../source/prefloop/methods/ial.py.md"
    assert found == (
        f"[log](../log.md#one) [`IAL.generate`]({source}#__codelineno-0-{line}) [x](https://e.org/a.md) "
        "[me](../project/contributing.md#adding-a-judge) [none](../none.md)\n"
        "```\n[log](../../prefloop/run/loop.py)\n```\n"
    )


def test_every_module_of_the_api_reference_exists(hooks: ModuleType) -> None:
    for _, modules in hooks.API.values():
        for name in modules:
            assert importlib.util.find_spec(name), name


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Dead links, dead anchors and pages without a place in the navigation end the build."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_there_and_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()
    for name in ("project/readme.html", "api/records.html", "source/prefloop/run/loop.py.html"):
        assert (site / name).is_file()
    ids: dict[Path, set[str]] = {}
    for page in site.rglob("*.html"):
        for link in re.findall(r'<a [^>]*href="([^"]+)"', page.read_text("utf-8")):
            parts = urlsplit(link.replace("&amp;", "&"))
            if parts.scheme or page.name == "404.html":
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{link} in {page}"
            if parts.fragment and target.suffix == ".html":
                if target not in ids:
                    found = re.findall(r'\bid="?([^\s">]+)', target.read_text("utf-8"))
                    ids[target] = set(found)
                assert unquote(parts.fragment) in ids[target], f"{link} in {page}"


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = r'<(?:script|img|iframe|source)[^>]+src="([^"]+)"|<link[^>]+href="([^"]+)"'
    for page in site.rglob("*.html"):
        for pair in re.findall(loaded, page.read_text("utf-8")):
            assert not re.match(r"(https?:)?//", "".join(pair)), f"{pair} in {page}"
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", sheet.read_text("utf-8")), sheet


@pytest.mark.slow
def test_a_link_to_a_function_leads_to_its_line(site: Path) -> None:
    text = (site / "methods/ial.html").read_text("utf-8")
    (line,) = set(
        re.findall(
            r'href="\.\./source/prefloop/methods/ial\.py\.html#__codelineno-0-(\d+)"><code>IAL\.rank',
            text,
        )
    )
    code = (ROOT / "prefloop/methods/ial.py").read_text("utf-8").splitlines()
    assert code[int(line) - 1].strip().startswith("def rank(")


@pytest.mark.slow
def test_the_api_reference_has_the_docstrings(site: Path) -> None:
    text = (site / "api/records.html").read_text("utf-8")
    assert 'id="prefloop.records.Pair.margin"' in text
    assert "what the implicit reward difference must exceed" in text


@pytest.mark.slow
def test_search_works_from_disk_and_asks_nobody(site: Path) -> None:
    wrong: list[str] = []
    with chromium() as browser:
        page = browser.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: wrong.append(request.url) if "http" in request.url[:5] else 0
        )
        page.goto(f"file://{site}/methods/ial.html")
        page.keyboard.press("s")
        page.keyboard.type("identical_rate")
        found = page.locator(".md-search-result__item")
        expect(found.first).to_be_visible(timeout=20_000)
        assert "Measures" in " ".join(found.all_inner_texts())
    assert wrong == []
