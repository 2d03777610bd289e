"""The closed loop on a tiny model: what it leaves behind, what it does not do twice, and how it is resumed."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prefloop.manifest
import prefloop.run.chunks
import prefloop.run.held_out
import prefloop.run.loop
import prefloop.run.publish
import prefloop.run.session
import prefloop.run_folder
import prefloop.train.checkpoint
from prefloop.errors import GuardStop
from prefloop.generate.engine import Weights
from prefloop.generate.engines.fake import _WORDS, Fake, _OpenFake
from prefloop.models.chat import Chat
from prefloop.models.policy import ModelOptions, Policy
from prefloop.recipe import Recipe, load_recipe
from prefloop.records import Candidates, Pair, Prompt
from prefloop.run.chunks import Journal
from prefloop.run.loop import run
from prefloop.run_folder import Outcome, RunDir, read_run
from prefloop.train.logprobs import padded_logprobs
from prefloop.train.packing import TokenGroup
from prefloop.train.trainer import Trainer
from tests.fake_chat_server import serve

SAMPLING = {"max_new_tokens": 8}
# Random weights never stop by themselves, and what they write would not pass any gate.
OPEN = {
    "cut_off": False,
    "identical": False,
    "meta_talk": False,
    "max_edit_share": None,
    "max_length_ratio": None,
}
METHODS: dict[str, dict[str, Any]] = {
    "ial": {
        "method": {"name": "ial", "sampling": SAMPLING, "advice": SAMPLING, "gates": OPEN},
        "judge": {"name": "similarity"},
    },
    "arop": {"method": {"name": "arop", "sampling": SAMPLING, "gates": OPEN}},
}
# For tests of other stages: as little evaluation as there can be.
LIGHT = {"prompts": 1, "introspection": False, "every_round": False}
STAGES = ("candidates", "ranked", "pairs", "train", "answers", "introspection", "result")


def recipe(folder: Path, name: str, **changes: Any) -> Recipe:
    """A loop of two rounds over eight prompts; `changes` are laid over its sections."""
    values: dict[str, Any] = {
        "name": name,
        "model": {"source": str(folder), "device": "cpu", "dtype": "float32"},
        "generate": {"chunk_size": 4},
        "loop": {"rounds": 2, "prompts_per_round": 8},
        "train": {"epochs": 1, "lr": 1e-3, "batch_size": 4, "micro_batch_size": 2, "save_every": 1},
        "evaluate": {"prompts": 4},
        "guard": {"min_stop_rate": 0.0},
        **METHODS[name],
    }
    for section, options in changes.items():
        both = isinstance(options, dict) and isinstance(values.get(section), dict)
        values[section] = {**values[section], **options} if both else options
    return Recipe.model_validate(values)


def play(recipe: Recipe, folder: Path) -> Outcome:
    return run(recipe, folder, Console(file=StringIO()))


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here only processes are killed, never the machine."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Outcome]:
    """The unbroken run of a method, played once for all tests of this file."""
    found: dict[str, Outcome] = {}

    def get(name: str) -> Outcome:
        if name not in found:
            folder = tmp_path_factory.mktemp("runs") / name
            found[name] = play(recipe(model_folder, name), folder)
        return found[name]

    return get


def what_counts(folder: Path) -> dict[str, bytes]:
    """Records, measures, training metrics and weights: all that must not depend on interruptions."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".jsonl", ".safetensors") and path.name != "events.jsonl"
    }


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_the_policy_is_checked_once_a_run(model_folder: Path, tmp_path: Path) -> None:
    chosen = recipe(model_folder, "arop", loop={"rounds": 1}, evaluate=LIGHT)
    console = Console(file=StringIO(), width=300)
    run(chosen, tmp_path / "run", console)
    assert isinstance(console.file, StringIO)
    assert "adapter on " in console.file.getvalue()
    run(chosen, tmp_path / "run", Console(file=StringIO()))
    kinds = [event["event"] for event in events(tmp_path / "run")]
    assert kinds.count("self_check") == kinds.count("adapter") == 1
    assert kinds.index("self_check") < kinds.index("stage")


