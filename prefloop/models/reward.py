"""A reward model: the head that scores an embedding, and how an encoder reads a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from prefloop.errors import ModelError
from prefloop.manifest import Manifest
from prefloop.models.chat_template import dated
from prefloop.records import Message

if TYPE_CHECKING:
    from torch import Tensor

    from prefloop.models.embedding import Embedder


Array = NDArray[np.float32]

MODEL_TYPE = "prefloop_embedding_head"

_WEIGHTS = "model.safetensors"
REPORT = "report.json"
"""What a finished `prefloop reward train` leaves last."""


def reward_manifest(folder: Path) -> Manifest:
    """What a finished reward training says of itself, and of its files."""
    return Manifest(
        folder / REPORT, f"delete {folder}, and the same prefloop reward train makes it again"
    )


def verify_reward(name: str) -> None:
    """RunFolderError where a reward model of ours is not as it was trained; others vouch for nothing."""
    folder = Path(name).expanduser()
    if (folder / REPORT).is_file() and (folder / "recipe.yaml").is_file():
        reward_manifest(folder).verify()


@dataclass(frozen=True)
class EmbeddingHead:
    """A weight for each feature, and where the embeddings come from."""

    source: str
    """The encoder: a folder, Hub id or "embedded:minilm"; it is not copied into the head's folder."""
    max_length: int
    """Tokens of a question (its last ones) and of an answer (its first ones) that are read."""
    weights_F: Array

    def save(self, folder: Path) -> None:
        """Write config.json and safetensors; the configuration last, for it says that the head is whole."""
        save_file({"weights": self.weights_F}, folder / _WEIGHTS)
        config = {
            "model_type": MODEL_TYPE,
            "source": self.source,
            "max_length": self.max_length,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    def score(
        self, embedder: Embedder, questions: Sequence[Sequence[Message]], answers: Sequence[str]
    ) -> list[float]:
        """One score an answer; a difference of two is the log-odds of being better."""
        features_NF = features(embedder, questions, answers, self.max_length)
        return [float(score) for score in features_NF @ self.weights_F]


def load_head(name: str) -> EmbeddingHead | None:
    """The head in a folder; None where the folder, or whatever `name` is, holds another kind of model.

    Raises ModelError for a head that is damaged.
    """
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        return None
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
            return None
        weights = load_file(path.with_name(_WEIGHTS))["weights"]
        return EmbeddingHead(str(config["source"]), int(config["max_length"]), weights)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the reward model in {name} is damaged ({error}); train it again"
        ) from error


def features(
    embedder: Embedder,
    questions: Sequence[Sequence[Message]],
    answers: Sequence[str],
    max_length: int,
) -> Array:
    """(N, F): e_y, e_x * e_y, |e_x - e_y|, their cosine and log(1 + characters), each scaled to about unit size.

    Every text is embedded once, however many rows share it.
    """
    texts = ["\n\n".join(message.content for message in turns) for turns in questions]
    x_NH = _embedded(embedder, texts, -max_length)
    y_NH = _embedded(embedder, answers, max_length)
    size = y_NH.shape[1] if len(answers) else 1
    cosine_N1 = (x_NH * y_NH).sum(axis=1, keepdims=True)
    length_N1 = np.log1p([[len(answer)] for answer in answers])
    return np.concatenate(
        [
            y_NH * size**0.5,
            x_NH * y_NH * size / 3,
            np.abs(x_NH - y_NH) * size**0.5 / 1.2,
            cosine_N1 * 3,
            length_N1 / 1.5,
        ],
        axis=1,
    ).astype(np.float32)


def _embedded(embedder: Embedder, texts: Sequence[str], window: int) -> Array:
    different = list(dict.fromkeys(texts))
    vectors = dict(zip(different, embedder.embed(different, cut=window), strict=True))
    return np.array([vectors[text] for text in texts], dtype=np.float32)


# Of a window that question and answer overfill, the least share that the question keeps.
_QUESTION_SHARE = 0.25


class Encoded(NamedTuple):
    """One conversation in tokens; `types` are BERT's segment ids where the model has them."""

    ids: list[int]
    types: list[int] | None


