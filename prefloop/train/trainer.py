"""The trainer: groups of responses and a loss function in, a changed policy out. It knows no method.

One optimiser step takes the mean of the loss over the step's examples, however they are split into
micro-batches and over processes. The reference's log-probs are computed once, before the first step.
Killed at any moment, training goes on from its newest checkpoint to the same weights, bit for bit.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from prefloop.errors import TrainingError
from prefloop.machine import Bar, raise_on_out_of_memory
from prefloop.models.policy import Policy
from prefloop.records import derive_seed
from prefloop.run_folder import METRICS, stream_metrics
from prefloop.train import checkpoint
from prefloop.train.batches import (
    Example,
    Pass,
    check_finite,
    check_initial_loss,
    learning_rate,
    plan,
    schedule,
)
from prefloop.train.dropout import without_dropout
from prefloop.train.logprobs import GroupLogprobs, group_logprobs, supports_packing
from prefloop.train.losses import GroupLogps, LossOutput
from prefloop.train.placement import Ranks
from prefloop.train.ppo import TokenMethod
from prefloop.train.sharded import distribute_model

if TYPE_CHECKING:
    from prefloop.train.options import TrainOptions


# B examples of a micro-batch, N examples of the round.

log = logging.getLogger(__name__)

LossFunction = Callable[[GroupLogps, float], LossOutput]

# While one rank writes a large checkpoint the others wait; who dies is noticed by the launcher at once.
_PATIENCE = timedelta(hours=2)
_PLANNED = 4096
"""Examples whose passes are planned at a time, outside of steps."""


@dataclass(frozen=True)
class Job:
    """What one call of `Trainer.run` is to do."""

    examples: Sequence[Example]
    roles: tuple[str, ...]
    loss: LossFunction
    folder: Path
    """Metrics and checkpoints go here."""
    seed: int
    reference: str | None = None
    """"initial" or "round_start": whose log-probs the loss gets; None where it needs none."""
    rate: float = 1.0
    """What the options' learning rate is multiplied by."""
    first_step: int = 0
    """Optimiser steps of the run before this job, for trackers that count on."""
    span: tuple[float, float] = (0.0, 1.0)
    """The part of the learning-rate schedule that this job walks through."""
    loss_at_start: Callable[[Sequence[int]], float | None] = lambda indices: None
    """Known mean loss of these examples while policy and reference are equal."""
    tokens: TokenMethod | None = None
    """What a trainer of tokens asks in place of `loss`."""
    before: Path | None = None
    """Folder of the previous round's job, for trainers that carry more than weights; None in the first one."""
    after_step: Callable[[int], None] = lambda steps: None
    """Called with the number of this job's steps that are done, before a checkpoint of them is written."""
    is_over: Callable[[], bool] = lambda: False
    """Asked before each step whether there is none to come, whatever the schedule says."""


def _summed(metrics: Path) -> dict[str, Any]:
    """Steps, tokens, first and last loss of what the steps have logged; a row at a time, there may be many."""
    steps = tokens = 0
    first: float | None = None
    last: float | None = None
    for row in stream_metrics(metrics):
        steps, tokens, last = steps + 1, tokens + row["tokens"], row["loss"]
        first = last if first is None else first
    return {"steps": steps, "tokens": tokens, "first_loss": first, "last_loss": last}