# What a run leaves behind.


@pytest.mark.parametrize("name", METHODS)
def test_a_run_leaves_every_artifact(finished, model_folder, name):
    outcome = finished(name)
    folder = outcome.folder
    for number in range(2):
        round_dir = folder / "rounds" / f"{number:04d}"
        for stage in STAGES:
            manifest = json.loads((round_dir / f"{stage}.done.json").read_text())
            assert manifest["stage"] == stage
            assert manifest["versions"]["torch"] == version("torch")
        assert len((round_dir / "pairs.jsonl").read_text().splitlines()) == 8
        assert (round_dir / "policy" / "adapter_model.safetensors").is_file()
        assert len((round_dir / "train" / "metrics.jsonl").read_text().splitlines()) == (
            4 if name == "ial" and number else 2
        )
    leftovers = ["*.progress.json", "*.tmp", "checkpoint-*", ".checkpoint*", ".policy*", "*.old"]
    assert [path for pattern in leftovers for path in folder.rglob(pattern)] == []
    for file in ("recipe.yaml", "environment.json", "events.jsonl", "policy/README.md"):
        assert (folder / file).is_file()
    assert outcome.policy == folder / "policy"
    assert load_recipe(str(folder / "recipe.yaml")) == recipe(model_folder, name)


@pytest.mark.parametrize("name", METHODS)
def test_the_start_and_every_round_are_measured(finished, name):
    results = finished(name).results
    assert [result.round for result in results] == [-1, 0, 1]
    always = {"distinct_2", "mean_length", "stop_rate", "kl", "score", "win_rate", "identical_rate"}
    trained = {"train_loss", "train_real_reward", "train_accuracy"}
    own = {"ial": {"R_i", "train_margin"}, "arop": {"flaw_edit_share", "train_reward_margin"}}[name]
    assert always <= results[0].measures.keys()
    assert always | trained | own <= results[2].measures.keys()
    assert results[0].measures["kl"] == 0.0
    assert results[0].measures["win_rate"] == 0.5
    assert results[1].measures["kl"] != 0.0
    assert results == read_run(finished(name).folder).results()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", METHODS)
def test_peft_loads_the_published_adapter(finished, model_folder, name):
    folder = finished(name).policy
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = peft.PeftModel.from_pretrained(base, folder)
    loaded = peft.get_peft_model_state_dict(model)
    last = load_file(folder.parent / "rounds" / "0001" / "policy" / "adapter_model.safetensors")
    assert loaded.keys() == last.keys()
    assert all(torch.equal(loaded[key], last[key]) for key in last)
    assert any(value.abs().max() > 0 for key, value in last.items() if "lora_B" in key)


def test_rounds_draw_other_prompts_and_train_on(finished):
    folder = finished("arop").folder
    pairs = [found for _, found in read_run(folder).pairs()]
    first, second = ({pair.prompt_id for pair in round_pairs} for round_pairs in pairs)
    assert len(first) == len(second) == 8
    assert first != second
    adapters = [
        (folder / "rounds" / f"{n:04d}" / "policy" / "adapter_model.safetensors").read_bytes()
        for n in range(2)
    ]
    assert adapters[0] != adapters[1]


def test_manifests_name_what_they_were_made_from(finished):
    round_dir = read_run(finished("ial").folder).rounds()[1]
    train = round_dir.manifest("train")
    pairs = round_dir.manifest("pairs")
    assert train is not None
    assert pairs is not None
    assert train["input"] == pairs["output"] == round_dir.digest("pairs")
    assert (pairs["records"], pairs["rejects"]) == (8, {})


def test_nothing_in_the_folder_is_pickled(finished):
    for name in METHODS:
        suffixes = {path.suffix for path in finished(name).folder.rglob("*") if path.is_file()}
        assert suffixes <= {".json", ".jsonl", ".yaml", ".safetensors", ".md", ".jinja", ""}


# What is not done twice.


