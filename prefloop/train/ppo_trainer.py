"""The trainer of token losses: PPO on a round's answers, with a value head beside the policy.

Before the first step, log-probs under policy and reference and values of all tokens are computed and stored in
rollout.safetensors; the method derives advantages and returns. Steps, schedule, micro-batches and resuming are
those of every trainer. The value head is one more trainable weight, in checkpoints and optimiser;
critic.safetensors passes it, with the method's `Memory`, to the next round.

Shapes: N answers of the round, B of a micro-batch, T tokens of an answer (right-padded), S scored tokens, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer

from prefloop.errors import RunFolderError, TrainingError
from prefloop.machine import Bar
from prefloop.train import checkpoint
from prefloop.train.batches import check_finite
from prefloop.train.logprobs import GroupLogprobs, group_logprobs
from prefloop.train.losses import LossOutput
from prefloop.train.placement import is_sharded
from prefloop.train.ppo import Memory, Rollout, TokenLogps, TokenMethod
from prefloop.train.trainer import Job, Trainer

CRITIC = "critic.safetensors"
ROLLOUT = "rollout.safetensors"


class ValueHead(nn.Module):
    """A linear map from a hidden state to its value; initialised to 0."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states_SH: Tensor) -> Tensor:
        """(S,) values, in float32 also under autocast."""
        with torch.autocast(states_SH.device.type, enabled=False):
            values_S: Tensor = self.linear(states_SH.float())[:, 0]
        return values_S


class ActorCritic(nn.Module):
    """Policy and value head as one module, so that one placement, optimiser and checkpoint hold both."""

    def __init__(self, policy: nn.Module, value_head: ValueHead) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = value_head


