"""Claim: on a GPU the packed step, the slot engine, the first loss and DDP are as exact as on a CPU, and fast.

One GPU, at most eight minutes, randomly initialised models in the shapes of SmolLM2-135M and 1.7B, no download.
Each part runs in a process of its own, under its own share of the time: what fails is listed and the others
go on. Without a GPU, or with --small, a tiny model takes the same ways in less than a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from ways.random_models import random_policy
from ways.steps import Batch, Step, draw_groups, mean_loss, plain_step, trl_step

from prefloop.generate.cache_attention import attending
from prefloop.generate.fallback import slot_decoding_unsupported
from prefloop.generate.hf_engine import HFEngine
from prefloop.methods.arop import AROP
from prefloop.methods.ial import IAL
from prefloop.models.policy import Policy
from prefloop.records import Sampling
from prefloop.train import logprobs
from prefloop.train.batches import Example
from prefloop.train.logprobs import group_logprobs, packed_logprobs
from prefloop.train.options import TrainOptions
from prefloop.train.packing import TokenGroup, build_tree, pack
from prefloop.train.trainer import Job, Trainer

# B rows, T positions, V vocabulary.

FLOAT32_LIMIT = 1e-4
"""float32: largest difference of a log-prob in nats, and of the gradient relative to its length."""
BFLOAT16_LIMIT = 1.5
"""bfloat16: error against float32 in multiples of the error that one sequence at a time makes in bfloat16."""
CONTROL_LEAST = 100.0
"""A mask that lets branches see each other must be told apart from rounding by this factor."""
LOSS_LIMIT = 0.05
"""bfloat16: how far the losses of two ways may lie apart, as rounding of a few hundred tokens times beta."""
TIE = 1e-3
"""Two greedy tokens whose logits are closer than this are a tie, which rounding decides."""


class Notes:
    """A part's findings, on disk after each, so that what stops it late takes nothing away."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = {"figures": {}, "checks": {}}

    def figure(self, name: str, value: Any) -> None:
        """Something measured."""
        self.found["figures"][name] = value
        self._write()

    def check(
        self, name: str, value: float, *, most: float | None = None, least: float = 0.0
    ) -> None:
        """A number that should be at most `most`, or at least `least`."""
        good = value <= most if most is not None else value >= least
        limit = {"most": most} if most is not None else {"least": least}
        seen = value if math.isfinite(value) else None
        self.found["checks"][name] = {"value": seen, **limit, "good": good}
        self._write()

    def fail(self, message: str) -> None:
        """Why the part did not come to its end."""
        self.found["failure"] = message
        self._write()

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.found))
        part.replace(self._path)


@dataclass(frozen=True)
class Form:
    """The sizes of a run: for a GPU, or small for a CPU."""

    device: str
    small: bool

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def shape(self, large: bool) -> str:
        """A shape of `random_models`."""
        return "tiny" if self.small else "1.7b" if large else "135m"

    def groups(self, case: str, count: int, seed: int, vocabulary: int) -> list[TokenGroup]:
        """`draw_groups`, in the small form every fifth token, so that answers share as much as before."""
        drawn = draw_groups(case, count, vocabulary, seed)
        if not self.small:
            return drawn
        return [TokenGroup(g.prompt[::5], tuple(c[::5] for c in g.completions)) for g in drawn]

    @contextmanager
    def masks(self) -> Iterator[None]:
        """Inside, a CPU attends with the mask that a GPU gets."""
        with patch.dict(logprobs._MASKS, sdpa=logprobs._bool_mask):
            yield


def autocast(policy: Policy) -> AbstractContextManager[Any]:
    """The trainer's precision: bfloat16 products where the model is in bfloat16."""
    half = policy.model.dtype == torch.bfloat16
    return torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=half)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


# Exactness of the packed step.


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


# Time and memory of steps.


def synchronize(form: Form) -> None:
    if form.on_gpu:
        torch.cuda.synchronize()


def peak_mb(form: Form) -> float | None:
    """The most that torch had allocated on the GPU since `forget_peak`."""
    return round(torch.cuda.max_memory_allocated() / 2**20, 1) if form.on_gpu else None


def forget_peak(form: Form) -> None:
    if form.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def packed_step(policy: Policy) -> Step:
    """The trainer's forward and backward pass."""

    def step(batch: Batch) -> float:
        policy.model.zero_grad()
        groups, reference = batch
        with autocast(policy):
            tokens = group_logprobs(policy.model, groups, packing=True, token_budget=4096)
        loss = mean_loss([[t.sum() for t in group] for group in tokens], reference)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    return step


def padded_step(policy: Policy) -> Step:
    """Padded rows and a log-softmax over all positions."""
    plain = plain_step(policy.model)

    def step(batch: Batch) -> float:
        with autocast(policy):
            return plain(batch)

    return step