@pytest.mark.parametrize("name", METHODS)
def test_a_second_run_loads_no_model_and_changes_nothing(finished, model_folder, monkeypatch, name):
    first = finished(name)
    before = what_counts(first.folder)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a finished run needs no model")

    monkeypatch.setattr(Policy, "load", refuse)
    second = play(recipe(model_folder, name), first.folder)
    assert second == first
    assert what_counts(first.folder) == before


def test_another_seed_gives_another_run(finished, model_folder, tmp_path):
    changed = recipe(model_folder, "arop", seed=1, loop={"rounds": 1}, evaluate=LIGHT)
    other = play(changed, tmp_path / "other")
    pairs = [
        read_run(folder).pairs([0])[0][1] for folder in (other.folder, finished("arop").folder)
    ]
    assert {pair.chosen for pair in pairs[0]}.isdisjoint(pair.chosen for pair in pairs[1])


# Ways to go around the loop.


def test_previous_pairs_are_mixed_in(finished, model_folder, tmp_path):
    """IAL's default; without it a round trains on its own pairs only."""

    def examples(folder: Path) -> list[int]:
        manifests = (round_dir.manifest("train") or {} for round_dir in read_run(folder).rounds())
        return [manifest["examples"] for manifest in manifests]

    assert examples(finished("ial").folder) == [8, 16]
    alone = recipe(model_folder, "ial", loop={"mix_previous": False}, evaluate=LIGHT)
    assert examples(play(alone, tmp_path / "alone").folder) == [8, 8]


def test_a_frozen_generator_answers_as_the_initial_policy(finished, model_folder, tmp_path):
    """Seen in the log-probs of the second round's answers, which the sampler itself has noted."""
    method = {**METHODS["arop"]["method"], "generator": "frozen"}
    frozen = play(recipe(model_folder, "arop", method=method, evaluate=LIGHT), tmp_path / "frozen")
    options = ModelOptions(source=str(model_folder), device="cpu", dtype="float32")
    initial = Policy.load(options)
    chat = Chat(initial.tokenizer)

    def distance(folder: Path, number: int) -> float:
        groups = RunDir(folder).round(number).records("candidates", Candidates)
        drafts = [group.responses["draft_a"] for group in groups]
        rows = [
            TokenGroup(tuple(chat.prompt_ids(group.prompt.messages)), (draft.token_ids,))
            for group, draft in zip(groups, drafts, strict=True)
        ]
        with torch.no_grad():
            known = [group[0].mean().item() for group in padded_logprobs(initial.model, rows)]
        found = [draft.mean_logprob or 0.0 for draft in drafts]
        return max(abs(a - b) for a, b in zip(known, found, strict=True))

    assert distance(frozen.folder, 1) < 1e-4
    assert distance(finished("arop").folder, 0) < 1e-4
    assert distance(finished("arop").folder, 1) > 1e-3


def test_the_divergence_is_of_the_tokens_that_were_sampled(finished, model_folder):
    """By plain forward passes; answers that the limit cut off have no end token that could count."""
    outcome = finished("arop")
    options = ModelOptions(source=str(model_folder), device="cpu", dtype="float32")
    last = RunDir(outcome.folder).round(1)
    initial, trained = Policy.load(options), Policy.load(options, last.policy)
    chat = Chat(initial.tokenizer)
    groups = last.records("answers", Candidates)
    answers = [group.responses["answer"] for group in groups]
    assert {answer.finish for answer in answers} == {"length"}
    rows = [
        TokenGroup(tuple(chat.prompt_ids(group.prompt.messages)), (answer.token_ids,))
        for group, answer in zip(groups, answers, strict=True)
    ]
    with torch.no_grad():
        sums = [
            sum(group[0].sum().item() for group in padded_logprobs(policy.model, rows))
            for policy in (trained, initial)
        ]
    tokens = sum(len(answer.token_ids) for answer in answers)
    assert outcome.results[-1].measures["kl"] == pytest.approx(
        (sums[0] - sums[1]) / tokens, abs=1e-5
    )


def test_pairs_hold_the_tokens_that_were_sampled(finished):
    for name in METHODS:
        for round_dir in read_run(finished(name).folder).rounds():
            groups = {g.prompt.id: g for g in round_dir.records("candidates", Candidates)}
            for pair in round_dir.records("pairs", Pair):
                said = groups[pair.prompt_id].responses
                assert pair.token_ids == {
                    role: said[candidate].token_ids for role, candidate in pair.origin.items()
                }


