"""Log-probs of completions under a causal LM, padded or packed as prefix trees, with equal results.

Both ways are exact: each token gets the log-prob of a plain forward pass over its own sequence. Logits are
computed only where a token is scored, some positions at a time, and again in the backward pass. They are
normalised in float32, whatever the model's dtype.

For mixed precision, call these functions inside autocast: they call parts of the model.

Shapes: B sequences, T tokens of a sequence or row, N scored tokens, C of them at a time, L tokens of one
completion, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import cross_entropy, linear
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from prefloop.errors import ModelError
from prefloop.train.packing import Row, TokenGroup, pack
from prefloop.train.tree_attention import subtree_ends


class _FrozenHeadLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        size: int,
    ) -> Tensor:
        logps_N = torch.empty(len(states_NH), dtype=torch.float32, device=states_NH.device)
        slopes_NH = torch.empty_like(states_NH) if ctx.needs_input_grad[0] else None
        for start in range(0, len(states_NH), size):
            chunk = slice(start, start + size)
            logits_CV = linear(states_NH[chunk], weight_VH, bias_V).float()
            targets_C = targets_N[chunk]
            norms_C = logits_CV.logsumexp(-1)
            logps_N[chunk] = logits_CV.gather(1, targets_C[:, None])[:, 0] - norms_C
            if slopes_NH is not None:
                probs_CV = logits_CV.sub_(norms_C[:, None]).exp_().to(weight_VH.dtype)
                slopes_NH[chunk] = weight_VH[targets_C] - probs_CV @ weight_VH
        if slopes_NH is not None:
            ctx.save_for_backward(slopes_NH)
        return logps_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: Tensor) -> tuple[Tensor | None, ...]:
        (slopes_NH,) = ctx.saved_tensors
        return (g_N[:, None] * slopes_NH).to(slopes_NH.dtype), None, None, None, None


def frozen_head_logps(
    states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, *, size: int
) -> Tensor:
    """(N,) float32 log-probs of the targets in nats; `size` rows of logits exist at a time."""
    assert not weight_VH.requires_grad, "no gradient reaches a frozen head"
    logps_N = _FrozenHeadLogps.apply(states_NH, weight_VH, bias_V, targets_N, size)  # type: ignore[no-untyped-call]
    assert isinstance(logps_N, Tensor)
    return logps_N


GroupLogprobs = list[list[Tensor]]
"""[group][completion]: (L,) float32 token log-probs in nats; with a value head (L, 2), log-probs and values."""

CHECKED_MODEL_TYPES = frozenset(
    {
        "cohere", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "gpt_neox",
        "granite", "helium", "llama", "mistral", "mixtral", "olmo2", "olmo3", "phi", "phi3", "qwen2",
        "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
    }
)  # fmt: skip
"""Model types whose handling of our masks, and whose head, are tested against plain forward passes."""

HEAD_SCALES = {
    "final_logit_softcapping": None,  # Gemma 2, 3
    "logit_scale": 1.0,  # Cohere
    "logits_scaling": 1.0,  # Granite
}
"""Config fields by which checked models change the head's output, with the value that has no effect."""

LOGITS_AT_ONCE = 2**24
"""Limit of logits that exist at a time (64 MiB of float32); it sets C."""


def group_logprobs(
    model: nn.Module,
    groups: Sequence[TokenGroup],
    *,
    packing: bool,
    token_budget: int,
    value_head: nn.Module | None = None,
) -> GroupLogprobs:
    """Differentiable log-probs of every completion of every group.

    `packing` is a preference: a model that cannot be packed exactly (`supports_packing` says why) is padded.
    `token_budget` bounds a packed row, in tokens; each row is one forward pass.
    `value_head` maps the (N, H) float32 states that predict the tokens to (N,) values.
    """
    longest = max((group.longest for group in groups), default=0)
    if packing and supports_packing(model, longest=longest) is None:
        return packed_logprobs(model, pack(groups, token_budget), value_head)
    return padded_logprobs(model, groups, value_head)


def padded_logprobs(
    model: nn.Module, groups: Sequence[TokenGroup], value_head: nn.Module | None = None
) -> GroupLogprobs:
    """Log-probs by one right-padded batch in which each completion is a sequence of its own."""
    sequences = [(g.prompt, completion) for g in groups for completion in g.completions]
    if not groups:
        return []
    assert all(g.prompt and g.completions for g in groups), (
        "a group needs a prompt and a completion"
    )
    longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
    ids_BT = torch.zeros(len(sequences), longest, dtype=torch.long)
    real_BT = torch.zeros_like(ids_BT)
    predicts_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for b, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        ids_BT[b, :end] = torch.tensor(prompt + completion)
        real_BT[b, :end] = 1
        predicts_BT[b, len(prompt) - 1 : end - 1] = True
    batch_N, time_N = predicts_BT.nonzero(as_tuple=True)
    logps_N = _target_logps(
        model,
        {"input_ids": ids_BT, "attention_mask": real_BT},
        (batch_N, time_N),
        ids_BT[batch_N, time_N + 1],
        value_head,
    )
    by_sequence = iter(torch.split(logps_N, [len(completion) for _, completion in sequences]))
    return [[next(by_sequence) for _ in group.completions] for group in groups]


def packed_logprobs(
    model: nn.Module, rows: Sequence[Row], value_head: nn.Module | None = None
) -> GroupLogprobs:
    """Log-probs of the groups in `pack`'s rows, in the order in which `pack` got them.

    Raises ModelError where the model cannot attend along a tree. Call `supports_packing` first, with the
    longest sequence: sliding windows are not checked here.
    """
    if (reason := _cannot_pack(model)) is not None:
        raise ModelError(f"the model cannot be packed: {reason}; set packing to false")
    logps_by_group: dict[int, dict[int, Tensor]] = {}
    for row in rows:
        logps_N = _target_logps(
            model,
            {
                "input_ids": row.input_ids[None],
                "position_ids": row.position_ids[None],
                "attention_mask": _mask_for(model, row),
            },
            (torch.zeros_like(row.predictors), row.predictors),
            row.targets,
            value_head,
        )
        for slot in row.slots:
            logps_L = logps_N[slot.scored.to(logps_N.device)]
            logps_by_group.setdefault(slot.group, {})[slot.completion] = logps_L
    return [
        [logps_by_group[g][c] for c in sorted(logps_by_group[g])] for g in sorted(logps_by_group)
    ]


def supports_packing(model: nn.Module, *, longest: int | None = None) -> str | None:
    """Why the model's log-probs cannot be packed exactly, as part of a sentence; None where they can.

    `longest` is the length of the longest sequence in tokens, prompt included: a sliding window of at least
    that length has no effect. Without it, any sliding window is a reason.
    """
    if (reason := _cannot_pack(model)) is not None:
        return reason
    config = _config(model)
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if slides and window is not None and (longest is None or longest > window):
        return f"its attention slides over {window} tokens and sequences may be longer"
    return None


def _cannot_pack(model: nn.Module) -> str | None:
    config = _config(model)
    if config.model_type not in CHECKED_MODEL_TYPES:
        return f"models of type {config.model_type!r} have not been checked"
    if isinstance(_unwrapped(model), FSDPModule) or (
        _is_wrapped(model) and not isinstance(model, DistributedDataParallel)
    ):
        return "its weights are sharded, and processes could differ in their number of rows"
    attention = config._attn_implementation
    if attention not in _MASKS:
        return f"its attention {attention!r} takes no mask per token; load it with 'sdpa'"
    if unknown_layers := set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }:
        return f"it has layers of type {', '.join(sorted(unknown_layers))}"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention is not causal"
    return None


def _bool_mask(row: Row, weight: Tensor) -> Tensor:
    return row.mask()[None, None]


def _additive_mask(row: Row, weight: Tensor) -> Tensor:
    mask = row.mask()[None, None]
    return torch.zeros(mask.shape, dtype=weight.dtype).masked_fill(
        ~mask, torch.finfo(weight.dtype).min
    )


def _sdpa_mask(row: Row, weight: Tensor) -> Tensor:
    return subtree_ends(row.ends) if weight.device.type == "cpu" else _bool_mask(row, weight)


def _block_mask(row: Row, weight: Tensor) -> BlockMask:
    ends_T, size = row.ends.to(weight.device), len(row.ends)

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends_T[key])

    return create_block_mask(attends, 1, None, size, size, device=str(weight.device))


# All masks are four-dimensional, so that transformers passes them on unchanged.
# SDPA is equally fast with a bool mask, which is correct under autocast too.
_MASKS: dict[str, Callable[[Row, Tensor], Tensor | BlockMask]] = {
    "sdpa": _sdpa_mask,
    "eager": _additive_mask,
    "flex_attention": _block_mask,
}


def _mask_for(model: nn.Module, row: Row) -> Tensor | BlockMask:
    return _MASKS[_config(model)._attn_implementation](row, next(model.parameters()))


def _target_logps(
    model: nn.Module,
    inputs: dict[str, Tensor | BlockMask],
    predictors: tuple[Tensor, Tensor],
    targets_N: Tensor,
    value_head: nn.Module | None,
) -> Tensor:
    """(N,) log-prob of each target, from the hidden state at its predictor, a (batch, time) index.

    With a value head (N, 2): log-probs, and the head's values of those states.
    """
    device = next(model.parameters()).device
    on_device: dict[str, Any] = {name: tensor.to(device) for name, tensor in inputs.items()}
    on_device["use_cache"] = False
    if len(targets_N) == 0:
        return torch.zeros(0, device=device)
    if _has_plain_head(model):
        base = _unwrapped(model)
        hidden_BTH = base.get_decoder()(**on_device).last_hidden_state
        logps_N = _chunked_logps(
            base.get_output_embeddings(), _gather(hidden_BTH, predictors), targets_N
        )
    else:
        on_device["output_hidden_states"] = value_head is not None
        logits_NV, hidden_BTH = _forward_logits(model, on_device, predictors)
        logps_N = _chunked_logps(nn.Identity(), logits_NV, targets_N)
    if value_head is None:
        return logps_N
    return torch.stack([logps_N, value_head(_gather(hidden_BTH, predictors).float())], dim=-1)


def _gather(values_BTX: Tensor, indices: tuple[Tensor, Tensor]) -> Tensor:
    batch_N, time_N = (axis.to(values_BTX.device) for axis in indices)
    return values_BTX[batch_N, time_N]


def _forward_logits(
    model: nn.Module, inputs: dict[str, Any], predictors: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(N, V) logits by the model's own forward, with its head and its wrapper's hooks.

    The second value is the last layer's (B, T, H) states where `inputs` asks for them, else meaningless.
    """
    batch_N, time_N = predictors
    kept_times = torch.unique(time_N)
    if "logits_to_keep" in inspect.signature(type(_unwrapped(model)).forward).parameters:
        inputs = inputs | {"logits_to_keep": kept_times.to(inputs["input_ids"].device)}
        time_N = torch.searchsorted(kept_times, time_N)
    output = model(**inputs)
    logits_NV: Tensor = _gather(output.logits, (batch_N, time_N))
    return logits_NV, output.hidden_states[-1] if output.hidden_states else logits_NV


def _chunked_logps(head: nn.Module, states_NX: Tensor, targets_N: Tensor) -> Tensor:
    vocabulary = getattr(head, "out_features", states_NX.shape[-1])
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    if _is_frozen(head):
        return frozen_head_logps(
            states_NX, head.weight, head.bias, targets_N.to(states_NX.device), size=size
        )
    chunks = zip(torch.split(states_NX, size), torch.split(targets_N, size), strict=True)
    return torch.cat(
        [_checkpointed_logps(head, states_CX, targets_C) for states_CX, targets_C in chunks]
    )


def _is_frozen(head: nn.Module) -> TypeGuard[nn.Linear]:
    return type(head) is nn.Linear and not any(w.requires_grad for w in head.parameters())


def _checkpointed_logps(head: nn.Module, states_CX: Tensor, targets_C: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _chunk_logps(head, states_CX, targets_C)
    return cast(Tensor, checkpoint(_chunk_logps, head, states_CX, targets_C, use_reentrant=False))


def _chunk_logps(head: nn.Module, states_CX: Tensor, targets_C: Tensor) -> Tensor:
    logits_CV = head(states_CX).float()
    return -cross_entropy(logits_CV, targets_C.to(logits_CV.device), reduction="none")


def _has_plain_head(model: nn.Module) -> bool:
    """Whether logits are the head of the decoder's states and nothing else, so that both can be called apart."""
    config = _config(model)
    return (
        config.model_type in CHECKED_MODEL_TYPES
        and not _is_wrapped(model)
        and not isinstance(_unwrapped(model), FSDPModule)
        and all(getattr(config, name, off) in (None, off) for name, off in HEAD_SCALES.items())
    )


def _is_wrapped(model: nn.Module) -> bool:
    return isinstance(getattr(model, "module", None), nn.Module)


def _unwrapped(model: nn.Module) -> Any:
    """The transformers model, without wrappers for several processes and without peft's."""
    inner: Any = model.module if _is_wrapped(model) else model
    if not hasattr(inner, "get_base_model"):
        return inner
    if inner.active_peft_config.is_prompt_learning:
        kind = inner.active_peft_config.peft_type
        raise ModelError(
            f"the adapter's kind {kind!s} adds tokens of its own; train a LoRA instead"
        )
    return inner.get_base_model()


def _config(model: nn.Module) -> Any:
    return _unwrapped(model).config
