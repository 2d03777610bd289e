"""The table of a comparison: from folders written by hand to numbers, groups, costs and what is missing."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prefloop.cli import app
from prefloop.compare.file import Cell, Comparison, cells
from prefloop.compare.table import tabulate
from prefloop.recipe.options import Budget
from prefloop.records import Candidates, Message, Prompt, Response, RoundResult, write_jsonl
from prefloop.run.cost import spent
from prefloop.run_folder import RoundDir, RunDir, open_run

BASE: dict[str, Any] = {
    "model": {"source": "some/model"},
    "method": {"name": "ial"},
    "judge": {"name": "similarity"},
    "evaluate": {"sampling": {}},
}
PROMPTS = 12


def answers(variant: str, seed: int, better: float) -> list[Candidates]:
    """Prompts of different difficulty, a little luck a seed, more luck an answer, and what the variant adds."""
    hard, lucky = random.Random(0), random.Random(f"{variant} {seed}")
    luck = lucky.gauss(0, 0.5)
    return [
        Candidates(
            prompt=Prompt(id=f"p{n}", messages=(Message(role="user", content="?"),)),
            responses={"answer": Response(text="a b", token_ids=(1, 2, 3))},
            scores={"answer": 30 + hard.gauss(0, 10) + luck + lucky.gauss(0, 1) + better},
        )
        for n in range(PROMPTS)
    ]


def pretend(cell: Cell, better: float) -> None:
    """What a finished run of the cell leaves."""
    with open_run(cell.folder, cell.recipe.dump()) as run:
        for number, add in ((-1, 0.0), (0, better)):
            round_dir = run.round(number)
            groups = answers("start" if number < 0 else cell.variant, cell.seed, add)
            write_jsonl(round_dir.path / "answers.jsonl", groups)
            round_dir.finish("answers", seconds=10.0, peak_memory_mb=1.0)
            score = sum(g.scores["answer"] for g in groups) / PROMPTS
            result = RoundResult(
                round=number, measures={"score": score, "kl": 0.1 + cell.seed / 100}
            )
            write_jsonl(round_dir.path / "result.jsonl", [result])
            round_dir.finish("result", seconds=10.0)
        round_dir = run.round(0)
        round_dir.finish("candidates", generated_tokens=700, read_tokens=300, seconds=4.0)
        round_dir.finish("ranked", read_tokens=100, seconds=1.0)
        round_dir.finish(
            "train", tokens=2000, reference_tokens=1000, parameters=10**6, seconds=20.0
        )
        (cell.folder / "policy").mkdir()


def played(folder: Path, better: dict[str, float], **values: Any) -> tuple[Comparison, list[Cell]]:
    values = {"measures": ("score", "kl", "R_i"), **values}
    comparison = Comparison(base=BASE, variants=dict.fromkeys(better), **values)
    found, _ = cells(comparison, folder)
    for cell in found:
        pretend(cell, better[cell.variant])
    return comparison, found


def test_a_real_difference_is_marked_and_noise_is_put_into_one_group(tmp_path):
    report = tabulate(*played(tmp_path, {"plain": 0.0, "same": 0.0, "good": 5.0}), {}, tmp_path)
    ranking = report["ranking"]
    assert ranking["order"][0]["variant"] == "good"
    assert sorted(map(sorted, ranking["groups"])) == [["good"], ["plain", "same"]]
    found = report["differences"]["score"]
    assert found["good"]["real"]
    assert found["good"]["difference"] == pytest.approx(5.0, abs=1.5)
    assert not found["same"]["real"]
    assert (found["good"]["seeds"], found["good"]["prompts"]) == (3, PROMPTS)
    # kl has no value a prompt: three equal seeds, no difference.
    assert report["differences"]["kl"]["good"]["prompts"] == 0
    assert report["differences"]["kl"]["good"]["p"] == 1.0
    assert report["variants"]["plain"]["measures"]["R_i"] is None


def test_prompts_that_differ_from_seed_to_seed_leave_the_seeds_to_compare(tmp_path):
    comparison, found = played(tmp_path, {"plain": 0.0, "good": 5.0})
    for cell in found:
        path = cell.folder / "rounds/0000/answers.jsonl"
        path.write_text(path.read_text().replace('"id":"p', f'"id":"s{cell.seed}p'))
        RoundDir(path.parent, 0).finish("answers", seconds=10.0)
        RoundDir(path.parent, 0).finish("result", seconds=10.0)
    report = tabulate(comparison, found, {}, tmp_path)
    assert report["differences"]["score"]["good"]["prompts"] == 0
    assert report["differences"]["score"]["good"]["real"]


def test_a_result_of_another_recipe_is_missing_and_not_the_variants(tmp_path):
    played(tmp_path, {"plain": 0.0, "good": 5.0})
    changed = Comparison(base=BASE, variants={"plain": None, "good": {"method.gamma": 2.0}})
    report = tabulate(changed, cells(changed, tmp_path)[0], {}, tmp_path)
    assert list(report["variants"]) == ["plain"]
    assert report["missing"] == {
        f"good seed {seed}": "played with another recipe (method.gamma was 5.0, now 2.0)"
        for seed in range(3)
    }


def test_costs_come_from_the_manifests(tmp_path):
    comparison, found = played(
        tmp_path, {"plain": 0.0}, budget={"trained_tokens": 1600}, seeds=[0, 1]
    )
    cost = tabulate(comparison, found, {}, tmp_path)["variants"]["plain"]["cost"]
    assert cost["generated_tokens"] == 700
    assert cost["trained_tokens"] == 2000
    # 2 N (drawn 700, read 400, reference 1000) and, under LoRA, 4 N for each of 2000 trained.
    assert cost["flops"] == 2e6 * (700 + 400 + 1000) + 4e6 * 2000
    assert cost["seconds"] == {"evaluate": 20.0, "generate": 4.0, "rank": 1.0, "train": 20.0}
    assert cost["budget_used"] == 1.25
    assert cost["rounds"] == 1
    assert cost["peak_memory_mb"] > 1


def test_full_tuning_and_recomputation_cost_more(tmp_path):
    _, [cell] = played(tmp_path, {"plain": 0.0}, seeds=[0])
    recipe = cell.recipe
    for tuning, again, passes in (("lora", False, 2), ("lora", True, 3), ("full", True, 4)):
        model = recipe.model.model_copy(update={"tuning": tuning, "gradient_checkpointing": again})
        cost = spent(RunDir(cell.folder), recipe.model_copy(update={"model": model}))
        assert cost.flops == 2e6 * (2100 + 2000 * passes)


def test_the_first_limit_that_is_reached_is_what_counts(tmp_path):
    _, [cell] = played(tmp_path, {"plain": 0.0}, seeds=[0])
    cost = spent(RunDir(cell.folder), cell.recipe)
    assert cost.seconds == 25.0
    assert cost.fraction_used(Budget(generated_tokens=1400)) == 0.5
    assert cost.fraction_used(Budget(generated_tokens=1400, seconds=20)) == 1.25


def written(folder: Path) -> Path:
    path = folder / "mine.yaml"
    values = {
        "base": BASE,
        "variants": {"plain": None, "good": None, "late": None},
        "measures": ["score", "kl"],
        "note": "A | note_with 5 % of traps.",
    }
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A comparison on disk with two variants played, one missing."""
    comparison = Comparison.model_validate(json.loads(written(tmp_path).read_text()))
    for cell in cells(comparison, tmp_path / "out")[0]:
        if cell.variant != "late":
            pretend(cell, 5.0 if cell.variant == "good" else 0.0)
    return tmp_path


