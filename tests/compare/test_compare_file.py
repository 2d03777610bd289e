"""Comparison files: what they say, what they may not say, and the cells that they make."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import prefloop.methods.dpo
from prefloop.cli import app
from prefloop.compare.file import Comparison, cells, check_judges, load_comparison
from prefloop.config import find_plugin, plugin_names
from prefloop.errors import RecipeError
from prefloop.methods import Method
from prefloop.methods.arop import AROP
from prefloop.methods.ial import IAL
from prefloop.report.meanings import OF_METHODS

BASE: dict[str, Any] = {
    "method": {"name": "ial", "sampling": {"max_new_tokens": 8}, "gates": {"cut_off": False}},
    "judge": {"name": "similarity"},
    "loop": {"rounds": 1, "prompts_per_round": 4},
    "evaluate": {"prompts": 4, "sampling": {"max_new_tokens": 8}},
}


SHORT = {"brief": {"name": "rules", "max_words": 1}}


def comparison(**values: Any) -> Comparison:
    return Comparison.model_validate({"base": BASE, "variants": {"ial": None}, **values})


def test_every_variant_is_played_with_every_seed_and_differs_from_the_base_in_what_it_says():
    found, _ = cells(
        comparison(
            seeds=[0, 7],
            variants={
                "ial": None,
                "gamma-1": {"method.gamma": 1},
                "nll": {"method": {**BASE["method"], "penalty": "nll"}},
            },
        ),
        Path("runs/x"),
    )
    assert [cell.name for cell in found] == [
        *("ial seed 0", "gamma-1 seed 0", "nll seed 0"),
        *("ial seed 7", "gamma-1 seed 7", "nll seed 7"),
    ]
    plain, gamma, nll = (cell.recipe for cell in found[3:])
    assert all(isinstance(recipe.method, IAL) for recipe in (plain, gamma, nll))
    assert [recipe.method.gamma for recipe in (plain, gamma, nll)] == [5.0, 1.0, 5.0]
    assert nll.method.penalty == "nll"
    assert plain.seed == gamma.seed == nll.seed == 7
    same = {"method", "name"}
    assert gamma.model_dump(exclude=same) == plain.model_dump(exclude=same)
    assert found[4].folder == Path("runs/x/gamma-1/seed-7")


def test_another_method_takes_its_own_schedule_and_the_options_of_the_base_that_it_has():
    found, notes = cells(
        comparison(variants={"ial": {}, "arop": {"method.name": "arop"}}, seeds=[0, 1]), Path("x")
    )
    ial, arop = found[0].recipe, found[1].recipe
    assert isinstance(arop.method, AROP)
    assert arop.method.sampling.max_new_tokens == 8
    assert arop.method.gates.max_edit_share == 0.5
    assert not arop.method.gates.cut_off
    assert ial.loop.mix_previous
    assert not arop.loop.mix_previous
    assert notes == []
    with_advice = {**BASE, "method": {**BASE["method"], "advice": {"max_new_tokens": 4}}}
    variants = {"ial": {}, "arop": {"method.name": "arop"}}
    _, notes = cells(comparison(base=with_advice, variants=variants), Path("x"))
    assert notes == ["variant arop: arop has no advice: left out of the base's method"]


def test_a_base_is_named_or_written_out_and_paths_are_the_working_directorys(tmp_path, monkeypatch):
    named, _ = cells(comparison(base="quickstart-ial"), Path("x"))
    assert named[0].recipe.loop.prompts_per_round == 96
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("method: {name: arop}\nloop: {rounds: 9}\n")
    own, _ = cells(comparison(base="mine.yaml"), Path("x"))
    assert own[0].recipe.loop.rounds == 9


def test_the_budget_is_every_cells():
    found, _ = cells(
        comparison(budget={"generated_tokens": 500}, variants={"a": {}, "b": {"loop.rounds": 3}}),
        Path("x"),
    )
    assert {str(cell.recipe.loop.budget) for cell in found} == {
        "generated_tokens=500 trained_tokens=None seconds=None flops=None"
    }


def test_one_seed_is_said_to_tell_nothing():
    _, notes = cells(comparison(seeds=[3]), Path("x"))
    assert notes == ["one seed: no difference between variants can be told from luck"]


def refused(**values: Any) -> str:
    with pytest.raises((RecipeError, ValueError)) as caught:
        cells(comparison(**values), Path("x"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"seeds": [1, 1]}, "seeds holds a seed twice"),
        ({"control": "iall"}, "control 'iall' is no variant; did you mean 'ial'?"),
        ({"rank_by": "kl", "measures": ["score"]}, "rank_by 'kl' is not among measures (score)"),
        ({"variants": {"a/b": {}}}, "'a/b' cannot name a folder"),
        ({"budget": {}}, "limits nothing"),
        ({"variants": {"a": {"seed": 3}}}, "seed is set by the comparison"),
        ({"variants": {"a": {"method.gama": 3}}}, "variant a: unknown key 'gama' in method"),
        ({"variants": {"a": {"method.name": "ail"}}}, "no method 'ail'"),
        ({"variants": {"a": {"loop": 3}}, "budget": {"seconds": 9}}, "variant a: loop should be"),
        ({"variants": {"a": {"loop.budget": {"seconds": 3}}}}, "variant a has a loop.budget"),
        (
            {"variants": {"a": {}, "b": {"evaluate.prompts": 2}}},
            "variants b and a are measured differently (evaluate.prompts)",
        ),
        (
            {"variants": {"a": {}, "b": {"data.holdout": 2}}},
            "variants b and a are measured differently (data.holdout)",
        ),
        (
            {
                "base": {**BASE, "evaluate": {"prompts": 4}},
                "variants": {"a": {}, "greedy": {"method.sampling": {"temperature": 0.0}}},
            },
            "measured differently (evaluate.sampling), so they cannot be compared; set it in the base",
        ),
        (
            {"variants": {"a": {}, "b": {"judge": {"name": "rules", "max_words": 9}}}},
            "variants b and a have different judges, so score means another thing",
        ),
        ({"base": "quickstart-iall"}, "did you mean 'quickstart-ial'?"),
        ({"judges": {"a b": {"name": "rules"}}}, "judges: 'a b' cannot name a column"),
        ({"judges": {"minilm": {"nam": "rules"}}}, "judges.minilm should be a section with a name"),
        (
            {"judges": {"minilm": {"name": "rule"}}},
            "no judges.minilm 'rule'; did you mean 'rules'?",
        ),
        ({"judges": {"own": {"name": "implicit"}}}, "judges.own asks the policy"),
        (
            {"judges": SHORT, "measures": ["score", "score_by_brif"]},
            "score_by_brif is of a judge 'brif' that is not there; did you mean 'brief'?",
        ),
        ({"measures": ["score", "win_rate_by_x"]}, "judges names none"),
        ({"judges": SHORT, "by_round": ["score_by_brief"]}, "score the last round alone"),
        (
            {"measures": ["score", "winrate"]},
            "measures: no round has a measure 'winrate'; did you mean 'win_rate'?",
        ),
        ({"by_round": ["train_penality"]}, "by_round: no round has a measure 'train_penality'"),
        ({"measures": ["score", "train_lr"]}, "no round has a measure 'train_lr'"),
        ({"measures": ["score", "train_seconds"]}, "no round has a measure 'train_seconds'"),
        ({"measures": ["zzz", "score"]}, "there are score, win_rate, R_i, identical_rate, "),
        ({"measures": ["scor"], "rank_by": "scor"}, "'scor'; did you mean 'score'?"),
        ({"measures": ["score", "kl_on_chat"]}, "no round has a measure 'kl_on_chat'"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(values, says):
    said = refused(**values)
    assert says in said


def test_measures_of_training_of_judges_and_of_evaluation_sets_are_known():
    sets = [{"name": name, "source": f"{name}.jsonl"} for name in ("chat", "maths")]
    names = ["score", "win_rate_low", "train_M", "win_rate_by_brief", "win_rate_low_by_brief"]
    names += ["stop_rate_on_chat", "win_rate_on_maths"]
    base = {**BASE, "data": {"train": "chat.jsonl", "eval": sets}}
    by_round = ["R_i", "train_seconds"]
    cells(comparison(base=base, judges=SHORT, measures=names, by_round=by_round), Path("x"))


def test_a_measure_that_no_variant_reports_is_noted():
    def notes(variants, *measures):
        return cells(comparison(variants=variants, measures=["score", *measures]), Path("x"))[1]

    dpo, ial = {"dpo": {"method.name": "dpo"}}, {"ial": {"evaluate.introspection": True}}
    off = {"ial": {"evaluate.introspection": False}}
    said = "measures: R_i stays empty, as no variant plays a method that reports it with evaluate.introspection on"
    assert said in notes(dpo, "R_i")
    assert said in notes(off, "R_i")
    assert said not in notes({**dpo, **ial}, "R_i", "identical_rate", "score_rewrite")


def test_every_measure_that_methods_report_is_in_some_methods_code():
    kinds = [
        find_plugin(prefloop.methods, name, Method, "method")
        for name in plugin_names(prefloop.methods)
    ]
    code = "".join(inspect.getsource(kind.measures) for kind in kinds)
    assert [name for name in sorted(OF_METHODS) if f'"{name}"' not in code] == []


def test_a_method_of_the_users_own_may_have_measures_of_its_own(tmp_path, monkeypatch):
    text = Path(prefloop.methods.dpo.__file__).read_text("utf-8")
    (tmp_path / "own_methods").mkdir()
    (tmp_path / "own_methods" / "mine.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"ial": None, "mine": {"method.name": "own_methods.mine"}}
    _, notes = cells(comparison(variants=mine, measures=["score", "novelty"]), Path("x"))
    assert "measures: novelty is empty unless own_methods.mine reports it" in notes


def test_an_unknown_measure_stops_the_command_before_anything_is_played(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: quickstart-ial\nvariants: {ial: {}}\nmeasures: [score]\nby_round: [winrate]\n"
    )
    for flags in ([], ["--check"], ["--table"]):
        done = CliRunner().invoke(app, ["compare", str(path), "--out", str(tmp_path / "x"), *flags])
        assert isinstance(done.exception, RecipeError)
        assert str(done.exception) == (
            "by_round: no round has a measure 'winrate'; did you mean 'win_rate'?"
        )
        assert not (tmp_path / "x").exists()


def test_other_judges_may_be_compared_by_what_no_judge_decides():
    variants = {"a": {}, "b": {"judge": {"name": "rules", "max_words": 9}}}
    found, _ = cells(comparison(variants=variants, measures=["kl"], rank_by="kl"), Path("x"))
    assert found[0].recipe.judge != found[1].recipe.judge


def test_a_further_judges_model_is_looked_for_before_the_cells_are_played():
    def judged(model: str) -> list[str]:
        return check_judges(comparison(judges={"x": {"name": "similarity", "model": model}}))

    with pytest.raises(RecipeError, match=r"judges\.x\.model: no folder /nowhere"):
        judged("/nowhere")
    with pytest.raises(RecipeError, match=r"judges\.x\.model: no embedded model 'minilmm'"):
        judged("embedded:minilmm")
    assert judged("embedded:minilm") == []
    assert "looked up on the Hugging Face Hub" in judged("owner/name")[0]
    assert check_judges(comparison(judges=SHORT)) == []


def test_a_file_is_read_and_its_mistakes_are_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: quickstart-ial\nvariants:\n  ial:\n  gamma-1: {method.gamma: 1}\n")
    assert load_comparison(path).variants == {"ial": None, "gamma-1": {"method.gamma": 1}}
    assert load_comparison(path).seeds == (0, 1, 2)
    assert load_comparison(path).control_name == "ial"
    path.write_text("base: quickstart-ial\nvariant: {a: {}}\n")
    with pytest.raises(
        RecipeError, match=r"mine.yaml: unknown key 'variant'; did you mean 'variants'"
    ):
        load_comparison(path)
    with pytest.raises(RecipeError, match=r"no file .*min.yaml; did you mean .*mine.yaml"):
        load_comparison(tmp_path / "min.yaml")
    path.write_text("base: quickstart-ial\nseeds: [-1]\nvariants: {a: {}}\n")
    with pytest.raises(
        RecipeError, match=r"mine.yaml: seeds\[0\] should be greater than or equal to 0"
    ):
        load_comparison(path)


def test_options_set_on_the_command_line_change_every_variant(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: quickstart-ial\nvariants:\n  ial:\n  gamma-1: {method.gamma: 1}\n")
    found, _ = cells(load_comparison(path, ["evaluate.prompts=7", "method.eta=0.3"]), tmp_path)
    assert {cell.recipe.evaluate.prompts for cell in found} == {7}
    assert {cell.recipe.method.eta for cell in found} == {0.3}
    assert {cell.recipe.method.gamma for cell in found} == {5.0, 1.0}
    with pytest.raises(RecipeError, match=r"mine.yaml: --set evaluate is not of the form"):
        load_comparison(path, ["evaluate"])
    path.write_text("variants: {ial: {}}\n")
    with pytest.raises(RecipeError, match=r"mine.yaml: base is missing"):
        load_comparison(path, ["evaluate.prompts=7"])
