"""PairRM (Jiang et al. 2023, arXiv:2306.02561, LLM-Blender) on transformers' DeBERTa-v2.

Shapes: B ordered pairs, T tokens with padding, H hidden size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field
from safetensors import SafetensorError

from prefloop.errors import JudgeError
from prefloop.judges import ALONE, EMPTY, Judge, NoVerdict, OpenJudge, Verdict, finite
from prefloop.judges._device import chosen_device, put_on
from prefloop.judges.reward_model import token_batches
from prefloop.models.sources import reason
from prefloop.records import Message, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet
    from prefloop.judges import Initial

SOURCE, FIRST, SECOND, CANDIDATE = "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"
# One of these inside a text would start another segment, or end its own early.
_SPECIAL = re.compile(r"<\|(?:source|candidate[12]?)\|>|\[(?:CLS|SEP|PAD|UNK|MASK)\]")
# "coversation" is how the model was trained to read it.
_MULTI_TURN = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
_SOURCE_TOKENS = 1224
_ALL_TOKENS = 2048


class PairRM(Judge):
    """PairRM: compares answers two by two in both orders; the score is the mean log-odds of winning.

    A score is the mean over all answers j of (C_ij - C_ji), j = i counting as 0, as `rank` of llm_blender
    has it: for two answers, sigmoid(score) is the probability of being the better one.
    """

    model: str = "llm-blender/PairRM-hf"
    """Hub id or folder with its config, tokenizer and safetensors weights."""
    too_long: Literal["cut", "reject"] = "cut"
    """Texts above PairRM's lengths (question 1,224 tokens, all three 2,048) are cut at the end, as PairRM's
    own code does, or give no verdict."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Padded tokens compared at once; a single longer pair makes a batch of its own."""
    device: str = "auto"
    """"auto" is the first GPU, else the CPU."""

    @property
    def sources(self) -> dict[str, str]:
        """PairRM's folder or Hub id."""
        return {"model": self.model}

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """Load PairRM; JudgeError where that fails or the folder holds another model."""
        model, tokenizer = _load(self.model)
        put_on(model, chosen_device(self.device), "PairRM")
        return _OpenPairRM(model, tokenizer, self.too_long == "reject", self.batch_tokens)


class _Question(NamedTuple):
    """The texts in PairRM's format."""

    source: str
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class _OpenPairRM:
    model: Any
    tokenizer: Any
    rejects_long: bool
    batch_tokens: int

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        rows_by_group = [
            self._encode_group(p, group) for p, group in zip(prompts, groups, strict=True)
        ]
        logits = iter(
            self._logits(
                [row for rows in rows_by_group if isinstance(rows, dict) for row in rows.values()]
            )
        )
        return [
            finite(mean_log_odds({pair: next(logits) for pair in rows}, len(group)))
            if isinstance(rows, dict)
            else rows
            for rows, group in zip(rows_by_group, groups, strict=True)
        ]

    def _encode_group(
        self, prompt: Prompt, group: Sequence[str]
    ) -> dict[tuple[int, int], list[int]] | NoVerdict:
        """Token ids of each ordered pair of different answers; equal answers tie without a comparison."""
        question = question_of(prompt.messages, group)
        if not all(clean(text).strip() for text in group):
            return EMPTY
        if len(group) < 2:
            return ALONE
        source = self._encode(SOURCE, question.source)
        candidates = {
            prefix: [self._encode(prefix, text) for text in question.candidates]
            for prefix in (FIRST, SECOND)
        }
        max_candidate_tokens = (_ALL_TOKENS - min(len(source), _SOURCE_TOKENS)) // 2
        longest = max(map(len, candidates[FIRST]))
        if self.rejects_long and (len(source) > _SOURCE_TOKENS or longest > max_candidate_tokens):
            return NoVerdict("longer than PairRM's window")
        return {
            (i, j): self._cut(source, _SOURCE_TOKENS)
            + self._cut(candidates[FIRST][i], max_candidate_tokens)
            + self._cut(candidates[SECOND][j], max_candidate_tokens)
            for i, j in permutations(range(len(group)), 2)
            if question.candidates[i] != question.candidates[j]
        }

    def _encode(self, prefix: str, text: str) -> list[int]:
        """One segment's token ids: [CLS] prefix text [SEP]."""
        return list(self.tokenizer.encode(prefix + text, verbose=False))

    def _cut(self, ids: list[int], max_tokens: int) -> list[int]:
        return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]

    def _logits(self, rows: Sequence[list[int]]) -> list[float]:
        """Log-odds for each row that its first candidate is better."""
        import torch

        logits = [math.nan] * len(rows)
        for batch in token_batches([len(row) for row in rows], self.batch_tokens):
            width = len(rows[batch[0]])
            pad = self.model.config.pad_token_id
            ids_BT = torch.tensor([rows[n] + [pad] * (width - len(rows[n])) for n in batch])
            mask_BT = torch.tensor(
                [[1] * len(rows[n]) + [0] * (width - len(rows[n])) for n in batch]
            )
            with torch.inference_mode():
                logits_B = self.model(ids_BT.to(self.model.device), mask_BT.to(self.model.device))
            for n, value in zip(batch, logits_B.float().tolist(), strict=True):
                logits[n] = value
        return logits


