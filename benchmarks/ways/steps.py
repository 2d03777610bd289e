"""Ways to take a training step on the same groups: this package's, plain padded rows, TRL's."""

from __future__ import annotations

import json
import random
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefloop.models.chat import Chat
from prefloop.models.policy import Policy
from prefloop.records import Message
from prefloop.train.logprobs import group_logprobs
from prefloop.train.losses import dpo, spacp
from prefloop.train.packing import TokenGroup

# B rows, T positions, V vocabulary.

CASES = {
    "arop": "pairs that share the prompt and 60 % of the answer",
    "prompt": "pairs that share the prompt only",
    "ial": "triples that share the prompt only, beside three padded rows",
    "real": "pairs of a run, from the file given",
}
TRL_SETTINGS = ("trl", "trl, plain head", "trl, eager attention")
Batch = tuple[list[TokenGroup], list[list[float]]]
"""Groups and, by group and completion, the reference's log-prob."""
Step = Callable[[Batch], float]
"""Forward and backward pass; the loss."""


def draw_groups(case: str, count: int, vocabulary: int, seed: int) -> list[TokenGroup]:
    """Random tokens in the lengths of short instructions: the work does not depend on which tokens."""
    rng = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(10, vocabulary) for _ in range(count))

    groups = []
    for _ in range(count):
        length = rng.randrange(80, 221)
        shared = tokens(int(0.6 * length) if case == "arop" else 0)
        answers = 3 if case == "ial" else 2
        # A flaw keeps the length or nearly so; answers drawn apart have lengths of their own.
        sizes = [length if case == "arop" else rng.randrange(80, 221) for _ in range(answers)]
        prompt = tokens(rng.randrange(40, 121))
        groups.append(TokenGroup(prompt, tuple(shared + tokens(n - len(shared)) for n in sizes)))
    return groups


def read_groups(path: Path, policy: Policy, count: int) -> list[TokenGroup]:
    """Pairs that `prefloop export` wrote, as the trainer would see them."""
    chat = Chat(policy.tokenizer)
    groups = []
    for line in path.read_text("utf-8").splitlines()[:count]:
        row = json.loads(line)
        turns = [Message(**turn) for turn in row["prompt"]]
        completions = [
            tuple(
                row.get(f"{role}_token_ids") or chat.completion_ids(turns, row[role][0]["content"])
            )
            for role in ("chosen", "rejected")
        ]
        groups.append(TokenGroup(tuple(chat.prompt_ids(turns)), tuple(completions)))
    return groups


def mean_loss(logps: Sequence[Sequence[Tensor]], reference: list[list[float]]) -> Tensor:
    """DPO of pairs, SPACP of triples, from summed log-probs."""
    sums = torch.stack([torch.stack(list(group)) for group in logps])
    ratios = sums - torch.tensor(reference, device=sums.device)
    if ratios.shape[1] == 2:
        return dpo(ratios[:, 0], ratios[:, 1], beta=0.1).mean()
    return spacp(ratios[:, 0], ratios[:, 1], ratios[:, 2], eta=0.1, gamma=5.0, lam=1.0).mean()


def own_step(model: nn.Module, *, packing: bool, token_budget: int) -> Step:
    """The step of prefloop's trainer."""

    def step(batch: Batch) -> float:
        model.zero_grad()
        groups, reference = batch
        tokens = group_logprobs(model, groups, packing=packing, token_budget=token_budget)
        loss = mean_loss([[t.sum() for t in group] for group in tokens], reference)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    return step


def plain_step(model: nn.Module) -> Step:
    """What most training loops do: padded rows, logits everywhere, log-softmax over all of them."""

    def step(batch: Batch) -> float:
        model.zero_grad()
        groups, reference = batch
        rows = [(g.prompt, c) for g in groups for c in g.completions]
        longest = max(len(p) + len(c) for p, c in rows)
        padded = [(*p, *c, *(0,) * (longest - len(p) - len(c))) for p, c in rows]
        with next(model.parameters()).device:
            ids_BT, index_T = torch.tensor(padded), torch.arange(longest)
            ends_B = torch.tensor([len(p) + len(c) for p, c in rows])
            starts_B = torch.tensor([len(p) for p, _ in rows])
        real_BT = index_T < ends_B[:, None]
        logits_BTV = model(input_ids=ids_BT, attention_mask=real_BT.long(), use_cache=False).logits
        logps_BT = logits_BTV[:, :-1].log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]
        scored_BT = real_BT[:, 1:] & (index_T[1:] >= starts_B[:, None])
        sums = (logps_BT * scored_BT).sum(1).view(len(groups), -1)
        loss = mean_loss([list(group) for group in sums], reference)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    return step


def trl_step(policy: Policy, lora: bool, *, fused: bool, folder: str) -> Step:
    """The step of TRL's DPOTrainer, the object itself; `policy` holds a plain model."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    lora_options = policy.options.lora
    adapter = LoraConfig(
        r=lora_options.r,
        lora_alpha=lora_options.alpha,
        target_modules=lora_options.target_modules,
        task_type="CAUSAL_LM",
    )
    config = DPOConfig(
        output_dir=folder,
        beta=0.1,
        use_cpu=policy.device.type == "cpu",
        bf16=policy.model.dtype == torch.bfloat16,
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        max_length=None,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        policy.model,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=policy.tokenizer,
        peft_config=adapter if lora else None,
    )
    trainer.current_gradient_accumulation_steps = 1
    if not fused:
        _use_plain_head(policy.model)

    def step(batch: Batch) -> float:
        trainer.model.zero_grad()
        rows = [
            {
                "prompt_ids": list(group.prompt),
                "chosen_ids": list(group.completions[0]),
                "rejected_ids": list(group.completions[1]),
                "ref_chosen_logps": reference[0],
                "ref_rejected_logps": reference[1],
            }
            for group, reference in zip(*batch, strict=True)
        ]
        return float(trainer.training_step(trainer.model, trainer.data_collator(rows)))

    return step


def _use_plain_head(model: Any) -> None:
    """TRL 1.16 has no switch for its fused head; this gives it log-probs from whole logits instead.

    The numbers that it only logs (entropy ...) are left out, which makes this way faster than it would be.
    """
    from trl.trainer.utils import FusedCausalLMOutput, selective_log_softmax

    def forward(self: Any, *args: Any, fused_lm_head: bool, labels: Tensor, **inputs: Any) -> Any:
        logits_BTV = type(self).forward(self, *args, **inputs).logits[:, :-1]
        wanted_BT = labels[:, 1:]
        logps_BT = selective_log_softmax(logits_BTV, wanted_BT.clamp(min=0))
        zeros_BT = torch.zeros_like(logps_BT)
        return FusedCausalLMOutput(
            log_probs=logps_BT.masked_fill(wanted_BT == -100, 0.0),
            entropy=zeros_BT,
            mean_logits=zeros_BT,
            is_top1=zeros_BT.bool(),
        )

    model.forward = types.MethodType(forward, model)
