"""The trainer: groups of responses and a loss function in, a changed policy out. It knows no method.

One optimiser step takes the mean of the loss over the step's examples, however they are split into
micro-batches. The reference's log-probs are computed once, before the first step. Killed at any
moment, training goes on from its newest checkpoint to the same weights, bit for bit.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefloop.errors import RunFolderError, TrainingError
from prefloop.memory import is_out_of_memory
from prefloop.progress import Bar
from prefloop.train import checkpoint
from prefloop.train.batches import Example, schedule
from prefloop.train.logprobs import group_logprobs, supports_packing
from prefloop.train.losses import GroupLogps, LossOutput
from prefloop.train.models import Policy

if TYPE_CHECKING:
    from prefloop.recipe import TrainOptions

# B examples of a micro-batch, N examples of the round.

log = logging.getLogger(__name__)
LossFunction = Callable[[GroupLogps, float], LossOutput]

# bf16 log-probs of a few hundred tokens carry about this much noise once multiplied by beta = 0.1.
_START_TOLERANCE = 0.1


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
    first_step: int = 0
    """Optimiser steps of the run before this job, for trackers that count on."""
    span: tuple[float, float] = (0.0, 1.0)
    """The part of the learning-rate schedule that this job walks through."""
    loss_at_start: Callable[[Sequence[int]], float | None] = lambda indices: None
    """Known mean loss of these examples while policy and reference are equal."""


def learning_rate(options: TrainOptions, progress: float) -> float:
    """Learning rate at `progress` in (0, 1) of the schedule: warm-up from 0, then line, cosine or constant."""
    if progress < options.warmup:
        return options.lr * progress / options.warmup
    rest = (1 - progress) / (1 - options.warmup)
    factors = {"linear": rest, "cosine": 0.5 - 0.5 * math.cos(math.pi * rest), "constant": 1.0}
    return options.lr * factors[options.schedule]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """What each optimiser step logged. Raises RunFolderError for a damaged line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RunFolderError(
                f"{path}:{number} is damaged ({error.msg}); delete {path.parent.parent} to redo the round"
            ) from error
    return rows