def test_full_tuning_saves_whole_models(model_folder, tmp_path):
    full = recipe(model_folder, "ial", model={"tuning": "full"}, loop={"rounds": 1}, evaluate=LIGHT)
    outcome = play(full, tmp_path / "full")
    trained = AutoModelForCausalLM.from_pretrained(outcome.policy).state_dict()
    initial = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    assert trained.keys() == initial.keys()
    assert any(not torch.equal(trained[key], initial[key]) for key in initial)
    assert not (outcome.policy / "adapter_config.json").exists()


def test_round_0_makes_a_new_initial_policy(finished, model_folder, tmp_path):
    """After supervised fine-tuning the divergence is measured from its result, and the loop starts there."""
    tuned = recipe(
        model_folder,
        "ial",
        sft={"epochs": 1, "lr": 1e-3, "batch_size": 8},
        data={"limit": 16},
        loop={"rounds": 1},
        evaluate=LIGHT,
    )
    outcome = play(tuned, tmp_path / "tuned")
    start = outcome.folder / "rounds" / "start"
    manifest = json.loads((start / "sft.done.json").read_text())
    assert (manifest["examples"], manifest["steps"]) == (16, 2)
    assert manifest["last_loss"] < manifest["first_loss"]
    assert outcome.results[0].measures["kl"] == 0.0
    merged = AutoModelForCausalLM.from_pretrained(start / "policy").state_dict()
    initial = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    assert merged.keys() == initial.keys()
    assert any(not torch.equal(merged[key], initial[key]) for key in initial)
    config = json.loads((outcome.policy / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == start / "policy"


def test_arop_carries_its_optimiser_and_ial_does_not(finished):
    def optimizers(name: str) -> list[Path]:
        return sorted(finished(name).folder.rglob("optimizer.safetensors"))

    taken = [load_file(path)["0/step"].item() for path in optimizers("arop")]
    assert taken == [2.0, 4.0]
    assert optimizers("ial") == []


# Engines.


@pytest.mark.parametrize("name", METHODS)
def test_any_engine_plays_the_policy_and_divergence_is_measured_in_process(
    model_folder, tmp_path, name
):
    """The fake engine writes all text, without having a look at the model."""
    fake = recipe(model_folder, name, engine={"name": "fake"}, loop={"rounds": 1})
    outcome = play(fake, tmp_path / "fake")
    drafts = [
        group.responses[fake.method.answer].text
        for group in read_run(outcome.folder).round(0).records("candidates", Candidates)
    ]
    assert len(drafts) == 8
    assert all(set(draft.strip(".").split()) <= set(_WORDS) for draft in drafts)
    assert outcome.results[0].measures["kl"] == 0.0
    assert outcome.results[1].measures["kl"] != 0.0


def test_an_engine_is_told_whose_weights_to_serve_and_closed_at_the_end(
    model_folder, tmp_path, monkeypatch
):
    told: list[Any] = []

    class Watched(_OpenFake):
        def load_weights(self, weights: Weights, probe: Any) -> None:
            told.append((weights.adapter and weights.adapter.parent.name, len(probe()) > 60))

        def offload(self) -> None:
            told.append("rest")

        def close(self) -> None:
            told.append("close")

    monkeypatch.setattr(Fake, "open", lambda self, setting: Watched(setting.chat))
    fake = recipe(model_folder, "arop", engine={"name": "fake"}, evaluate=LIGHT)
    play(fake, tmp_path / "fake")
    without_repeats = [now for before, now in pairwise([None, *told]) if now != before]
    assert without_repeats == [
        (None, True),
        "rest",
        ("0000", True),
        "rest",
        ("0001", True),
        "close",
    ]
    told.clear()
    monkeypatch.setattr(Trainer, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        play(fake, tmp_path / "stopped")
    assert told[-1] == "close"


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_vllm_and_this_process_make_one_policy_of_one_recipe_and_stale_weights_stop_the_run():
    """benchmarks/vllm_rounds.py says what that means; needs PREFLOOP_VLLM_PYTHON."""
    python = os.environ.get("PREFLOOP_VLLM_PYTHON")
    if python is None:
        pytest.skip("vLLM has an environment of its own: name its Python in PREFLOOP_VLLM_PYTHON")
    script = Path(__file__).parents[2] / "benchmarks" / "vllm_rounds.py"
    command = [sys.executable, str(script), "--vllm-python", python, "--rounds", "1", "--json"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


# Guards.


def test_a_guard_stops_the_run_and_keeps_the_rounds_before(model_folder, tmp_path):
    strict = recipe(model_folder, "arop", guard={"action": "stop", "max_kl": 1e-9})
    for _ in range(2):
        with pytest.raises(GuardStop, match=r"KL from the initial.* after round 0.*guard\.action"):
            play(strict, tmp_path / "a")
    assert [round_dir.number for round_dir in read_run(tmp_path / "a").rounds()] == [0]
    assert [e["round"] for e in events(tmp_path / "a") if e["event"] == "guard"] == [0, 0]
    assert not (tmp_path / "a" / "policy").exists()


def test_what_the_start_deserves_as_well_trips_no_guard(model_folder, tmp_path):
    """The random model's flawed copies are other texts, before training as after it."""
    guard = {"action": "stop", "max_flaw_edit_share": 0.1}
    outcome = play(recipe(model_folder, "arop", guard=guard, loop={"rounds": 1}), tmp_path / "a")
    assert [result.measures["flaw_edit_share"] for result in outcome.results] == [1.0, 1.0]
    assert [e for e in events(tmp_path / "a") if e["event"] == "guard"] == []


def test_a_round_of_rejects_stops_the_run_and_says_why(model_folder, tmp_path):
    gates = {**METHODS["arop"]["method"], "gates": {**OPEN, "cut_off": True}}
    with pytest.raises(
        GuardStop, match=r"0 pairs of 8 prompts \(8 cut off\).*gates\.cut_off: false"
    ):
        play(recipe(model_folder, "arop", method=gates), tmp_path / "a")
    rejects = read_run(tmp_path / "a").rounds()[0].rejects()
    assert Counter((reject.stage, reject.reason) for reject in rejects) == {("pair", "cut off"): 8}


def test_the_implicit_reward_measures_from_the_first_update_on(model_folder, tmp_path):
    small = {"rounds": 1, "prompts_per_round": 4}
    evaluate = {"prompts": 2, "introspection": False}
    changes = {"judge": {"name": "implicit"}, "loop": small, "evaluate": evaluate}
    outcome = play(recipe(model_folder, "arop", **changes), tmp_path / "run")
    start, after = [result.measures.get("score") for result in outcome.results]
    assert start is None
    assert after
    answers = read_run(tmp_path / "run").round(0).records("answers", Candidates)
    for answer in answers:
        # The judge's sums against the evaluation's own means, made outside merged weights.
        tokens = len(answer.responses["answer"].token_ids)
        moved = (answer.ratings["logprob"] - answer.ratings["logprob_initial"]) * tokens
        assert answer.scores["answer"] == pytest.approx(0.1 * moved, rel=1e-3, abs=1e-5)


def test_a_servers_verdicts_are_asked_for_once_however_often_the_run_is_started(
    model_folder, tmp_path
):
    def longer(body: dict[str, Any]) -> str:
        first, second = re.findall(
            r"<(answer_[ab]-\w+)>\n(.*?)\n</\1>", body["messages"][0]["content"], re.DOTALL
        )
        return "A" if len(first[1]) >= len(second[1]) else "B"

    file = tmp_path / "verdicts.jsonl"
    with serve(longer) as server:
        judge = {"name": "api", "url": server.url, "model": "m", "verdicts": str(file)}
        small = {"rounds": 1, "prompts_per_round": 4}
        changes = {"judge": judge, "loop": small, "evaluate": LIGHT}
        play(recipe(model_folder, "ial", **changes), tmp_path / "first")
        asked, kept = len(server.asked), file.read_text().count("\n")
        assert asked == kept > 0
        play(recipe(model_folder, "ial", **changes), tmp_path / "second")
        assert len(server.asked) == asked
    pairs = [
        read_run(tmp_path / name).round(0).records("pairs", Pair) for name in ("first", "second")
    ]
    assert pairs[0] == pairs[1]
    assert all(len(pair.chosen) >= len(pair.rejected) for pair in pairs[0])


def test_judges_that_ask_the_policy_and_others_play_together(model_folder, tmp_path):
    members = [{"name": "self_judge"}, {"name": "similarity"}]
    small = {"rounds": 1, "prompts_per_round": 4}
    changes = {"judge": {"name": "ensemble", "judges": members}, "loop": small}
    outcome = play(recipe(model_folder, "ial", evaluate=LIGHT, **changes), tmp_path / "run")
    assert outcome.results[-1].measures["score"] is not None


def test_the_best_round_is_published_where_asked_for(model_folder, tmp_path):
    light = {**LIGHT, "every_round": True, "prompts": 8}
    best = recipe(model_folder, "ial", guard={"action": "best_round"}, evaluate=light)
    outcome = play(best, tmp_path / "best")
    scores = {result.round: result.measures["score"] for result in outcome.results[1:]}
    number = max(scores, key=lambda n: scores[n] or 0.0)
    policies = [
        outcome.folder / "rounds" / f"{n:04d}" / "policy" / "adapter_model.safetensors"
        for n in range(2)
    ]
    published = (outcome.policy / "adapter_model.safetensors").read_bytes()
    assert [path.read_bytes() == published for path in policies] == [n == number for n in range(2)]


# Interruptions.


class Interrupter:
    """Raises KeyboardInterrupt once at every place that it has not seen before."""

    def __init__(self, patch: pytest.MonkeyPatch, *, thorough: bool) -> None:
        self.thorough = thorough
        """Every chunk and step of every round is a place of its own, not only every stage."""
        self.seen: set[str] = set()
        self._patch = patch
        self._around(Journal, "append", lambda self, records, counts=None: self._main)
        self._around(Trainer, "_step", lambda self, job, ref, chosen, n, steps: job.folder / str(n))
        self._around(Policy, "save", lambda self, folder: folder)
        self._around(
            prefloop.run.loop, "publish", lambda recipe, run, round_dir, results: round_dir.policy
        )
        for room in (prefloop.run.session, prefloop.run.publish):
            self._around(room, "replace_folder", lambda temporary, final: final)
        save: Any = prefloop.train.checkpoint
        self._around(save, "save_checkpoint", lambda folder, *_, **p: folder / str(p["step"]))
        self._around(save, "drop_checkpoints", lambda folder: folder)
        if thorough:
            self._around(save, "save_file", lambda tensors, path, **_: path)
            for room in (
                prefloop.manifest,
                prefloop.run_folder,
                prefloop.run.chunks,
                prefloop.run.held_out,
            ):
                self._around(room, "write_atomically", lambda path, text: path)

    def _around(self, owner: Any, name: str, place: Callable[..., Path]) -> None:
        original = getattr(owner, name)

        def guarded(*args: Any, **options: Any) -> Any:
            label = f"{name} {self._name(place(*args, **options))}"
            self._stop(f"before {label}")
            result = original(*args, **options)
            self._stop(f"after {label}")
            return result

        self._patch.setattr(owner, name, guarded)

    def _name(self, path: Path) -> str:
        if self.thorough:
            return "/".join(path.parts[-4:])
        return path.parent.name if path.name.isdigit() else path.name

    def _stop(self, label: str) -> None:
        if label not in self.seen:
            self.seen.add(label)
            raise KeyboardInterrupt(label)


def play_interrupted(recipe: Recipe, folder: Path, *, thorough: bool = False) -> set[str]:
    """Play a run that is stopped at every place once; returns the places."""
    with pytest.MonkeyPatch.context() as patch:
        interrupter = Interrupter(patch, thorough=thorough)
        while True:
            known = len(interrupter.seen)
            try:
                play(recipe, folder)
            except KeyboardInterrupt:
                assert len(interrupter.seen) == known + 1
            else:
                return interrupter.seen


@pytest.mark.parametrize("name", METHODS)
def test_a_run_stopped_in_every_stage_ends_in_the_same_bytes(
    finished, model_folder, tmp_path, name
):
    places = play_interrupted(recipe(model_folder, name), tmp_path / name)
    for stage in ("candidates", "ranked", "pairs", "answers", "introspection"):
        assert {f"before append {stage}.jsonl", f"after append {stage}.jsonl"} <= places
    assert {"before _step train", "after _step train", "before save policy"} <= places
    assert {"after save policy", "before save_checkpoint train", "after publish policy"} <= places
    assert what_counts(tmp_path / name) == what_counts(finished(name).folder)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ial": ("ial", {}),
    "arop": ("arop", {}),
    "full": ("ial", {"model": {"tuning": "full"}}),
    "full-carried": ("arop", {"model": {"tuning": "full"}, "train": {"optimizer": "rmsprop"}}),
    "sft": ("ial", {"sft": {"batch_size": 8}, "data": {"limit": 16}}),
    "dropout": ("arop", {"model": {"lora": {"dropout": 0.3}}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_at_every_single_place_ends_in_the_same_bytes(
    model_folder, tmp_path, variant
):
    name, changes = VARIANTS[variant]
    wanted = recipe(model_folder, name, **changes)
    unbroken = play(wanted, tmp_path / "unbroken").folder
    places = play_interrupted(wanted, tmp_path / "stopped", thorough=True)
    assert len(places) > 140
    for place in ("progress", "done"):
        assert f"after write_atomically stopped/rounds/0001/candidates.{place}.json" in places
    assert any(place.startswith("after replace_folder") for place in places)
    assert what_counts(tmp_path / "stopped") == what_counts(unbroken)


def half_a_verdict(prompt: Prompt, responses: Sequence[str]) -> list[float | None]:
    """A judge that knows nothing of every second question."""
    known = int(re.findall(r"\d+", prompt.id)[-1]) % 2
    return [float(len(text)) if known else None for text in responses]


def longer(prompt, responses):
    """A judge that training never meets."""
    return [float(len(text)) for text in responses]


def test_held_out_answers_are_scored_by_the_judge_that_took_no_part(model_folder, tmp_path):
    """And pairs are ranked by the other one."""
    chosen = recipe(
        model_folder,
        "ial",
        judge={"name": "similarity"},
        eval_judge={"name": "python", "function": f"{__name__}:longer"},
        evaluate={**LIGHT, "prompts": 4},
        loop={"rounds": 1, "prompts_per_round": 4},
    )
    found = RunDir(run(chosen, tmp_path / "run", Console(file=StringIO())).folder)
    answers = found.start.records("answers", Candidates)
    assert [g.scores["answer"] for g in answers] == [
        len(g.responses["answer"].text) for g in answers
    ]
    ranked = found.round(0).records("ranked", Candidates)
    assert ranked
    for group in ranked:
        for name, score in group.scores.items():
            assert score == chrf(group.responses[name].text, group.prompt.target)


def chrf(text, target):
    """As the similarity judge scores."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF().sentence_score(text, [target]).score


def test_a_judge_s_failures_on_held_out_answers_are_counted_and_told(model_folder, tmp_path):
    said = StringIO()
    chosen = recipe(
        model_folder,
        "arop",
        judge={"name": "python", "function": f"{__name__}:half_a_verdict"},
        evaluate={**LIGHT, "prompts": 8},
        loop={"rounds": 1, "prompts_per_round": 4},
    )
    folder = run(chosen, tmp_path / "run", Console(file=said, width=200)).folder
    start = RunDir(folder).start
    manifest = start.manifest("answers") or {}
    without = sum(not group.scores for group in start.records("answers", Candidates))
    assert 0 < without < 8
    assert sum(manifest["failures"].values()) == without
    assert "rejects" not in manifest
    assert RunDir(folder).results()[0].measures["no_verdict"] == without / 8
    assert f"{without} without a verdict" in said.getvalue()
