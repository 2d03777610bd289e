"""Sections of a recipe that are no plug-in: the loop's schedule, generation, evaluation, guards, budgets, processes."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from prefloop.config import Options, here_or_shipped
from prefloop.errors import LaunchError
from prefloop.records import Sampling, as_tuple


class Budget(Options):
    """What a run may spend: after the round in which it reaches one of these it begins no other."""

    generated_tokens: int | None = Field(default=None, ge=1)
    """Tokens that the policy has drawn in generation, those of rejected answers included."""
    trained_tokens: int | None = Field(default=None, ge=1)
    """Tokens of prompts and answers in training passes, each as often as it was trained on; sft's too."""
    seconds: float | None = Field(default=None, gt=0.0)
    """Wall time of all stages but measuring."""
    flops: float | None = Field(default=None, gt=0.0)
    """Floating-point operations by the formula of docs/compare.md."""

    @model_validator(mode="after")
    def _says_something(self) -> Budget:
        if not self.limits:
            raise ValueError(
                "loop.budget limits nothing; give generated_tokens, trained_tokens, seconds or flops"
            )
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class LaunchOptions(Options):
    """Stages in several processes. Give `processes` for this machine, or a launcher as `command`."""

    processes: int | None = Field(default=None, ge=1)
    """Processes on this machine: one for each GPU, or sharing the cores."""
    sharding: Literal["none", "fsdp2"] = "none"
    """Under `processes`: each holds all weights, or a part of them (FSDP2)."""
    command: str | None = None
    """A launcher with its options, "accelerate launch --config_file FILE"; it must take -m MODULE and set RANK."""

    generate: bool = False
    """Share generation, ranking and measuring as well: each process takes every n-th chunk."""

    @model_validator(mode="after")
    def _one_launcher(self) -> LaunchOptions:
        if (self.processes is None) == (self.command is None):
            raise ValueError("launch needs either processes or command, not both")
        if self.command is not None and self.sharding != "none":
            raise ValueError(
                "launch.sharding goes with launch.processes; with launch.command, say it in the "
                "launcher's own config file"
            )
        return self

    def words(self) -> list[str]:
        """The launcher's command line. Raises LaunchError where the launcher is not there."""
        if self.command is None:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            return [sys.executable, *torchrun, "--nproc-per-node", str(self.processes)]
        try:
            first, *rest = shlex.split(self.command) or [""]
        except ValueError as error:
            raise LaunchError(
                f"launch.command {self.command!r} cannot be read ({error}); close its quotes"
            ) from error
        # What is installed beside this Python is meant, whether or not that environment is active.
        places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        found = shutil.which(first, path=places)
        if found is None:
            raise LaunchError(f"launch.command: no program {first!r}; install it, or name another")
        # A shipped recipe names its launcher's config as recipes/accelerate/NAME.yaml.
        return [found, *(str(here_or_shipped(Path(word))) for word in rest)]


class GenerateOptions(Options):
    """How text is generated; what is generated is the method's."""

    batch_size: int = Field(default=64, ge=1)
    """Conversations decoded together; changes no answer in float32 on CPUs."""
    chunk_size: int = Field(default=64, ge=1)
    """Prompts a chunk: what a killed run loses at most, and what one seed covers."""


