"""Exactness on a GPU: the packed step, the first loss and DDP of one process.

B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from ways.gpu_form import FLOAT32_LIMIT, LOSS_LIMIT, Form, Notes, autocast
from ways.random_models import random_policy

from prefloop.generate.cache_attention import attending
from prefloop.methods.arop import AROP
from prefloop.methods.ial import IAL
from prefloop.models.policy import Policy
from prefloop.train.batches import Example
from prefloop.train.logprobs import group_logprobs, packed_logprobs
from prefloop.train.options import TrainOptions
from prefloop.train.packing import TokenGroup, build_tree, pack
from prefloop.train.trainer import Job, Trainer

BFLOAT16_LIMIT = 1.5
"""bfloat16: error against float32 in multiples of the error that one sequence at a time makes in bfloat16."""
CONTROL_LEAST = 100.0
"""A mask that lets branches see each other must be told apart from rounding by this factor."""


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


class Outcome(NamedTuple):
    """All log-probs in a row, in nats, and the gradient of a weighted sum of them as one vector."""

    logps: Tensor
    gradient: Tensor | None


Way = Callable[[Policy, Sequence[TokenGroup]], list[list[Tensor]]]


def one_at_a_time(policy: Policy, groups: Sequence[TokenGroup]) -> list[list[Tensor]]:
    """Each sequence by itself through the model's own forward pass and a log-softmax."""
    found = []
    for group in groups:
        rows = []
        for completion in group.completions:
            ids_T = torch.tensor([*group.prompt, *completion], device=policy.device)
            logits_TV = policy.model(input_ids=ids_T[None], use_cache=False).logits[0]
            logps_TV = logits_TV[len(group.prompt) - 1 : -1].float().log_softmax(-1)
            rows.append(logps_TV.gather(1, ids_T[len(group.prompt) :, None])[:, 0])
        found.append(rows)
    return found


def packed(policy: Policy, groups: Sequence[TokenGroup]) -> list[list[Tensor]]:
    """This package's rows."""
    return packed_logprobs(policy.model, pack(groups, 2048))


def without_tree(policy: Policy, groups: Sequence[TokenGroup]) -> list[list[Tensor]]:
    """The same rows with a merely causal mask: wrong, to see that it would be noticed."""
    rows = pack(groups, 2048)
    wrong = [replace(row, ends=torch.full_like(row.ends, len(row.ends))) for row in rows]
    return packed_logprobs(policy.model, wrong)


def outcome(policy: Policy, groups: Sequence[TokenGroup], way: Way, *, slopes: bool) -> Outcome:
    policy.model.zero_grad()
    with torch.set_grad_enabled(slopes):
        with autocast(policy):
            logps = way(policy, groups)
        if not slopes:
            return Outcome(torch.cat([t.detach() for g in logps for t in g]), None)
        rng = random.Random(0)
        total = sum((rng.gauss(0, 1) * t.sum() for g in logps for t in g), torch.tensor(0.0))
        total.backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat(
        [w.grad.flatten().float() for w in trained(policy.model) if w.grad is not None]
    )
    policy.model.zero_grad()
    return Outcome(torch.cat([t.detach() for g in logps for t in g]), gradient)


def apart(found: Outcome, wanted: Outcome) -> dict[str, float]:
    """Differences of the log-probs in nats, and of the gradient relative to its length."""
    difference = (found.logps - wanted.logps).abs()
    distances = {
        "logp_max": difference.max().item(),
        "logp_rms": difference.square().mean().sqrt().item(),
    }
    if found.gradient is not None and wanted.gradient is not None:
        gap = (found.gradient - wanted.gradient).norm() / wanted.gradient.norm()
        distances["gradient"] = gap.item()
    return distances


