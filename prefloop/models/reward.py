"""A linear reward over frozen sentence embeddings of question and answer: trains in seconds, reads topic and tone.

Shapes: N answers, H numbers of an embedding, F = 3H + 2 features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from prefloop.errors import ModelError
from prefloop.records import Message

if TYPE_CHECKING:
    from prefloop.models.embedding import Embedder

Array = NDArray[np.float32]
MODEL_TYPE = "prefloop_embedding_head"
_WEIGHTS = "model.safetensors"


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
    place = Path(name).expanduser() / "config.json"
    if not place.is_file():
        return None
    try:
        config: Any = json.loads(place.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
            return None
        weights = load_file(place.with_name(_WEIGHTS))["weights"]
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
    asked = ["\n\n".join(message.content for message in turns) for turns in questions]
    x_NH = _embedded(embedder, asked, -max_length)
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