def mean_log_odds(logits: dict[tuple[int, int], float], size: int) -> tuple[float, ...]:
    """Mean over j of (C_ij - C_ji) for each i of `size`; a missing pair counts as 0."""
    return tuple(
        math.fsum(logits.get((i, j), 0.0) - logits.get((j, i), 0.0) for j in range(size) if j != i)
        / size
        for i in range(size)
    )


def question_of(messages: Sequence[Message], group: Sequence[str]) -> _Question:
    """A single user turn unchanged; several turns in PairRM's multi-turn format, with the earlier answers.

    PairRM has no system role: a system turn is put before the user turn that follows it.
    """
    turns: list[list[str]] = [[""]]
    for message in messages:
        text = clean(message.content)
        if message.role == "assistant":
            turns[-1].append(text)
            turns.append([""])
        else:
            turns[-1][0] = f"{turns[-1][0]}\n\n{text}" if turns[-1][0] else text
    answers = [clean(text) for text in group]
    if len(turns) == 1:
        return _Question(turns[0][0], tuple(answers))
    source = _MULTI_TURN + "\n".join(
        f"USER: {turn[0]}\nAssistant: <Response {n}>" for n, turn in enumerate(turns, start=1)
    )
    before = "".join(f"<Response {n}>: {turn[1]}\n" for n, turn in enumerate(turns[:-1], start=1))
    return _Question(source, tuple(f"{before}<Response {len(turns)}>: {text}" for text in answers))


def clean(text: str) -> str:
    """The text without PairRM's special strings; repeated, as removing one can create another."""
    while (shorter := _SPECIAL.sub("", text)) != text:
        text = shorter
    return text


def _load(name: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = _network().from_pretrained(
            name, use_safetensors=True, output_loading_info=True
        )
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        AttributeError,
        SafetensorError,
    ) as error:
        raise JudgeError(
            f"PairRM {name!r} cannot be loaded ({reason(error)}); name the Hub id "
            "llm-blender/PairRM-hf or a folder with a copy of it"
        ) from error
    # Unexpected keys are harmless: old checkpoints hold buffers such as position_ids.
    missing = sorted(info["missing_keys"])
    ids = tokenizer.convert_tokens_to_ids([SOURCE, FIRST, SECOND])
    expected = [
        getattr(model.config, f"{part}_prefix_id", None) for part in ("source", "cand1", "cand2")
    ]
    if missing or ids != expected:
        problem = (
            f"weights {', '.join(missing[:3])}"
            if missing
            else f"prefix tokens {ids}, not {expected}"
        )
        raise JudgeError(
            f"{name!r} is not PairRM ({problem}); name llm-blender/PairRM-hf or a folder with a copy of it"
        )
    return model.eval(), tokenizer


def _network() -> type[Any]:
    """The architecture of PairRM-hf; inside a function because it brings torch and transformers."""
    import torch
    from transformers import DebertaV2Config, DebertaV2Model, PreTrainedModel

    class PairRMNetwork(PreTrainedModel):  # type: ignore[no-untyped-call]
        config_class = DebertaV2Config
        base_model_prefix = "pretrained_model"

        def __init__(self, config: DebertaV2Config) -> None:
            super().__init__(config)
            nn, width = torch.nn, config.hidden_size
            dropout = getattr(config, "drop_out", 0.05)
            self.pretrained_model = DebertaV2Model(config)
            self.head_layer = nn.Sequential(
                nn.Dropout(dropout),
                nn.Linear(2 * width, width),
                nn.Tanh(),
                nn.Dropout(dropout),
                nn.Linear(width, 1),
            )
            self.post_init()  # type: ignore[no-untyped-call]

        def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
            """Log-odds (B,) that the first candidate is better."""
            hidden_BTH = self.pretrained_model(ids_BT, attention_mask=mask_BT).last_hidden_state
            config = self.config
            source_BH, first_BH, second_BH = (
                # Exactly one per row, as `clean` removes them from the texts.
                hidden_BTH[ids_BT == prefix]
                for prefix in (
                    config.source_prefix_id,
                    config.cand1_prefix_id,
                    config.cand2_prefix_id,
                )
            )
            scores: list[Tensor] = [
                self.head_layer(torch.cat([source_BH, candidate_BH], dim=-1)).squeeze(-1)
                for candidate_BH in (first_BH, second_BH)
            ]
            return scores[0] - scores[1]

    return PairRMNetwork
