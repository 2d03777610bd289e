"""Time and memory on a GPU: the packed step beside others, FlexAttention, generation beside transformers.

B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from ways.gpu_exact import exactness
from ways.gpu_form import LOSS_LIMIT, Form, Notes, autocast
from ways.random_models import random_policy
from ways.steps import Batch, Step, mean_loss, plain_step, trl_step

from prefloop.generate.cache_attention import attending
from prefloop.generate.fallback import slot_decoding_unsupported
from prefloop.generate.hf_engine import HFEngine
from prefloop.models.policy import Policy
from prefloop.records import Sampling
from prefloop.train.logprobs import group_logprobs
from prefloop.train.packing import build_tree

TIE = 1e-3
"""Two greedy tokens whose logits are closer than this are a tie, which rounding decides."""


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