@dataclass(frozen=True)
class RewardEncoder:
    """Encodes conversations with the tokenizer's chat template, or as a plain pair where it has none."""

    tokenizer: Any
    segments: bool
    """Whether the model has segment ids."""
    window: int
    """Tokens of question and answer together."""
    cut: bool
    """Whether what exceeds the window is cut: of a template's tokens the first ones; of a plain pair the
    question's first ones, down to a quarter of the window, then the answer's last ones."""

    def encode(self, messages: Sequence[Message], answer: str) -> Encoded | None:
        """None where it does not fit and is not to be cut. Raises jinja2.TemplateError."""
        if self.tokenizer.chat_template:
            return self._conversation(messages, answer)
        return self._plain_pair(messages, answer)

    def _conversation(self, messages: Sequence[Message], answer: str) -> Encoded | None:
        turns = [*messages, Message(role="assistant", content=answer)]
        # Sanitized: an answer that spells the model's end-of-turn token cannot end its own turn.
        ids = list(
            self.tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in turns],
                chat_template=dated(self.tokenizer.get_chat_template()),
                return_dict=False,
                sanitize_control_tokens=True,
            )
        )
        if len(ids) <= self.window:
            return Encoded(ids, None)
        return Encoded(ids[-self.window :], None) if self.cut else None

    def _plain_pair(self, messages: Sequence[Message], answer: str) -> Encoded | None:
        """(question, answer), as OpenAssistant's reward-model-deberta-v3-large-v2 takes them."""
        question = "\n\n".join(message.content for message in messages)
        pair = self._pair(question, answer)
        if len(pair.ids) <= self.window:
            return pair
        if not self.cut:
            return None
        room = self.window - self.tokenizer.num_special_tokens_to_add(pair=True)
        pair = self._pair(*self._cut(question, answer, room))
        while room and (over := len(pair.ids) - self.window) > 0:
            # What is left of a word that was cut can need more tokens than it had in the whole word.
            room = max(0, room - over)
            pair = self._pair(*self._cut(question, answer, room))
        return pair

    def _pair(self, question: str, answer: str) -> Encoded:
        # verbose: the tokenizer's own limit is not the window; we look ourselves.
        pair = self.tokenizer(question, answer, split_special_tokens=True, verbose=False)
        types = pair.get("token_type_ids") if self.segments else None
        return Encoded(list(pair["input_ids"]), types)

    def _cut(self, question: str, answer: str, room: int) -> tuple[str, str]:
        least = int(room * _QUESTION_SHARE)
        question_ends, answer_ends = self._ends(question), self._ends(answer)
        kept = min(len(answer_ends), room - min(len(question_ends), least))
        answer = answer[: answer_ends[kept - 1][1]] if kept else ""
        begins = [*(begin for begin, _ in question_ends), len(question)]
        first = len(question_ends) - (room - kept)
        return (question[begins[first] :] if first > 0 else question), answer

    def _ends(self, text: str) -> list[tuple[int, int]]:
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        return list(encoded["offset_mapping"])


def window_of(max_length: int, config: Any, tokenizer: Any) -> int:
    """Tokens that fit: the least of `max_length`, the model's positions and the tokenizer's limit."""
    positions = getattr(config, "max_position_embeddings", None) or max_length
    return int(min(max_length, positions, tokenizer.model_max_length))


def has_segments(model: Any) -> bool:
    """Whether a model tells the question from the answer by segment ids, as BERT does."""
    return getattr(model.config, "type_vocab_size", 0) > 1


# Where a model's config.json keeps what it was trained with.
CONFIG_KEY = "prefloop_reward"


def trained_with(config: Any) -> dict[str, Any]:
    """What `prefloop reward train` noted in the model's config; empty for any other model."""
    noted = getattr(config, CONFIG_KEY, None)
    return dict(noted) if isinstance(noted, dict) else {}


def free_token(config: Any, rows: Sequence[Encoded]) -> int | None:
    """A token of the vocabulary that these rows do not contain; None where they use all of it."""
    used = {token for row in rows for token in row.ids}
    return next((token for token in range(config.vocab_size) if token not in used), None)


@contextmanager
def padding_token(config: Any, rows: Sequence[Encoded]) -> Iterator[int | None]:
    """Inside, the token to pad these rows with; None where there is none left.

    Decoders score the last token that is not padding and find it by its id. To pad with the end-of-turn
    token, as is common, would move the score to the token before it; so where the model has no padding
    token, one that these rows do not contain is lent to it.
    """
    own = config.pad_token_id
    token = own if own is not None and own >= 0 else free_token(config, rows)
    config.pad_token_id = token
    try:
        yield token
    finally:
        config.pad_token_id = own


def padded(rows: Sequence[Encoded], pad: int, device: Any) -> dict[str, Tensor]:
    """The model's input: `input_ids`, `attention_mask` and, where the rows have them, `token_type_ids`, (B, T)."""
    import torch

    def table(lists: Sequence[Sequence[int]], value: int) -> Tensor:
        width = max(map(len, lists))
        return torch.tensor([[*ids, *[value] * (width - len(ids))] for ids in lists], device=device)

    inputs_BT = {
        "input_ids": table([row.ids for row in rows], pad),
        "attention_mask": table([[1] * len(row.ids) for row in rows], 0),
    }
    types = [row.types for row in rows if row.types is not None]
    if types:
        inputs_BT["token_type_ids"] = table(types, 0)
    return inputs_BT
