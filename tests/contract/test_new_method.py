"""Adding a method touches one file: one that is written here is found, listed, checked, documented and run."""

import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import prefloop.methods
from prefloop.cli import app
from prefloop.config import find_plugin, plugin_names
from prefloop.errors import RecipeError
from prefloop.methods import Method
from prefloop.recipe import load_recipe
from prefloop.recipe.check import check_recipe
from prefloop.recipe.schema import json_schema
from prefloop.records import Pair
from prefloop.run.loop import run
from prefloop.run_folder import read_run

LONGER = '''"""Longer answers over shorter ones.

Source: nobody; it is here to be added.
"""

from pydantic import Field

from prefloop.methods import Method, pair_of
from prefloop.methods._pair_method import drafts
from prefloop.train import losses


class Longer(Method):
    """The longer of two drafts over the shorter."""

    beta: float = Field(default=0.5, gt=0.0)
    """Inverse temperature."""

    def generate(self, prompts, actors):
        yield from drafts(prompts, actors, self.sampling, 2)

    def rank(self, groups, actors):
        yield from groups

    def pair(self, ranked, round):
        for group in ranked:
            short, long = sorted(group.responses, key=lambda n: len(group.responses[n].text))
            yield pair_of(group, long, short, round)

    def loss(self, logps, progress):
        r_c, r_r = (logps.ratio(role) for role in self.roles)
        return losses.LossOutput(losses.dpo(r_c, r_r, beta=self.beta), {})
'''

RECIPE = """
model: {{source: "{model}", device: cpu, dtype: float32}}
method: {{name: {name}, beta: 0.25, sampling: {{max_new_tokens: 6}}}}
engine: {{name: fake}}
loop: {{rounds: 1, prompts_per_round: 4}}
train: {{lr: 1.0e-3, batch_size: 2, micro_batch_size: 2}}
evaluate: {{prompts: 2}}
guard: {{min_stop_rate: 0.0}}
"""


@pytest.fixture(params=["longer", "my_methods.longer"])
def added(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The method's name, once its one file lies in the package's folder or in a package of the user's."""
    name: str = request.param
    home = tmp_path / "my_methods"
    home.mkdir()
    (home / "longer.py").write_text(LONGER)
    if "." in name:
        (home / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
    else:
        # A second folder of the package stands for a file put into its first one.
        monkeypatch.setattr(prefloop.methods, "__path__", [*prefloop.methods.__path__, str(home)])
    return name


@pytest.fixture(autouse=True)
def forgotten_again() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.endswith("longer") or name == "my_methods":
            del sys.modules[name]
    vars(prefloop.methods).pop("longer", None)


def test_one_file_is_a_method_that_runs(
    added: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    Path("mine.yaml").write_text(RECIPE.format(model=model_folder, name=added))
    kind = find_plugin(prefloop.methods, added, Method, "method")
    assert kind.__name__ == "Longer"
    recipe = load_recipe("mine.yaml")
    check_recipe(recipe)
    assert recipe.method == kind.model_validate({"beta": 0.25, "sampling": {"max_new_tokens": 6}})
    assert f"name: {added}" in recipe.dump()
    outcome = run(recipe, tmp_path / "run", Console(file=StringIO()))
    pairs = read_run(outcome.folder).round(0).records("pairs", Pair)
    assert len(pairs) == 4
    assert all(len(pair.chosen) >= len(pair.rejected) for pair in pairs)
    assert (outcome.policy / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("added", ["longer"], indirect=True)
def test_a_file_in_the_packages_folder_is_listed_and_has_a_schema(added: str) -> None:
    assert added in plugin_names(prefloop.methods)
    listed = CliRunner().invoke(app, ["ls", "methods"]).output
    assert "The longer of two drafts over the shorter." in " ".join(listed.split())
    kinds = json_schema()["$defs"]
    assert kinds["Longer"]["properties"]["beta"]["description"] == "Inverse temperature."


@pytest.mark.parametrize("added", ["my_methods.longer"], indirect=True)
def test_a_mistake_in_its_options_is_one_sentence(
    added: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = RECIPE.format(model=model_folder, name=added).replace("beta", "betta")
    Path("mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match="unknown key 'betta' in method; did you mean 'beta'"):
        load_recipe("mine.yaml")
