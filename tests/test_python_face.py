"""The public face: light to import, the same from every side, and the page's example runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import prefloop
from prefloop.models import sources
from prefloop.run_folder import read_run

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")


def said(code: str) -> list[str]:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True
    )
    return done.stdout.splitlines()


def test_importing_it_imports_nothing_else() -> None:
    loaded = said(
        "import sys; before = set(sys.modules); import prefloop\n"
        "print(*(m.partition('.')[0] for m in set(sys.modules) - before), sep='\\n')"
    )
    assert set(loaded) <= {"prefloop", *sys.stdlib_module_names}
    ours = said("import sys, prefloop; print(*(m for m in sys.modules if m[:8] == 'prefloop'))")
    assert ours == ["prefloop"]


@pytest.mark.parametrize(
    "first", ["", "import prefloop.run.launch, prefloop.evaluate.questions", "prefloop.run"]
)
def test_verbs_are_callable_whatever_was_imported_first_and_stay_packages(first: str) -> None:
    found = said(
        f"import prefloop\n{first}\n"
        "from prefloop import evaluate, run\n"
        "import prefloop.evaluate.questions as questions\n"
        "import prefloop.run.launch\n"
        "print(callable(prefloop.run), callable(evaluate), run is prefloop.run)\n"
        "print(prefloop.run.launch.__name__, questions.__name__)\n"
    )
    assert found == ["True True True", "prefloop.run.launch prefloop.evaluate.questions"]


def test_every_public_name_is_there_and_no_other_is_shown() -> None:
    assert dir(prefloop) == sorted(prefloop.__all__)
    assert all(hasattr(prefloop, name) for name in prefloop.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        _ = prefloop.trainer  # type: ignore[attr-defined]
    assert [name for name in prefloop.__all__ if f"`{name}" not in PAGE] == ["__version__"]


@pytest.mark.slow
def test_type_checkers_see_functions_and_records(tmp_path: Path) -> None:
    (tmp_path / "uses.py").write_text(
        "import prefloop\n"
        "run = prefloop.run('quickstart-ial', quiet=True)\n"
        "reveal_type(run)\n"
        "reveal_type(run.pairs()[0].chosen)\n"
        "reveal_type(prefloop.evaluate(run))\n"
        "prefloop.run(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", str(tmp_path / "uses.py")],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    kinds = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert kinds == ["prefloop.api.Run", "str", "dict[str, Any]"] or kinds == [
        "prefloop.api.Run",
        "builtins.str",
        "builtins.dict[builtins.str, Any]",
    ]
    assert 'incompatible type "int"' in done.stdout


@pytest.fixture(scope="module")
def example(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The page's code, played once with a tiny model in the embedded one's place: its variables, and where."""
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    # Random weights end an answer by chance alone, and a round whose answers are all cut off ends the run.
    code = code.replace('["loop.rounds', '["method.gates.cut_off=false", "loop.rounds')
    assert "gates" in code
    folder = tmp_path_factory.mktemp("notebook")
    space: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr(sources, "_unpacked", lambda name: model_folder)
        exec(compile(code, "docs/python.md", "exec"), space)
    return space, folder


@pytest.mark.slow
def test_the_pages_example_runs_and_its_lists_are_the_runs(
    example: tuple[dict[str, Any], Path],
) -> None:
    space, folder = example
    run, files = space["run"], read_run(folder / "runs/notebook")
    assert [pair for _, pairs in files.pairs() for pair in pairs] == run.pairs() == run.pairs(0)
    assert run.measures() == files.results()
    assert [result.round for result in run.measures()] == [-1, 0]
    assert len(run.candidates()) == files.round(0).count("ranked")
    assert len(run.pairs()) + len(run.rejects()) == 8
    assert run.rounds == [0]
    assert {row["subject"] for row in space["report"]["comparisons"]} == {"notebook"}


@pytest.mark.slow
def test_lists_become_tables(example: tuple[dict[str, Any], Path]) -> None:
    space, _ = example
    run, pairs = space["run"], space["pairs"]
    assert {"prompt", "chosen", "rejected", "target"} <= set(pairs.column_names)
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": run.pairs()[0].chosen}]
    assert list(run.pairs().to_pandas()["chosen"]) == [pair.chosen for pair in run.pairs()]
    table = run.measures().to_pandas()
    assert list(table["round"]) == [-1, 0]
    assert table["score"][1] == run.measures()[1].measures["score"]
    assert run.measures().to_dataset()["round"][:] == [-1, 0]
    assert len(run.candidates().to_dataset()) == len(run.candidates())


def test_mistakes_are_prefloop_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(prefloop.PrefloopError, match="no recipe 'quickstart-ia'; did you mean"):
        prefloop.run("quickstart-ia")
    with pytest.raises(prefloop.PrefloopError, match="nowhere is no run"):
        prefloop.Run("nowhere")
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(prefloop.PrefloopError, match=r"no pairs of round 3; it has those of \[\]"):
        prefloop.Run(tmp_path).pairs(round=3)
    with pytest.raises(TypeError, match="overrides belong to a recipe's name"):
        prefloop.run(prefloop.load_recipe("quickstart-ial"), overrides=["seed=1"])
