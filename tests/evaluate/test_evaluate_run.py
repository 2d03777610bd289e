"""`prefloop evaluate`: subjects, suites, what is kept, what is compared, and what is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import prefloop.evaluate.run as evaluation
from prefloop import cli
from prefloop.evaluate.measures.preferences import Preferences
from prefloop.generate.hf_engine import HFEngine
from prefloop.models.policy import Policy
from prefloop.models.sources import ModelOptions
from prefloop.recipe import load_recipe
from prefloop.run.loop import run as play

ROWS = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(10)]
PAIRS = [
    {"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(6)
]
SHORT = {"max_new_tokens": 6}
QUICK = [
    *("--set", "win_rate.sampling={max_new_tokens: 6}"),
    *("--set", "health.sampling={max_new_tokens: 6}"),
    *("--set", "divergence.max_new_tokens=6"),
]


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def made(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of two rounds, runs/r, its model, and files of prompts and pairs."""
    folder = tmp_path_factory.mktemp("evaluate")
    sections = {
        "model": {"source": str(model_folder), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(folder / "rows.jsonl"), "holdout": 4},
        "method": {"name": "ial", "sampling": SHORT, "advice": SHORT, "gates": {"cut_off": False}},
        "judge": {"name": "similarity"},
        "loop": {"rounds": 2, "prompts_per_round": 4},
        "generate": {"chunk_size": 2},
        "train": {"batch_size": 4, "micro_batch_size": 2, "lr": 1e-2},
        "evaluate": {"prompts": 4, "introspection": False},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write("rows.jsonl", ROWS)
        write("pairs.jsonl", PAIRS)
        Path("r.yaml").write_text(yaml.safe_dump(sections))
        with Path("log").open("w") as log:
            play(load_recipe("r.yaml"), folder / "runs" / "r", Console(file=log))
    return folder


class Shell:
    """The entry point, in this process."""

    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.patch = patch
        self.capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        code: Any = 0
        with self.patch.context() as patch:
            patch.setattr("sys.argv", ["prefloop", "evaluate", *words])
            try:
                cli.main()
            except SystemExit as end:
                code = end.code or 0
        out, err = self.capsys.readouterr()
        return code, out, err

    def report(self, *words: str) -> dict[str, Any]:
        code, out, err = self(*words, "--json")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    def refuses(self, *words: str, saying: tuple[str, ...]) -> None:
        code, _, err = self(*words)
        lines = [line for line in err.splitlines() if line.startswith("prefloop: ")]
        assert code == 2, err
        assert len(lines) == 1, err
        assert err.splitlines()[-1] == lines[0]
        for part in saying:
            assert part in err, err


@pytest.fixture
def shell(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    made: Path,
    tmp_path: Path,
) -> Shell:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "pairs.jsonl"):
        shutil.copy(made / name, name)
    Path("runs").symlink_to(made / "runs")
    return Shell(monkeypatch, capsys)


def test_the_quick_suite_of_a_run_says_what_it_measured_and_what_it_skipped(shell: Shell) -> None:
    report = shell.report("runs/r", *QUICK)
    part = report["subjects"]["r"]
    assert set(part["measures"]) == {"divergence", "health", "introspection", "win_rate"}
    assert "name a file of labelled pairs" in part["skipped"]["preferences"]
    assert report["judge"] == "similarity, the run's own"
    assert report["prompts"] == "held out by runs/r"
    for row in part["measures"].values():
        assert row["seconds"] >= 0
        for estimate in row["estimates"].values():
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert report["environment"]["versions"]["torch"] == version("torch")
    assert {"R_i", "identical_rate"} <= set(part["measures"]["introspection"]["estimates"])
    for name in ("json", "md", "tex"):
        assert Path(f"evaluations/evaluation.{name}").stat().st_size > 100
    assert json.loads(Path("evaluations/evaluation.json").read_text()) == report
    assert list(Path("evaluations").rglob("on-its-way")) == []


def test_margin_and_real_reward_of_every_step_are_in_the_report(shell: Shell, made: Path) -> None:
    report = shell.report(
        "runs/r", "--set", "health.sampling={max_new_tokens: 6}", "--suite", "safety"
    )
    curves = report["subjects"]["r"]["curves"]
    logged = (made / "runs/r/rounds/0001/train/metrics.jsonl").read_text().splitlines()
    assert curves["training"]["1"] == [json.loads(line) for line in logged]
    assert {"margin", "real_reward"} <= set(curves["training"]["0"][0])