def test_the_command_writes_tables_for_people_papers_and_programs(table):
    arguments = ["compare", str(table / "mine.yaml"), "--out", str(table / "out"), "--table"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for text in (
        "A | note_with 5 % of traps.",
        "Measures after the last round",
        "* : differs from plain (5 %, paired by seed and prompt, seeds only where",
        "good         3",
        "Differences from plain",
        "detectable : the true difference that so many seeds and prompts would show",
        "Ranking by score",
        "missing: late seed 0: not played",
        "No common budget: each variant played all its rounds",
    ):
        assert text in shown.output
    report = json.loads((table / "out/comparison.json").read_text())
    assert report["control"] == "plain"
    assert len(report["missing"]) == 3
    page = (table / "out/comparison.md").read_text()
    heads = [line for line in page.splitlines() if line.startswith("| variant")]
    assert len(heads) == 3
    assert "| measure | variant | difference | 95 % | p (Holm) | detectable |" in page
    for block in page.split("\n\n"):
        if block.startswith("| "):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    paper = (table / "out/comparison.tex").read_text()
    assert paper.count(r"\begin{tabular}") == paper.count(r"\end{tabular}") == 4
    assert r"5 \%" in paper
    assert not [line for line in paper.splitlines() if line.startswith("%")][1:]


def test_json_is_one_object(table):
    arguments = ["compare", str(table / "mine.yaml"), "--out", str(table / "out"), "--table"]
    shown = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(shown.stdout)["rank_by"] == "score"


def test_one_seed_is_never_ranked(tmp_path):
    comparison, found = played(tmp_path, {"plain": 0.0, "good": 50.0}, seeds=[0])
    report = tabulate(comparison, found, {}, tmp_path)
    assert report["ranking"]["groups"] == [["good", "plain"]]
    assert report["variants"]["good"]["measures"]["score"]["low"] is None
    from prefloop.report.comparison import tables

    assert tables(report)[1].notes == (
        "One seed: the order may be luck, and nothing here can tell.",
    )


def test_a_cell_that_cannot_be_played_makes_the_command_fail(tmp_path, monkeypatch):
    """The exit code says so, the table is shown all the same, and the reason stands below it."""
    monkeypatch.setattr("prefloop.recipe.check.check_recipe", lambda recipe: [])
    written(tmp_path)
    comparison = Comparison.model_validate(json.loads((tmp_path / "mine.yaml").read_text()))
    found, _ = cells(comparison, tmp_path / "out")
    for cell in found:
        if cell.name != "late seed 1":
            pretend(cell, 0.0)
        else:
            cell.folder.mkdir(parents=True)
            (cell.folder / "stranger").touch()
    arguments = ["compare", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 1
    assert "missing: late seed 1: " in shown.output
    assert "'stranger' but no recipe.yaml" in shown.output


def test_a_variant_that_does_not_exist_is_named(tmp_path):
    path = written(tmp_path)
    shown = CliRunner().invoke(app, ["compare", str(path), "--only", "plan", "--table"])
    assert "did you mean 'plain'?" in str(shown.exception)


def test_the_check_lists_cells_and_what_they_share(tmp_path, monkeypatch):
    monkeypatch.setattr("prefloop.recipe.check.check_recipe", lambda recipe: ["all is well"])
    shown = CliRunner().invoke(app, ["compare", str(written(tmp_path)), "--check"])
    assert shown.exit_code == 0
    assert (
        "good seed 0  shares answers, introspection, candidates, ranked of plain seed 0"
        in shown.output
    )
    assert "note: variant plain: all is well" in shown.output
    assert "mine: 9 cells, ok" in shown.output
    assert not (tmp_path / "runs").exists()


SHORT = {"brief": {"name": "rules", "max_words": 1}}


def test_further_judges_score_the_same_answers_and_keep_their_verdicts(tmp_path):
    """Their columns are compared as the run's own are; what they said is read again, not asked again."""
    comparison, found = played(
        tmp_path,
        {"plain": 0.0, "good": 5.0},
        judges=SHORT,
        measures=("win_rate_by_brief", "score_by_brief"),
        rank_by="score_by_brief",
    )
    for cell in found:
        if cell.variant == "good":
            path = cell.folder / "rounds/0000/answers.jsonl"
            path.write_text(path.read_text().replace('"text":"a b"', '"text":"a"'))
            RoundDir(path.parent, 0).finish("answers", seconds=10.0)
            RoundDir(path.parent, 0).finish("result", seconds=10.0)
    report = tabulate(comparison, found, {}, tmp_path)
    measures = {name: one["measures"] for name, one in report["variants"].items()}
    assert measures["plain"]["win_rate_by_brief"]["value"] == 0.5
    assert measures["good"]["win_rate_by_brief"]["value"] == 1.0
    assert measures["good"]["score_by_brief"]["value"] == 1.0
    found_by_prompt = report["differences"]["score_by_brief"]["good"]
    assert (found_by_prompt["difference"], found_by_prompt["prompts"]) == (1.0, PROMPTS)
    kept = list((tmp_path / "judged").rglob("*.jsonl"))
    assert len(kept) == 2, "the start and every seed's answers are the same texts here"
    changed = kept[0].stat().st_mtime_ns
    assert tabulate(comparison, found, {}, tmp_path) == report
    assert kept[0].stat().st_mtime_ns == changed


def test_rounds_are_tabled_with_each_seeds_value_and_the_seconds(tmp_path):
    from prefloop.report.comparison import markdown

    comparison, found = played(tmp_path, {"plain": 0.0}, seeds=[0, 1], by_round=("kl",))
    report = tabulate(comparison, found, {}, tmp_path)
    start, first = report["by_round"]["plain"]
    assert (start["round"], first["round"]) == (-1, 0)
    assert first["measures"]["kl"]["by_seed"] == {"0": 0.1, "1": 0.11}
    assert first["measures"]["train_seconds"]["mean"]["value"] == 20.0
    assert first["measures"]["generate_seconds"]["mean"]["value"] == 5.0
    assert start["measures"]["train_seconds"]["mean"] is None
    assert "| plain | 0 | 0.105 (0.100, 0.110) |" in re.sub(" +", " ", markdown(report))
