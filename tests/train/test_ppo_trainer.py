"""PPO's trainer: ratios that begin at 1, an exact resume, a value head that is handed on, and nothing silent."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from prefloop.errors import RunFolderError, TrainingError
from prefloop.methods.ppo import PPO
from prefloop.models.chat import Chat
from prefloop.models.policy import Policy
from prefloop.records import Message, Pair
from prefloop.train import losses
from prefloop.train.batches import check_initial_loss, encode_pairs
from prefloop.train.checkpoint import save_tensors
from prefloop.train.logprobs import padded_logprobs
from prefloop.train.losses import LossOutput
from prefloop.train.options import TrainOptions
from prefloop.train.ppo import TokenLogps
from prefloop.train.ppo_trainer import CRITIC, ROLLOUT, PPOTrainer, ValueHead
from prefloop.train.trainer import Job
from tests.conftest import model_options
from tests.train.test_ranks import together
from tests.train.test_trainer import interrupt_before, policy, rows

OPTIONS = TrainOptions(epochs=2, lr=1e-2, batch_size=4, micro_batch_size=2, schedule="constant")
ANSWERS = [
    Pair(
        prompt_id=f"p{n}",
        round=0,
        prompt=(Message(role="user", content=f"Say {n} " + "please " * (n % 3)),),
        chosen=f"Here is {n * 7}, with {'care' * (n % 4)}.",
        rejected="",
        unfinished=("chosen",) if n % 3 else (),
        scores={"chosen": (n * 5 % 8) / 4},
    )
    for n in range(8)
]


def job(policy: Policy, folder: Path, method: PPO | None = None, **changes: Any) -> Job:
    method = method or PPO()
    examples = list(encode_pairs(Chat(policy.tokenizer), ANSWERS, method.roles, window=2048))
    plain = Job(
        examples, method.roles, method.loss, folder, seed=5, reference="initial", tokens=method
    )
    return replace(plain, **changes)


def weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in trainer.placement.weights().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# The first step.


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_at_the_first_step_every_ratio_is_1_and_the_policy_loss_0(model_folder, tmp_path, packing):
    """All answers in one step: white advantages have mean 0, and 0 is all that is left of the policy loss."""
    trained = policy(model_folder, dropout=0.5)
    options = OPTIONS.model_copy(
        update={"batch_size": 8, "epochs": 1, "micro_batch_size": 4, "packing": packing}
    )
    PPOTrainer(trained, options).run(job(trained, tmp_path))
    [row] = rows(tmp_path)
    assert row["policy_loss"] == pytest.approx(0, abs=1e-5)
    assert row["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert row["clip_fraction"] == 0
    assert row["loss"] == pytest.approx(row["policy_loss"] + 0.1 * row["value_loss"], rel=1e-5)
    assert row["reward"] == pytest.approx(sum(p.scores["chosen"] for p in ANSWERS) / 8)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "starcoder2"])
def test_no_layer_drops_anything_where_activations_are_computed_again(
    tokenizer, tmp_path, monkeypatch, kind
):
    """Dropout is a module of its own, a function of a layer, or attention's, with a rate of 0.5 each."""
    rates = {f"{part}_dropout": 0.5 for part in ("attention", "residual", "embedding")}
    rates |= {f"{part}_pdrop": 0.5 for part in ("attn", "resid", "embd")}
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), num_attention_heads=2, **shape, **rates
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = model_options(tmp_path, tuning="full", gradient_checkpointing=True)
    trainer = PPOTrainer(Policy.load(options), OPTIONS)
    again = []
    usual = GradientCheckpointingLayer.__call__

    def counted(layer: Any, *args: Any, **options: Any) -> Any:
        again.append(layer.gradient_checkpointing and layer.training)
        return usual(layer, *args, **options)

    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", counted)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        still = trainer.policy.model(ids, use_cache=False).logits
        with trainer._training():
            assert torch.equal(trainer.policy.model(ids, use_cache=False).logits, still)
    assert again == [False, False, True, True]


def test_what_is_kept_of_the_rollout_is_what_the_models_give(model_folder, tmp_path):
    """A second round: policy and reference differ, values are no longer 0, and nothing is kept of padding."""
    trained = policy(model_folder)
    trainer = PPOTrainer(trained, OPTIONS)
    trainer.run(job(trained, tmp_path / "0"))
    second = job(trained, tmp_path / "1", before=tmp_path / "0")
    groups = [example.group for example in second.examples]
    with torch.no_grad():
        now = padded_logprobs(trained.model, groups, trainer.value_head)
        with trained.at_start():
            initial = padded_logprobs(trained.model, groups)
    trainer.run(second)
    kept = load_file(tmp_path / "1" / ROLLOUT)
    for n, (round_dir, before) in enumerate(zip(now, initial, strict=True)):
        length = len(round_dir[0])
        torch.testing.assert_close(
            kept["logps_NT"][n, :length], round_dir[0][:, 0], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            kept["values_NT"][n, :length], round_dir[0][:, 1], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            kept["reference_NT"][n, :length], before[0], rtol=1e-4, atol=1e-4
        )
        assert not any(tensor[n, length:].any() for tensor in kept.values())
    assert kept["values_NT"].abs().max() > 1e-3
    assert (kept["logps_NT"] - kept["reference_NT"]).abs().max() > 1e-2