def test_what_is_measured_already_is_not_measured_again(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("runs/r", "--set", "preferences.data=pairs.jsonl", *QUICK)
    first = shell.report(*words)
    with monkeypatch.context() as patch:
        patch.setattr(
            evaluation, "open_subject", lambda *_: pytest.fail("the model is loaded again")
        )
        second = shell.report(*words)
    rows = second["subjects"]["r"]["measures"]
    assert all(row.pop("kept_from_before") for row in rows.values())
    for row in first["subjects"]["r"]["measures"].values():
        assert not row.pop("kept_from_before")
    assert second == first


def test_a_text_that_ends_answers_is_no_path_whatever_lies_there(shell: Shell) -> None:
    file = measures({"health": {"sampling": {**SHORT, "stop": [".", "~~~", "x" * 300]}}})
    for again in (False, True):  # "." holds the report of the first call by then
        part = shell.report("runs/r", "--measures", file)["subjects"]["r"]
        assert part["measures"]["health"]["kept_from_before"] is again


def test_a_file_that_changes_while_it_is_measured_is_measured_again_the_next_time(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = measures({"health": {"held_out": "rows.jsonl", "limit": 2, "sampling": SHORT}})
    real = evaluation.open_subject
    monkeypatch.setattr(
        evaluation, "open_subject", lambda *names: (write("rows.jsonl", ROWS[:3]), real(*names))[1]
    )
    for _ in range(2):
        part = shell.report("runs/r", "--measures", file)["subjects"]["r"]
        assert not part["measures"]["health"]["kept_from_before"]


@pytest.mark.parametrize("change", ["data", "option", "weights"])
def test_what_has_changed_is_measured_again_and_nothing_else(
    shell: Shell, change: str, made: Path
) -> None:
    words = ["runs/r", "--set", "preferences.data=pairs.jsonl", "--suite", "quick", *QUICK]
    shell.report(*words)
    if change == "data":
        write("pairs.jsonl", PAIRS[:5])
    elif change == "option":
        words += ["--set", "preferences.beta=0.2"]
    else:
        Path("runs").unlink()
        shutil.copytree(made / "runs", "runs")
        policy = Path("runs/r/policy/adapter_model.safetensors")
        shutil.copy("runs/r/rounds/0000/policy/adapter_model.safetensors", policy)
        Path("runs/r/policy.done.json").unlink()  # another policy, not a damaged one
    rows = shell.report(*words)["subjects"]["r"]["measures"]
    again = {name for name, row in rows.items() if not row["kept_from_before"]}
    assert again == (set(rows) if change == "weights" else {"preferences"})


def test_a_killed_evaluation_goes_on_to_the_same_report(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = ("--set", "win_rate.chunk=2", "--set", "health.chunk=2")
    words = ("runs/r", *QUICK, *chunks)
    whole = shell.report(*words, "--out", "whole")
    sample, calls = HFEngine.sample, []

    def killed(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(HFEngine, "sample", killed)
        code, _, err = shell(*words, "--out", "killed")
    assert code == 130
    assert "the same command goes on where it stopped" in err
    resumed = shell.report(*words, "--out", "killed")
    for report in (whole, resumed):
        for row in report["subjects"]["r"]["measures"].values():
            row.pop("seconds"), row.pop("kept_from_before")
            row["options"].pop("held_out", None)
    assert resumed == whole


def test_rounds_and_the_start_are_compared_on_the_items_that_both_have(shell: Shell) -> None:
    words = ("--set", "preferences.data=pairs.jsonl", *QUICK)
    report = shell.report("runs/r@start", "runs/r@0", "runs/r", *words)
    parts = report["subjects"]
    assert set(parts) == {"r@start", "r@0", "r"}
    start = parts["r@start"]["measures"]
    assert start["preferences"]["estimates"]["acs"]["value"] == 0.0
    assert start["divergence"]["estimates"]["kl"]["value"] == 0.0
    assert start["win_rate"]["estimates"]["win_rate"]["value"] == 0.5
    rows = report["comparisons"]
    assert {row["subject"] for row in rows} == {"r@0", "r"}
    assert {row["against"] for row in rows} == {"r@start"}
    for row in rows:
        assert row["p_holm"] >= row["p"]
        assert row["significant"] == (row["p_holm"] < 0.05)
    acs = next(r for r in rows if r["metric"] == "acs" and r["subject"] == "r")
    found = parts["r"]["measures"]["preferences"]["estimates"]["acs"]["value"]
    assert acs["difference"]["value"] == pytest.approx(found)
    assert acs["difference"]["count"] == 6
    text = Path("evaluations/evaluation.md").read_text()
    assert "n.s." in text
    assert "Holm" in text


def test_acs_is_what_the_policies_own_log_probs_say(shell: Shell, model_folder: Path) -> None:
    report = shell.report(
        "runs/r", "--measures", measures({"preferences": {"data": "pairs.jsonl"}})
    )
    options = ModelOptions(source=str(model_folder), dtype="float32", device="cpu")
    pairs = Preferences(data="pairs.jsonl")._pairs()
    sums = []
    for adapter in (Path("runs/r/policy"), None):
        policy = Policy.load(options, adapter, trainable=False)
        chat = HFEngine(policy.model, policy.tokenizer).chat
        found = []
        for pair in pairs:
            for text in (pair.chosen, pair.rejected):
                prompt, answer = (
                    chat.prompt_ids(pair.messages),
                    chat.completion_ids(pair.messages, text),
                )
                with torch.no_grad():
                    logits = policy.model(input_ids=torch.tensor([prompt + answer])).logits[0]
                logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
                found.append(logps[range(len(answer)), answer].sum())
        sums.append(torch.stack(found).view(-1, 2))
    rewards = 0.1 * (sums[0] - sums[1]) @ torch.tensor([1.0, -1.0])
    estimates = report["subjects"]["r"]["measures"]["preferences"]["estimates"]
    assert abs(rewards).max() > 1e-3
    assert estimates["acs"]["value"] == pytest.approx(rewards.mean().item(), abs=1e-5)
    accuracy = (rewards > 0).float().mean().item()
    assert estimates["pair_accuracy"]["value"] == pytest.approx(accuracy)


def test_a_model_that_is_no_runs_policy_is_measured_without_a_start(
    shell: Shell, model_folder: Path
) -> None:
    words = (str(model_folder), "--data", "rows.jsonl", "--limit", "3", *QUICK[:4])
    code, out, err = shell(*words, "--judge", "similarity", "--set", "win_rate.opponent=targets")
    assert code == 0, err
    part = json.loads(Path("evaluations/evaluation.json").read_text())["subjects"]
    (row,) = part.values()
    assert set(row["measures"]) == {"health", "win_rate"}
    assert row["measures"]["win_rate"]["estimates"]["win_rate"]["count"] == 3
    assert "is no run's policy" in row["skipped"]["divergence"]
    assert "skipped divergence" in out
    assert list(Path("evaluations").rglob("on-its-way")) == []


def test_a_models_start_can_be_named(shell: Shell, model_folder: Path) -> None:
    words = ("--data", "rows.jsonl", "--limit", "2", "--set", "divergence.max_new_tokens=4")
    file = measures({"divergence": None})
    report = shell.report(
        str(model_folder), "--initial", str(model_folder), "--measures", file, *words
    )
    (part,) = report["subjects"].values()
    assert part["measures"]["divergence"]["estimates"]["kl"]["value"] == 0.0


def measures(values: dict[str, Any]) -> str:
    Path("measures.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return "measures.yaml"


def test_a_file_of_measures_takes_those_alone(shell: Shell) -> None:
    file = measures({"health": {"sampling": SHORT}})
    part = shell.report("runs/r", "--measures", file)["subjects"]["r"]
    assert set(part["measures"]) == {"health"}
    assert part["skipped"] == {}


def test_the_report_names_the_run_whole_whatever_its_name_holds(shell: Shell) -> None:
    Path("a@b").symlink_to("runs/r")
    file = measures({"health": {"sampling": SHORT}})
    assert shell.report("a@b", "--measures", file)["prompts"] == "held out by a@b"


def test_a_measure_of_the_users_own_is_found_by_its_module(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own_measures").mkdir()
    Path("own_measures/shouting.py").write_text(
        "from prefloop.evaluate.measures import Measure, Outcome\n"
        "from prefloop.evaluate.stats import wilson\n"
        "class Shouting(Measure):\n"
        "    'Whether it shouts.'\n"
        "    def run(self, subject):\n"
        "        return Outcome({'shouting': wilson(1, 4)})\n"
    )
    monkeypatch.syspath_prepend(".")
    part = shell.report("runs/r", "--measures", measures({"own_measures.shouting": None}))[
        "subjects"
    ]["r"]
    assert part["measures"]["own_measures.shouting"]["estimates"]["shouting"]["value"] == 0.25


def test_piped_tables_are_plain_and_whole(shell: Shell) -> None:
    code, out, err = shell("runs/r@0", "runs/r", *QUICK)
    assert code == 0, err
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].startswith("prompts: held out by runs/r")
    head = next(line for line in lines if line.startswith("measure"))
    assert "r@0" in head
    assert any(line.split()[:2] == ["win_rate", "win_rate"] for line in lines)
    assert any("n.s." in line for line in lines)


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (("runs/r", "--suite", "quik"), ("no suite 'quik'", "'quick'")),
        (("runs/r", "--set", "winrate.limit=3"), ("no measure 'winrate'", "'win_rate'")),
        (("runs/r", "--set", "win_rate.limt=3"), ("unknown key 'limt'", "'limit'")),
        (("runs/r", "--set", "limit=3"), ("measure.option=value",)),
        (("runs/r", "--set", "preferences.beta=2"), ("preferences", "labelled pairs")),
        (("runs/r", "--set", "preferences.data=no.jsonl"), ("preferences", "no.jsonl")),
        (("runs/r", "--measures", "no.yaml"), ("no file no.yaml",)),
        (("runs/r@7",), ("no policy of round 7", "it has 0, 1")),
        (("runs/r@last",), ("'last' is no round", "runs/r@start")),
        (("./nowhere",), ("./nowhere",)),
        (("runs/r", "runs/r"), ("named twice",)),
        (("runs/r", "--judge", "self_judge"), ("--policy",)),
        (("runs/r", "--judge", "similarty"), ("'similarity'",)),
        (("runs/r", "--data", "no.jsonl"), ("no.jsonl",)),
        (
            ("runs/r", "--set", "win_rate.opponent=pairs.jsonl"),
            ("opponent pairs.jsonl", "response"),
        ),
    ],
)
def test_a_wrong_input_is_one_sentence(
    shell: Shell, words: tuple[str, ...], saying: tuple[str, ...]
) -> None:
    shell.refuses(*words, saying=saying)


def test_a_model_that_is_not_there_leaves_no_folder_behind(shell: Shell) -> None:
    shell.refuses("./nowhere", "--out", "new", saying=("./nowhere",))
    words = ("runs/r", "--initial", "./nowhere", "--out", "new")
    shell.refuses(*words, saying=("./nowhere",))
    assert not Path("new").exists()


def test_a_judge_that_compares_with_responses_needs_prompts_that_have_some(shell: Shell) -> None:
    write("bare.jsonl", [{"prompt": "question 1"}])
    words = ("runs/r", "--data", "bare.jsonl")
    shell.refuses(*words, "--judge", "similarity", saying=("compares with responses", "bare.jsonl"))
    report = shell.report(*words, "--suite", "quick", "--limit", "1")
    assert report["judge"] is None
    assert "--judge" in report["subjects"]["r"]["skipped"]["win_rate"]


def test_asking_a_model_for_what_only_a_run_has_is_an_error_before_anything_is_measured(
    shell: Shell, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFEngine, "sample", lambda *_, **__: pytest.fail("it was measured first"))
    file = measures({"health": None, "divergence": None})
    words = (str(model_folder), "--measures", file, "--data", "rows.jsonl")
    shell.refuses(*words, saying=("divergence", "is no run's policy", "--initial"))


def test_a_run_without_a_policy_is_told_what_to_do(shell: Shell, made: Path) -> None:
    Path("runs").unlink()
    shutil.copytree(made / "runs", "runs")
    shutil.rmtree("runs/r/policy")
    rounds = [path.parent for path in sorted(Path("runs/r/rounds").glob("0*/policy"))]
    last = int(rounds[-1].name)
    shell.refuses(
        "runs/r",
        saying=("has no policy; finish it with prefloop run", f"name a round: runs/r@{last}"),
    )
    for number in rounds:
        shutil.rmtree(number)
    shell.refuses(
        "runs/r",
        saying=("has no policy; finish it with prefloop run", "name a round: runs/r@start"),
    )
