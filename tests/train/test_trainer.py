"""The trainer: exact means, an exact resume, a reference computed once, and no silent nonsense."""

import json
import math
import shutil
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefloop.errors import RunFolderError, TrainingError
from prefloop.models.chat import Chat
from prefloop.models.policy import LoraOptions, ModelOptions, Policy
from prefloop.records import Message, Pair
from prefloop.run_folder import read_metrics
from prefloop.train import losses, trainer
from prefloop.train.batches import encode_pairs, plan, schedule
from prefloop.train.checkpoint import save_tensors
from prefloop.train.logprobs import padded_logprobs
from prefloop.train.losses import GroupLogps, LossOutput
from prefloop.train.options import TrainOptions
from prefloop.train.trainer import Job, Trainer, learning_rate
from tests.conftest import trainable_weights

ROLES = ("chosen", "rejected")
LOG_2 = math.log(2)
OPTIONS = TrainOptions(epochs=2, lr=1e-2, batch_size=4, micro_batch_size=2, schedule="cosine")
PAIRS = [
    Pair(
        prompt_id=f"p{n}",
        round=0,
        prompt=(Message(role="user", content=f"Say {n} " + "please " * (n % 3)),),
        chosen=f"Here is {n * 7}, with {'care' * (n % 4)}.",
        rejected=f"Here is {n * 5}!",
        margin=n / 10,
    )
    for n in range(8)
]


def dpo(logps: GroupLogps, progress: float) -> LossOutput:
    r_c, r_r = logps.ratio("chosen"), logps.ratio("rejected")
    return LossOutput(losses.dpo(r_c, r_r, beta=0.1), {"gap": (r_c - r_r).detach()})


def policy(folder: Path, tuning: str = "lora", dropout: float = 0.0) -> Policy:
    lora = LoraOptions(r=4, alpha=8, dropout=dropout)
    options = ModelOptions.model_validate(
        {"source": str(folder), "tuning": tuning, "lora": lora, "dtype": "float32", "device": "cpu"}
    )
    return Policy.load(options, seed=0)


def job(policy: Policy, folder: Path, pairs: Sequence[Pair] = PAIRS, **changes: Any) -> Job:
    examples = list(encode_pairs(Chat(policy.tokenizer), pairs, ROLES, window=2048))
    plain = Job(examples, ROLES, dpo, folder, seed=5, reference="initial")
    return replace(plain, **changes)


