"""What a run is said to take: counts that are exact, rates that are proportional, a finished run beside its estimate."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from prefloop.cli import app
from prefloop.errors import DataError, PrefloopError, RecipeError
from prefloop.models.policy import Policy
from prefloop.recipe import Recipe
from prefloop.run.cost import spent
from prefloop.run.estimate import (
    DECODES,
    FILL,
    READS,
    TRAINS,
    Rates,
    Shape,
    Told,
    Work,
    count_work,
    estimate,
    first_line,
    model_shape,
    rates_here,
    rates_of,
)
from prefloop.run.estimate_beside import beside
from prefloop.run_folder import read_run
from prefloop.train.options import SftOptions
from tests.run.test_clean import play, recipe


def even(shape: Shape) -> Rates:
    """A machine of round numbers."""
    return Rates(1e9, 2e9, 4e9, "a machine of round numbers")


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_models_numbers_are_those_of_the_loaded_one(model_folder: Path, tuning: str) -> None:
    chosen = recipe(model_folder, model={"tuning": tuning, "lora": {"r": 4}})
    shape, policy = model_shape(chosen), Policy.load(chosen.model)
    assert shape.multiplying == policy.multiplying_weights
    assert shape.trained == sum(w.numel() for w in policy.model.parameters() if w.requires_grad)
    base: Any = policy.model if tuning == "full" else policy.model.get_base_model()
    numbers = {n: w.numel() for n, w in base.named_parameters() if "lora_" not in n}
    assert shape.weights == sum(numbers.values())


def test_tokens_are_those_that_the_method_asks_for(model_folder: Path) -> None:
    spin = recipe(
        model_folder,
        method={"name": "spin", "sampling": {"max_new_tokens": 50}, "gates": {}},
        loop={"rounds": 3, "prompts_per_round": 4, "mix_previous": True, "carry_optimizer": False},
        train={"epochs": 2},
        evaluate={"prompts": 2, "introspection": False},
    )  # fmt: skip
    work = count_work(spin)
    # One answer to each of four prompts in three rounds; the start and three rounds are measured on two.
    assert work.generated == pytest.approx(3 * 4 * FILL * 50)
    assert work.measured_generated == pytest.approx(4 * 2 * FILL * 50)
    assert work.read > 0
    # Pairs of the rounds before the last are trained on twice, each time in two epochs.
    assert work.trained == pytest.approx(2 * work.reference, abs=1)
    longer = spin.model_copy(update={"loop": spin.loop.model_copy(update={"rounds": 6})})
    assert count_work(longer).generated == 2 * work.generated


def test_no_more_prompts_are_measured_than_there_are(model_folder: Path, tmp_path: Path) -> None:
    def measured(**data: Any) -> float:
        evaluate = {"prompts": 64, "introspection": False}
        chosen = recipe(model_folder, evaluate=evaluate)
        data = {**chosen.data.model_dump(), **data}
        chosen = chosen.model_copy(update={"data": type(chosen.data).model_validate(data)})
        answer = FILL * chosen.method.sampling.max_new_tokens
        return count_work(chosen).measured_generated / answer / (1 + chosen.loop.rounds)

    rows = "".join(json.dumps({"prompt": f"q {n}", "response": "a"}) + "\n" for n in range(3))
    (tmp_path / "few.jsonl").write_text(rows)
    few = {"name": "few", "source": str(tmp_path / "few.jsonl")}
    assert measured(eval=few["source"], holdout=0) == pytest.approx(3, abs=0.1)
    assert measured(eval=[few, {**few, "name": "again"}], holdout=0) == pytest.approx(6, abs=0.1)
    assert measured(eval=None, holdout=2) == pytest.approx(2, abs=0.1)
    assert measured(eval="owner/name", holdout=0) == pytest.approx(64, abs=0.1)


def test_a_budget_ends_the_rounds_and_supervision_counts(model_folder: Path) -> None:
    loop = {"rounds": 5, "prompts_per_round": 4, "mix_previous": False, "carry_optimizer": False}
    whole = estimate(recipe(model_folder, loop=loop), even).work
    one = round(whole.generated / 5)
    part = estimate(
        recipe(model_folder, loop={**loop, "budget": {"generated_tokens": one + 1}}), even
    )
    assert part.work.generated == pytest.approx(2 * one, abs=2)
    late = recipe(model_folder, loop={**loop, "budget": {"generated_tokens": 10**9}})
    assert estimate(late, even).work == whole
    quick = recipe(model_folder, loop={**loop, "budget": {"seconds": 1e-9}})
    assert estimate(quick, even).work.generated == pytest.approx(one, abs=1)
    taught = estimate(recipe(model_folder, loop=loop, sft={"epochs": 3}), even).work
    once = estimate(recipe(model_folder, loop=loop, sft={"epochs": 1}), even).work
    assert taught.trained - whole.trained == pytest.approx(
        3 * (once.trained - whole.trained), abs=3
    )
    assert once.trained > whole.trained


def test_a_run_begins_with_its_estimate_and_goes_on_without(
    model_folder: Path, tmp_path: Path
) -> None:
    chosen = recipe(model_folder, loop={"rounds": 1})
    path = tmp_path / "told.yaml"
    path.write_text(chosen.dump(), encoding="utf-8")
    words = ["run", str(path), "--out", str(tmp_path / "run")]
    first, again = (CliRunner().invoke(app, words) for _ in range(2))
    assert first.exit_code == again.exit_code == 0, first.output
    work = estimate(chosen, even).work
    drawn = work.generated + work.measured_generated
    assert f"up to about {drawn:,} tokens drawn, {work.trained:,} trained, " in first.output
    assert "tokens drawn" not in again.output
    assert first_line(chosen.model_copy(update={"model": gone(chosen)})) is None


def test_the_first_line_waits_for_nothing_that_it_cannot_use(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(model_folder, loop={"rounds": 1})
    hopeless = tmp_path / "no_answers.jsonl"
    hopeless.write_text('{"prompt": "a", "response": "b", "label": false}\n')
    empty = recipe(model_folder, data={"train": str(hopeless), "holdout": 1})
    with pytest.raises(DataError):
        count_work(empty)
    assert first_line(empty) is None

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("timed or estimated for nobody")

    monkeypatch.setattr("prefloop.run.estimate.rates_here", never)
    assert first_line(chosen) is None  # whatever is raised, a run goes on without its line
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    line = first_line(chosen)
    assert line is not None
    assert " GB of disk" in line
    assert " s," not in line and " h," not in line  # noqa: PT018
    monkeypatch.undo()
    monkeypatch.setattr("prefloop.run.estimate.first_line", never)
    path = tmp_path / "told.yaml"
    path.write_text(chosen.dump(), encoding="utf-8")
    told = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "run"), "--json"])
    assert told.exit_code == 0, told.output


def gone(chosen: Recipe) -> Any:
    """Model options of a folder that is not there."""
    return chosen.model.model_copy(update={"source": "/nowhere/model"})


def test_hours_follow_from_operations_and_rates(model_folder: Path) -> None:
    chosen = recipe(model_folder)
    work, n = Work(1000, 500, 300, 100, 20, 10), 2.0 * model_shape(chosen).multiplying
    found = estimate(chosen, even, work)
    assert found.flops == n * (1000 + 500 + 2 * 300 + 100)
    assert found.seconds == {
        "generate": pytest.approx(n * (1000 / 1e9 + 500 / 2e9)),
        "train": pytest.approx(n * 700 / 4e9),
        "evaluate": pytest.approx(n * (20 / 1e9 + 10 / 2e9)),
    }
    full = chosen.model_copy(update={"model": chosen.model.model_copy(update={"tuning": "full"})})
    assert estimate(full, even, work).flops == n * (1000 + 500 + 3 * 300 + 100)
    assert estimate(full, even, work).memory_mb["train"] > found.memory_mb["train"]


def test_named_gpus_are_as_many_times_faster_and_unknown_ones_named(model_folder: Path) -> None:
    chosen = recipe(model_folder)
    shape = model_shape(chosen)
    one, eight = rates_of("H100", chosen)(shape), rates_of("8xh100", chosen)(shape)
    assert eight.train == 8 * one.train == 8 * 0.35 * 989e12
    assert eight.decode == pytest.approx(8 * one.decode)
    for wrong in ("8xH1000", "0xH100", "many", ""):
        with pytest.raises(RecipeError, match="write 8xH100, with one of 4090"):
            rates_of(wrong, chosen)


def test_what_is_not_here_is_told(model_folder: Path, tmp_path: Path) -> None:
    chosen = recipe(model_folder, evaluate={"introspection": False})
    config = tmp_path / "elsewhere.json"
    config.write_text((model_folder / "config.json").read_text())
    assert model_shape(chosen, config) == model_shape(chosen)
    away = chosen.model_copy(
        update={"data": chosen.data.model_copy(update={"train": "owner/name"})}
    )
    told = {n: estimate(away, even, told=Told(config, n)).work for n in (50, 150)}
    rounds, prompts = chosen.loop.rounds, chosen.loop.prompts_per_round
    assert told[150].reference - told[50].reference == 100 * rounds * prompts
    assert told[150].generated == told[50].generated
    taught = away.model_copy(update={"sft": SftOptions()})
    with pytest.raises(RecipeError, match="trains on every row"):
        estimate(taught, even, told=Told(None, 50))


def test_of_a_hub_model_no_weights_are_fetched(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(model_folder)

    def fetch(source: str, *, allow_patterns: list[str], **options: Any) -> Path:
        for file in model_folder.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    on_the_hub = chosen.model_copy(
        update={"model": chosen.model.model_copy(update={"source": "owner/name"})}
    )
    assert estimate(on_the_hub, even) == estimate(chosen, even)
    assert not [*tmp_path.glob("*.safetensors")]


@pytest.mark.slow  # the embedded model's tokenizer
def test_scale_outs_example_prints_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale-out.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    ((words, said),) = re.findall(
        r"```\n(prefloop check [^\n]*--model-config [^\n]*)\n(.*?)```", page, re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    Path("zephyr.json").write_text(config)
    told = CliRunner().invoke(app, words.split()[1:])
    assert told.exit_code == 0, told.output
    assert said in told.output


def test_this_machine_is_timed_in_a_moment(model_folder: Path) -> None:
    chosen = recipe(model_folder)
    rates = rates_here(chosen, limit=0.1)(model_shape(chosen))
    assert rates.decode > 0
    # Both are of the same timed products, in float32.
    assert rates.train == pytest.approx(rates.prefill * sum(READS) / sum(TRAINS))


def test_what_is_not_products_does_not_become_faster_in_bfloat16(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {torch.float32: 1e9, torch.bfloat16: 8e9}
    monkeypatch.setattr(
        "prefloop.run.estimate._product_rate", lambda shape, rows, dtype, seconds: speeds[dtype]
    )
    chosen = recipe(model_folder)
    shape = dataclasses.replace(model_shape(chosen), dtype="bfloat16")
    threads = torch.get_num_threads()
    expected = [threads / (s.products / 8e9 + s.rest / 1e9) for s in (DECODES, READS, TRAINS)]
    assert rates_here(chosen)(shape)[:3] == pytest.approx(expected)


def test_a_finished_run_stands_beside_its_estimate(model_folder: Path, tmp_path: Path) -> None:
    chosen: Recipe = recipe(model_folder)
    folder = play(chosen, tmp_path / "run")
    lines = beside(folder, lambda r: even)
    rows = {line[:18].strip(): line[18:].split() for line in lines[1:]}
    found = spent(read_run(folder), chosen)
    for name, value in {
        "tokens drawn": found.generated_tokens,
        "tokens trained": found.trained_tokens,
        "FLOPs": found.flops,
    }.items():
        _, known, measured = map(float, rows[name])
        assert known == measured == pytest.approx(value, rel=1e-3)
    guessed, _, read = map(float, rows["tokens read"])
    assert guessed == pytest.approx(read, rel=0.5)


def test_the_command_prints_all_of_it(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "clean.yaml"
    path.write_text(recipe(model_folder).dump(), encoding="utf-8")
    told = CliRunner().invoke(app, ["check", str(path), "--estimate", "--gpus", "8xL20"])
    assert told.exit_code == 0, told.output
    for word in ("tokens ", "FLOPs ", "hours ", "8 x L20", "memory ", "disk "):
        assert word in told.output


def test_of_named_gpus_the_dtype_there_is_told_not_this_machines(
    model_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "clean.yaml"
    path.write_text(recipe(model_folder).dump(), encoding="utf-8")
    options = ["--set", "model.dtype=auto", "--set", "sft={epochs: 1}", "--estimate"]
    told = CliRunner().invoke(app, ["check", str(path), *options, "--gpus", "8xL20"])
    assert told.exit_code == 0, told.output
    assert "model.dtype auto is bfloat16 there: as for every adapter on CUDA" in told.output
    assert "products in bfloat16" in told.output
    assert "this CPU" not in told.output


def test_what_an_estimate_cannot_use_is_refused(model_folder: Path, tmp_path: Path) -> None:
    path, run_folder = tmp_path / "clean.yaml", tmp_path / "stopped"
    run_folder.mkdir()
    for place in (path, run_folder / "recipe.yaml"):
        place.write_text(recipe(model_folder).dump(), encoding="utf-8")
    for words, says in {
        (str(path), "--gpus", "8xL20"): "add --estimate",
        (str(run_folder), "--estimate", "--set", "seed=1"): "leave out --set",
        (str(run_folder), "--estimate", "--dump"): "leave out --dump",
        (str(run_folder), "--estimate", "--prompt-tokens", "9"): "leave out --prompt-tokens",
        (str(path), "--model-config", "config.json"): "--model-config is for an estimate",
        (str(path), "--estimate", "--model-config", "config.json"): "no file config.json",
        (str(path), "--estimate", "--model-config", str(path)): "no config of a model",
        (str(run_folder), "--estimate", "--gpus", "8xL20"): "has not ended",
    }.items():
        told = CliRunner().invoke(app, ["check", *words])
        assert isinstance(told.exception, PrefloopError)
        assert says in str(told.exception)