class LoopOptions(Options):
    """The closed loop's schedule."""

    rounds: int = Field(default=3, ge=1)
    """Times around the loop. IAL section 4.1: 3."""
    prompts_per_round: int = Field(default=64, ge=1)
    """Prompts that each round draws from the training data. IAL section 4.1: 50,000."""
    mix_previous: bool = False
    """Train on the previous round's pairs as well (IAL Algorithm 1: D'_t and D'_{t-1})."""
    carry_optimizer: bool = False
    """One optimiser and one schedule for the whole run (AROP), not a new one each round (IAL)."""
    lr_factors: Annotated[
        tuple[Annotated[float, Field(gt=0.0)], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = (1.0,)
    """What train.lr is multiplied by in each round; the last number holds for all that follow."""
    budget: Budget | None = None
    """What the run may spend: generated_tokens, trained_tokens, seconds or flops; null: all rounds."""

    def rate_factor(self, round: int) -> float:
        """What train.lr is multiplied by in this round."""
        return self.lr_factors[min(round, len(self.lr_factors) - 1)]


Tracker = Literal[
    "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"
]


class TrackOptions(Options):
    """Experiment trackers, through accelerate. `track: [wandb]` is short for `track: {report_to: [wandb]}`."""

    report_to: tuple[Tracker, ...] = ()
    """Their names; steps of training go there as train/..., measures of rounds as eval/..., with a table of rounds."""
    project: str = Field(default="prefloop", min_length=1)
    """The project, or experiment, that the run stands in there."""
    run_name: str | None = None
    """The run's name there; null: the recipe's name."""
    pairs: int = Field(default=100, ge=0)
    """Pairs of each round in a table, where the tracker has tables; 0 sends none."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: object) -> object:
        """As in transformers' TrainingArguments, "none" is nobody."""
        given = [value] if isinstance(value, str) else value
        return () if given == ["none"] else as_tuple(given)


class EvaluateOptions(Options):
    """What is measured on held-out prompts."""

    prompts: int = Field(default=64, ge=1)
    """Held-out prompts answered for each measurement, of each set where data.eval is a list; fewer where there are fewer."""
    sampling: Sampling | None = None
    """How they are answered; null takes the method's sampling."""
    every_round: bool = True
    """Measure after each round, not only at the start and after the last."""
    every_steps: int = Field(default=0, ge=0)
    """Also measure the win rate against the start every so many optimiser steps; 0 does not."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """End training, and the run with that round, after so many win rates of the curve in a row that were no better than
    the best before them; needs `every_steps`. null does not."""
    early_stopping_threshold: float = Field(default=0.0, ge=0.0, le=1.0)
    """How much better a win rate must be to count as better."""
    introspection: bool = True
    """Play the whole method on these prompts too, for its own measures (R_i, identical rate ...)."""


class GuardOptions(Options):
    """What counts as collapse, and what is done about it. A policy that is no worse than the start trips nothing."""

    action: Literal["warn", "stop", "best_round"] = "warn"
    """Warn, stop the run, or go on and give the best round's policy at the end."""
    max_kl: float = Field(default=2.0, gt=0.0)
    """Divergence from the initial policy, nats per token."""
    min_distinct2: float = Field(default=0.5, ge=0.0, le=1.0)
    """Distinct word bigrams, as a share of the initial policy's."""
    min_stop_rate: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of answers that end by themselves."""
    max_identical_rate: float = Field(default=0.9, ge=0.0, le=1.0)
    """Share of prompts with the rewrite equal to the draft. IAL appendix B.4: 3 to 5 % at T = 0.7."""
    max_flaw_edit_share: float = Field(default=0.5, ge=0.0, le=1.0)
    """AROP: share of the words that a planted flaw changes; above it the flawed answer is a rewrite."""
    min_margin: float = Field(default=0.25, ge=0.0, le=1.0)
    """AROP: mean margin M, as a share of the start's; below it critique has collapsed (AROP section 6.2)."""
    max_unseen_flaws: float = Field(default=0.5, ge=0.0, le=1.0)
    """AROP, margin by confidence: share of flawed answers that the policy finds as likely as the better ones."""
    slack: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Where the start is past a limit: the share of the start's distance from the worst value that may be lost."""
    max_reject_share: float = Field(default=0.95, ge=0.0, le=1.0)
    """Share of a round's prompts that gave no pair."""


class RewardStep(Options):
    """RLAIF: the reward model that is made first, into the folder that `judge.model` names."""

    drafts: str = Field(min_length=1)
    """Recipe (a file, or the name of a shipped one) whose first round makes the pairs; it is not trained."""
    train: str = Field(min_length=1)
    """Reward recipe (a file, or the name of a shipped one); its data are these pairs."""