def weights(policy: Policy) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in trainable_weights(policy)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logps(policy: Policy, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Summed log-probs by role: padded, in one batch, without the trainer."""
    with torch.no_grad():
        groups = padded_logprobs(policy.model, [example.group for example in examples])
    return {r: torch.stack([g[n].sum() for g in groups]) for n, r in enumerate(ROLES)}


# Steps.


def test_neither_loss_nor_update_depends_on_the_split_into_micro_batches(model_folder, tmp_path):
    found = {}
    for size in (1, 2, 8):
        trained = policy(model_folder)
        options = OPTIONS.model_copy(update={"batch_size": 8, "micro_batch_size": size})
        Trainer(trained, options).run(job(trained, tmp_path / str(size)))
        found[size] = (rows(tmp_path / str(size)), weights(trained))
    for size in (2, 8):
        for row, other in zip(found[1][0], found[size][0], strict=True):
            assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
        for weight, other in zip(found[1][1], found[size][1], strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5)


def test_a_short_last_step_takes_the_mean_of_what_it_has(model_folder, tmp_path):
    trained = policy(model_folder)
    options = OPTIONS.model_copy(update={"epochs": 1, "lr": 1e-9})
    facts = Trainer(trained, options).run(job(trained, tmp_path, PAIRS[:7]))
    assert [row["loss"] for row in rows(tmp_path)] == pytest.approx([LOG_2, LOG_2], abs=1e-4)
    assert (facts["steps"], facts["examples"]) == (2, 7)
    assert facts["first_loss"] == pytest.approx(LOG_2, abs=1e-4)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_training_widens_the_gap(model_folder, tmp_path, tuning):
    trained = policy(model_folder, tuning)
    facts = Trainer(trained, OPTIONS).run(job(trained, tmp_path))
    assert facts["first_loss"] == pytest.approx(LOG_2, abs=1e-4)
    assert facts["last_loss"] < LOG_2 - 0.01
    assert not trained.model.training
    assert facts["tokens"] == sum(row["tokens"] for row in rows(tmp_path))


def test_every_epoch_meets_every_example_once_in_an_order_of_its_own():
    steps = schedule(7, epochs=2, batch_size=3, seed=1)
    assert [len(step) for step in steps] == [3, 3, 1, 3, 3, 1]
    first, second = ([n for step in half for n in step] for half in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert steps == schedule(7, epochs=2, batch_size=3, seed=1)
    # Numbers of eight bytes, not objects: a round may have millions.
    assert all(isinstance(step, array) and step.itemsize == 8 for step in steps)
    assert steps != schedule(7, epochs=2, batch_size=3, seed=2)


def test_the_loss_hears_how_far_the_round_is(model_folder, tmp_path):
    heard = []

    def listening(logps: GroupLogps, progress: float) -> LossOutput:
        heard.append(progress)
        return dpo(logps, progress)

    trained = policy(model_folder)
    options = OPTIONS.model_copy(update={"micro_batch_size": 4})
    Trainer(trained, options).run(job(trained, tmp_path, loss=listening, span=(0.5, 1.0)))
    assert heard == [0.125, 0.375, 0.625, 0.875]


# The learning rate.


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_the_rate_rises_to_its_peak_and_follows_its_shape(shape):
    options = TrainOptions(lr=1.0, warmup=0.2, schedule=shape)
    at = [learning_rate(options, place) for place in (0.05, 0.1, 0.2, 0.4, 0.6, 1.0)]
    rest = {
        "linear": [0.75, 0.5, 0.0],
        "cosine": [0.5 + 0.25 * math.sqrt(2), 0.5, 0.0],
        "constant": [1.0, 1.0, 1.0],
    }
    assert at == pytest.approx([0.25, 0.5, 1.0, *rest[shape]])


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_no_step_is_wasted_at_rate_zero(model_folder, tmp_path, monkeypatch, shape, count):
    options = OPTIONS.model_copy(
        update={"epochs": 1, "batch_size": 1, "micro_batch_size": 1, "schedule": shape}
    )
    trained = policy(model_folder)
    trainer = Trainer(trained, options)
    trainer.run(job(trained, tmp_path, PAIRS[:count]))
    rates = [row["lr"] for row in rows(tmp_path)]
    assert all(0 < rate <= options.lr for rate in rates)
    assert len(rates) == count


def test_two_rounds_of_a_carried_schedule_walk_through_it_once(model_folder, tmp_path):
    options = OPTIONS.model_copy(update={"epochs": 1, "batch_size": 2})
    trained = policy(model_folder)
    trainer = Trainer(trained, options)
    for name, span in (("0", (0.0, 0.5)), ("1", (0.5, 1.0))):
        trainer.run(job(trained, tmp_path / name, span=span))
    found = [row["lr"] for name in "01" for row in rows(tmp_path / name)]
    assert found == pytest.approx([learning_rate(options, (n + 0.5) / 8) for n in range(8)])


def test_the_optimiser_is_kept_between_jobs_until_renewed(model_folder, tmp_path):
    trained = policy(model_folder)
    trainer = Trainer(trained, OPTIONS)

    def steps_taken() -> set[float]:
        return {float(state["step"]) for state in trainer.placement.optimizer.state.values()}

    trainer.run(job(trained, tmp_path / "0"))
    trainer.run(job(trained, tmp_path / "1"))
    assert steps_taken() == {8.0}
    trainer.renew_optimizer()
    assert steps_taken() == set()


# The reference.


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("kind", ["initial", "round_start"])
def test_the_reference_is_the_policy_it_says_before_the_first_update(
    model_folder, tmp_path, tuning, kind
):
    """Two jobs: in the second one the initial policy and the round's are no longer the same."""
    trained = policy(model_folder, tuning)
    trainer = Trainer(trained, OPTIONS)
    trainer.run(job(trained, tmp_path / "0"))
    second = job(trained, tmp_path / "1", reference=kind)
    expected = logps(
        policy(model_folder, tuning) if kind == "initial" else trained, second.examples
    )
    trainer.run(second)
    found = load_file(tmp_path / "1" / "reference.safetensors")
    for role in ROLES:
        torch.testing.assert_close(found[role], expected[role], rtol=1e-4, atol=1e-3)
        assert (found[role] - logps(trained, second.examples)[role]).abs().max() > 0.1


def test_the_reference_is_computed_once_and_then_read(model_folder, tmp_path):
    trained = policy(model_folder)
    first = job(trained, tmp_path)
    known = {role: logp_N - 1.0 for role, logp_N in logps(trained, first.examples).items()}
    save_tensors(tmp_path / "reference.safetensors", known)
    seen = []

    def looking(logps: GroupLogps, progress: float) -> LossOutput:
        seen.append(logps.ratio("chosen").detach())
        return dpo(logps, progress)

    Trainer(trained, OPTIONS.model_copy(update={"epochs": 1, "lr": 1e-9})).run(
        replace(first, loss=looking)
    )
    torch.testing.assert_close(torch.cat(seen), torch.ones(8), rtol=1e-3, atol=1e-3)


def test_a_wrong_reference_is_found_at_the_first_step(model_folder, tmp_path):
    trained = policy(model_folder)
    before = weights(trained)
    start = job(trained, tmp_path, loss_at_start=lambda chosen: LOG_2)
    wrong = logps(trained, start.examples)
    wrong["chosen"] = wrong["chosen"] - 10.0
    save_tensors(tmp_path / "reference.safetensors", wrong)
    with pytest.raises(TrainingError, match=r"first loss is 0\.3133 where .* give 0\.6931.*delete"):
        Trainer(trained, OPTIONS).run(start)
    assert same(before, weights(trained))


def test_passes_of_all_examples_are_planned_a_few_examples_at_a_time(
    model_folder, tmp_path, monkeypatch
):
    """A plan holds its examples' lengths and places: a round of a million must not be one plan."""
    planned: list[int] = []

    def counting(examples: Sequence[Any], chosen: Sequence[int], **options: Any) -> Any:
        planned.append(len(chosen))
        return plan(examples, chosen, **options)

    monkeypatch.setattr(trainer, "plan", counting)
    trained, found = policy(model_folder), []
    for most, counts in ((4096, [8]), (5, [4, 4]), (1, [2, 2, 2, 2])):
        planned.clear()
        monkeypatch.setattr(trainer, "_PLANNED", most)
        folder = tmp_path / str(most)
        folder.mkdir()
        found.append(Trainer(trained, OPTIONS)._reference(job(trained, folder)))
        assert planned == counts
    for role in ROLES:
        assert torch.equal(found[0][role], found[1][role])
        assert torch.equal(found[0][role], found[2][role])


def test_the_start_is_known_for_the_examples_of_the_first_step(model_folder, tmp_path):
    asked = []

    def known(chosen: Sequence[int]) -> float:
        asked.append(list(chosen))
        return LOG_2

    trained = policy(model_folder)
    Trainer(trained, OPTIONS).run(job(trained, tmp_path, loss_at_start=known))
    assert asked == [list(schedule(8, epochs=2, batch_size=4, seed=5)[0])]


# What must not be trained on.


def test_a_loss_that_is_nan_names_the_pair_and_changes_nothing(model_folder, tmp_path):
    def broken(logps: GroupLogps, progress: float) -> LossOutput:
        output = dpo(logps, progress)
        bad_B = logps.margin_B == PAIRS[3].margin
        return LossOutput(torch.where(bad_B, torch.nan, output.loss_B), {})

    trained = policy(model_folder)
    before = weights(trained)
    options = OPTIONS.model_copy(update={"batch_size": 8})
    with pytest.raises(TrainingError, match=r"the loss of 0000/p3 is not finite"):
        Trainer(trained, options).run(job(trained, tmp_path, loss=broken))
    lines = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert len(lines) == 1
    assert row["pair"] == "0000/p3"
    assert row["policy"]["chosen"] == pytest.approx(row["reference"]["chosen"], rel=1e-3)
    assert same(before, weights(trained))


def test_an_infinite_gradient_names_its_step_and_changes_nothing(model_folder, tmp_path):
    def steep(logps: GroupLogps, progress: float) -> LossOutput:
        ratio_B = logps.ratio("chosen")
        return LossOutput((ratio_B - ratio_B.detach()).abs().sqrt(), {})

    trained = policy(model_folder)
    before = weights(trained)
    with pytest.raises(TrainingError, match=r"gradient of step 0 is (nan|inf).*0000/p"):
        Trainer(trained, OPTIONS).run(job(trained, tmp_path, loss=steep))
    assert same(before, weights(trained))


# Resume.


def interrupt_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., dict[str, Any]] = Trainer._step

    def guarded(self: Trainer, job: Job, ref: Any, chosen: Any, number: int, steps: int) -> Any:
        if number == step:
            raise KeyboardInterrupt
        return original(self, job, ref, chosen, number, steps)

    monkeypatch.setattr(Trainer, "_step", guarded)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_job_killed_at_any_step_ends_in_the_same_weights_and_metrics(
    model_folder, tmp_path, monkeypatch, tuning, optimizer
):
    """Checkpoints at every second step: killed at an odd one, a row of metrics is already too much.

    Dropout draws from the global random state, so that is restored too.
    """
    options = OPTIONS.model_copy(update={"optimizer": optimizer, "save_every": 2, "epochs": 2})
    unbroken = policy(model_folder, tuning, dropout=0.2)
    Trainer(unbroken, options).run(job(unbroken, tmp_path / "unbroken"))
    expected = (tmp_path / "unbroken" / "metrics.jsonl").read_bytes()
    for step in range(4):
        folder = tmp_path / f"killed-{step}"
        killed = policy(model_folder, tuning, dropout=0.2)
        with monkeypatch.context() as patch:
            interrupt_before(step, patch)
            with pytest.raises(KeyboardInterrupt):
                Trainer(killed, options).run(job(killed, folder))
        resumed = policy(model_folder, tuning, dropout=0.2)
        torch.manual_seed(step)
        facts = Trainer(resumed, options).run(job(resumed, folder))
        assert (folder / "metrics.jsonl").read_bytes() == expected
        assert same(weights(unbroken), weights(resumed))
        assert facts["steps"] == 4


