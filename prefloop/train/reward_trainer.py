"""Training of a Bradley-Terry reward model: a sequence classifier with one output, on pairs of conversations.

Shapes: B pairs of a micro-batch; scores of the chosen, then of the rejected ones are (2B,).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from prefloop.errors import ModelError, TrainingError
from prefloop.machine import Bar
from prefloop.models.embedding import embedded_encoder
from prefloop.models.reward import Encoded, padded, padding_token
from prefloop.models.sources import ModelOptions, local_folder, quiet, reason, resolve_source
from prefloop.records import derive_seed
from prefloop.train import checkpoint
from prefloop.train.losses import bradley_terry
from prefloop.train.options import RewardModelOptions, RewardTrainOptions
from prefloop.train.placement import Ranks, Replicated


def fit_head(
    chosen_NF: NDArray[np.float32],
    rejected_NF: NDArray[np.float32],
    margin_N: NDArray[np.float32],
    *,
    l2: float,
) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Weights (F,) that minimise mean Bradley-Terry loss + l2 |w|^2, and the loss before and after.

    Raises TrainingError where the loss is not finite.
    """
    chosen, rejected, margin = map(torch.from_numpy, (chosen_NF, rejected_NF, margin_N))
    weights_F = torch.zeros(chosen_NF.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights_F], max_iter=200, line_search_fn="strong_wolfe")

    def mean_loss() -> torch.Tensor:
        return bradley_terry(chosen @ weights_F, rejected @ weights_F, margin, centering=0.0).mean()

    def closure() -> float:
        optimizer.zero_grad()
        loss = mean_loss() + l2 * (weights_F**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    first_loss = float(mean_loss().detach())
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    last_loss = float(mean_loss().detach())
    if not np.isfinite(last_loss):
        raise TrainingError("the head's loss is not finite; raise train.l2 or look at the pairs")
    return weights_F.detach().numpy(), {"first_loss": first_loss, "last_loss": last_loss}


# Number of batches whose shuffled pairs are sorted by length together, so that a batch's lengths are similar.
_BATCHES_SORTED_TOGETHER = 20


@dataclass(frozen=True)
class EncodedPair:
    """A pair as token ids: the conversation with either answer."""

    id: str
    chosen: Encoded
    rejected: Encoded
    margin: float = 0.0

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two."""
        return max(len(self.chosen.ids), len(self.rejected.ids))


@dataclass(frozen=True)
class RewardBase:
    """A classifier ready for training, and its tokenizer."""

    model: Any
    """A PeftModel with LoRA, else a transformers model."""
    tokenizer: Any


def load_base(options: RewardModelOptions, seed: int) -> RewardBase:
    """Load the base model with a new scalar head, whose weights depend on `seed` only. Raises ModelError."""
    folder = _base_folder(options.source)
    config_changes: dict[str, Any] = {"num_labels": 1}
    if options.dropout is not None:
        config_changes |= {
            "hidden_dropout_prob": options.dropout,
            "attention_probs_dropout_prob": options.dropout,
        }
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, "head"))
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            for name, value in config_changes.items():
                setattr(config, name, value)
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            if options.tuning == "lora":
                model = _with_adapter(model, options)
            else:
                _freeze(model, options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"model.source {options.source} cannot become a reward model ({reason(error)}); name a "
            "model folder or Hub id that transformers knows as a sequence classifier"
        ) from error
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        nn.Module.to(model, device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f'model.device {device!r} cannot be used here ({reason(error)}); "auto" chooses'
        ) from error
    return RewardBase(model, tokenizer)


def _base_folder(source: str) -> str:
    encoder = embedded_encoder(source)
    if encoder is not None:
        return encoder
    return str(local_folder(resolve_source(source), ModelOptions(source=source)))


def _with_adapter(model: Any, options: RewardModelOptions) -> Any:
    lora = options.lora
    return get_peft_model(
        model,
        LoraConfig(
            target_modules=lora.target_modules,
            target_parameters=lora.target_parameters,
            exclude_modules=lora.exclude_modules,
            **lora.for_peft(),
            task_type="SEQ_CLS",  # trains the new head as well
        ),
    )


def _freeze(model: Any, options: RewardModelOptions) -> None:
    if not options.freeze_layers:
        return
    layers = max(
        (module for module in model.modules() if isinstance(module, nn.ModuleList)),
        key=len,
        default=nn.ModuleList(),
    )
    if options.freeze_layers > len(layers):
        raise ValueError(
            f"model.freeze_layers is {options.freeze_layers} and it has {len(layers)} layers"
        )
    model.get_input_embeddings().requires_grad_(False)
    layers[: options.freeze_layers].requires_grad_(False)


def train_reward_model(
    model: Any,
    pairs: Sequence[EncodedPair],
    options: RewardTrainOptions,
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Train in place; metrics and checkpoints are written to `folder`, from which a killed training resumes.

    Returns counts and the mean loss of the first and of the last tenth of the steps. Raises TrainingError
    where the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = batches([pair.longest for pair in pairs], options, seed)
    placement = Replicated(
        model,
        Ranks(),
        lambda weights: torch.optim.AdamW(
            weights, lr=options.lr, weight_decay=options.weight_decay
        ),
    )
    log = folder / "metrics.jsonl"
    torch.manual_seed(derive_seed(seed, "dropout"))
    done = _resume(folder, placement)
    rows = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    log.write_text("".join(f"{row}\n" for row in rows[:done]), encoding="utf-8")
    model.train()
    with log.open("a", encoding="utf-8") as file, Bar("reward model", len(steps)) as bar:
        bar.advance(items=done)
        for number in range(done, len(steps)):
            chosen = [pairs[index] for index in steps[number]]
            metrics = _step(model, placement, chosen, options, (number + 0.5) / len(steps))
            file.write(json.dumps({"step": number, **metrics}) + "\n")
            if options.save_every and (number + 1) % options.save_every == 0:
                file.flush()
                state = checkpoint.State(
                    placement.weights(), placement.optimizer_state(), [checkpoint.random_state()]
                )
                checkpoint.save_checkpoint(folder, state, step=number + 1)
            bar.advance(items=1, amount=sum(2 * pair.longest for pair in chosen))
    model.eval()
    losses = [json.loads(line)["loss"] for line in log.read_text(encoding="utf-8").splitlines()]
    tenth = max(1, len(losses) // 10)
    return {
        "pairs": len(pairs),
        "steps": len(steps),
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
    }


def _resume(folder: Path, placement: Replicated) -> int:
    """Load the newest checkpoint; returns its number of steps, 0 without one."""
    newest = checkpoint.load_checkpoint(folder, ranks=1)
    if newest is None:
        return 0
    state, position = newest
    placement.set_weights(state.weights)
    placement.set_optimizer_state(state.optimizer)
    checkpoint.set_random_state(state.random[0])
    return int(position["step"])


def batches(lengths: Sequence[int], options: RewardTrainOptions, seed: int) -> list[list[int]]:
    """Indices of the pairs of every optimiser step of all epochs; each pair once an epoch.

    Pairs of similar length share a step, to save padding; their grouping and the order of the steps are drawn
    for each epoch.
    """
    steps = []
    for epoch in range(options.epochs):
        random = Random(derive_seed(seed, "order", epoch))
        order = list(range(len(lengths)))
        random.shuffle(order)
        span = options.batch_size * _BATCHES_SORTED_TOGETHER
        for start in range(0, len(order), span):
            order[start : start + span] = sorted(
                order[start : start + span], key=lambda i: lengths[i]
            )
        size = options.batch_size
        epoch_steps = [order[start : start + size] for start in range(0, len(order), size)]
        random.shuffle(epoch_steps)
        steps += epoch_steps
    return steps


def _step(
    model: Any,
    placement: Replicated,
    pairs: Sequence[EncodedPair],
    options: RewardTrainOptions,
    progress: float,
) -> dict[str, float]:
    warmup, decay = options.warmup, 1 - options.warmup
    rate = options.lr * min(progress / warmup if warmup else 1.0, (1 - progress) / decay)
    loss = correct = 0.0
    for start in range(0, len(pairs), options.micro_batch_size):
        micro_batch = pairs[start : start + options.micro_batch_size]
        scores_2B = score_rows(
            model,
            [*(pair.chosen for pair in micro_batch), *(pair.rejected for pair in micro_batch)],
        )
        chosen_B, rejected_B = scores_2B.chunk(2)
        margin_B = torch.tensor([pair.margin for pair in micro_batch], device=scores_2B.device)
        loss_B = bradley_terry(chosen_B, rejected_B, margin_B, centering=options.centering)
        if not torch.isfinite(loss_B).all():
            raise TrainingError(
                f"the loss of {', '.join(pair.id for pair in micro_batch)} is not finite; "
                "lower train.lr or remove these pairs"
            )
        last = start + options.micro_batch_size >= len(pairs)
        placement.backward(loss_B.sum() / len(pairs), last=last)
        loss += float(loss_B.detach().sum()) / len(pairs)
        correct += float((chosen_B > rejected_B).sum()) / len(pairs)
    norm = placement.update(rate, options.max_grad_norm)
    if not math.isfinite(norm):
        raise TrainingError("the gradient is not finite; lower train.lr")
    return {"loss": loss, "accuracy": correct, "lr": rate, "grad_norm": norm}


def score_rows(model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
    """Scores (len(rows),) of encoded conversations, with gradient. Raises ModelError."""
    with padding_token(model.config.get_text_config(), rows) as pad:
        if pad is None:
            raise ModelError(
                "the base has no padding token and a batch uses its whole vocabulary; set pad_token_id "
                "in its config.json, or lower train.micro_batch_size"
            )
        scores: torch.Tensor = model(**padded(rows, pad, model.device)).logits.squeeze(-1)
    return scores
