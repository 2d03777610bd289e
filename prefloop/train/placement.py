"""Where the weights in training lie: whole in every process, or in shards (FSDP2, or ZeRO-3: zero3.py).

A placement runs forward passes, collects gradients, steps its optimiser, and gives and takes whole tensors,
so that neither the trainer nor its files know how many processes there are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_

from prefloop.errors import TrainingError
from prefloop.train.ranks import Ranks

T = TypeVar("T")
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


class FullyShared(Replicated):
    """FSDP2: each process holds a part of every weight, gathered a layer at a time when it is used.

    Set up as `accelerate launch` was told (reshard_after_forward, offload_params), on CPUs as well.
    """

    sharded = True

    def __init__(
        self, model: Any, ranks: Ranks, make_optimizer: MakeOptimizer, device: torch.device
    ) -> None:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        shard = partial(
            fully_shard,
            mesh=init_device_mesh(device.type, (ranks.count,)),
            reshard_after_forward=plugin.reshard_after_forward,
            offload_policy=plugin.cpu_offload or OffloadPolicy(),
        )
        layers = set(model._no_split_modules or ())
        for module in [m for m in model.modules() if type(m).__name__ in layers]:
            shard(module)
        self._door: Any = shard(Door(model))
        super().__init__(model, ranks, make_optimizer)

    def forward(self, compute: Callable[[nn.Module], T]) -> T:
        """What `compute` makes of the model, its weights gathered as it goes."""
        found: T = self._door(compute)
        return found

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient; FSDP2 takes means over processes, and a step's loss is a sum."""
        super().backward(loss * self.ranks.count, last=last)

    def release(self) -> None:
        """The outermost weights stay gathered until a backward pass, which may never come."""
        self._door.reshard()


class Door(nn.Module):
    """The one forward through which sharded weights are reached: libraries gather them around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module], T]) -> T:
        """What `compute` makes of the model."""
        return compute(self.model)


def lay_out(
    model: nn.Module, ranks: Ranks, make_optimizer: MakeOptimizer, device: torch.device
) -> Replicated:
    """Lay the model out as the launcher's environment says. Raises TrainingError for what is not supported."""
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        from prefloop.train.sharded import Zero3

        return Zero3(model, ranks, make_optimizer)
    if is_sharded():
        return FullyShared(model, ranks, make_optimizer, device)
    return Replicated(model, ranks, make_optimizer)


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
