"""The command line called in this process, in a folder with a recipe and data that are good."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from prefloop import cli
from prefloop.recipe import load_recipe
from prefloop.run import loop
from tests.conftest import model_section

ROWS = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(6)]


def recipe(model_folder: Path) -> str:
    sections = {
        "model": model_section(model_folder),
        "data": {"train": "rows.jsonl", "holdout": 2},
        "method": {
            "name": "ial",
            "sampling": {"max_new_tokens": 6},
            "advice": {"max_new_tokens": 4},
            "gates": {"cut_off": False},
        },
        "judge": {"name": "similarity"},
        "loop": {"rounds": 1, "prompts_per_round": 4, "mix_previous": False},
        "generate": {"chunk_size": 2},
        "train": {"batch_size": 4, "micro_batch_size": 2},
        "evaluate": {"prompts": 2},
    }
    return yaml.safe_dump(sections)


def called(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of the entry point, called in this process."""
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["prefloop", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code


class Shell:
    """The entry point, called in this process in a folder with a recipe and data that are good."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path
    ) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.model = model

    def __call__(self, *words: str) -> tuple[int, str]:
        """Exit code and what stands on standard error, notes left out."""
        code = called(self.monkeypatch, *words)
        lines = self.capsys.readouterr().err.splitlines()
        return code, "\n".join(line for line in lines if not line.startswith("note: "))

    def refuses(self, *words: str, saying: tuple[str, ...]) -> None:
        """The whole claim of this file."""
        code, err = self(*words)
        assert code == 2, err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("prefloop: ")
        for part in saying:
            assert part in err


def prepare(folder: Path, model_folder: Path) -> None:
    (folder / "r.yaml").write_text(recipe(model_folder))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


@pytest.fixture
def shell(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model_folder: Path,
) -> Shell:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, model_folder)
    return Shell(monkeypatch, capsys, model_folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    prepare(folder, model_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        loop.run(load_recipe("r.yaml"), folder / "runs/r", Console(file=io.StringIO()))
    return folder / "runs/r"


@pytest.fixture
def run_folder(shell: Shell, finished: Path) -> Path:
    """A copy of the finished run that `prefloop run r.yaml` would go on with."""
    shutil.copytree(finished, "runs/r")
    return Path("runs/r")
