"""Losses and their gradients against TRL's DPOTrainer, on a tiny random model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from prefloop.train import losses
from prefloop.train.losses import GroupLogps

pytestmark = [
    pytest.mark.oracle,
    # TRL 1.16 uses the names that transformers 5.23 deprecates.
    *[
        pytest.mark.filterwarnings(
            f"ignore:`{old}` is deprecated and will be removed in v6. "
            f"Use `{new}` instead.:FutureWarning"
        )
        for old, new in [
            ("gradient_checkpointing", "activation_checkpointing"),
            ("is_gradient_checkpointing", "is_activation_checkpointing"),
        ]
    ],
]

BETA = 0.1
WORDS = [f"w{i}" for i in range(20)]
ROWS = [
    {"prompt": "w0 w1 w2 ", "chosen": "w3 w4 w5 w6 w7", "rejected": "w8 w9"},
    {"prompt": "w10 ", "chosen": "w11", "rejected": "w12 w13 w14 w15"},
    {"prompt": "w16 w17 ", "chosen": "w18 w19 w0", "rejected": "w18 w19 w1"},
]
MARGIN_B = torch.tensor([0.0, 0.5, 2.0])


@pytest.fixture(autouse=True)
def _no_accelerate_state_left() -> Iterator[None]:
    """accelerate keeps device and precision for the process; other tests may want others."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """Random float32 weights, wide enough that two seeds differ by nats, not by rounding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


class MarginTrainer(trl.DPOTrainer):  # type: ignore[misc]
    """AROP through TRL: −log σ(βΔ − M) is DPO whose reference likes chosen M/β more."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        chosen_B, rejected_B = self.compute_ref_log_probs(self.ref_model, inputs)
        inputs["ref_chosen_logps"] = chosen_B + MARGIN_B / BETA
        inputs["ref_rejected_logps"] = rejected_B
        self.precompute_ref_logps = True
        return super()._compute_loss(model, inputs, return_outputs)


def open_trainer(kind: type, folder: Path, loss_type: str) -> Any:
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        loss_type=loss_type,
        beta=BETA,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    return kind(
        model=tiny_llama(seed=1),
        ref_model=tiny_llama(seed=2),
        args=arguments,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=toy_tokenizer(),
    )


def trl_loss(trainer: Any) -> Tensor:
    """The loss of all rows as one batch."""
    rows = [trainer.train_dataset[i] for i in range(len(ROWS))]
    batch: dict[str, Tensor] = trainer.data_collator(rows)
    loss: Tensor = trainer.compute_loss(trainer.model, batch)
    return loss


def response_logp(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, response: str
) -> tuple[Tensor, int]:
    """Summed log-prob of one response and its tokens, end-of-turn included; one row, no padding."""
    prompt_ids, response_ids = tokenizer.encode(prompt), tokenizer.encode(response + "<eos>")
    ids_T = torch.tensor(prompt_ids + response_ids)
    logprobs_TV = model(ids_T[None]).logits[0].log_softmax(-1)
    picked_T = logprobs_TV[:-1].gather(1, ids_T[1:, None])[:, 0]
    return picked_T[len(prompt_ids) - 1 :].sum(), len(response_ids)


def our_logps(policy: LlamaForCausalLM) -> GroupLogps:
    tokenizer, reference = toy_tokenizer(), tiny_llama(seed=2)
    roles = ("chosen", "rejected")
    scored = {
        (who, role): [response_logp(model, tokenizer, row["prompt"], row[role]) for row in ROWS]
        for who, model in (("policy", policy), ("reference", reference))
        for role in roles
    }
    return GroupLogps(
        policy={role: torch.stack([s for s, _ in scored["policy", role]]) for role in roles},
        reference={role: torch.stack([s for s, _ in scored["reference", role]]) for role in roles},
        lengths={role: torch.tensor([n for _, n in scored["policy", role]]) for role in roles},
        margin_B=MARGIN_B,
    )


def our_dpo(logps: GroupLogps) -> Tensor:
    return losses.dpo(logps.ratio("chosen"), logps.ratio("rejected"), beta=BETA)


def our_ipo(logps: GroupLogps) -> Tensor:
    return losses.ipo(
        logps.ratio("chosen"),
        logps.ratio("rejected"),
        chosen_length_B=logps.lengths["chosen"],
        rejected_length_B=logps.lengths["rejected"],
        beta=BETA,
    )


def our_arop(logps: GroupLogps) -> Tensor:
    return losses.arop(logps.ratio("chosen"), logps.ratio("rejected"), logps.margin_B, beta=BETA)


def gradients(loss: Tensor, model: LlamaForCausalLM) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize(
    ("kind", "loss_type", "ours"),
    [
        pytest.param(trl.DPOTrainer, "sigmoid", our_dpo, id="dpo"),
        pytest.param(trl.DPOTrainer, "ipo", our_ipo, id="ipo"),
        pytest.param(MarginTrainer, "sigmoid", our_arop, id="arop"),
    ],
)
def test_loss_and_gradient_equal_those_of_trl(
    kind: type, loss_type: str, ours: Callable[[GroupLogps], Tensor], tmp_path: Path
) -> None:
    trainer = open_trainer(kind, tmp_path, loss_type)
    theirs = trl_loss(trainer)
    policy = tiny_llama(seed=1)
    logps = our_logps(policy)
    assert (logps.ratio("chosen") - logps.ratio("rejected")).abs().max() > 1, "trivial example"
    mean = ours(logps).mean()
    torch.testing.assert_close(mean, theirs, rtol=2e-6, atol=2e-6)
    expected = gradients(theirs, trainer.model)
    for name, gradient in gradients(mean, policy).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )
