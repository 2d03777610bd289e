"""Placement of the trained weights: replicated in every process (here) or sharded (FSDP2, ZeRO-3: sharded.py).

A placement runs forward passes, sums gradients, steps its optimiser, and reads and writes whole tensors, so
that the trainer and its files do not depend on the number of processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_

from prefloop.errors import TrainingError

T = TypeVar("T")

_BUCKET_ELEMENTS = 2**25
"""Gradient elements that are summed in one all-reduce (128 MiB in float32)."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank, `number` of `count`. With one process, every method returns its argument."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.number == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order, on every rank. All ranks must call."""
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def means(self, sums: dict[str, float], count: int) -> dict[str, float]:
        """Means over `count` examples from all ranks' sums; {} for a rank without examples. All ranks must call."""
        all_sums = [rank_sums for rank_sums in self.gather(sums) if rank_sums]
        return {
            name: sum(rank_sums[name] for rank_sums in all_sums) / count for name in all_sums[0]
        }

    def add(self, tensor: Tensor) -> None:
        """Sum `tensor` over the ranks, in place; bitwise equal on each. All ranks must call."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the ranks; None stays where no rank has a gradient. All ranks must call."""
        if self.count == 1:
            return
        weights = list(parameters)
        has_gradient = torch.tensor([weight.grad is not None for weight in weights]).int()
        has_gradient = has_gradient.to(weights[0].device)
        self.add(has_gradient)
        bucket: list[Tensor] = []
        for weight, on_any_rank in zip(weights, has_gradient.tolist(), strict=True):
            if not on_any_rank:
                continue
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            is_full = bucket and sum(map(torch.numel, bucket)) + weight.numel() > _BUCKET_ELEMENTS
            if is_full or (bucket and bucket[0].dtype != weight.grad.dtype):
                self._add_bucket(bucket)
                bucket = []
            bucket.append(weight.grad)
        if bucket:
            self._add_bucket(bucket)

    def _add_bucket(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        self.add(flat)
        totals = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, total in zip(bucket, totals, strict=True):
            gradient.copy_(total.view_as(gradient))


MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OptimizerState = dict[str, Tensor]
"""Optimiser state by "index of the parameter/name of the state"."""


class Replicated:
    """Every process holds all weights; gradients are summed once per step, after the last backward pass.

    Like DDP with `no_sync` on all micro-batches but the last, but processes may make different numbers of
    passes, or none.
    """

    sharded: ClassVar[bool] = False
    """Whether a process holds only a shard of the weights. All must then make equally many passes."""

    def __init__(self, model: nn.Module, ranks: Ranks, make_optimizer: MakeOptimizer) -> None:
        self.model = model
        self.ranks = ranks
        self._make_optimizer = make_optimizer
        self.renew_optimizer()

    def renew_optimizer(self) -> None:
        """Start with a new optimiser, without state."""
        self.optimizer = self._make_optimizer(list(self._trainable().values()))

    def forward(self, compute: Callable[[nn.Module], T]) -> T:
        """The result of `compute(model)`; the only way in which the weights may be used."""
        return compute(self.model)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of this process's part of the step's loss; `last` in the step's last pass."""
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self, rate: float, limit: float) -> float:
        """One optimiser step with learning rate `rate`; returns the gradient norm before clipping to `limit`.

        No step is taken where the norm is not finite.
        """
        weights = list(self._trainable().values())
        if not self.sharded:
            self.ranks.add_gradients(weights)
        norm = clip_grad_norm_(weights, limit)
        norm_value = _full_tensor(norm).item()
        if math.isfinite(norm_value):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm_value

    def release(self) -> None:
        """Free weights that forward passes without a backward pass have gathered."""

    # Whole tensors on the CPU of the first process, which writes them; all processes must call.

    def weights(self) -> dict[str, Tensor]:
        """All trainable weights by name. All ranks must call."""
        return {name: self._to_cpu(weight) for name, weight in self._trainable().items()}

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load what `weights` returned."""
        with torch.no_grad():
            for name, weight in self._trainable().items():
                weight.copy_(_distribute_like(weight, weights[name]))

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of this process's part of the weights, to restore by `set_weights`."""
        return {name: weight.detach().clone() for name, weight in self._trainable().items()}

    def optimizer_state(self) -> OptimizerState:
        """The optimiser's state. All ranks must call."""
        return {
            f"{number}/{key}": self._to_cpu(value)
            for number, state in self.optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }

    def set_optimizer_state(self, tensors: OptimizerState) -> None:
        """Load what `optimizer_state` returned."""
        weights = list(self._trainable().values())
        state: dict[int, dict[str, Tensor]] = {}
        for path, tensor in tensors.items():
            number, key = path.split("/", 1)
            weight = weights[int(number)]
            value = _distribute_like(weight, tensor) if tensor.shape == weight.shape else tensor
            state.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _to_cpu(self, tensor: Tensor) -> Tensor:
        whole = _full_tensor(tensor.detach())
        return whole.to("cpu", copy=True) if self.ranks.first else torch.empty(0)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


class ForwardWrapper(nn.Module):
    """A module whose forward runs any `compute(model)`, as libraries gather sharded weights around a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module], T]) -> T:
        """The result of `compute(model)`."""
        return compute(self.model)


def is_sharded() -> bool:
    """Whether the launcher asks for sharded weights. Raises TrainingError for FSDP's first version."""
    if _is_set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise TrainingError(
            "the launcher asks for the first version of FSDP; set fsdp_version: 2 in its config file"
        )
    return _is_set("ACCELERATE_USE_FSDP") or _is_set("ACCELERATE_USE_DEEPSPEED")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _distribute_like(current: Tensor, whole: Tensor) -> Tensor:
    """`whole`, which every process has, sharded like `current`."""
    if not isinstance(current, DTensor) or isinstance(whole, DTensor):
        return whole
    on_device = whole.to(current.device_mesh.device_type)
    return distribute_tensor(on_device, current.device_mesh, current.placements, src_data_rank=None)