def batches(form: Form, policy: Policy) -> list[Batch]:
    """Pairs that share 60 %, a new batch for each step: the first two warm up."""
    found = []
    for number in range(3 if form.small else 7):
        groups = form.groups("arop", 2 if form.small else 8, number, policy.model.config.vocab_size)
        with torch.inference_mode(), autocast(policy):
            tokens = group_logprobs(policy.model, groups, packing=True, token_budget=4096)
        # Apart from the policy, or every loss would be log 2 whatever was computed.
        shift = random.Random(number)
        found.append((groups, [[t.sum().item() + shift.uniform(-9, 9) for t in g] for g in tokens]))
    return found


def time_steps(form: Form, step: Step, data: Sequence[Batch]) -> dict[str, Any]:
    """Milliseconds, losses and peak memory of all batches but the two that warm up."""
    forget_peak(form)
    loaded = round(torch.cuda.memory_allocated() / 2**20, 1) if form.on_gpu else None
    times, losses = [], []
    for batch in data:
        synchronize(form)
        start = time.perf_counter()
        losses.append(step(batch))
        synchronize(form)
        times.append(1000 * (time.perf_counter() - start))
    kept = times[2:]
    return {
        "ms": statistics.median(kept), "ms_min": min(kept), "ms_max": max(kept),
        "first_ms": times[0], "loaded_mb": loaded, "peak_mb": peak_mb(form), "losses": losses,
    }  # fmt: skip


