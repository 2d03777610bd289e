"""A reward model as judge: any sequence classifier with one output, from a folder or the Hub.

Shapes: B responses in a batch, T tokens with padding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError
from pydantic import Field
from safetensors import SafetensorError

from prefloop.errors import JudgeError
from prefloop.rank import Judge, NoVerdict, OpenJudge, Verdict
from prefloop.records import Message, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet
    from prefloop.rank import Initial

logger = logging.getLogger(__name__)

TOO_LONG = NoVerdict("longer than the reward model's window")
REFUSED = NoVerdict("the reward model's chat template refuses the conversation")
EMPTY = NoVerdict("empty response")
NOT_FINITE = NoVerdict("score is not finite")


class RewardModel(Judge):
    """Scalar of a Bradley-Terry reward model (Ouyang et al. 2022, arXiv:2203.02155, section 3.5)."""

    model: str
    """Hub id or folder of a sequence classifier with one label; safetensors weights only."""
    max_length: int = Field(default=4096, ge=1)
    """Tokens of question and answer together; the model's own window may be shorter. Never truncated."""
    batch_tokens: int = Field(default=16384, ge=1)
    """Padded tokens scored at once; a single longer conversation makes a batch of its own."""
    device: str = "auto"
    """"auto" is the first GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is the checkpoint's own on a GPU, float32 on the CPU."""

    @property
    def sources(self) -> dict[str, str]:
        """The reward model."""
        return {"model": self.model}

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """Load model and tokenizer; JudgeError where that fails or the model gives no single score."""
        import torch

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self.dtype
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        model = _load_model(self.model, dtype)
        tokenizer = _part("AutoTokenizer", self.model)
        try:
            model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            raise JudgeError(
                f"reward model {self.model!r} cannot be put on device {device!r} "
                f"({_first_line(error)}); choose another device for this judge"
            ) from error
        if not tokenizer.chat_template:
            logger.warning(
                "reward model %r has no chat template; question and answer are encoded as a plain pair",
                self.model,
            )
        return _OpenRewardModel(
            name=self.model,
            model=model,
            tokenizer=tokenizer,
            own_pad=model.config.get_text_config().pad_token_id,
            window=_window(self.max_length, model.config.get_text_config(), tokenizer),
            batch_tokens=self.batch_tokens,
        )


class _Encoded(NamedTuple):
    """One conversation in tokens; `types` are BERT's segment ids where the model has them."""

    ids: list[int]
    types: list[int] | None


@dataclass(frozen=True)
class _OpenRewardModel:
    name: str
    model: Any
    tokenizer: Any
    own_pad: int | None
    window: int
    batch_tokens: int

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        encoded = [
            self._encode_group(p.messages, group) for p, group in zip(prompts, groups, strict=True)
        ]
        rows = [row for group in encoded if not isinstance(group, NoVerdict) for row in group]
        scores = iter(self._scores(rows))
        return [
            group if isinstance(group, NoVerdict) else _verdict([next(scores) for _ in group])
            for group in encoded
        ]

    def _encode_group(
        self, messages: Sequence[Message], group: Sequence[str]
    ) -> list[_Encoded] | NoVerdict:
        if not all(text.strip() for text in group):
            return EMPTY
        encode = self._conversation if self.tokenizer.chat_template else self._plain_pair
        try:
            rows = [encode(messages, text) for text in group]
        except TemplateError:
            return REFUSED
        return rows if all(len(row.ids) <= self.window for row in rows) else TOO_LONG

    def _conversation(self, messages: Sequence[Message], text: str) -> _Encoded:
        turns = [*messages, Message(role="assistant", content=text)]
        # Sanitized: an answer that spells the model's end-of-turn token cannot end its own turn.
        ids = self.tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            return_dict=False,
            sanitize_control_tokens=True,
        )
        return _Encoded(list(ids), None)

    def _plain_pair(self, messages: Sequence[Message], text: str) -> _Encoded:
        """(question, answer), as OpenAssistant's reward-model-deberta-v3-large-v2 takes them."""
        question = "\n\n".join(message.content for message in messages)
        pair = self.tokenizer(question, text, split_special_tokens=True)
        has_types = getattr(self.model.config, "type_vocab_size", 0) > 1
        return _Encoded(list(pair["input_ids"]), pair.get("token_type_ids") if has_types else None)

    def _scores(self, rows: Sequence[_Encoded]) -> list[float]:
        """Scores in the order of `rows`, computed longest batch first: out of memory shows at once."""
        scores = [math.nan] * len(rows)
        for batch in token_batches([len(row.ids) for row in rows], self.batch_tokens):
            for index, value in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                scores[index] = value
        return scores

    def _forward(self, rows: Sequence[_Encoded]) -> list[float]:
        import torch

        def padded(lists: Sequence[Sequence[int]], value: int) -> Tensor:
            width = max(map(len, lists))
            return torch.tensor(
                [[*ids, *[value] * (width - len(ids))] for ids in lists], device=self.model.device
            )

        inputs_BT = {
            "input_ids": padded([row.ids for row in rows], self._pad_id(rows)),
            "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        }
        types = [row.types for row in rows if row.types is not None]
        if types:
            inputs_BT["token_type_ids"] = padded(types, 0)
        with torch.inference_mode():
            logits_B = self.model(**inputs_BT).logits.squeeze(-1)
        return [float(value) for value in logits_B.float().tolist()]

    def _pad_id(self, rows: Sequence[_Encoded]) -> int:
        """The model's padding token; where it has none, a token that these rows do not contain.

        Decoders score the last token that is not padding and find it by its id. To pad with the
        end-of-turn token, as is common, would move the score to the token before it.
        """
        if self.own_pad is not None and self.own_pad >= 0:
            return self.own_pad
        config = self.model.config.get_text_config()
        used = {token for row in rows for token in row.ids}
        free = next((token for token in range(config.vocab_size) if token not in used), None)
        if free is None:
            raise JudgeError(
                f"reward model {self.name!r} has no padding token and these answers use its whole "
                "vocabulary; set pad_token_id in its config.json, or lower batch_tokens"
            )
        config.pad_token_id = free
        return free


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in batches, longest first, with count x longest within `budget` tokens.

    A row that alone exceeds the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _verdict(scores: Sequence[float]) -> Verdict:
    return tuple(scores) if all(map(math.isfinite, scores)) else NOT_FINITE


def _load_model(name: str, dtype: str) -> Any:
    """The classifier, once it is certain that its one output was trained."""
    config = _part("AutoConfig", name)
    if config.num_labels != 1:
        raise JudgeError(
            f"reward model {name!r} has num_labels = {config.num_labels}, but a score needs "
            "num_labels = 1; name a sequence classifier trained as a reward model"
        )
    model, info = _part(
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


def _part(kind: str, name: str, **options: Any) -> Any:
    """`kind`.from_pretrained(name), its many failures turned into one sentence."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise JudgeError(
            f"reward model {name!r} cannot be loaded by {kind} ({_first_line(error)}); name a folder "
            "or Hub id with config, tokenizer and safetensors weights of a sequence classifier"
        ) from error


def _window(max_length: int, config: Any, tokenizer: Any) -> int:
    """Tokens that fit: the least of the option, the model's positions and the tokenizer's limit."""
    positions = getattr(config, "max_position_embeddings", None) or max_length
    return int(min(max_length, positions, tokenizer.model_max_length))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".:")
