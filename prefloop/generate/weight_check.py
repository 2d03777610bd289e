"""Whether an engine answers with the weights that the trainer has: the same log-probs of a few known answers.

Peers trained on for rounds while their generator kept the first weights; nothing else shows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prefloop.generate.engine import Engine
from prefloop.records import Message, Request, Response

TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15, "float16": 0.03}
"""Mean absolute difference of a token's log-probs (nats) that rounding may explain, by the weights' dtype."""

# Ordinary text, and some that no model expects: the first moves with training, the second tells models apart.
_DIALOGUES = (
    (
        "Why is the sky blue?",
        "Sunlight is scattered by the air, and blue light is scattered more than red, because its "
        "waves are shorter. That is why the whole sky looks blue by day.",
    ),
    (
        "Write one sentence about rivers.",
        "Rivers carry water from the mountains to the sea, and towns grew along them because they "
        "gave people food, drink and a way to travel.",
    ),
    (
        "What is 17 times 23? Explain.",
        "17 times 20 is 340, and 17 times 3 is 51. Together that makes 391. Quartz jigs vex 8 bold "
        "sphinx folk; the umbrella sings in B flat.",
    ),
)


def probe(engine: Engine) -> list[float]:
    """Log-probs (nats) of every token of the known answers."""
    requests = [
        Request(messages=(Message(role="user", content=question),)) for question, _ in _DIALOGUES
    ]
    scored = engine.score(requests, [Response(text=answer) for _, answer in _DIALOGUES])
    return [logprob for answer in scored for logprob in answer.logprobs]


def mismatch(
    engine: Sequence[float], trainer: Sequence[float], before: Sequence[float] | None, dtype: str
) -> str | None:
    """Why the engine cannot have the trainer's weights, or None.

    All are log-probs of the same tokens; `before` are the trainer's of the weights that the engine had
    before. With d = trainer - before and e = engine - before, the least-squares c in e = c d is 1 for new
    weights and 0 for stale ones. It is used where its standard error is small enough to tell them apart:
    that finds stale weights also where the rounding of low precision hides them from the tolerance.
    """
    distance = _mean_distance(engine, trainer)
    tolerance = TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
    # Written so that NaN is a mismatch.
    if not distance <= tolerance:
        return (
            f"its log-probs of known answers are {distance:.3g} nats a token away from the trainer's, "
            f"more than the {tolerance:g} that {dtype} explains"
        )
    if before is not None and _is_stale(engine, trainer, before):
        return "its log-probs of known answers are still those of the weights before"
    return None


def _is_stale(engine: Sequence[float], trainer: Sequence[float], before: Sequence[float]) -> bool:
    moved = [t - b for t, b in zip(trainer, before, strict=True)]
    seen = [e - b for e, b in zip(engine, before, strict=True)]
    square = math.fsum(d * d for d in moved)
    if square == 0.0:
        return False
    c = math.fsum(d * e for d, e in zip(moved, seen, strict=True)) / square
    noise = math.fsum((e - c * d) ** 2 for d, e in zip(moved, seen, strict=True)) / len(moved)
    return c < 0.5 and math.sqrt(noise / square) < 0.1


def _mean_distance(first: Sequence[float], second: Sequence[float]) -> float:
    return math.fsum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(first)
