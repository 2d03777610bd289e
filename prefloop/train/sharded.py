"""DeepSpeed ZeRO-3 as a placement: its engine owns weights, gradients and optimiser; we give and take whole tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import OffloadPolicy, fully_shard
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from prefloop.errors import TrainingError
from prefloop.train.placement import (
    ForwardWrapper,
    MakeOptimizer,
    OptimizerState,
    Ranks,
    Replicated,
    T,
    _asked,
    is_sharded,
)


class Zero3(Replicated):
    """Each process holds a part of every weight, as `accelerate launch` was told by its DeepSpeed section."""

    sharded = True

    def __init__(self, model: nn.Module, ranks: Ranks, make_optimizer: MakeOptimizer) -> None:
        """Raises TrainingError where DeepSpeed is missing or another stage is asked for."""
        try:
            import deepspeed
        except ImportError as error:
            raise TrainingError(
                "the launcher asks for DeepSpeed, which is not installed; pip install deepspeed"
            ) from error
        trainable = [weight for weight in model.parameters() if weight.requires_grad]
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=ForwardWrapper(model),
            optimizer=make_optimizer(trainable),
            config=_config(),
            dist_init_required=False,
        )
        # accelerate has set it, and transformers would cut up every model that is loaded from now on.
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        self._api = deepspeed.utils
        self._gathered = deepspeed.zero.GatheredParameters
        super().__init__(model, ranks, make_optimizer)

    def renew_optimizer(self) -> None:
        """Forget the optimiser's state. DeepSpeed keeps the optimiser, so its state goes back to zero."""
        self.optimizer = self._zero.optimizer
        for state in self._states():
            for value in state.values():
                value.zero_()

    def forward(self, compute: Callable[[nn.Module], T]) -> T:
        """What `compute` makes of the model, its weights gathered as it goes."""
        found: T = self._engine(compute)
        return found

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient; DeepSpeed takes means over processes, and a step's loss is a sum."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.ranks.count)

    def update(self, rate: float, limit: float) -> float:
        """One optimiser step; here it is taken whatever the norm, which the trainer then refuses."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._zero.clip_grad = limit
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else math.nan

    def release(self) -> None:
        """Nothing stays gathered."""

    def weights(self) -> dict[str, Tensor]:
        """All trainable weights by name. All must call."""
        return {
            name: self._kept(self._api.safe_get_full_fp32_param(weight).view(weight.ds_shape))
            for name, weight in self._named()
        }

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what `weights` gave, in the computing copy and in the optimiser's."""
        for name, weight in self._named():
            whole = weights[name]
            with self._gathered([weight], modifier_rank=0), torch.no_grad():
                if self.ranks.first:
                    weight.copy_(whole)
            mine = self._api.safe_get_local_fp32_param(weight)
            self._api.safe_set_local_fp32_param(weight, self._part(whole, mine))

    def snapshot(self) -> dict[str, Tensor]:
        """Weights to come back to, whole and in main memory: DeepSpeed takes them in no other way."""
        return {
            name: self._api.safe_get_full_fp32_param(weight).view(weight.ds_shape).cpu()
            for name, weight in self._named()
        }

    def optimizer_state(self) -> OptimizerState:
        """The optimiser's state. All must call."""
        found = {}
        steps = next(self._states())["step"] if self._steps() else None
        for number, (_, weight) in enumerate(self._named()):
            for key in self._keys():
                whole = self._api.safe_get_full_optimizer_state(weight, key)
                found[f"{number}/{key}"] = self._kept(whole.view(weight.ds_shape))
            if steps is not None:
                found[f"{number}/step"] = self._kept(steps)
        return found

    def set_optimizer_state(self, tensors: OptimizerState) -> None:
        """Take over what `optimizer_state` gave."""
        if not self.optimizer.state:
            self._prepare_states({path.split("/")[1]: value for path, value in tensors.items()})
        for number, (_, weight) in enumerate(self._named()):
            for key in self._keys():
                mine = self._api.safe_get_local_optimizer_state(weight, key)
                part = self._part(tensors[f"{number}/{key}"], mine)
                self._api.safe_set_local_optimizer_state(weight, part, key)
        if self._steps():
            for state in self._states():
                state["step"].copy_(tensors["0/step"])

    def _prepare_states(self, examples: dict[str, Tensor]) -> None:
        """States of zero, which the optimiser would make in its first step."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            self.optimizer.state[flat] = {
                key: torch.zeros_like(value if key == "step" else flat.detach())
                for key, value in examples.items()
            }

    def _part(self, whole: Tensor, mine: Tensor) -> Tensor:
        """This process's piece of a tensor, which DeepSpeed cuts flat and fills up with zeros."""
        flat = whole.flatten().to(mine)
        room = mine.numel() * self.ranks.count
        filled = torch.cat([flat, flat.new_zeros(room - flat.numel())])
        return filled.narrow(0, mine.numel() * self.ranks.number, mine.numel())

    def _named(self) -> Iterator[tuple[str, Any]]:
        return ((n, weight) for n, weight in self.model.named_parameters() if weight.requires_grad)

    def _states(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.optimizer.state.values())

    def _steps(self) -> bool:
        return any("step" in state for state in self._states())

    def _keys(self) -> list[str]:
        """Names of the optimiser's states that are as large as the weights."""
        return [key for key in next(self._states()) if key != "step"]


def _config() -> dict[str, Any]:
    """The launcher's ZeRO section; batches, precision and clipping are the recipe's."""
    from accelerate import DeepSpeedPlugin

    zero: dict[str, Any] = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    if zero.get("stage") != 3:
        raise TrainingError(
            f"the launcher asks for ZeRO stage {zero.get('stage')}; set zero_stage: 3 in its config file"
        )
    return {
        "zero_optimization": {key: value for key, value in zero.items() if value != "auto"},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


class FullySharded(Replicated):
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
        self._wrapper: Any = shard(ForwardWrapper(model))
        super().__init__(model, ranks, make_optimizer)

    def forward(self, compute: Callable[[nn.Module], T]) -> T:
        """What `compute` makes of the model, its weights gathered as it goes."""
        found: T = self._wrapper(compute)
        return found

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient; FSDP2 takes means over processes, and a step's loss is a sum."""
        super().backward(loss * self.ranks.count, last=last)

    def release(self) -> None:
        """The outermost weights stay gathered until a backward pass, which may never come."""
        self._wrapper.reshard()


def distribute_model(
    model: nn.Module, ranks: Ranks, make_optimizer: MakeOptimizer, device: torch.device
) -> Replicated:
    """Lay the model out as the launcher's environment says. Raises TrainingError for what is not supported."""
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        from prefloop.train.sharded import Zero3

        return Zero3(model, ranks, make_optimizer)
    if is_sharded():
        return FullySharded(model, ranks, make_optimizer, device)
    return Replicated(model, ranks, make_optimizer)