def awkward_groups(form: Form, vocabulary: int) -> list[TokenGroup]:
    """Pairs and triples, and a group with equal answers, one that begins another, and an early fork."""
    drawn = [
        *form.groups("arop", 3, 0, vocabulary),
        *form.groups("ial", 1, 1, vocabulary),
    ]
    long, other = drawn[0].completions
    return [
        *drawn,
        TokenGroup(drawn[1].prompt, (long, long, long[: len(long) // 2], long[:3] + other)),
    ]


def exactness(form: Form, notes: Notes, attention: str, *, slopes: bool) -> None:
    """Packed rows under this attention against one sequence at a time, in both dtypes."""
    exact = random_policy(form.shape(False), form.device, torch.bfloat16, noise=0.02)
    groups = awkward_groups(form, exact.model.config.vocab_size)
    half = outcome(exact, groups, one_at_a_time, slopes=slopes)
    with attending(exact.model.get_base_model(), attention), form.masks():
        half_packed = outcome(exact, groups, packed, slopes=slopes)
    exact.model.float()  # the same weights; rotary frequencies were in float32 already
    truth = outcome(exact, groups, one_at_a_time, slopes=slopes)
    with attending(exact.model.get_base_model(), attention), form.masks():
        single = outcome(exact, groups, packed, slopes=slopes)
        wrong = outcome(exact, groups, without_tree, slopes=slopes)
    found = apart(single, truth)
    bad = apart(wrong, truth)
    notes.figure("float32", found)
    notes.figure("float32, branches seeing each other", bad)
    own, rows = apart(half, truth), apart(half_packed, truth)
    notes.figure("bfloat16, one at a time, to float32", own)
    notes.figure("bfloat16, packed, to float32", rows)
    notes.figure("bfloat16, packed to one at a time", apart(half_packed, half))
    for name in ("logp_max", *(["gradient"] if slopes else [])):
        notes.check(f"float32 {name}", found[name], most=FLOAT32_LIMIT)
        notes.check(f"control {name} in limits", bad[name] / FLOAT32_LIMIT, least=CONTROL_LEAST)
    for name in ("logp_rms", *(["gradient"] if slopes else [])):
        ratio = rows[name] / own[name] if own[name] else math.inf
        notes.check(f"bfloat16 {name} in errors of one at a time", ratio, most=BFLOAT16_LIMIT)


def first_losses(form: Form, notes: Notes) -> None:
    """What the trainer writes for step 0 of both methods, and the same rows computed twice."""
    for dtype, limit in ((torch.float32, FLOAT32_LIMIT), (torch.bfloat16, LOSS_LIMIT)):
        name = str(dtype).removeprefix("torch.")
        policy = random_policy(form.shape(False), form.device, dtype, noise=0.02)
        groups = form.groups("ial", 8, 0, policy.model.config.vocab_size)
        with form.masks():
            notes.check(f"{name}, the same rows twice, nats", repeated(policy, groups), most=0.0)
            ial, expected = IAL(), 2 * math.log(2)
            row = first_row(policy, ial, [Example(f"p{n}", g) for n, g in enumerate(groups)])
            notes.figure(f"{name}, IAL", {"loss": row["loss"], "expected": expected})
            notes.check(f"{name}, IAL loss", abs(row["loss"] - expected), most=limit)
            notes.check(
                f"{name}, IAL penalty, nats", row["penalty"], most=0.5 if limit > 0.01 else 1e-3
            )
            margins = [n / 4 for n in range(8)]
            examples = [
                Example(f"p{n}", TokenGroup(g.prompt, g.completions[:2]), margin=margin)
                for n, (g, margin) in enumerate(zip(groups, margins, strict=True))
            ]
            expected = statistics.fmean(math.log1p(math.exp(m)) for m in margins)
            row = first_row(policy, AROP(), examples)
            notes.figure(f"{name}, AROP", {"loss": row["loss"], "expected": expected})
            notes.check(f"{name}, AROP loss", abs(row["loss"] - expected), most=limit)


def repeated(policy: Policy, groups: Sequence[TokenGroup]) -> float:
    """Largest difference in nats of log-probs computed for the reference and for training, in equal rows."""
    with torch.inference_mode(), autocast(policy):
        before = group_logprobs(policy.model, groups, packing=True, token_budget=2048)
    with autocast(policy):
        after = group_logprobs(policy.model, groups, packing=True, token_budget=2048)
    return max(
        (a.detach() - b).abs().max().item()
        for many, others in zip(after, before, strict=True)
        for a, b in zip(many, others, strict=True)
    )


def first_row(policy: Policy, method: Any, examples: list[Example]) -> dict[str, Any]:
    """The metrics of step 0 of a round whose reference is the policy at its start."""
    options = TrainOptions(lr=1e-6, batch_size=8, micro_batch_size=4)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(examples, method.roles, method.loss, Path(folder), 0, reference="round_start")
        Trainer(policy, options).run(job)
        rows = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    found: dict[str, Any] = json.loads(rows[0])
    return found


def one_process(form: Form, notes: Notes) -> None:
    """A packed step inside DDP of one process, over the backend that a launcher would choose."""
    backend = "nccl" if form.on_gpu else "gloo"
    policy = random_policy(form.shape(False), form.device, torch.float32, noise=0.02)
    groups = awkward_groups(form, policy.model.config.vocab_size)
    # DDP counts one forward pass for each backward pass, so all groups share a row.
    budget = sum(build_tree(group).size for group in groups)

    def way(seen: nn.Module) -> Way:
        return lambda _, found: packed_logprobs(seen, pack(found, budget))

    with form.masks():
        plain = outcome(policy, groups, way(policy.model), slopes=True)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        wrapped = DistributedDataParallel(policy.model)
        found = apart(outcome(policy, groups, way(wrapped), slopes=True), plain)
    notes.figure("backend", backend)
    notes.figure("float32, DDP beside the bare model", found)
    for name in ("logp_max", "gradient"):
        notes.check(f"float32 {name}", found[name], most=FLOAT32_LIMIT)
    total = plain.gradient.clone() if plain.gradient is not None else torch.zeros(1)
    dist.all_reduce(total)
    notes.check("all-reduce of one", (total - plain.gradient).abs().max().item(), most=0.0)
    dist.destroy_process_group()