class PPOTrainer(Trainer):
    """Trains the policy and its value head on the tokens of a round's answers."""

    def _trained(self) -> nn.Module:
        if is_sharded():
            raise TrainingError(
                "a method that trains on tokens keeps a value head beside whole weights; launch it without "
                "sharding"
            )
        config: Any = self.policy.model.config
        self.value_head = ValueHead(config.get_text_config().hidden_size).to(self.policy.device)
        return ActorCritic(self.policy.model, self.value_head)

    def run(self, job: Job) -> dict[str, Any]:
        """Train on the job's answers; value head and memory for the next round are saved in the job's folder."""
        self._memory = self._load_memory(job)
        facts = super().run(job)
        if self.ranks.first:
            fields = dataclasses.asdict(self._memory).items()
            numbers = {name: torch.tensor(number, dtype=torch.float64) for name, number in fields}
            head = {f"value_head.{k}": v.cpu() for k, v in self.value_head.state_dict().items()}
            checkpoint.save_tensors(job.folder / CRITIC, numbers | head)
            facts["reference_tokens"] *= 2  # the rollout computes the policy's log-probs too
        return facts

    def _load_memory(self, job: Job) -> Memory:
        """Load value head and memory of the previous round; initialise both in the first round."""
        if job.before is None:
            for weight in self.value_head.parameters():
                nn.init.zeros_(weight)
            return _token_method(job).first_memory()
        path = job.before / CRITIC
        if not path.is_file():
            raise RunFolderError(
                f"{path} is missing, which holds the value head after that round; delete that round's folder and "
                "all later ones to play them again"
            )
        tensors = checkpoint.load_tensors(path)
        self.value_head.load_state_dict(
            {name: tensors[f"value_head.{name}"] for name in self.value_head.state_dict()}
        )
        names = [field.name for field in dataclasses.fields(Memory)]
        return Memory(**{name: tensors[name].item() for name in names})

    def _reference(self, job: Job) -> dict[str, Tensor]:
        """The inputs of the loss that are fixed before the first step: (N, T) each; scores are (N,)."""
        path = job.folder / ROLLOUT
        # All ranks check before any can have written the file: computing it synchronises them.
        rollout_tensors = (
            checkpoint.load_tensors(path) if path.exists() else self._compute_rollout(job, path)
        )
        sizes_N = torch.tensor([len(example.group.completions[0]) for example in job.examples])
        rollout = Rollout(
            **rollout_tensors,
            mask_NT=torch.arange(int(sizes_N.max())) < sizes_N[:, None],
            scores_N=torch.tensor([example.score for example in job.examples]),
        )
        targets, self._memory = _token_method(job).targets(rollout, self._memory)
        self._facts = targets.facts
        self._mean_length = sizes_N.double().mean().item()
        return {
            "old_policy_BT": rollout.logps_NT,
            "old_values_BT": rollout.values_NT,
            "reference_BT": rollout.reference_NT,
            "advantages_BT": targets.advantages_NT,
            "returns_BT": targets.returns_NT,
            "mask_BT": rollout.mask_NT,
            "scores_B": rollout.scores_N,
        }

    def _compute_rollout(self, job: Job, path: Path) -> dict[str, Tensor]:
        """Log-probs under policy and reference, and values, of every token; stored in `path`."""
        self._say_how_it_packs(job)
        longest = max(len(example.group.completions[0]) for example in job.examples)
        names, device = ("logps_NT", "values_NT", "reference_NT"), self.policy.device
        tensors = {name: torch.zeros(len(job.examples), longest, device=device) for name in names}
        with torch.inference_mode(), Bar("rollout", 2 * len(job.examples)) as bar:

            def fill(*names_to_fill: str) -> None:
                """Compute all tokens' log-probs, and values where a second name is given, into `tensors`."""
                for indices, _ in self._all_passes(job):
                    for name, tensor_BT in zip(
                        names_to_fill, self._token_logps(job, indices), strict=False
                    ):
                        tensors[name][indices, : tensor_BT.shape[1]] = tensor_BT
                    bar.advance(len(indices))

            fill("logps_NT", "values_NT")
            with self._at_start():
                fill("reference_NT")
        return self._kept(path, tensors)

    def _token_logps(self, job: Job, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probs and values of these answers' tokens, (B, T) each."""

        def compute(model: nn.Module) -> GroupLogprobs:
            assert isinstance(model, ActorCritic)
            with self._precision():
                return group_logprobs(
                    model.policy,
                    [job.examples[index].group for index in indices],
                    packing=self.options.packing,
                    token_budget=self.options.token_budget,
                    value_head=model.value_head,
                )

        answers = [completions[0] for completions in self.placement.forward(compute)]
        logps_BT, values_BT = pad_sequence(answers, batch_first=True).unbind(dim=-1)
        return logps_BT, values_BT

    def _losses(
        self, job: Job, indices: Sequence[int], reference: dict[str, Tensor], progress: float
    ) -> LossOutput:
        """The method's loss of one micro-batch, checked to be finite; `progress` in [0, 1] is the position in the round."""
        policy_BT, values_BT = self._token_logps(job, indices)
        at_start = self._at_round_start(indices, reference)
        tokens = dataclasses.replace(at_start, policy_BT=policy_BT, values_BT=values_BT)
        output = _token_method(job).token_loss(tokens, progress)
        sums_B = {"log_prob": policy_BT.sum(dim=1), "value": values_BT.sum(dim=1)}
        ids = [job.examples[index].id for index in indices]
        check_finite(job.folder, ids, output.loss_B, {"sum": sums_B})
        facts = {name: torch.full((len(ids),), fact) for name, fact in self._facts.items()}
        return LossOutput(output.loss_B, {**output.metrics, **facts})

    def _at_round_start(self, indices: Sequence[int], reference: dict[str, Tensor]) -> TokenLogps:
        """The loss's inputs of these answers with log-probs and values as before the first step."""
        tensors = {
            name: tensor_N[list(indices)].to(self.policy.device)
            for name, tensor_N in reference.items()
        }
        longest = int(tensors["mask_BT"].sum(dim=1).max())
        tensors |= {name: tensors[name][:, :longest] for name in tensors if name.endswith("_BT")}
        return TokenLogps(
            policy_BT=tensors["old_policy_BT"],
            values_BT=tensors["old_values_BT"],
            mean_length=self._mean_length,
            **tensors,
        )

    def _loss_at_start(
        self, job: Job, chosen: Sequence[int], reference: dict[str, Tensor]
    ) -> float | None:
        """The loss with the stored log-probs and values, where every ratio is 1."""
        output = _token_method(job).token_loss(self._at_round_start(chosen, reference), 0.0)
        return output.loss_B.mean().item()

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Training mode without dropout, whose noise in the ratio would look like a change of the policy."""
        with super()._training():
            for module in self.policy.model.modules():
                # Attention applies dropout by its own training flag. For GradientCheckpointingLayer the flag
                # only switches checkpointing; dropout is in its submodules.
                module.training = isinstance(module, GradientCheckpointingLayer)
            yield


def _token_method(job: Job) -> TokenMethod:
    assert job.tokens is not None, "a trainer of tokens needs to be told of a method's"
    return job.tokens
