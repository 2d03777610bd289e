"""A language model's implicit reward as judge: how much likelier it made an answer than its reference does.

Shapes: T tokens of one answer, end-of-turn included unless the answer was cut off, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from prefloop.errors import JudgeError
from prefloop.judges import EMPTY, Judge, NoVerdict, OpenJudge, Verdict, finite
from prefloop.records import Prompt, Request, Response

if TYPE_CHECKING:
    from torch import Tensor

    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet
    from prefloop.judges import Initial

# Answers whose vocabulary-wide log-probs are kept until the initial policy, which may have to be loaded, has read them too.
_AT_ONCE = 16

UNMOVED = NoVerdict("the policy has not moved from its reference")


class Implicit(Judge):
    """Implicit reward beta (log pi(y|x) - log pi_ref(y|x)) of the policy against the initial policy, in nats.

    Rafailov et al. 2023 (arXiv:2305.18290, eq. 5 without the part that is the same for all answers); as
    judge of its own answers in SPA (Kim et al. 2024, arXiv:2406.04412, section 4).
    """

    beta: float = Field(default=0.1, gt=0.0)
    """Inverse temperature; it scales the scores and changes no order."""
    decoupled: float = Field(default=0.0, ge=0.0)
    """SPA's de-coupled policy: softmax of (1 + a) logits - a reference logits in the policy's place; 0 is the policy."""
    model: str | None = None
    """Folder, Hub id or embedded:NAME of a model in the policy's place, such as one that DPO trained."""
    reference: str | None = None
    """The model's reference, which must share its tokenizer; null is the initial policy."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> Implicit:
        if (self.model is None) != (self.reference is None):
            raise ValueError(
                "judge.model and judge.reference belong together; give both, or neither for the policy"
            )
        return self

    @property
    def needs_policy(self) -> bool:
        """Unless two other models are compared."""
        return self.model is None

    @property
    def needs_moved_policy(self) -> bool:
        """Unless two other models are compared."""
        return self.needs_policy

    @property
    def sources(self) -> dict[str, str]:
        """The two other models."""
        given = {"model": self.model, "reference": self.reference}
        return {option: source for option, source in given.items() if source is not None}

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """JudgeError where there is no policy, or no initial one to compare it with."""
        if self.model is not None and self.reference is not None:
            from prefloop.generate.hf_engine import open_engine

            policy, initial = open_engine(self.model), _always(open_engine(self.reference))
        if policy is None or initial is None:
            raise JudgeError(
                "judge 'implicit' compares the policy with the initial one, but no policy is loaded "
                "here; name judge.model and judge.reference, or choose another judge"
            )
        return _OpenImplicit(policy, initial, self.beta, self.decoupled, self.needs_policy)


@dataclass(frozen=True)
class _OpenImplicit:
    policy: Engine
    initial: Callable[[], AbstractContextManager[Engine]]
    beta: float
    decoupled: float
    own_tokens: bool
    """Whether sampled tokens are the policy's own; other models read the texts in tokens of theirs."""

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        return self.score_sampled(prompts, [[Response(text=text) for text in g] for g in groups])

    def score_sampled(
        self, prompts: Sequence[Prompt], groups: Sequence[Sequence[Response]]
    ) -> list[Verdict]:
        judged = [bool(group) and all(r.text.strip() for r in group) for group in groups]
        asks, answers = list[Request](), list[Response]()
        for prompt, group, fine in zip(prompts, groups, judged, strict=True):
            if fine:
                asks += [Request(messages=prompt.messages)] * len(group)
                answers += group
        if not self.own_tokens:
            answers = [answer.model_copy(update={"token_ids": ()}) for answer in answers]
        ratios = iter(self._ratios(asks, answers) if asks else ())
        return [
            self._verdict([next(ratios) for _ in group]) if fine else EMPTY
            for group, fine in zip(groups, judged, strict=True)
        ]

    def _verdict(self, ratios: Sequence[float]) -> Verdict:
        # Exactly 0 for all happens only before the first update; a tie would be a made-up score.
        return finite([self.beta * ratio for ratio in ratios]) if any(ratios) else UNMOVED

    def _ratios(self, asks: Sequence[Request], answers: Sequence[Response]) -> Iterator[float]:
        """log pi(y|x) - log pi_ref(y|x) of each answer, summed over its tokens."""
        if self.decoupled:
            asked = list(zip(asks, answers, strict=True))
            for start in range(0, len(asked), _AT_ONCE):
                yield from self._decoupled(asked[start : start + _AT_ONCE])
            return
        now = self.policy.score(asks, answers)
        with self.initial() as reference:
            before = reference.score(asks, answers)
        for mine, theirs in zip(now, before, strict=True):
            yield sum(mine.logprobs) - sum(theirs.logprobs)

    def _decoupled(self, batch: Sequence[tuple[Request, Response]]) -> list[float]:
        now = [_log_softmax(self.policy, ask, answer) for ask, answer in batch]
        ratios = []
        with self.initial() as reference:
            for (ask, answer), (now_TV, ids) in zip(batch, now, strict=True):
                before_TV, theirs = _log_softmax(reference, ask, answer)
                if ids != theirs:
                    raise JudgeError(
                        "judge.reference reads the answers in other tokens than judge.model; "
                        "name two models with the same tokenizer"
                    )
                ratios.append(decoupled_ratio(now_TV, before_TV, ids, self.decoupled))
        return ratios


def decoupled_ratio(now_TV: Tensor, before_TV: Tensor, ids: Sequence[int], amount: float) -> float:
    """log pi~(y|x) - log pi_ref(y|x), pi~ = softmax((1 + amount) log pi - amount log pi_ref), in nats.

    `now_TV` and `before_TV`: log-probs of both models at each token of the answer `ids`.
    """
    import torch

    away_TV = ((1 + amount) * now_TV - amount * before_TV).log_softmax(dim=-1)
    picked = torch.tensor(ids, device=now_TV.device)[:, None]
    return float((away_TV - before_TV).gather(1, picked).sum())


def _log_softmax(engine: Any, ask: Request, answer: Response) -> tuple[Tensor, list[int]]:
    """Log-probs (T, V), float32, at each token of an answer, and its token ids; one answer at a time."""
    import torch

    from prefloop.generate.completion import completion_ids

    if not hasattr(engine, "model") or not hasattr(engine, "chat"):
        raise JudgeError(
            "judge.decoupled needs the whole vocabulary's log-probs, which this engine does not give; "
            "generate in process, or set judge.decoupled: 0"
        )
    prompt, ids = engine.chat.prompt_ids(ask.messages), completion_ids(engine.chat, ask, answer)
    ids_BT = torch.tensor([prompt + ids], device=engine.model.device)
    with torch.inference_mode():
        logits_TV = engine.model(input_ids=ids_BT, logits_to_keep=len(ids) + 1).logits[0, :-1]
    return logits_TV.float().log_softmax(dim=-1), ids


def _always(engine: Engine) -> Initial:
    @contextmanager
    def opened() -> Iterator[Engine]:
        yield engine

    return opened
