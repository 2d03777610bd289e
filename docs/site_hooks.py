"""How MkDocs makes a site of this repository: `make docs`.

The pages are written to be read in the repository, where a link such as ../prefloop/run/loop.py works. Here the files
outside docs/ that any page links to become pages too: Markdown as it is, code with numbered lines, and a link
whose text is a function's name goes to its line. The API reference is made from docstrings by mkdocstrings.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
PROJECT = {
    "README.md": "project/readme.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
}
API = {
    "methods": ("Methods", ["prefloop.methods"]),
    "judges": ("Judges", ["prefloop.judges"]),
    "losses": ("Losses", ["prefloop.train.losses"]),
    "measures": (
        "Measures and statistics",
        [
            "prefloop.evaluate.measures",
            "prefloop.evaluate.stats",
            "prefloop.evaluate.win_rates",
            "prefloop.evaluate.agreement",
            "prefloop.evaluate.agreement",
            "prefloop.evaluate.answers",
        ],
    ),
    "records": ("Records and runs", ["prefloop.records", "prefloop.run_folder", "prefloop.errors"]),
    "engines": ("Engines", ["prefloop.generate.engine", "prefloop.generate.engines"]),
}
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".jinja": "jinja"}


def on_config(config: Any) -> None:
    """Fill in the navigation's stars, so that a new page has a place without an edit."""
    named = set(re.findall(r"[\w./-]+\.md", str(config.nav)))
    config.nav = [filled for entry in config.nav if (filled := _filled(entry, named)) != {}]


def _filled(entry: Any, named: set[str]) -> Any:
    """An entry of the navigation with pages for its stars; {} where there are none."""
    if isinstance(entry, list):
        return [_filled(one, named) for one in entry]
    if isinstance(entry, dict):
        filled = {title: _filled(inside, named) for title, inside in entry.items()}
        return {title: inside for title, inside in filled.items() if inside}
    if entry.endswith("*"):
        pages = sorted((ROOT / "docs" / entry).parent.glob("*.md"))
        places = [page.relative_to(ROOT / "docs").as_posix() for page in pages]
        return [place for place in places if place not in named]
    return entry


def on_files(files: Any, config: Any) -> None:
    """Add the pages that do not lie in docs/."""

    def add(uri: str, text: str) -> None:
        level = InclusionLevel.NOT_IN_NAV if uri.startswith("source/") else InclusionLevel.INCLUDED
        files.append(File.generated(config, uri, content=text, inclusion=level))

    for source, uri in PROJECT.items():
        add(uri, (ROOT / source).read_text("utf-8"))
    for name, (title, modules) in API.items():
        add(f"api/{name}.md", f"# {title}\n\n" + "\n\n".join(f"::: {one}" for one in modules))
    places = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    pages = {place: ROOT / place for place in places if (ROOT / place).is_file()}
    pages |= {source: ROOT / source for source in PROJECT}
    linked = {
        target
        for place, path in pages.items()
        for _, link in LINK.findall(FENCE.sub("", path.read_text("utf-8")))
        if (target := _outside(place, link)) is not None
    }
    for target in sorted(linked - PROJECT.keys()):
        add(f"source/{target}.md", _source_page(target))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository as links between pages of the site."""
    uri = page.file.src_uri
    place = next((source for source, made in PROJECT.items() if made == uri), f"docs/{uri}")

    def moved(match: re.Match[str]) -> str:
        text, link = match.groups()
        target = _target(place, link)
        if target is None:
            return match.group()
        anchor = link.partition("#")[2]
        if target in PROJECT:
            goal = PROJECT[target]
        elif _in_site(target):
            goal = target.removeprefix("docs/")
        else:
            goal = f"source/{target}.md"
            line = line_of(ROOT / target, text)
            anchor = f"__codelineno-0-{line}" if line else ""
        relative = posixpath.relpath(goal, posixpath.dirname(uri) or ".")
        return f"[{text}]({relative}{f'#{anchor}' if anchor else ''})"

    return _outside_fences(markdown, lambda text: LINK.sub(moved, text))


def on_page_content(html: str, page: Any, **_: Any) -> None:
    """Tell the check of links of the lines' anchors, which are made too late for it to see."""
    found = set(re.findall(r'id="(__codelineno-[\d-]+)"', html))
    page.present_anchor_ids = (page.present_anchor_ids or set()) | found


def line_of(path: Path, text: str) -> int | None:
    """Where the class, method or function that a link's text names begins; None where it names none."""
    name = re.fullmatch(r"`([\w.]+)`", text)
    if name is None or path.suffix != ".py" or name[1].endswith(".py"):
        return None
    inside: Any = ast.parse(path.read_text("utf-8"))
    for part in name[1].split("."):
        kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        inside = next(
            (node for node in inside.body if isinstance(node, kinds) and node.name == part), None
        )
        if inside is None:
            return None
    return int(inside.lineno)


def _target(place: str, link: str) -> str | None:
    """The file of the repository that a link on a page means; None for other links."""
    path = link.partition("#")[0]
    if not path or re.match(r"\w+:", link):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
    return target if (ROOT / target).is_file() else None


def _in_site(target: str) -> bool:
    """Whether MkDocs copies the file; the scripts in docs/ it leaves out."""
    return target.startswith("docs/") and not target.endswith(".py")


def _outside(place: str, link: str) -> str | None:
    target = _target(place, link)
    return None if target is None or _in_site(target) else target


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    pieces = FENCE.split(markdown)
    return "".join(text if place % 2 else change(text) for place, text in enumerate(pieces))


def _source_page(target: str) -> str:
    path = ROOT / target
    language = LANGUAGES.get(path.suffix, "text")
    # As long a fence as no file has, so that a fence inside one ends nothing.
    fence = "`" * 12
    text = path.read_text("utf-8").rstrip("\n")
    return (
        "---\nsearch: {exclude: true}\n---\n"
        f'# {target}\n\n{fence}{language} linenums="1"\n{text}\n{fence}\n'
    )
