"""Recipes: what they accept, what they refuse and in which words, and that a dump is the recipe."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import prefloop.judges
import prefloop.methods
from prefloop.config import SHIPPED, here_or_shipped, plugin_names
from prefloop.errors import DataError, PrefloopError, RecipeError
from prefloop.judges.similarity import Similarity
from prefloop.methods import Method
from prefloop.methods.ial import IAL
from prefloop.recipe import Recipe, load_recipe, shipped_recipes
from prefloop.recipe.check import check_recipe
from prefloop.recipe.options import LaunchOptions
from prefloop.recipe.schema import json_schema
from prefloop.train.options import SftOptions, TrainOptions

IAL_RECIPE = "method: {name: ial}\njudge: {name: similarity}\n"
METHODS = ", ".join(plugin_names(prefloop.methods))
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate"}

WRONG = [
    ("", "r.yaml is empty; a recipe is a mapping with at least the section method"),
    ("- ial\n", 'r.yaml holds ["ial"]; a recipe is a mapping with at least the section method'),
    ("seed: 1\n", "r.yaml: method is missing"),
    ("metod: {name: ial}\n", "r.yaml: unknown key 'metod'; did you mean 'method'?"),
    (
        IAL_RECIPE + "train: {learning_rate_: 1, lrr: 5e-7}\n",
        "r.yaml: unknown key 'learning_rate_' in train; "
        f"there are: {', '.join(TrainOptions.model_fields)}",
    ),
    (
        IAL_RECIPE + "train: {batchsize: 8}\n",
        "r.yaml: unknown key 'batchsize' in train; did you mean 'batch_size'?",
    ),
    (
        "method: {name: ial, gama: 5}\n",
        "r.yaml: unknown key 'gama' in method; did you mean 'gamma'?",
    ),
    (
        "method: {name: ial, sampling: {temprature: 1}}\n",
        "r.yaml: unknown key 'temprature' in method.sampling; did you mean 'temperature'?",
    ),
    ("method: {name: iall}\n", "r.yaml: no method 'iall'; did you mean 'ial'?"),
    (
        "method: {name: no_such.module}\n",
        "r.yaml: method 'no_such.module' cannot be imported: No module named 'no_such'",
    ),
    (
        "method: {name: ./mine.py}\n",
        f"r.yaml: method.name './mine.py' is neither one of {METHODS} "
        "nor a module that can be imported, such as my_package.my_module",
    ),
    (IAL_RECIPE + "track: 3\n", "r.yaml: track should be a section of keys; it is 3"),
    (
        "method: ial\n",
        f'r.yaml: method should be a section with a name ({METHODS}); it is "ial"',
    ),
    (
        "method: {gamma: 5}\n",
        f'r.yaml: method should be a section with a name ({METHODS}); it is {{"gamma": 5}}',
    ),
    (
        IAL_RECIPE + "eval_judge: {name: similar}\n",
        "r.yaml: no eval_judge 'similar'; did you mean 'similarity'?",
    ),
    (
        "method: {name: ial}\njudge: {name: similar}\n",
        "r.yaml: no judge 'similar'; did you mean 'similarity'?",
    ),
    (
        IAL_RECIPE + "train: {lr: -1}\n",
        "r.yaml: train.lr should be greater than 0; it is -1",
    ),
    (
        IAL_RECIPE + "train: {lr: fast}\n",
        'r.yaml: train.lr should be a valid number; it is "fast"',
    ),
    (
        IAL_RECIPE + "train: {lr: .inf}\n",
        "r.yaml: train.lr should be a finite number; it is Infinity",
    ),
    (
        IAL_RECIPE + "train: {epochs: yes}\n",
        "r.yaml: train.epochs should be a valid integer; it is true",
    ),
    (
        IAL_RECIPE + "train: {epochs: 1.5}\n",
        "r.yaml: train.epochs should be a valid integer; it is 1.5",
    ),
    (
        IAL_RECIPE + "train: {optimizer: sgd}\n",
        "r.yaml: train.optimizer should be 'adamw' or 'rmsprop'; it is \"sgd\"",
    ),
    (
        IAL_RECIPE + "train: {optimizer: no}\n",
        "r.yaml: train.optimizer should be 'adamw' or 'rmsprop'; it is false",
    ),
    (
        IAL_RECIPE + "train: {batch_size: 6}\n",
        "r.yaml: train.micro_batch_size (4) must divide train.batch_size (6); change one of them",
    ),
    (
        IAL_RECIPE + "sft: {batch_size: 6}\n",
        "r.yaml: train.micro_batch_size (4) must divide sft.batch_size (6); change one of them",
    ),
    (
        IAL_RECIPE + "train:\n",
        "r.yaml: train should be a section of keys; it is null",
    ),
    (
        IAL_RECIPE + "data: {train: on}\n",
        "r.yaml: data.train should be a source, or a list of {source, ...}; it is true",
    ),
    (
        IAL_RECIPE + "data: {eval: a.jsonl, holdout: 3}\n",
        "r.yaml: data.holdout and data.eval exclude each other; set one of them",
    ),
    (
        IAL_RECIPE + "model: {lora: {r: 0}}\n",
        "r.yaml: model.lora.r should be greater than or equal to 1; it is 0",
    ),
    (
        IAL_RECIPE + "guard: {action: best_round}\nevaluate: {every_round: false}\n",
        "r.yaml: guard.action best_round needs evaluate.every_round: true",
    ),
    (
        "method: {name: ial}\nguard: {action: best_round}\n",
        "r.yaml: guard.action best_round needs a judge to score the rounds; add a section judge",
    ),
    (
        IAL_RECIPE + "track: [wandbb]\n",
        "r.yaml: track.report_to[0] should be 'tensorboard', 'wandb', 'trackio', 'comet_ml', 'mlflow', "
        "'clearml', 'dvclive' or 'swanlab'; it is \"wandbb\"",
    ),
    (IAL_RECIPE + "seed: true\n", "r.yaml: seed should be a valid integer; it is true"),
    (
        IAL_RECIPE + "name: ../elsewhere\n",
        "r.yaml: name: '../elsewhere' cannot name the run's folder; "
        "use letters, digits, '_', '-' and '.', beginning with a letter or digit",
    ),
    ("method: {name: ial}\nseed: 1\nseed: 2\n", "r.yaml:3:1: key 'seed' is given twice"),
    (
        "method:\n  name: ial\n  gamma: 1\n  gamma: 2\n",
        "r.yaml:4:3: key 'gamma' is given twice",
    ),
    (IAL_RECIPE + "on: 1\n", "r.yaml:3:1: a key must be text"),
    (
        "method:\n\tname: ial\n",
        "r.yaml:2:1: found character '\\t' that cannot start any token; indent with spaces",
    ),
    (
        "method: {name: ial\nseed: 1\n",
        "r.yaml:2:5: expected ',' or '}', but got ':'",
    ),
    (
        "method: !!python/name:os.system\n",
        "r.yaml:1:9: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/name:os.system'",
    ),
    ("name: a\n# \x07\n", "r.yaml:2: special characters are not allowed ('\\x07')"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(text: str) -> Path:
    path = Path("r.yaml")
    path.write_text(text, encoding="utf-8")
    return path


def loaded(text: str, *overrides: str) -> Recipe:
    return load_recipe(str(written(text)), overrides)


@pytest.mark.parametrize(("text", "sentence"), WRONG)
def test_a_wrong_recipe_is_refused_in_one_sentence(folder: Path, text: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(text)
    assert str(caught.value) == sentence


def test_overrides_that_are_one_text_are_refused(folder: Path) -> None:
    (folder / "r.yaml").write_text(IAL_RECIPE)
    with pytest.raises(RecipeError, match=r"overrides is the text 'seed=5'; write a list"):
        load_recipe("r.yaml", "seed=5")


def test_all_overrides_are_named_in_an_error(folder: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^r\.yaml with --set seed=5 --set train\.lr=: train\.lr"
    ):
        loaded(IAL_RECIPE, "seed=5", "train.lr=")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.lr", "--set train.lr is not of the form section.key=value"),
        ("train..lr=1", "--set train..lr=1 is not of the form section.key=value"),
        ("=1", "--set =1 is not of the form section.key=value"),
        ("train.lr=[1", "--set train.lr=[1:1:3: expected ',' or ']', but got '<stream end>'"),
        ("seed.lr=1", "--set seed.lr=1: seed is 5, not a section"),
        (
            "trian.lr=1",
            "r.yaml with --set trian.lr=1: unknown key 'trian'; did you mean 'train'?",
        ),
        (
            "train.epoch=1",
            "r.yaml with --set train.epoch=1: unknown key 'epoch' in train; did you mean 'epochs'?",
        ),
        (
            "train.lr=",
            "r.yaml with --set train.lr=: train.lr should be a valid number; it is null",
        ),
    ],
)
def test_a_wrong_override_is_refused_in_one_sentence(
    folder: Path, override: str, sentence: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(IAL_RECIPE + "seed: 5\n", override)
    assert str(caught.value) == sentence


def test_a_missing_file_is_answered_with_the_nearest_one(folder: Path) -> None:
    Path("quick.yaml").write_text(IAL_RECIPE)
    with pytest.raises(RecipeError, match=r"^no file quik\.yaml; did you mean 'quick\.yaml'\?$"):
        load_recipe("quik.yaml")
    with pytest.raises(RecipeError, match=r"^no file nowhere/r\.yaml$"):
        load_recipe("nowhere/r.yaml")


def test_a_name_is_looked_up_in_the_recipes_folders(folder: Path) -> None:
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text(IAL_RECIPE)
    assert load_recipe("mine").name == "mine"
    with pytest.raises(RecipeError, match=r"^no recipe 'mime'; did you mean 'mine'\?$"):
        load_recipe("mime")


def test_a_path_below_recipes_is_the_shipped_file_unless_there_is_one_here(folder: Path) -> None:
    shipped = here_or_shipped(Path("recipes/accelerate/zero3.yaml"))
    assert shipped == SHIPPED / "accelerate/zero3.yaml"
    assert load_recipe("recipes/quickstart-ial.yaml") == load_recipe("quickstart-ial")
    assert (
        str(shipped)
        in LaunchOptions(command=f"{sys.executable} recipes/accelerate/zero3.yaml").words()
    )
    Path("recipes/accelerate").mkdir(parents=True)
    Path("recipes/accelerate/zero3.yaml").touch()
    for path in ("recipes/accelerate/zero3.yaml", "recipes/none.yaml", "recipes/../py.typed", "r"):
        assert here_or_shipped(Path(path)) == Path(path)


def test_a_file_that_is_not_utf8_is_refused(folder: Path) -> None:
    Path("r.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"^r\.yaml is not UTF-8 text; save it as UTF-8$"):
        load_recipe("r.yaml")


@pytest.mark.parametrize(
    "text", ["5e-7", "5E-7", "5.e-7", "5.0e-07", "0.0000005", "+5e-7", ".5e-6"]
)
def test_scientific_notation_is_a_number(folder: Path, text: str) -> None:
    recipe = loaded(IAL_RECIPE + f"train: {{lr: {text}}}\n")
    assert recipe.train.lr == pytest.approx(5e-7, rel=1e-12)
    assert loaded(IAL_RECIPE, f"train.lr={text}") == recipe


def test_a_quoted_number_is_no_number(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.lr should be a valid number"):
        loaded(IAL_RECIPE + "train: {lr: '5e-7'}\n")


def test_a_commit_that_begins_like_a_number_is_text(folder: Path) -> None:
    assert loaded(IAL_RECIPE, "model.revision=12e5f03").model.revision == "12e5f03"


def test_merge_keys_may_repeat_what_they_merge(folder: Path) -> None:
    recipe = loaded(IAL_RECIPE + "sft: &t {epochs: 2, lr: 1e-4}\ntrain: {<<: *t, lr: 1e-5}\n")
    assert (recipe.train.epochs, recipe.train.lr) == (2, 1e-5)


def test_the_methods_defaults_lie_under_the_file_and_the_overrides(folder: Path) -> None:
    recipe = loaded(IAL_RECIPE + "train: {lr: 1e-6}\n", "train.epochs=1")
    assert recipe.train.lr == 1e-6
    assert recipe.train.epochs == 1
    assert recipe.train.optimizer == "rmsprop"  # IAL section 4.1
    assert recipe.loop.mix_previous  # IAL Algorithm 1


def test_overrides_reach_into_sections_that_were_null(folder: Path) -> None:
    recipe = loaded(IAL_RECIPE, "sft.epochs=3")
    assert recipe.sft == SftOptions(epochs=3)
    assert loaded(IAL_RECIPE, "sft.epochs=3", "sft=null").sft is None
    assert loaded(IAL_RECIPE, "evaluate.sampling.temperature=0").evaluate.sampling is not None


def test_the_optimizer_of_pairs_is_not_that_of_round_zero(folder: Path) -> None:
    recipe = loaded(IAL_RECIPE + "sft: {}\n")
    assert recipe.sft_train is not None
    assert (recipe.train.optimizer, recipe.sft_train.optimizer) == ("rmsprop", "adamw")
    assert loaded(IAL_RECIPE, "train.rmsprop_alpha=0.9").train.rmsprop_alpha == 0.9
    with pytest.raises(RecipeError, match=r"rmsprop_alpha has an effect under .*rmsprop only"):
        loaded(IAL_RECIPE, "train.optimizer=adamw", "train.rmsprop_alpha=0.9")


def test_round_zero_trains_as_the_rounds_do_but_for_what_sft_says(folder: Path) -> None:
    recipe = loaded(IAL_RECIPE + "sft: {epochs: 3, lr: 1e-4, batch_size: 8}\n")
    told = {"epochs": 3, "lr": 1e-4, "batch_size": 8, "optimizer": "adamw"}
    assert recipe.sft_train == TrainOptions(**{**recipe.train.model_dump(), **told})
    assert loaded(IAL_RECIPE).sft_train is None


def test_a_recipe_made_in_python_equals_the_one_from_yaml(folder: Path) -> None:
    made = Recipe(name="r", method=IAL(gamma=2.0), judge=Similarity(), seed=3)
    assert made == loaded("seed: 3\nmethod: {name: ial, gamma: 2.0}\njudge: {name: similarity}\n")
    assert made.train.optimizer == "rmsprop"


def test_a_method_of_the_users_own_is_found_by_its_module(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("lab").mkdir()
    Path("lab/__init__.py").touch()
    Path("lab/mine.py").write_text(
        "from prefloop.methods import Method\n\nclass Mine(Method):\n    strength: float = 1.0\n"
    )
    monkeypatch.syspath_prepend(folder)
    recipe = loaded("method: {name: lab.mine, strength: 2}\n")
    assert type(recipe.method).__name__ == "Mine"
    assert "name: lab.mine\n  " in recipe.dump()
    Path("again.yaml").write_text(recipe.dump())
    assert load_recipe("again.yaml") == recipe


@pytest.mark.parametrize("method", plugin_names(prefloop.methods))
def test_a_dump_shows_every_value_and_loads_as_the_same_recipe(folder: Path, method: str) -> None:
    recipe = loaded(f"method: {{name: {method}}}\njudge: {{name: self_judge}}\nsft: {{}}\n")
    shown = yaml.safe_load(recipe.dump())
    assert shown.keys() == Recipe.model_fields.keys()
    assert shown["method"].keys() == {"name", *type(recipe.method).model_fields}
    assert shown["train"].keys() == TrainOptions.model_fields.keys()
    assert loaded(recipe.dump()) == recipe


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=20))
def test_any_text_survives_a_dump(text: str) -> None:
    recipe = Recipe(name="r", method=IAL(), data={"train": text})
    assert _through_yaml(recipe) == recipe


@pytest.mark.parametrize(
    "text", ["1e-4", "no", "1:30", "2024-01-01", "null", "~", "=", "<<", "0x1F", "a\x85b"]
)
def test_text_that_looks_like_something_else_survives_a_dump(text: str) -> None:
    recipe = Recipe(name="r", method=IAL(), data={"train": text})
    assert _through_yaml(recipe) == recipe


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_by_name_passes_its_check_and_survives_a_dump(
    path: Path, folder: Path
) -> None:
    assert path.stem in shipped_recipes()
    recipe = load_recipe(path.stem)
    check_recipe(recipe)
    assert _through_yaml(recipe) == recipe


def test_importing_the_recipe_imports_nothing_heavy() -> None:
    code = f"import sys, prefloop.recipe, prefloop.cli; print(sorted({HEAVY} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words", [["check", str(SHIPPED / "quickstart-ial.yaml")], ["ls", "methods"]]
)
def test_looking_at_recipes_and_methods_imports_nothing_heavy(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the template of a model that is on this disk is worth an import.
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path))
    code = (
        "import atexit, sys, prefloop.cli; "
        f"atexit.register(lambda: print(sorted({HEAVY} & sys.modules.keys()))); "
        f"sys.argv = ['prefloop', *{words}]; prefloop.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def _through_yaml(recipe: Recipe) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "r.yaml")
        path.write_text(recipe.dump(), encoding="utf-8")
        return load_recipe(str(path))


# check


def test_the_embedded_setup_passes_without_a_note(folder: Path) -> None:
    assert check_recipe(loaded(IAL_RECIPE + "loop: {prompts_per_round: 64}\n")) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "method: {name: ial}\n",
            "method 'ial' needs a judge; add a section judge with a name "
            f"({', '.join(plugin_names(prefloop.judges))})",
        ),
        (
            "method: {name: ial}\njudge: {name: python, function: 'no_such_module:f'}\n",
            "judge.function 'no_such_module:f' cannot be imported (No module named 'no_such_module'); "
            "mend it, or name it as module:function, from the working directory or an installed package",
        ),
        (
            "method: {name: ial}\njudge:\n  name: ensemble\n  judges:\n    - {name: similarity}\n"
            "    - {name: api, url: 'http://x/v1', model: m, key_env: PREFLOOP_NO_SUCH_KEY}\n",
            "key_env names the environment variable PREFLOOP_NO_SUCH_KEY, which is not set; export it",
        ),
        (
            IAL_RECIPE + "eval_judge: {name: self_judge}\n",
            "eval_judge 'self_judge' asks the policy, which would measure itself; name a judge that asks none, "
            "or leave eval_judge out",
        ),
        (
            IAL_RECIPE + "eval_judge: {name: reward_model, model: ../no-judge}\n",
            "eval_judge.model: no folder ../no-judge (paths are relative to the working directory)",
        ),
        (
            "method: {name: ial}\njudge: {name: implicit}\n",
            "judge 'implicit' compares the policy with the initial one, and in round 0 they are the "
            "same; name the implicit judge's model and reference, or choose another judge",
        ),
        (
            "method: {name: ial, prompt_set: papr}\njudge: {name: similarity}\n",
            "no prompt set 'papr': name one of compact, paper, shared, or a folder with your own .jinja files",
        ),
        (
            IAL_RECIPE + "model: {source: ./no-model}\n",
            "model.source: no folder ./no-model (paths are relative to the working directory)",
        ),
        (
            IAL_RECIPE + "model: {source: 'embedded:smollm2'}\n",
            "model.source: no embedded model 'smollm2'; did you mean 'smollm2-135m'?",
        ),
        (
            "method: {name: ial}\njudge: {name: reward_model, model: ../no-judge}\n",
            "judge.model: no folder ../no-judge (paths are relative to the working directory)",
        ),
        (
            IAL_RECIPE + "data: {train: few.jsonl}\nloop: {prompts_per_round: 2}\n",
            "there are no held-out prompts to measure on; name a file in data.eval, "
            "or hold some of data.train out with data.holdout",
        ),
        (
            IAL_RECIPE + "track: [dvclive]\n",
            "track.report_to names dvclive, which is not installed; pip install dvclive",
        ),
        (
            IAL_RECIPE + "data: {train: few.jsonl}\nloop: {prompts_per_round: 4}\n",
            "loop.prompts_per_round is 4, and data.train leaves 3 to train on; "
            "lower it, or give more data",
        ),
        (
            IAL_RECIPE + "data: {train: few.jsonl, holdout: 9}\n",
            "data.holdout is 9, and data.train has 3 usable prompts in all; "
            "lower it, or give more data",
        ),
        (
            IAL_RECIPE + "data: {train: few.jsonl, holdout: 2}\nloop: {prompts_per_round: 2}\n",
            "loop.prompts_per_round is 2, and data.train leaves 1 to train on; "
            "lower it, or give more data",
        ),
    ],
)
def test_check_refuses_what_would_stop_the_run(folder: Path, text: str, sentence: str) -> None:
    few(folder)
    with pytest.raises(PrefloopError) as caught:
        check_recipe(loaded(text))
    assert str(caught.value) == sentence


def test_check_reads_the_data_and_names_file_and_line(folder: Path) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(DataError, match=r"^bad\.jsonl:2 has no target response"):
        check_recipe(loaded(IAL_RECIPE + "data: {train: bad.jsonl}\n"))
    with pytest.raises(DataError, match=r"bad\.jsonl:2 has no target response"):
        check_recipe(loaded(IAL_RECIPE + "data: {eval: bad.jsonl}\n"))


def test_data_are_relative_to_the_working_directory_not_to_the_recipe(folder: Path) -> None:
    few(folder)
    Path("deep").mkdir()
    text = IAL_RECIPE + "data: {train: few.jsonl, holdout: 1}\nloop: {prompts_per_round: 2}\n"
    Path("deep/r.yaml").write_text(text + "train: {batch_size: 2, micro_batch_size: 2}\n")
    assert check_recipe(load_recipe("deep/r.yaml")) == [
        "few.jsonl: 3 rows read as prompt_response from prompt, response"
    ]
    Path("few.jsonl").rename("deep/few.jsonl")
    with pytest.raises(DataError, match=r"few\.jsonl"):
        check_recipe(load_recipe("deep/r.yaml"))


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "method: {name: arop}\njudge: {name: similarity}\n",
            "judge: method arop ranks without it; it only scores the held-out answers",
        ),
        (
            "method: {name: arop}\njudge: {name: similarity}\neval_judge: {name: target_checks}\n",
            "judge: method arop ranks without it, and eval_judge scores the held-out answers: it has no effect",
        ),
        (
            "method: {name: arop}\nloop: {rounds: 1, mix_previous: true}\n",
            "loop.mix_previous has no effect in a single round",
        ),
        (
            IAL_RECIPE + "loop: {rounds: 1, carry_optimizer: true}\n",
            "loop.carry_optimizer has no effect in a single round",
        ),
        (
            IAL_RECIPE + "evaluate: {early_stopping_threshold: 0.1}\n",
            "evaluate.early_stopping_threshold has no effect without evaluate.early_stopping_patience",
        ),
        (
            IAL_RECIPE + "loop: {prompts_per_round: 16}\n",
            "loop.prompts_per_round (16) is less than train.batch_size (32): "
            "each epoch is one smaller step",
        ),
        (
            IAL_RECIPE + "model: {source: owner/name}\n",
            "model.source owner/name is no folder here: it will be looked up on the Hugging Face Hub",
        ),
        (
            IAL_RECIPE + "model: {source: smollm2-135m}\n",
            "model.source smollm2-135m is no folder here: it will be looked up on the Hugging Face Hub "
            "(or is embedded:smollm2-135m meant?)",
        ),
        (
            IAL_RECIPE + "data: {train: owner/name, holdout: 2}\n",
            "data.train owner/name is not here: it will be looked up on the Hugging Face Hub",
        ),
        (
            "method: {name: ial, generator: frozen}\njudge: {name: similarity}\n",
            "method.generator frozen with method.reference round_start: "
            "answers come from the initial policy, the loss is measured from the round's",
        ),
    ],
)
def test_check_notes_what_has_no_effect_or_was_not_looked_at(
    folder: Path, text: str, note: str
) -> None:
    few(folder)
    assert check_recipe(loaded(text)) == [note]


def test_check_notes_nothing_that_only_the_methods_own_schedule_says(folder: Path) -> None:
    few(folder)
    for text in (IAL_RECIPE, "method: {name: arop}\n"):
        assert check_recipe(loaded(text + "loop: {rounds: 1}\n")) == []


def few(folder: Path) -> None:
    rows = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(3)]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# schema


def test_the_schema_knows_every_option_of_every_method_and_judge() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["required"] == ["method"]
    for key, package, base in [
        ("method", prefloop.methods, Method),
        ("judge", prefloop.judges, prefloop.judges.Judge),
    ]:
        known = {alternative["$ref"].rpartition("/")[2] for alternative in _refs(schema, key)}
        found = {schema["$defs"][name]["properties"]["name"]["const"]: name for name in known}
        assert sorted(found) == plugin_names(package)
        for name in known:
            section = schema["$defs"][name]
            assert "name" in section["required"]
            assert section["additionalProperties"] is False
            assert base.model_fields.keys() <= section["properties"].keys()


def _refs(schema: dict, key: str) -> list[dict]:
    return [way for way in schema["properties"][key]["anyOf"] if "$ref" in way]
