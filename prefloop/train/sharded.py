"""Sharded placements: DeepSpeed ZeRO-3 and FSDP2. Trainer and files read and write whole tensors."""

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
from prefloop.models.lora_linear import narrow
from prefloop.train.placement import (
    ForwardWrapper,
    MakeOptimizer,
    OptimizerState,
    Ranks,
    Replicated,
    T,
    _is_set,
    is_sharded,
)


class Zero3(Replicated):
    """DeepSpeed ZeRO-3, as in the DeepSpeed section of `accelerate launch`'s config: each process holds a shard."""

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
        # accelerate has set it; transformers would shard every model that is loaded from now on.
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        self._utils = deepspeed.utils
        self._gather_parameters = deepspeed.zero.GatheredParameters
        super().__init__(model, ranks, make_optimizer)

    def renew_optimizer(self) -> None:
        """Reset the optimiser's state to zero, as DeepSpeed keeps the optimiser itself."""
        self.optimizer = self._zero.optimizer
        for state in self._states():
            for value in state.values():
                value.zero_()

    def forward(self, compute: Callable[[nn.Module], T]) -> T:
        """The result of `compute(model)`; weights are gathered as they are used."""
        result: T = self._engine(compute)
        return result

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient, times the number of processes: DeepSpeed averages, and a step's loss is a sum."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.ranks.count)

    def update(self, rate: float, limit: float) -> float:
        """One optimiser step, also where the norm is not finite: the trainer stops then."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._zero.clip_grad = limit
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else math.nan

    def release(self) -> None:
        """Nothing to free: no weights stay gathered."""

    def weights(self) -> dict[str, Tensor]:
        """All trainable weights by name. All ranks must call."""
        return {
            name: self._to_cpu(self._utils.safe_get_full_fp32_param(weight).view(weight.ds_shape))
            for name, weight in self._trainable_weights()
        }

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load what `weights` returned, into the model's weights and the optimiser's float32 copies."""
        for name, weight in self._trainable_weights():
            whole = weights[name]
            with self._gather_parameters([weight], modifier_rank=0), torch.no_grad():
                if self.ranks.first:
                    weight.copy_(whole)
            shard = self._utils.safe_get_local_fp32_param(weight)
            self._utils.safe_set_local_fp32_param(weight, self._local_shard(whole, shard))

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the weights, to restore by `set_weights`: whole and on the CPU, as DeepSpeed requires."""
        return {
            name: self._utils.safe_get_full_fp32_param(weight).view(weight.ds_shape).cpu()
            for name, weight in self._trainable_weights()
        }

    def optimizer_state(self) -> OptimizerState:
        """The optimiser's state. All ranks must call."""
        tensors = {}
        steps = next(self._states())["step"] if self._has_step_counts() else None
        for number, (_, weight) in enumerate(self._trainable_weights()):
            for key in self._state_names():
                whole = self._utils.safe_get_full_optimizer_state(weight, key)
                tensors[f"{number}/{key}"] = self._to_cpu(whole.view(weight.ds_shape))
            if steps is not None:
                tensors[f"{number}/step"] = self._to_cpu(steps)
        return tensors

    def set_optimizer_state(self, tensors: OptimizerState) -> None:
        """Load what `optimizer_state` returned."""
        if not self.optimizer.state:
            self._create_states({path.split("/")[1]: value for path, value in tensors.items()})
        for number, (_, weight) in enumerate(self._trainable_weights()):
            for key in self._state_names():
                shard = self._utils.safe_get_local_optimizer_state(weight, key)
                new_shard = self._local_shard(tensors[f"{number}/{key}"], shard)
                self._utils.safe_set_local_optimizer_state(weight, new_shard, key)
        if self._has_step_counts():
            for state in self._states():
                state["step"].copy_(tensors["0/step"])

    def _create_states(self, examples: dict[str, Tensor]) -> None:
        """Create the optimiser's states as zeros, as its first step would."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            self.optimizer.state[flat] = {
                key: torch.zeros_like(value if key == "step" else flat.detach())
                for key, value in examples.items()
            }

    def _local_shard(self, whole: Tensor, shard_like: Tensor) -> Tensor:
        """This process's shard of a tensor, which DeepSpeed flattens and pads with zeros."""
        flat = whole.flatten().to(shard_like)
        padded_size = shard_like.numel() * self.ranks.count
        padded = torch.cat([flat, flat.new_zeros(padded_size - flat.numel())])
        return padded.narrow(0, shard_like.numel() * self.ranks.number, shard_like.numel())

    def _trainable_weights(self) -> Iterator[tuple[str, Any]]:
        return ((n, weight) for n, weight in self.model.named_parameters() if weight.requires_grad)

    def _states(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.optimizer.state.values())

    def _has_step_counts(self) -> bool:
        return any("step" in state for state in self._states())

    def _state_names(self) -> list[str]:
        """Names of the optimiser's states that have the weights' size."""
        return [key for key in next(self._states()) if key != "step"]


def _config() -> dict[str, Any]:
    """DeepSpeed's config: the launcher's ZeRO section; batches, precision and clipping come from the recipe."""
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
    """FSDP2: each process holds a shard of every weight; layers are gathered one at a time when used.

    Configured by `accelerate launch` (reshard_after_forward, offload_params); works on CPUs too.
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
        layer_classes = set(model._no_split_modules or ())
        for module in [m for m in model.modules() if type(m).__name__ in layer_classes]:
            shard(module)
        self._wrapper: Any = shard(ForwardWrapper(model))
        super().__init__(model, ranks, make_optimizer)

    def forward(self, compute: Callable[[nn.Module], T]) -> T:
        """The result of `compute(model)`; weights are gathered as they are used."""
        result: T = self._wrapper(compute)
        return result

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient, times the number of processes: FSDP2 averages, and a step's loss is a sum."""
        super().backward(loss * self.ranks.count, last=last)

    def release(self) -> None:
        """Reshard the outermost weights, which else stay gathered until a backward pass."""
        self._wrapper.reshard()


def distribute_model(
    model: nn.Module, ranks: Ranks, make_optimizer: MakeOptimizer, device: torch.device
) -> Replicated:
    """Place the model as the launcher's environment variables say. Raises TrainingError for unsupported settings."""
    if not is_sharded():
        return Replicated(model, ranks, make_optimizer)
    narrow(model)
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        return Zero3(model, ranks, make_optimizer)
    return FullySharded(model, ranks, make_optimizer, device)