class Trainer:
    """Trains one policy; keeps its optimiser between jobs where asked to."""

    def __init__(
        self, policy: Policy, options: TrainOptions, trackers: Sequence[str] = (), folder: str = "."
    ) -> None:
        """`trackers` names accelerate's trackers; those that write files write below `folder`."""
        self.policy = policy
        self.options = options
        self.accelerator = Accelerator(
            cpu=policy.device.type == "cpu", log_with=list(trackers) or None, project_dir=folder
        )
        if trackers:
            self.accelerator.init_trackers("prefloop")
        self.optimizer = self._new_optimizer()
        self._logged_packing = False

    def _new_optimizer(self) -> torch.optim.Optimizer:
        parameters = self.policy.trainable_parameters()
        decay = self.options.weight_decay
        if self.options.optimizer == "rmsprop":
            return torch.optim.RMSprop(parameters, lr=self.options.lr, weight_decay=decay)
        return torch.optim.AdamW(parameters, lr=self.options.lr, weight_decay=decay)

    def renew_optimizer(self) -> None:
        """Forget the optimiser's state: a new optimiser each round (IAL)."""
        self.optimizer = self._new_optimizer()

    def run(self, job: Job) -> dict[str, Any]:
        """Train on the job's examples; returns counts and first and last loss. Raises TrainingError."""
        job.folder.mkdir(parents=True, exist_ok=True)
        reference = self._reference(job)
        steps = schedule(
            len(job.examples),
            epochs=self.options.epochs,
            batch_size=self.options.batch_size,
            seed=job.seed,
        )
        position = checkpoint.load_checkpoint(job.folder, self.policy.model, self.optimizer)
        done = 0 if position is None else int(position["step"])
        metrics = job.folder / "metrics.jsonl"
        metrics.touch()
        os.truncate(metrics, 0 if position is None else position["metrics_bytes"])
        if position is None:
            torch.manual_seed(job.seed)
        with (
            Bar("train", len(steps)) as bar,
            metrics.open("a", buffering=1, encoding="utf-8") as file,
        ):
            bar.advance(done)
            for number in range(done, len(steps)):
                try:
                    row = self._step(job, reference, steps[number], number, len(steps))
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise TrainingError(
                        f"out of memory in training step {number}; start a new run with a lower "
                        "train.micro_batch_size, or with model.gradient_checkpointing: true"
                    ) from error
                file.write(json.dumps(row) + "\n")
                self.accelerator.log(row, step=job.first_step + number)
                bar.advance(1, amount=row["tokens"])
                if self._is_due(number + 1, len(steps)):
                    checkpoint.save_checkpoint(
                        job.folder,
                        self.policy.model,
                        self.optimizer,
                        step=number + 1,
                        metrics_bytes=metrics.stat().st_size,
                    )
        rows = read_metrics(metrics)
        return {
            "steps": len(rows),
            "examples": len(job.examples),
            "tokens": sum(row["tokens"] for row in rows),
            "first_loss": rows[0]["loss"],
            "last_loss": rows[-1]["loss"],
        }

    def _is_due(self, step: int, steps: int) -> bool:
        every = self.options.save_every
        return step == steps or (every > 0 and step % every == 0)

    def _step(
        self, job: Job, reference: dict[str, Tensor], chosen: list[int], number: int, steps: int
    ) -> dict[str, Any]:
        """One optimiser step on the examples `chosen`; its metrics."""
        low, high = job.span
        # The middle of the step: with few steps, neither the first nor the last is wasted at zero.
        place = (number + 0.5) / steps
        rate = learning_rate(self.options, low + (high - low) * place)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        size = self.options.micro_batch_size
        sums: dict[str, float] = {}
        with self._training():
            for start in range(0, len(chosen), size):
                indices = chosen[start : start + size]
                logps = self._logps(job, indices, reference)
                with torch.set_grad_enabled(True):
                    output = job.loss(logps, place)
                self._demand_finite(job, indices, output.loss_B, logps)
                self.accelerator.backward(output.loss_B.sum() / len(chosen))
                for name, values_B in {"loss": output.loss_B, **output.metrics}.items():
                    sums[name] = sums.get(name, 0.0) + values_B.detach().float().sum().item()
        means = {name: total / len(chosen) for name, total in sums.items()}
        if number == 0:
            self._demand_known_start(job, chosen, means["loss"])
        norm = self.accelerator.clip_grad_norm_(
            self.policy.trainable_parameters(), self.options.max_grad_norm
        )
        assert norm is not None
        if not math.isfinite(norm.item()):
            raise TrainingError(
                f"the gradient of step {number} is {norm.item()}; lower train.lr, or look at the pairs "
                + ", ".join(job.examples[i].id for i in chosen)
            )
        self.optimizer.step()
        tokens = sum(job.examples[i].tokens for i in chosen)
        return {"step": number, **means, "lr": rate, "grad_norm": norm.item(), "tokens": tokens}

    @contextmanager
    def _training(self) -> Iterator[None]:
        self.policy.model.train()
        try:
            with self._precision():
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
        tokens = group_logprobs(
            self.policy.model,
            [example.group for example in examples],
            packing=self.options.packing,
            token_budget=self.options.token_budget,
        )
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
        )

    def _reference(self, job: Job) -> dict[str, Tensor]:
        """Summed log-probs of all N examples by role under the reference, computed once and kept on disk."""
        if job.reference is None:
            return {role: torch.zeros(len(job.examples)) for role in job.roles}
        path = job.folder / "reference.safetensors"
        if not path.exists():
            self._say_how_it_packs(job)
            at = self.policy.at_start() if job.reference == "initial" else nullcontext()
            zeros = {role: torch.zeros(len(job.examples)) for role in job.roles}
            parts: dict[str, list[Tensor]] = {role: [] for role in job.roles}
            size = self.options.micro_batch_size
            with (
                at,
                torch.inference_mode(),
                self._precision(),
                Bar("reference", len(job.examples)) as bar,
            ):
                for start in range(0, len(job.examples), size):
                    indices = range(len(job.examples))[start : start + size]
                    logps = self._logps(job, indices, zeros)
                    for role in job.roles:
                        parts[role].append(logps.policy[role].float().cpu())
                    bar.advance(len(indices))
            temporary = path.with_suffix(".tmp")
            save_file({role: torch.cat(rows).clone() for role, rows in parts.items()}, temporary)
            temporary.replace(path)
        return load_file(path)

    def _say_how_it_packs(self, job: Job) -> None:
        if not self.options.packing or self._logged_packing:
            return
        self._logged_packing = True
        longest = max(example.group.longest for example in job.examples)
        why_not = supports_packing(self.policy.model, longest=longest)
        if why_not is not None:
            log.warning("training without packing: %s", why_not)

    def _demand_finite(
        self, job: Job, indices: Sequence[int], loss_B: Tensor, logps: GroupLogps
    ) -> None:
        bad = [n for n, finite in enumerate(torch.isfinite(loss_B).tolist()) if not finite]
        if not bad:
            return
        path = job.folder / "nonfinite.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for n in bad:
                values = {role: logps.policy[role][n].item() for role in job.roles}
                refs = {role: logps.reference[role][n].item() for role in job.roles}
                row = {"pair": job.examples[indices[n]].id, "loss": loss_B[n].item()}
                file.write(json.dumps({**row, "policy": values, "reference": refs}) + "\n")
        names = ", ".join(job.examples[indices[n]].id for n in bad)
        raise TrainingError(
            f"the loss of {names} is not finite (their log-probs are in {path}); "
            "lower train.lr or remove these prompts"
        )

    def _demand_known_start(self, job: Job, chosen: Sequence[int], loss: float) -> None:
        expected = job.loss_at_start(chosen)
        if expected is not None and abs(loss - expected) > _START_TOLERANCE * max(1.0, expected):
            raise TrainingError(
                f"the first loss is {loss:.4f} where policy and reference, being equal, give "
                f"{expected:.4f}; the reference's log-probs in {job.folder} are not of this policy, "
                "delete that folder to compute them again"
            )