def beside(found: dict[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The other way's figures, with ratios to ours and the largest difference of a loss."""
    pairs = zip(found["losses"], ours["losses"], strict=True)
    ratio = found["peak_mb"] and ours["peak_mb"] / found["peak_mb"]
    return {
        **found,
        "times_faster": found["ms"] / ours["ms"],
        "peak_ratio": ratio,
        "loss_apart": max(abs(a - b) for a, b in pairs),
    }


def steps(form: Form, notes: Notes, *, large: bool) -> None:
    """The packed step under SDPA's mask, a padded one, and TRL's, in bfloat16 with LoRA."""
    policy = random_policy(form.shape(large), form.device, torch.bfloat16)
    with form.masks():
        data = batches(form, policy)
        ours = time_steps(form, packed_step(policy), data)
    groups = [group for batch, _ in data for group in batch]
    sizes = [len(g.prompt) + len(c) for g in groups for c in g.completions]
    notes.figure("tokens a batch", round(sum(sizes) / len(data)))
    notes.figure("distinct of them", round(sum(build_tree(g).size for g in groups) / len(data)))
    notes.figure("packed, sdpa", ours)
    padded = beside(time_steps(form, padded_step(policy), data), ours)
    notes.figure("padded, log-softmax over all positions", padded)
    notes.check("loss apart from the padded step's", padded["loss_apart"], most=LOSS_LIMIT)
    if find_spec("trl") is None:
        notes.figure("trl", "not installed: the padded step stands in its place")
        return
    del policy
    plain = random_policy(form.shape(large), form.device, torch.bfloat16, adapter=False)
    with tempfile.TemporaryDirectory() as folder:
        step = trl_step(plain, True, fused=True, folder=folder)
        trl = beside(time_steps(form, step, data), ours)
    notes.figure(f"trl {version('trl')}", trl)
    notes.check("loss apart from TRL's", trl["loss_apart"], most=LOSS_LIMIT)


def flex(form: Form, notes: Notes) -> None:
    """FlexAttention: as exact, and its time beside SDPA's mask."""
    if not form.on_gpu:
        # No backward pass on CPUs, and compiling its forward pass is no part of the claim there.
        torch.compiler.set_stance("force_eager")
    exactness(form, notes, "flex_attention", slopes=form.on_gpu)
    if not form.on_gpu:
        notes.figure("gradient", "not seen: FlexAttention has no backward pass on CPUs")
        return
    policy = random_policy(form.shape(False), form.device, torch.bfloat16)
    data = batches(form, policy)
    masked = time_steps(form, packed_step(policy), data)
    with attending(policy.model.get_base_model(), "flex_attention"):
        found = time_steps(form, packed_step(policy), data)
    notes.figure("packed, sdpa", masked)
    notes.figure("packed, flex_attention", beside(found, masked))


# The first loss.


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


# Generation.


def draw_prompts(form: Form, vocabulary: int) -> list[list[int]]:
    rng = random.Random(0)
    count, longest = (6, 30) if form.small else (64, 350)
    sizes = [rng.randrange(longest // 8, longest + 1) for _ in range(count)]
    return [[rng.randrange(10, vocabulary) for _ in range(size)] for size in sizes]


def transformers_answers(
    policy: Policy, prompts: Sequence[Sequence[int]], limit: int, *, greedy: bool
) -> list[list[int]]:
    """transformers' own loop on one batch, padded on the left; answers end with the tokenizer's end."""
    end = policy.tokenizer.eos_token_id
    longest = max(map(len, prompts))
    ids_BT = torch.tensor(
        [[0] * (longest - len(p)) + list(p) for p in prompts], device=policy.device
    )
    mask_BT = torch.tensor(
        [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=policy.device
    )
    drawn = (
        {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
    )
    with torch.inference_mode():
        out_BT = policy.model.generate(
            ids_BT, attention_mask=mask_BT, max_new_tokens=limit, pad_token_id=0, eos_token_id=[end],
            top_k=None if greedy else 0, **drawn,
        )  # fmt: skip
    answers = out_BT[:, longest:].tolist()
    return [a[: a.index(end) + 1] if end in a else a for a in answers]


def gap_of(policy: Policy, ids: list[int], a: int, b: int) -> float:
    """Difference of two tokens' logits after `ids`."""
    with torch.inference_mode():
        logits_V = policy.model(input_ids=torch.tensor([ids], device=policy.device)).logits[0, -1]
    return abs(logits_V[a] - logits_V[b]).item()


def greedy_equality(form: Form, notes: Notes) -> None:
    """Greedy answers in float32, token by token, each prompt by itself in transformers' loop."""
    policy = random_policy(form.shape(False), form.device, torch.float32, adapter=False)
    policy.model.eval()
    prompts = draw_prompts(form, policy.model.config.vocab_size)[:8]
    limit = 8 if form.small else 32
    engine = HFEngine(policy.model, policy.tokenizer, batch_size=4)
    own = engine.continue_tokens(prompts, Sampling(temperature=0, max_new_tokens=limit), seed=0)
    equal, ties = 0, 0
    for prompt, mine in zip(prompts, own, strict=True):
        (theirs,) = transformers_answers(policy, [prompt], limit, greedy=True)
        fork = next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        equal += mine == theirs
        if fork is not None:
            ids = [*prompt, *mine[:fork]]
            ties += gap_of(policy, ids, mine[fork], theirs[fork]) < TIE
    notes.figure("greedy answers", {"compared": len(prompts), "equal": equal, "ties": ties})
    notes.check("greedy answers that differ, ties aside", len(prompts) - equal - ties, most=0)


def generation(form: Form, notes: Notes, *, large: bool) -> None:
    """Tokens a second of the slot engine and of transformers' `generate` in bfloat16."""
    if not large:
        greedy_equality(form, notes)
    policy = random_policy(form.shape(large), form.device, torch.bfloat16, adapter=False)
    policy.model.eval()
    prompts = draw_prompts(form, policy.model.config.vocab_size)
    limit = 8 if form.small else 128
    longest = max(map(len, prompts)) + limit
    with torch.inference_mode():
        reason = slot_decoding_unsupported(policy.model, longest)
    notes.figure("slots", "used" if reason is None else f"not used, as {reason}")
    engine = HFEngine(policy.model, policy.tokenizer, batch_size=len(prompts))
    sampling = Sampling(temperature=0.7, top_p=0.95, max_new_tokens=limit)
    short = sampling.model_copy(update={"max_new_tokens": 2})
    engine.continue_tokens(prompts[:2], short, seed=0)
    ours = rate(form, lambda: engine.continue_tokens(prompts, sampling, seed=1))
    notes.figure("slot engine", ours)
    engine.release()
    transformers_answers(policy, prompts[:2], 2, greedy=False)
    theirs = rate(form, lambda: transformers_answers(policy, prompts, limit, greedy=False))
    notes.figure("transformers generate, one batch", theirs)
    notes.figure("times faster", ours["tokens_per_second"] / theirs["tokens_per_second"])


def rate(form: Form, work: Callable[[], list[list[int]]]) -> dict[str, Any]:
    forget_peak(form)
    synchronize(form)
    start = time.perf_counter()
    tokens = sum(map(len, work()))
    synchronize(form)
    seconds = time.perf_counter() - start
    return {
        "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
        "peak_mb": peak_mb(form),
    }  # fmt: skip


# One process, distributed.


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


def machine(form: Form, notes: Notes) -> None:
    """What it ran on."""
    notes.figure("python", sys.version.split()[0])
    for name in ("torch", "transformers", "peft", "trl"):
        notes.figure(name, version(name) if find_spec(name) else None)
    if form.on_gpu:
        about = torch.cuda.get_device_properties(0)
        notes.figure("gpu", about.name)
        notes.figure("gpu memory, MB", about.total_memory // 2**20)
        notes.figure("cuda", torch.version.cuda)


class Part(NamedTuple):
    """A part, its share of the time (seconds of 480), and whether the small form has it too."""

    work: Callable[[Form, Notes], None]
    seconds: int
    small: bool = True


def _exact(form: Form, notes: Notes) -> None:
    exactness(form, notes, "sdpa", slopes=True)


def _steps(form: Form, notes: Notes) -> None:
    steps(form, notes, large=False)


def _large_steps(form: Form, notes: Notes) -> None:
    steps(form, notes, large=True)


def _generation(form: Form, notes: Notes) -> None:
    generation(form, notes, large=False)


def _large_generation(form: Form, notes: Notes) -> None:
    generation(form, notes, large=True)


PARTS: Mapping[str, Part] = {
    "machine": Part(machine, 20),
    "exact": Part(_exact, 45),
    "first loss": Part(first_losses, 45),
    "step": Part(_steps, 60),
    "generate": Part(_generation, 70),
    "ddp": Part(one_process, 40),
    "flex": Part(flex, 80),
    "step, 1.7 B": Part(_large_steps, 60, small=False),
    "generate, 1.7 B": Part(_large_generation, 60, small=False),
}
"""In the order in which they run: what needs a compiler or much memory comes last."""


def child(name: str, form: Form, path: Path) -> None:
    """One part, in a process of its own."""
    os.setsid()
    os.dup2(2, 1)  # standard output is for the result
    os.environ["TQDM_DISABLE"] = "1"
    notes = Notes(path)
    try:
        PARTS[name].work(form, notes)
    except Exception as error:  # noqa: BLE001 (a failure is a finding; the other parts go on)
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        notes.fail(f"{type(error).__name__}: {first}")


def play(name: str, form: Form, seconds: float) -> dict[str, Any]:
    """A part's findings; its process is ended when its time is over."""
    # A forked process cannot use CUDA if this one has asked for it; without a GPU nothing is imported twice.
    context: Any = multiprocessing.get_context("spawn" if form.on_gpu else "fork")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "notes.json"
        process = context.Process(target=child, args=(name, form, path))
        process.start()
        try:
            process.join(seconds)
        finally:
            late = process.is_alive()
            if late:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        found: dict[str, Any] = (
            json.loads(path.read_text()) if path.exists() else {"figures": {}, "checks": {}}
        )
    if late:
        found["failure"] = f"not done after its {seconds:.0f} seconds"
    elif process.exitcode:
        found["failure"] = f"its process ended with code {process.exitcode}"
    found["seconds"] = round(time.perf_counter() - start, 1)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts; what the script prints."""
    has_gpu = torch.cuda.is_available()
    form = Form("cuda" if has_gpu else "cpu", small=options.small or not has_gpu)
    deadline = time.perf_counter() + options.seconds
    parts: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, part in PARTS.items():
        if form.small and not part.small:
            continue
        left = deadline - time.perf_counter()
        own = part.seconds * options.seconds / sum(p.seconds for p in PARTS.values())
        if left < 1:
            failures[name] = f"not begun: the {options.seconds:.0f} seconds were over"
            continue
        parts[name] = play(name, form, min(own, left))
        print(name, json.dumps(parts[name]), file=sys.stderr, flush=True)
        if "failure" in parts[name]:
            failures[name] = parts[name]["failure"]
    missed = [
        f"{name}: {check}"
        for name, found in parts.items()
        for check, values in found["checks"].items()
        if not values["good"]
    ]
    return {
        "form": "small" if form.small else "full",
        "device": form.device,
        "parts": parts,
        "missed": missed,
        "failures": failures,
    }


def table(found: Mapping[str, Any]) -> str:
    """The findings as Markdown."""
    lines = [
        f"Form: {found['form']}, on {found['device']}.",
        "",
        "| part | what | found | limit | |",
        "|---|---|---|---|---|",
    ]
    for name, part in found["parts"].items():
        for what, value in part["figures"].items():
            lines.append(f"| {name} | {what} | {_said(value)} | | |")
        for what, check in part["checks"].items():
            limit = ", ".join(f"{k} {check[k]:g}" for k in ("most", "least") if k in check)
            good = "good" if check["good"] else "**missed**"
            lines.append(f"| {name} | {what} | {_said(check['value'])} | {limit} | {good} |")
    lines += ["", *(f"Failed: {name}: {why}" for name, why in found["failures"].items())]
    return "\n".join(lines)


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items() if k != "losses")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a tiny model; the form without a GPU")
    parser.add_argument("--seconds", type=float, default=480.0, help="bound of the whole")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = measure(options)
    print(json.dumps(found) if options.json else table(found))
    if not any(part["figures"] for name, part in found["parts"].items() if name != "machine"):
        sys.exit("nothing ran; the messages stand above")


if __name__ == "__main__":
    main()
