"""Options of a reward model's base and training. Cheap to import: recipes need them."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    model_validator,
)

from prefloop.config import Options
from prefloop.models.sources import LoraOptions


class RewardModelOptions(Options):
    """What the reward model is made from, and what of it is trained besides its new scalar head."""

    source: str = "embedded:minilm"
    """A folder, a Hub id, "embedded:minilm" (an encoder, fast on a CPU) or "embedded:smollm2-135m"."""
    tuning: Literal["head", "full", "lora"] = "head"
    """head: a linear reward over the frozen sentence embeddings of an encoder, in seconds once they are
    made. full: all weights. lora: a low-rank adapter, which is merged when the model is saved."""
    freeze_layers: int = Field(default=0, ge=0)
    """full: so many of the first layers, and the token embeddings with them, stay as they are."""
    lora: LoraOptions = Field(default_factory=LoraOptions)
    """The adapter, where `tuning` is lora."""
    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """full: dropout of an encoder's hidden layers and attention; null keeps what its config says."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", "mps"; "auto" takes the accelerator where there is one."""

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> RewardModelOptions:
        if self.tuning != "full" and (self.freeze_layers or self.dropout is not None):
            raise ValueError(
                "model.freeze_layers and model.dropout have an effect under tuning: full only; "
                "leave them out"
            )
        return self


class RewardTrainOptions(Options):
    """How labelled pairs become a reward model."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the training pairs; more than two overfit most data."""
    lr: float = Field(default=5e-5, gt=0.0, le=1.0)
    """Peak learning rate; it rises over `warmup`, then falls to 0 on a line."""
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the optimiser steps in which the learning rate rises."""
    batch_size: int = Field(default=16, ge=1)
    """Pairs per optimiser step."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Pairs per forward and backward pass; must divide batch_size."""
    max_length: int = Field(default=256, ge=8)
    """Tokens of question and answer together (head: of each); what exceeds them is cut, here and when judging."""
    l2: float = Field(default=1.0, gt=0.0)
    """head: weight of |w|^2, the only other option besides `max_length` that a head has."""
    weight_decay: float = Field(default=0.01, ge=0.0, le=1.0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm."""
    centering: float = Field(default=0.0, ge=0.0)
    """Weight of (s_chosen + s_rejected)^2, which holds scores near 0 (Eisenstein et al. 2023: 0.01)."""
    save_every: int = Field(default=50, ge=0)
    """Optimiser steps between checkpoints, at which a killed training goes on; 0 saves none."""

    @model_validator(mode="after")
    def _steps_are_whole(self) -> RewardTrainOptions:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size ({self.micro_batch_size}) must divide "
                f"train.batch_size ({self.batch_size}); change one of them"
            )
        return self


class SftOptions(Options):
    """Round 0: supervised fine-tuning on the data's targets. What is not here comes from `train`."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the training prompts. IAL appendix B.2.2: 2, for a baseline's SFT stage."""
    lr: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Peak learning rate. IAL appendix B.2.2: 2e-4, for a baseline's SFT stage."""
    batch_size: int = Field(default=32, ge=1)
    """Examples per optimiser step."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """Of its own: `train.optimizer` is for pairs."""


class TrainOptions(Options):
    """How a round's pairs become a new policy."""

    epochs: int = Field(default=1, ge=1)
    """Passes over a round's pairs. IAL section 4.1: 2."""
    lr: float = Field(default=5e-6, gt=0.0, le=1.0)
    """Peak learning rate. IAL section 4.1: 5e-7."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """IAL section 4.1: RMSProp."""
    rmsprop_alpha: float = Field(default=0.99, gt=0.0, lt=1.0)
    """rmsprop: how slowly its mean of squared gradients follows. It starts from 0, so the first step is
    1 / sqrt(1 - alpha) times the learning rate: 10 times at 0.99."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after warm-up: to 0 on a line or a cosine, or not at all."""
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the optimiser steps in which the learning rate rises. IAL section 4.1: 10 %."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs per optimiser step. IAL appendix B: 4 x 8 accumulation steps."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Pairs per forward and backward pass; must divide batch_size."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    """Weight decay: decoupled under adamw, part of the gradient under rmsprop."""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm."""
    packing: bool = True
    """Compute what a pair's responses share once, several pairs to a row, where the model allows."""
    token_budget: int = Field(default=2048, ge=1)
    """Tokens in a packed row."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """bf16: matrix products in bfloat16, also over float32 weights; auto: where the model is in bfloat16."""
    disable_dropout: bool = True
    """The base model's dropout is off, so that policy and reference are compared without its noise.
    `model.lora.dropout` is the adapter's own and stays."""
    save_every: int = Field(default=0, ge=0)
    """Optimiser steps between training checkpoints; 0 saves only at the round's end."""
    keep_last: int | None = Field(default=None, ge=1)
    """Keep the policies and the training state of so many rounds, the last ones (and the best one under guard.action:
    best_round); null keeps all. `prefloop clean` frees more once the run has ended."""

    @model_validator(mode="after")
    def _steps_are_whole(self) -> TrainOptions:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size ({self.micro_batch_size}) must divide "
                f"train.batch_size ({self.batch_size}); change one of them"
            )
        # A dumped recipe has every value, so the default's is no contradiction.
        if self.optimizer != "rmsprop" and self.rmsprop_alpha != 0.99:
            raise ValueError(
                "train.rmsprop_alpha has an effect under train.optimizer: rmsprop only; leave it out"
            )
        return self
