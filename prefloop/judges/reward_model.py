"""A reward model as judge: any sequence classifier with one output, from a folder or the Hub.

Shapes: B responses in a batch, T tokens with padding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError
from pydantic import Field
from safetensors import SafetensorError

from prefloop.errors import JudgeError
from prefloop.judges import EMPTY, Judge, NoVerdict, OpenJudge, Verdict, finite
from prefloop.judges._device import chosen_device, put_on
from prefloop.models.embedding import Embedder
from prefloop.models.reward import (
    EmbeddingHead,
    Encoded,
    RewardEncoder,
    has_segments,
    load_head,
    padded,
    padding_token,
    trained_with,
    verify_reward,
    window_of,
)
from prefloop.models.sources import reason
from prefloop.records import Message, Prompt

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet
    from prefloop.judges import Initial

logger = logging.getLogger(__name__)
_MAX_LENGTH = 4096

TOO_LONG = NoVerdict("longer than the reward model's window")
REFUSED = NoVerdict("the reward model's chat template refuses the conversation")


class RewardModel(Judge):
    """Scalar of a Bradley-Terry reward model (Ouyang et al. 2022, arXiv:2203.02155, section 3.5)."""

    model: str
    """Hub id or folder of a sequence classifier with one label, or of what `prefloop reward train` made;
    safetensors weights only."""
    max_length: int | None = Field(default=None, ge=8)
    """Tokens of question and answer together; the model's own window may be shorter. null: what
    `prefloop reward train` trained with, 4,096 for any other model."""
    too_long: Literal["auto", "cut", "reject"] = "auto"
    """What is longer gives no verdict (reject), or is cut as in training (cut): at the question's beginning, and
    without a chat template, if that is not enough, at the answer's end. auto: cut for a model of
    `prefloop reward train`, which was trained so; reject for any other."""
    batch_tokens: int = Field(default=16384, ge=1)
    """Padded tokens scored at once; a single longer conversation makes a batch of its own."""
    device: str = "auto"
    """"auto" is the first GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is the checkpoint's own on a GPU, float32 on the CPU."""

    @property
    def sources(self) -> dict[str, str]:
        """The reward model's folder or Hub id."""
        return {"model": self.model}

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """Load model and tokenizer; JudgeError where that fails or the model gives no single score."""
        verify_reward(self.model)
        head = load_head(self.model)
        if head is not None:
            return _OpenEmbeddingHead(head, Embedder(head.source))
        device = chosen_device(self.device)
        dtype = self.dtype
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        model = _load_model(self.model, dtype)
        tokenizer = _from_pretrained("AutoTokenizer", self.model)
        put_on(model, device, f"reward model {self.model!r}")
        trained = trained_with(model.config)
        if not tokenizer.chat_template and not trained:
            logger.warning(
                "reward model %r has no chat template; question and answer are encoded as a plain pair",
                self.model,
            )
        max_length = self.max_length or trained.get("max_length", _MAX_LENGTH)
        cut = bool(trained) if self.too_long == "auto" else self.too_long == "cut"
        window = window_of(max_length, model.config.get_text_config(), tokenizer)
        return _OpenRewardModel(
            name=self.model,
            model=model,
            encoder=RewardEncoder(tokenizer, has_segments(model), window, cut),
            batch_tokens=self.batch_tokens,
        )


@dataclass(frozen=True)
class _OpenRewardModel:
    name: str
    model: Any
    encoder: RewardEncoder
    batch_tokens: int

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        encoded = [
            self._encode_group(p.messages, group) for p, group in zip(prompts, groups, strict=True)
        ]
        rows = [row for group in encoded if not isinstance(group, NoVerdict) for row in group]
        scores = iter(self._scores(rows))
        return [
            group if isinstance(group, NoVerdict) else finite([next(scores) for _ in group])
            for group in encoded
        ]

    def _encode_group(
        self, messages: Sequence[Message], group: Sequence[str]
    ) -> list[Encoded] | NoVerdict:
        if not all(text.strip() for text in group):
            return EMPTY
        try:
            rows = [self.encoder.encode(messages, text) for text in group]
        except TemplateError:
            return REFUSED
        fitting = [row for row in rows if row is not None]
        return fitting if len(fitting) == len(rows) else TOO_LONG

    def _scores(self, rows: Sequence[Encoded]) -> list[float]:
        """Scores in the order of `rows`, computed longest batch first, so that running out of memory shows at once."""
        scores = [math.nan] * len(rows)
        for batch in token_batches([len(row.ids) for row in rows], self.batch_tokens):
            for index, value in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                scores[index] = value
        return scores

    def _forward(self, rows: Sequence[Encoded]) -> list[float]:
        import torch

        with padding_token(self.model.config.get_text_config(), rows) as pad:
            if pad is None:
                raise JudgeError(
                    f"reward model {self.name!r} has no padding token and these answers use its whole "
                    "vocabulary; set pad_token_id in its config.json, or lower batch_tokens"
                )
            with torch.inference_mode():
                logits_B = self.model(**padded(rows, pad, self.model.device)).logits.squeeze(-1)
        return [float(value) for value in logits_B.float().tolist()]


@dataclass(frozen=True)
class _OpenEmbeddingHead:
    """A linear head over embeddings of an answer's beginning, so no answer is too long."""

    head: EmbeddingHead
    embedder: Embedder

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        nonempty = [all(text.strip() for text in group) for group in groups]
        rows = [
            (prompt.messages, text)
            for prompt, group, has_texts in zip(prompts, groups, nonempty, strict=True)
            if has_texts
            for text in group
        ]
        scores = iter(
            self.head.score(self.embedder, [turns for turns, _ in rows], [text for _, text in rows])
            if rows
            else ()
        )
        return [
            finite([next(scores) for _ in group]) if has_texts else EMPTY
            for group, has_texts in zip(groups, nonempty, strict=True)
        ]


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in batches, longest first, with count x longest within `budget` tokens.

    A row longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _load_model(name: str, dtype: str) -> Any:
    """Load the classifier, after checking that its one output was trained."""
    config = _from_pretrained("AutoConfig", name)
    if config.num_labels != 1:
        raise JudgeError(
            f"reward model {name!r} has num_labels = {config.num_labels}, but a score needs "
            "num_labels = 1; name a sequence classifier trained as a reward model"
        )
    model, info = _from_pretrained(
        "AutoModelForSequenceClassification",
        name,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    # transformers only warns here and draws the missing weights at random: scores would be noise.
    missing = sorted(info["missing_keys"])
    if missing:
        raise JudgeError(
            f"reward model {name!r} lacks trained weights for {', '.join(missing[:3])}; "
            "name a checkpoint saved as a sequence classifier"
        )
    return model


def _from_pretrained(kind: str, name: str, **options: Any) -> Any:
    """transformers' `kind`.from_pretrained(name), with its errors as JudgeError."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise JudgeError(
            f"reward model {name!r} cannot be loaded by {kind} ({reason(error)}); name a folder "
            "or Hub id with config, tokenizer and safetensors weights of a sequence classifier"
        ) from error