def test_a_rollout_of_another_policy_is_found_at_the_first_step(model_folder, tmp_path):
    trained = policy(model_folder)
    trainer = PPOTrainer(trained, OPTIONS)
    trainer.run(job(trained, tmp_path / "other"))
    wrong = load_file(tmp_path / "other" / ROLLOUT)
    wrong["logps_NT"] += 2.0 * torch.randn(wrong["logps_NT"].shape)
    (tmp_path / "mine").mkdir()
    save_tensors(tmp_path / "mine" / ROLLOUT, wrong)
    trained = policy(model_folder)
    with pytest.raises(TrainingError, match=r"first loss is .* give .* delete that folder"):
        PPOTrainer(trained, OPTIONS).run(job(trained, tmp_path / "mine"))


def test_of_a_large_first_loss_as_much_may_be_noise_below_zero_as_above(tmp_path):
    """Advantages that are neither normalised nor whitened are in the judge's units."""
    for expected in (40.0, -40.0):
        check_initial_loss(tmp_path, expected, expected + 1)
        with pytest.raises(TrainingError, match="first loss"):
            check_initial_loss(tmp_path, expected, expected + 5)


# Steps.


def test_neither_loss_nor_update_depends_on_the_split_into_micro_batches(model_folder, tmp_path):
    found = {}
    for size in (1, 2, 8):
        trained = policy(model_folder)
        options = OPTIONS.model_copy(update={"batch_size": 8, "micro_batch_size": size})
        trainer = PPOTrainer(trained, options)
        trainer.run(job(trained, tmp_path / str(size)))
        found[size] = (rows(tmp_path / str(size)), weights(trainer))
    for size in (2, 8):
        for row, other in zip(found[1][0], found[size][0], strict=True):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
        for name, weight in found[1][1].items():
            torch.testing.assert_close(weight, found[size][1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_what_scored_above_the_mean_becomes_likelier_and_the_rest_less_so(
    model_folder, tmp_path, tuning
):
    trained = policy(model_folder, tuning)
    trainer = PPOTrainer(trained, OPTIONS)
    first = job(trained, tmp_path, PPO(kl_coef=0.0, lam=1.0))
    groups = [example.group for example in first.examples]

    def logps() -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([a[0].mean() for a in padded_logprobs(trained.model, groups)])

    before = logps()
    trainer.run(first)
    gain = logps() - before
    good = torch.tensor([example.score for example in first.examples]) > 1
    assert gain[good].mean() > gain[~good].mean() + 0.01
    assert trainer.value_head.linear.weight.any()


def test_values_come_to_explain_the_returns(model_folder, tmp_path):
    """The same answers round after round, nothing but values learned: most of the variance is foreseen."""
    trained = policy(model_folder)
    options = OPTIONS.model_copy(update={"epochs": 6})
    trainer = PPOTrainer(trained, options)
    method = PPO(value_clip=None, value_coef=1.0, kl_coef=0.0, lam=1.0, ratio_clip=1e-6)
    found = []
    for n in range(3):
        before = tmp_path / str(n - 1) if n else None
        trainer.run(job(trained, tmp_path / str(n), method, before=before))
        found.append(rows(tmp_path / str(n))[0]["explained_variance"])
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[2] > 0.3


def test_prompts_and_padding_get_no_gradient(model_folder, tmp_path):
    """The gradient of a batch is that of its answers alone: the sum over single ones without padding."""
    trained = policy(model_folder, "full")
    trainer = PPOTrainer(trained, OPTIONS)
    start = job(trained, tmp_path)
    trainer._memory = PPO().first_memory()
    tmp_path.mkdir(exist_ok=True)
    kept = trainer._reference(start)

    def gradient(batches: list[list[int]]) -> dict[str, torch.Tensor]:
        trained.model.zero_grad()
        trainer.value_head.zero_grad()
        for indices in batches:
            trainer._losses(start, indices, kept, 0.0).loss_B.sum().backward()
        named = trainer.placement.model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    together, alone = gradient([list(range(8))]), gradient([[n] for n in range(8)])
    assert "value_head.linear.bias" in together
    for name, grad in together.items():
        torch.testing.assert_close(grad, alone[name], rtol=1e-3, atol=1e-5)


# What is handed on.


def test_the_next_round_goes_on_with_value_head_and_memory(model_folder, tmp_path):
    trained = policy(model_folder)
    trainer = PPOTrainer(trained, OPTIONS)
    method = PPO(kl_control="adaptive", kl_horizon=16.0)
    trainer.run(job(trained, tmp_path / "0", method))
    kept = load_file(tmp_path / "0" / CRITIC)
    assert kept["value_head.linear.weight"].any()
    assert kept["count"].item() == 8
    assert kept["kl_coef"].item() == pytest.approx(0.02 * (1 - 0.2 * 8 / 16))
    other = PPOTrainer(policy(model_folder), OPTIONS)
    other.run(job(other.policy, tmp_path / "1", method, before=tmp_path / "0"))
    assert rows(tmp_path / "1")[0]["kl_coef"] == pytest.approx(kept["kl_coef"].item())
    assert load_file(tmp_path / "1" / CRITIC)["count"].item() == 16


def test_a_lost_value_head_is_an_error_not_a_new_one(model_folder, tmp_path):
    trained = policy(model_folder)
    with pytest.raises(RunFolderError, match=r"critic\.safetensors is missing.*delete"):
        PPOTrainer(trained, OPTIONS).run(job(trained, tmp_path / "1", before=tmp_path / "0"))


# Resume.


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_second_round_killed_at_any_step_ends_in_the_same_weights_and_metrics(
    model_folder, tmp_path, monkeypatch, tuning
):
    """Checkpoints at every second step; value head, its optimiser state and the memory are in what is compared."""
    options = OPTIONS.model_copy(update={"save_every": 2})

    def start(folder: Path) -> tuple[PPOTrainer, Job]:
        trainer = PPOTrainer(policy(model_folder, tuning), options)
        return trainer, job(trainer.policy, folder, before=tmp_path / "first")

    trainer, first = start(tmp_path / "first")
    trainer.run(replace(first, before=None))
    unbroken, whole = start(tmp_path / "unbroken")
    unbroken.run(whole)
    expected = {
        name: (tmp_path / "unbroken" / name).read_bytes() for name in ("metrics.jsonl", CRITIC)
    }
    assert len(rows(tmp_path / "unbroken")) == 4
    for step in (0, 1, 3):
        folder = tmp_path / f"killed-{step}"
        killed, broken = start(folder)
        with monkeypatch.context() as patch:
            interrupt_before(step, patch)
            with pytest.raises(KeyboardInterrupt):
                killed.run(broken)
        resumed, rest = start(folder)
        resumed.run(rest)
        assert {name: (folder / name).read_bytes() for name in expected} == expected
        assert same(weights(unbroken), weights(resumed))
        moments = (t.placement.optimizer_state() for t in (unbroken, resumed))
        assert same(*moments)


# Several processes.


def train_alone(source: Path, folder: Path) -> None:
    """One process's part, of as many as the environment says."""
    torch.set_num_threads(1)
    trained = policy(source)
    # Eight answers in steps of seven: in every second step one of two ranks has nothing to do.
    options = OPTIONS.model_copy(update={"batch_size": 7, "micro_batch_size": 1})
    PPOTrainer(trained, options).run(job(trained, folder))


def test_two_processes_train_as_one(model_folder, tmp_path):
    train_alone(model_folder, tmp_path / "one")
    together(2, {}, partial(train_alone, model_folder, tmp_path / "two"))
    for row, other in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)
    one, two = (load_file(tmp_path / name / CRITIC) for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)


# What must not be trained on, and what cannot be.


def test_a_loss_that_is_nan_names_the_answer_and_changes_nothing(model_folder, tmp_path):
    class Broken(PPO):
        def token_loss(self, tokens: TokenLogps, progress: float) -> LossOutput:
            output = super().token_loss(tokens, progress)
            bad_B = tokens.scores_B == ANSWERS[3].scores["chosen"]
            return losses.LossOutput(torch.where(bad_B, math.nan, output.loss_B), {})

    trained = policy(model_folder)
    trainer = PPOTrainer(trained, OPTIONS.model_copy(update={"batch_size": 8}))
    before = weights(trainer)
    with pytest.raises(TrainingError, match=r"the loss of 0000/p3 is not finite"):
        trainer.run(job(trained, tmp_path, Broken()))
    [row] = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(row)["sum"]["log_prob"] < 0
    assert same(before, weights(trainer))


def test_sharded_weights_are_refused(model_folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(TrainingError, match="launch it without sharding"):
        PPOTrainer(policy(model_folder), OPTIONS)


def test_a_value_is_0_at_first_and_float32_under_autocast() -> None:
    head = ValueHead(8)
    states = torch.randn(5, 8, dtype=torch.bfloat16)
    assert not head(states).any()
    torch.nn.init.ones_(head.linear.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(states)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, states.float().sum(dim=1))
