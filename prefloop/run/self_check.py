"""Before the first round: is the policy that is trained the one that generates, scores, merges and is saved?

A fresh adapter changes nothing, so an adapter that is lost on the way would show only after rounds. Here it
gets random weights for a moment, a few tokens go every way that a run takes, and it gets its own back.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from prefloop.errors import ModelError
from prefloop.generate.hf_engine import HFEngine
from prefloop.models.adapter import adapted_weight
from prefloop.models.policy import Policy
from prefloop.models.sources import quiet
from prefloop.models.split import joined
from prefloop.records import Sampling
from prefloop.train.logprobs import group_logprobs
from prefloop.train.options import TrainOptions
from prefloop.train.packing import TokenGroup

# N tokens of all rows but each row's first, V vocabulary.

TOLERANCE, TOLERANCE_HALF = 1e-3, 0.5
"""Mean difference of a logit, in standard deviations of all, that rounding may explain; in half precision,
where the merged weights are rounded too, small models showed up to 0.23."""

_ROWS, _LENGTH, _NEW_TOKENS = 2, 9, 2
_STRENGTH, _STRENGTH_HALF = 0.05, 0.3
"""Size of the adapter's update beside the weight it adds to; it must stand out against rounding."""


def check_policy(policy: Policy, options: TrainOptions, folder: Path) -> dict[str, float]:
    """How far each way is from the trained policy's own forward pass. Raises ModelError beyond the tolerance.

    `policy` is a fresh one. Weights and random state are as before afterwards; `folder` is for a moment's copy.
    """
    # An engine of its own: what a moment's weights make it decide is not kept.
    arguments = policy.options.chat_template_kwargs
    engine = HFEngine(policy.model, policy.tokenizer, batch_size=_ROWS, template_kwargs=arguments)
    rows = _rows(engine)
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), quiet(), _without_warnings():
        initial_NV = _logits(policy.model, rows)
        with _random_adapter(policy):
            expected_NV = _logits(policy.model, rows)
            distances = {"trainer": _trainer(policy, rows, expected_NV, options)}
            with policy.merged():
                distances["merged"] = _distance(_logits(policy.model, rows), expected_NV)
                distances |= _engine(engine, policy, rows, expected_NV)
            if isinstance(policy.model, PeftModel):
                with policy.at_start():
                    distances["initial"] = _distance(_logits(policy.model, rows), initial_NV)
                distances["reopened"] = _reopened(policy, folder)
            moved = _distance(initial_NV, expected_NV)
    _check_distances(policy, distances)
    return {"moved": moved, **distances}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Mute this throw-away engine: the run's own engine gives the same warnings about the model."""
    # What is said once a process, as of the C compiler, stays.
    logger = logging.getLogger("prefloop.generate.hf_engine")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


_WAYS = {
    "trainer": "the trainer's log-probs",
    "merged": "the policy merged for generation",
    "scored": "the engine's scores",
    "decoded": "the engine's greedy answers",
    "initial": "the initial policy beside a trained adapter",
    "reopened": "the policy saved and opened again",
}


def _check_distances(policy: Policy, distances: dict[str, float]) -> None:
    tolerance = TOLERANCE_HALF if _is_half(policy) else TOLERANCE
    for way, distance in distances.items():
        # Written so that NaN is a difference.
        if not distance <= tolerance:
            model: Any = policy.model
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            raise ModelError(
                f"{type(base).__name__} cannot be aligned so: {_WAYS[way]} differ from the policy in training by "
                f"{distance:.2g} standard deviations of a logit, more than the {tolerance:g} of rounding; "
                "name fewer modules in model.lora.target_modules, or set model.tuning to full"
            )


def _is_half(policy: Policy) -> bool:
    return policy.model.dtype not in (torch.float32, torch.float64)


def _rows(engine: HFEngine) -> list[list[int]]:
    model: Any = engine.model
    size = min(model.config.get_text_config().vocab_size, len(engine.chat.tokenizer))
    return [[(7919 * (n + 5 * row) + 3) % size for n in range(_LENGTH)] for row in range(_ROWS)]


def _logits(model: Any, rows: Sequence[list[int]]) -> Tensor:
    """(N, V) float32, of rows of one length; the last token of a row predicts nothing here."""
    with torch.inference_mode():
        ids_BT = torch.tensor(rows, device=model.device)
        logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV[:, :-1].flatten(0, 1).float()


def _distance(other_NV: Tensor, expected_NV: Tensor) -> float:
    spread = expected_NV.std().clamp(min=1e-6)
    return float((other_NV - expected_NV).abs().mean() / spread)


def _logps(rows: Sequence[list[int]], logits_NV: Tensor) -> Tensor:
    """(N,) log-probs of the rows' tokens, in standard deviations of a logit."""
    targets_N = torch.tensor([token for ids in rows for token in ids[1:]], device=logits_NV.device)
    logps_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0]
    return logps_N / logits_NV.std().clamp(min=1e-6)