def test_a_finished_job_is_not_trained_again(model_folder, tmp_path, monkeypatch):
    """Killed after its last step, before the policy was saved: only the weights come back."""
    unbroken = policy(model_folder)
    first = Trainer(unbroken, OPTIONS).run(job(unbroken, tmp_path))
    interrupt_before(0, monkeypatch)
    resumed = policy(model_folder)
    assert Trainer(resumed, OPTIONS).run(job(resumed, tmp_path)) == first
    assert same(weights(unbroken), weights(resumed))


def test_a_resumed_job_reads_its_old_reference(model_folder, tmp_path):
    """A checkpoint's weights are not the round's first ones: the reference must not follow them."""
    trained = policy(model_folder, "full")
    options = OPTIONS.model_copy(update={"save_every": 1})
    start = job(trained, tmp_path, reference="round_start")
    Trainer(trained, options).run(start)
    before = (tmp_path / "reference.safetensors").read_bytes()
    shutil.copytree(tmp_path, tmp_path / "copy")
    Trainer(trained, options).run(replace(start, folder=tmp_path / "copy"))
    assert (tmp_path / "copy" / "reference.safetensors").read_bytes() == before


def test_nothing_in_the_folder_is_pickled(model_folder, tmp_path):
    trained = policy(model_folder)
    Trainer(trained, OPTIONS.model_copy(update={"save_every": 1})).run(job(trained, tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jsonl"}


# Trackers.


def test_who_tracks_gets_each_step_counted_on_through_the_run(model_folder, tmp_path):
    lines, trained = [], policy(model_folder)
    tell = lambda row, step: lines.append((step, row))  # noqa: E731
    Trainer(trained, OPTIONS, tell).run(job(trained, tmp_path, first_step=40))
    assert [step for step, _ in lines] == [40, 41, 42, 43]
    assert [row["loss"] for _, row in lines] == [row["loss"] for row in rows(tmp_path)]


# Completions.


def test_an_unfinished_answer_is_scored_without_an_end_of_turn(tokenizer):
    chat = Chat(tokenizer)
    cut = PAIRS[0].model_copy(update={"unfinished": ("rejected",)})
    [example] = encode_pairs(chat, [cut], ROLES, window=None)
    chosen, rejected = example.group.completions
    assert chosen[-1] == chat.end_id
    assert list(rejected) == chat.text_ids(cut.rejected)


def test_what_the_policy_sampled_is_trained_on_as_it_was_sampled(tokenizer):
    """The text is not encoded again; the answer beside it, which nobody sampled, is."""
    chat = Chat(tokenizer)
    sampled = (*chat.text_ids(f"\n{PAIRS[0].chosen} "), chat.end_id)
    pair = PAIRS[0].model_copy(update={"token_ids": {"chosen": sampled}})
    [example] = encode_pairs(chat, [pair], ROLES, window=None)
    assert example.group.completions[0] == sampled
    assert list(example.group.completions[1]) == chat.completion_ids(pair.prompt, pair.rejected)
    assert Pair.model_validate_json(pair.model_dump_json()) == pair


def test_a_pair_longer_than_the_window_is_named(tokenizer):
    with pytest.raises(
        TrainingError, match=r"pair 0000/p0 has \d+ tokens and the model's window 9"
    ):
        list(encode_pairs(Chat(tokenizer), PAIRS, ROLES, window=9))


# What a user can meet.


def test_out_of_memory_says_what_to_lower(model_folder, tmp_path):
    def full(logps: GroupLogps, progress: float) -> LossOutput:
        raise torch.OutOfMemoryError("no room")

    trained = policy(model_folder)
    with pytest.raises(TrainingError, match=r"step 0.*train\.micro_batch_size"):
        Trainer(trained, OPTIONS).run(job(trained, tmp_path, loss=full))


def test_another_runtime_error_is_not_taken_for_it(model_folder, tmp_path):
    def broken(logps: GroupLogps, progress: float) -> LossOutput:
        raise RuntimeError("a bug")

    trained = policy(model_folder)
    with pytest.raises(RuntimeError, match="a bug"):
        Trainer(trained, OPTIONS).run(job(trained, tmp_path, loss=broken))


def test_a_damaged_metrics_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n{"loss"\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2 is damaged"):
        read_metrics(tmp_path / "metrics.jsonl")
