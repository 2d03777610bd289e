"""The wheel in an environment of its own, without this checkout: recipes and data are inside, and a run plays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from prefloop.config import SHIPPED

ROOT = Path(__file__).parents[1]
Prefloop = Callable[..., str]


def said(*words: str | Path, folder: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(words, cwd=folder, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the built wheel; what prefloop needs is taken from the environment of the tests."""
    home = tmp_path_factory.mktemp("wheel")
    # Built from a copy: a build leaves folders behind, and old ones would get into the wheel.
    source = home / "source"
    source.mkdir()
    shutil.copytree(
        ROOT / "prefloop", source / "prefloop", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    build = ("wheel", ".", "--no-deps", "--no-build-isolation", "-w", home / "dist")
    said(*pip, *build, folder=source)
    (wheel,) = (home / "dist").glob("*.whl")
    venv = home / "venv"
    said(sys.executable, "-m", "venv", "--without-pip", venv, folder=home)
    python = venv / "bin" / "python"
    said(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, folder=home)
    # Only afterwards, or pip would see the checkout's prefloop there. A path in a .pth file is searched for
    # modules, and .pth files below it (those of editable installs) are not read.
    packages = said(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=home
    )
    (Path(packages.strip()) / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


@pytest.fixture
def prefloop(installed: Path, tmp_path: Path) -> Prefloop:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(*words: str) -> str:
        return said(installed / "bin" / "prefloop", *words, folder=tmp_path, env=env)

    where = "import prefloop; print(prefloop.__file__)"
    found = said(installed / "bin" / "python", "-c", where, folder=tmp_path, env=env)
    assert found.startswith(str(installed))
    return call


@pytest.mark.slow
def test_an_installed_wheel_lists_and_checks_its_recipes(prefloop: Prefloop) -> None:
    listed = [line.split()[0] for line in prefloop("ls", "recipes").splitlines()]
    assert listed == sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    rewards = [line.split()[0] for line in prefloop("ls", "reward-recipes").splitlines()]
    assert rewards == sorted(path.stem for path in (SHIPPED / "reward").glob("*.yaml"))
    for name in ("quickstart-ial", "quickstart-arop", "recipes/quickstart-ial.yaml"):
        assert prefloop("check", name).endswith(": ok\n")
    assert prefloop("compare", "recipes/compare/claims-arop.yaml", "--check").endswith("ok\n")


@pytest.mark.slow
def test_a_run_from_an_empty_folder_plays_with_what_is_in_the_wheel(
    prefloop: Prefloop, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="needs the extra embedded, which make setup installs")
    changes = {
        "loop.rounds": 1,
        "loop.prompts_per_round": 4,
        "evaluate.prompts": 2,
        "method.sampling.max_new_tokens": 8,
        "method.advice.max_new_tokens": 8,
        "method.gates.cut_off": "false",  # nothing ends within eight tokens
        "train.batch_size": 4,
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    assert "report" in prefloop("run", "quickstart-ial", *sets)
    run = tmp_path / "runs" / "quickstart-ial"
    assert (run / "policy" / "adapter_model.safetensors").is_file()
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