def _trainer(
    policy: Policy, rows: list[list[int]], expected_NV: Tensor, options: TrainOptions
) -> float:
    groups = [TokenGroup((ids[0],), (tuple(ids[1:]),)) for ids in rows]
    with torch.no_grad():
        logps = group_logprobs(
            policy.model, groups, packing=options.packing, token_budget=options.token_budget
        )
    logps_N = torch.cat([answers[0] for answers in logps]) / expected_NV.std().clamp(min=1e-6)
    return float((logps_N - _logps(rows, expected_NV)).abs().mean())


def _engine(
    engine: HFEngine, policy: Policy, rows: list[list[int]], expected_NV: Tensor
) -> dict[str, float]:
    """Distance of the engine's scores of the rows; and of greedily decoded tokens, how much less likely they are than
    the likeliest one."""
    spread = float(expected_NV.std().clamp(min=1e-6))
    scores = engine.score_tokens(rows, [1] * len(rows))
    found_N = torch.tensor([logp for score in scores for logp in score.logprobs]) / spread
    scored = float((found_N - _logps(rows, expected_NV).cpu()).abs().mean())
    greedy = Sampling(temperature=0.0, max_new_tokens=_NEW_TOKENS)
    # Of two lengths, so that a batch must be padded where nothing else is possible.
    prompts = [ids[: _LENGTH - 4 * n] for n, ids in enumerate(rows)]
    answers = engine.continue_tokens(prompts, greedy, seed=0, label="self-check")
    # Under the merged weights, which have just been compared with the trained ones.
    gap = 0.0
    for ids, answer in zip(prompts, answers, strict=True):
        logits_TV = _logits(policy.model, [[*ids, *answer]])[-len(answer) :]
        chosen_T = logits_TV.gather(1, torch.tensor(answer, device=logits_TV.device)[:, None])[:, 0]
        gap = max(gap, float((logits_TV.max(dim=-1).values - chosen_T).mean() / spread))
    return {"scored": scored, "decoded": gap}


@contextmanager
def _random_adapter(policy: Policy) -> Iterator[None]:
    """Inside, the adapter changes the model; afterwards its weights are the very ones before."""
    if not isinstance(policy.model, PeftModel):
        yield
        return
    trained = [weight for weight in policy.model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in trained]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for layer in policy.model.modules():
                if isinstance(layer, LoraLayer):
                    strength = _STRENGTH_HALF if _is_half(policy) else _STRENGTH
                    _move(layer, policy.model.active_adapter, generator, strength)
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(trained, before, strict=True):
                weight.copy_(old)


def _move(layer: Any, adapter: str, generator: torch.Generator, strength: float) -> None:
    """Add noise to the factor that is zero, or to one of them, so that the update is a part of the weight's size."""
    if adapter in layer.lora_A:
        factors = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
    else:
        factors = [layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]]
    zero, other = sorted(factors, key=lambda factor: bool(factor.any()))
    size = _size(adapted_weight(layer)) or 0.02
    unit = layer.scaling[adapter] * math.sqrt(layer.r[adapter]) * (_size(other) or 0.02)
    noise = torch.randn(zero.shape, generator=generator) * (strength * size / unit)
    zero.add_(noise.to(zero.dtype))
    if adapter in layer.lora_magnitude_vector:
        lengths = layer.lora_magnitude_vector[adapter].weight
        lengths.mul_(1 + strength * torch.randn(lengths.shape, generator=generator).to(lengths))


def _size(weight: Tensor) -> float:
    """Root mean square; 0 of a quantised weight, whose numbers are not its values."""
    if not weight.is_floating_point() or hasattr(weight, "__tensor_flatten__"):
        return 0.0
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)
    return float(norm) / math.sqrt(max(1, weight.numel()))


def _reopened(policy: Policy, folder: Path) -> float:
    """0 where PEFT finds the adapter's very weights, by name, in what `save` writes; else infinite.

    The base is not read a second time: a skeleton without weights shows where the file's tensors belong.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".self-check-") as temporary:
        policy_dir = Path(temporary) / "policy"
        policy.save(policy_dir)
        weights = load_file(policy_dir / "adapter_model.safetensors")
        opened = _skeleton(
            policy, PeftConfig.from_pretrained(str(policy_dir), trust_remote_code=False)
        )
    for module in opened.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.requires_grad:
                # What no tensor of the file is for stays not a number, and unequal.
                unset = torch.full_like(weight, math.nan, device="cpu")
                module._parameters[name] = nn.Parameter(unset)
    set_peft_model_state_dict(opened, weights)
    reopened = _trained(opened)
    expected = {
        name: joined(name, weight, policy.split) for name, weight in _trained(policy.model).items()
    }
    same = reopened.keys() == expected.keys() and all(
        torch.equal(reopened[name], weight.cpu()) for name, weight in expected.items()
    )
    return 0.0 if same else math.inf


def _skeleton(policy: Policy, config: PeftConfig) -> nn.Module:
    assert isinstance(policy.model, PeftModel)
    base = policy.model.get_base_model()
    config.inference_mode = False
    with torch.device("meta"), no_init_weights():
        kind: Any = AutoModelForCausalLM
        empty = kind.from_config(base.config, trust_remote_code=policy.options.trust_remote_code)
        made: nn.Module = get_peft_model(empty, config, low_cpu_mem_usage=True)
    return made


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name."""
    return {name: w.detach() for name, w in model.named_parameters() if w.requires_grad}