class Trainer:
    """Trains one policy; keeps its optimiser between jobs where asked to."""

    def __init__(
        self,
        policy: Policy,
        options: TrainOptions,
        tell: Callable[[dict[str, Any], int], None] = lambda row, step: None,
    ) -> None:
        """`tell` gets each optimiser step's metrics and its number in the run, on the first rank only."""
        self.policy = policy
        self.options = options
        self.tell = tell
        device = policy.intended_device
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        self.placement = distribute_model(self._trained(), self.ranks, self._new_optimizer, device)
        option = policy.options.needs_whole_weights
        if option is not None and self.placement.sharded:
            raise TrainingError(
                f"{option} needs whole weights in every process, and the launcher shards them; choose another of "
                "its modes, or leave the option out"
            )
        self._logged_packing = False

    def _trained(self) -> nn.Module:
        """What is laid out, and whose trainable weights the optimiser gets."""
        return self.policy.model

    def _new_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        decay = self.options.weight_decay
        if self.options.optimizer == "rmsprop":
            return torch.optim.RMSprop(
                parameters,
                lr=self.options.lr,
                alpha=self.options.rmsprop_alpha,
                weight_decay=decay,
            )
        return torch.optim.AdamW(parameters, lr=self.options.lr, weight_decay=decay)

    def renew_optimizer(self) -> None:
        """Forget the optimiser's state: a new optimiser each round (IAL)."""
        self.placement.renew_optimizer()

    def save_optimizer(self, path: Path) -> None:
        """Write the optimiser's state, for a later round to go on with. All ranks must call."""
        state = self.placement.optimizer_state()
        if self.ranks.first:
            checkpoint.save_tensors(path, state)

    def load_optimizer(self, path: Path) -> None:
        """Go on with the state that `save_optimizer` wrote for the same parameters."""
        self.placement.set_optimizer_state(checkpoint.load_tensors(path))

    def whole_policy(self) -> Policy | None:
        """The policy as one process holds it, to be saved or merged; None on all ranks but the first."""
        weights = self.placement.weights() if self.placement.sharded else {}
        if not self.ranks.first:
            return None
        if not self.placement.sharded:
            return self.policy
        whole = Policy.load(self.policy.options, on_cpu=True)
        with torch.no_grad():
            for name, weight in whole.model.named_parameters():
                if name in weights:
                    weight.copy_(weights[name])
        return whole

    def run(self, job: Job) -> dict[str, Any]:
        """Train on the job's examples; returns counts and first and last loss, on the first rank only.

        Raises TrainingError.
        """
        job.folder.mkdir(parents=True, exist_ok=True)
        reference = self._reference(job)
        steps = schedule(
            len(job.examples),
            epochs=self.options.epochs,
            batch_size=self.options.batch_size,
            seed=job.seed,
        )
        done, metrics_bytes = self._resume(job)
        metrics = job.folder / METRICS if self.ranks.first else Path(os.devnull)
        if self.ranks.first:
            metrics.touch()
            os.truncate(metrics, metrics_bytes)
        with (
            Bar("train", len(steps)) as bar,
            metrics.open("a", buffering=1, encoding="utf-8") as file,
        ):
            bar.advance(done)
            for number in range(done, len(steps)):
                if job.is_over():
                    break
                want_of_memory = TrainingError(
                    f"out of memory in training step {number}; start a new run with a lower "
                    "train.micro_batch_size, or with model.gradient_checkpointing: true"
                )
                with raise_on_out_of_memory(want_of_memory):
                    row = self._step(job, reference, steps[number], number, len(steps))
                file.write(json.dumps(row) + "\n")
                if self.ranks.first:
                    self.tell(row, job.first_step + number)
                bar.advance(1, amount=row["tokens"])
                job.after_step(number + 1)
                if self._is_due(number + 1, len(steps)):
                    self._save(job.folder, number + 1)
        if not self.ranks.first:
            return {}
        return {
            **_summed(metrics),
            "examples": len(job.examples),
            "reference_tokens": sum(e.tokens for e in job.examples) if job.reference else 0,
            "parameters": self.policy.multiplying_weights,
        }

    def _resume(self, job: Job) -> tuple[int, int]:
        """Go on from the newest checkpoint; the steps it has behind it, and the bytes of their metrics."""
        found = checkpoint.load_checkpoint(job.folder, self.ranks.count)
        if found is None:
            rank = self.ranks.number
            torch.manual_seed(derive_seed(job.seed, "rank", rank) if rank else job.seed)
            return 0, 0
        state, position = found
        self.placement.set_weights(state.weights)
        self.placement.set_optimizer_state(state.optimizer)
        checkpoint.set_random_state(state.random[self.ranks.number])
        return int(position["step"]), int(position["metrics_bytes"])

    def _save(self, folder: Path, step: int) -> None:
        state = checkpoint.State(
            self.placement.weights(),
            self.placement.optimizer_state(),
            self.ranks.gather(checkpoint.random_state()),
        )
        if self.ranks.first:
            checkpoint.save_checkpoint(folder, state, step=step)

    def _is_due(self, step: int, steps: int) -> bool:
        every = self.options.save_every
        return step == steps or (every > 0 and step % every == 0)

    def _step(
        self,
        job: Job,
        reference: dict[str, Tensor],
        chosen: Sequence[int],
        number: int,
        steps: int,
    ) -> dict[str, Any]:
        """One optimiser step on the examples `chosen`; its metrics."""
        low, high = job.span
        # The middle of the step: with few steps, neither the first nor the last is wasted at zero.
        place = (number + 0.5) / steps
        rate = job.rate * learning_rate(self.options, low + (high - low) * place)
        sums: dict[str, float] = {}
        with self._training():
            passes = self._passes(job, chosen)
            for left, (indices, counts) in zip(reversed(range(len(passes))), passes, strict=True):
                output = self._losses(job, indices, reference, place)
                if not counts:
                    self.placement.backward(output.loss_B.sum() * 0.0, last=left == 0)
                    continue
                self.placement.backward(output.loss_B.sum() / len(chosen), last=left == 0)
                for name, values_B in {"loss": output.loss_B, **output.metrics}.items():
                    sums[name] = sums.get(name, 0.0) + values_B.detach().float().sum().item()
        means = self.ranks.means(sums, len(chosen))
        if number == 0:
            expected = self._loss_at_start(job, chosen, reference)
            check_initial_loss(job.folder, expected, means["loss"])
        norm = self.placement.update(rate, self.options.max_grad_norm)
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient of step {number} is {norm}; lower train.lr, or look at the pairs "
                + ", ".join(job.examples[i].id for i in chosen)
            )
        tokens = sum(job.examples[i].tokens for i in chosen)
        return {"step": number, **means, "lr": rate, "grad_norm": norm, "tokens": tokens}

    def _losses(
        self, job: Job, indices: Sequence[int], reference: dict[str, Tensor], place: float
    ) -> LossOutput:
        """The method's loss of one micro-batch at `place` of the round, all of it finite."""
        logps = self._logps(job, indices, reference)
        with torch.set_grad_enabled(True):
            output = job.loss(logps, place)
        numbers = {"policy": logps.policy, "reference": logps.reference}
        check_finite(job.folder, [job.examples[i].id for i in indices], output.loss_B, numbers)
        return output

    def _loss_at_start(
        self, job: Job, chosen: Sequence[int], reference: dict[str, Tensor]
    ) -> float | None:
        return job.loss_at_start(chosen)

    def _passes(self, job: Job, chosen: Sequence[int]) -> list[Pass]:
        """This rank's micro-batches of the examples `chosen`, each with whether it counts."""
        plans = plan(
            job.examples,
            chosen,
            ranks=self.ranks.count,
            size=self.options.micro_batch_size,
            one_row_of=self.options.token_budget if self.placement.sharded else None,
        )
        return plans[self.ranks.number]

    def _all_passes(self, job: Job) -> Iterator[Pass]:
        """This rank's micro-batches of all examples, in their order.

        Planned a few thousand at a time: a plan holds its examples' lengths and places.
        """
        size = self.options.micro_batch_size
        block = size * max(1, _PLANNED // size)
        for first in range(0, len(job.examples), block):
            yield from self._passes(job, range(len(job.examples))[first : first + block])

    @contextmanager
    def _training(self) -> Iterator[None]:
        self.policy.model.train()
        off = without_dropout(self.policy.model) if self.options.disable_dropout else nullcontext()
        try:
            with off:
                yield
        finally:
            self.policy.model.eval()

    @contextmanager
    def _precision(self) -> Iterator[None]:
        wanted = self.options.mixed_precision
        model_is_bf16 = self.policy.model.dtype == torch.bfloat16
        enabled = wanted == "bf16" or (wanted == "auto" and model_is_bf16)
        with torch.autocast(self.policy.device.type, dtype=torch.bfloat16, enabled=enabled):
            yield

    def _logps(self, job: Job, indices: Sequence[int], reference: dict[str, Tensor]) -> GroupLogps:
        examples = [job.examples[i] for i in indices]

        def compute(model: nn.Module) -> GroupLogprobs:
            # Inside: DeepSpeed switches off what was switched on around it.
            with self._precision():
                return group_logprobs(
                    model,
                    [example.group for example in examples],
                    packing=self.options.packing,
                    token_budget=self.options.token_budget,
                )

        tokens = self.placement.forward(compute)
        device = self.policy.device
        policy, lengths = {}, {}
        for place, role in enumerate(job.roles):
            policy[role] = torch.stack([completions[place].sum() for completions in tokens])
            sizes = [len(example.group.completions[place]) for example in examples]
            lengths[role] = torch.tensor(sizes, device=device, dtype=torch.float32)
        return GroupLogps(
            policy=policy,
            reference={role: reference[role][list(indices)].to(device) for role in job.roles},
            lengths=lengths,
            margin_B=torch.tensor([example.margin for example in examples], device=device),
            smoothing_B=torch.tensor([example.smoothing for example in examples], device=device),
        )

    def _reference(self, job: Job) -> dict[str, Tensor]:
        """Summed log-probs of all N examples by role under the reference, computed once and kept on disk."""
        if job.reference is None:
            return {role: torch.zeros(len(job.examples)) for role in job.roles}
        path = job.folder / "reference.safetensors"
        # Asked by all before any of them can have written it: they meet in between.
        if path.exists():
            return checkpoint.load_tensors(path)
        self._say_how_it_packs(job)
        zeros = {role: torch.zeros(len(job.examples)) for role in job.roles}
        found = {role: zeros[role].to(self.policy.device) for role in job.roles}
        # Sharded weights that are gathered in inference mode could not be trained afterwards.
        quiet = torch.no_grad() if self.placement.sharded else torch.inference_mode()
        at = self._at_start() if job.reference == "initial" else nullcontext()
        with at, quiet, Bar("reference", len(job.examples)) as bar:
            for indices, counts in self._all_passes(job):
                logps = self._logps(job, indices, zeros)
                for role in job.roles if counts else ():
                    found[role][indices] = logps.policy[role].float()
                bar.advance(len(indices))
            self.placement.release()
        return self._kept(path, found)

    def _kept(self, path: Path, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each rank has found of some examples, for all of them and in main memory; kept on disk."""
        for tensor in found.values():
            self.ranks.add(tensor)
        whole = {name: tensor.cpu() for name, tensor in found.items()}
        if self.ranks.first:
            checkpoint.save_tensors(path, whole)
        return whole

    @contextmanager
    def _at_start(self) -> Iterator[None]:
        """Inside, the model is the initial policy, sharded or not."""
        if not self.placement.sharded or self.policy.options.tuning == "lora":
            with self.policy.at_start():
                yield
            return
        kept = self.placement.snapshot()
        initial = Policy.load(self.policy.options, on_cpu=True).model
        self.placement.set_weights(dict(initial.named_parameters()))
        del initial
        try:
            yield
        finally:
            self.placement.set_weights(kept)

    def _say_how_it_packs(self, job: Job) -> None:
        if not self.options.packing or self._logged_packing:
            return
        self._logged_packing = True
        longest = max(example.group.longest for example in job.examples)
        slot_decoding_unsupported = supports_packing(self.policy.model, longest=longest)
        if slot_decoding_unsupported is not None:
            log.warning("training without packing: %s", slot_decoding_unsupported)
