"""Where the weights in training lie: whole in every process, or in shards (FSDP2, or ZeRO-3: zero3.py).

A placement runs forward passes, collects gradients, steps its optimiser, and gives and takes whole tensors,
so that neither the trainer nor its files know how many processes there are.
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

_BUCKET = 2**25
"""Elements of gradients that are summed in one message (128 MiB in float32)."""


@dataclass(frozen=True)
class Ranks:
    """This process, number `number` of `count`. Alone, every method gives back what it got."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.number == 0

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank, for everybody. All must call."""
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def means(self, sums: dict[str, float], count: int) -> dict[str, float]:
        """Means over `count` examples from everybody's sums; a rank without examples has none. All must call."""
        everybody = [theirs for theirs in self.gather(sums) if theirs]
        return {name: sum(theirs[name] for theirs in everybody) / count for name in everybody[0]}

    def add(self, tensor: Tensor) -> None:
        """Make `tensor` the sum over the ranks, the same bits on each. All must call."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the ranks; a weight that no rank has one for keeps none. All must call."""
        if self.count == 1:
            return
        weights = list(parameters)
        having = torch.tensor([weight.grad is not None for weight in weights]).int()
        having = having.to(weights[0].device)
        self.add(having)
        bucket: list[Tensor] = []
        for weight, anywhere in zip(weights, having.tolist(), strict=True):
            if not anywhere:
                continue
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            full = bucket and sum(map(torch.numel, bucket)) + weight.numel() > _BUCKET
            if full or (bucket and bucket[0].dtype != weight.grad.dtype):
                self._add_together(bucket)
                bucket = []
            bucket.append(weight.grad)
        if bucket:
            self._add_together(bucket)

    def _add_together(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        self.add(flat)
        totals = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, total in zip(bucket, totals, strict=True):
            gradient.copy_(total.view_as(gradient))


MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OptimizerState = dict[str, Tensor]
"""By "number of the parameter/name of the state"."""


class Replicated:
    """Every process holds all weights; gradients are summed once a step, after its last backward pass.

    That is DDP with `no_sync` on all micro-batches but the last, without its wrapper: processes may
    make different numbers of passes, and none.
    """

    sharded: ClassVar[bool] = False
    """Whether a process holds a part of the weights only. All must then make equally many passes."""

    def __init__(self, model: nn.Module, ranks: Ranks, make_optimizer: MakeOptimizer) -> None:
        self.model = model
        self.ranks = ranks
        self._make_optimizer = make_optimizer
        self.renew_optimizer()

    def renew_optimizer(self) -> None:
        """Forget the optimiser's state."""
        self.optimizer = self._make_optimizer(list(self._trainable().values()))

    def forward(self, compute: Callable[[nn.Module], T]) -> T:
        """What `compute` makes of the model; the only way in which its weights may be used."""
        return compute(self.model)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this process's part of the step's loss; `last` for the step's last pass."""
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self, rate: float, limit: float) -> float:
        """One optimiser step with the gradients of all processes; their norm before it is cut to `limit`.

        No step is taken where the norm is not finite.
        """
        weights = list(self._trainable().values())
        if not self.sharded:
            self.ranks.add_gradients(weights)
        norm = clip_grad_norm_(weights, limit)
        value = _whole(norm).item()
        if math.isfinite(value):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def release(self) -> None:
        """Give back what forward passes without a backward pass have gathered."""

    # Whole tensors, in main memory: collected by all processes, for the first one to write.

    def weights(self) -> dict[str, Tensor]:
        """All trainable weights by name. All must call."""
        return {name: self._kept(weight) for name, weight in self._trainable().items()}

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what `weights` gave."""
        with torch.no_grad():
            for name, weight in self._trainable().items():
                weight.copy_(_like(weight, weights[name]))

    def snapshot(self) -> dict[str, Tensor]:
        """This process's part of the weights, for `set_weights` to come back to."""
        return {name: weight.detach().clone() for name, weight in self._trainable().items()}

    def optimizer_state(self) -> OptimizerState:
        """The optimiser's state. All must call."""
        return {
            f"{number}/{key}": self._kept(value)
            for number, state in self.optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }

    def set_optimizer_state(self, tensors: OptimizerState) -> None:
        """Take over what `optimizer_state` gave."""
        weights = list(self._trainable().values())
        state: dict[int, dict[str, Tensor]] = {}
        for path, tensor in tensors.items():
            number, key = path.split("/", 1)
            weight = weights[int(number)]
            value = _like(weight, tensor) if tensor.shape == weight.shape else tensor
            state.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _kept(self, tensor: Tensor) -> Tensor:
        whole = _whole(tensor.detach())
        return whole.to("cpu", copy=True) if self.ranks.first else torch.empty(0)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


class ForwardWrapper(nn.Module):
    """The one forward through which sharded weights are reached: libraries gather them around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module], T]) -> T:
        """What `compute` makes of the model."""
        return compute(self.model)


def is_sharded() -> bool:
    """Whether the launcher asks for sharded weights. Raises TrainingError for FSDP's first version."""
    if _asked("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise TrainingError(
            "the launcher asks for the first version of FSDP; set fsdp_version: 2 in its config file"
        )
    return _asked("ACCELERATE_USE_FSDP") or _asked("ACCELERATE_USE_DEEPSPEED")


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(current: Tensor, whole: Tensor) -> Tensor:
    """`whole`, laid out over the processes as `current` is; every process has it whole."""
    if not isinstance(current, DTensor) or isinstance(whole, DTensor):
        return whole
    on_device = whole.to(current.device_mesh.device_type)
    return distribute_tensor(on_device, current.device_mesh, current.placements, src_data_rank=None)
