"""Guards: limits on a round's measures that say that training has gone wrong, read beside the start's own values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from prefloop.recipe.options import GuardOptions
from prefloop.records import RoundResult

Measures = Mapping[str, float | None]


class _Guard(NamedTuple):
    """One limit on one measure."""

    option: str
    """The guard's option; of several measures under one option the first that is there is read."""
    measure: str
    worst: float
    """The end of the measure's scale that collapse goes to: 0 below, 1 or infinity above."""
    sentence: str
    """Ends in the value's name; the bound follows."""
    unit: str = ".1%"
    relative: bool = False
    """Whether the option is a share of the start's value; without a start only NaN then trips it."""


_GUARDS = (
    _Guard(
        "max_kl", "kl", math.inf, "KL from the initial policy is {} nats/token, above {}", ".3g"
    ),
    _Guard("min_distinct2", "distinct_2", 0.0, "distinct-2 is {}, below {}", ".3g", relative=True),
    _Guard("min_stop_rate", "stop_rate", 0.0, "{} of answers end by themselves, below {}"),
    _Guard(
        "max_identical_rate",
        "identical_rate",
        1.0,
        "{} of rewritten answers equal their draft, above {}",
    ),
    _Guard(
        "max_flaw_edit_share",
        "flaw_edit_share",
        1.0,
        "planted flaws change {} of the words, above {}",
    ),
    _Guard(
        "max_unseen_flaws",
        "flaw_unseen",
        1.0,
        "{} of flawed answers are as likely to the policy as what they were made from, above {}",
    ),
    _Guard("min_margin", "M", 0.0, "AROP's margin M is {}, below {}", ".3g", relative=True),
    _Guard("min_margin", "train_M", 0.0, "AROP's margin M of pairs is {}, below {}", ".3g", True),
)


def check_guards(measures: Measures, start: Measures, options: GuardOptions) -> list[str]:
    """A sentence for each guard that a policy's measures violate; `start` holds the initial policy's.

    A policy that is no worse than the start violates nothing. Where the start itself is beyond a limit, the
    policy must be worse by `options.slack`. A measure that is missing or None trips nothing; NaN trips its guard.
    """
    tripped, read = [], set()
    for guard in _GUARDS:
        value = measures.get(guard.measure)
        if value is None or guard.option in read:
            continue
        read.add(guard.option)
        before = start.get(guard.measure)
        before = None if before is None or math.isnan(before) else before
        bound = _bound(guard, getattr(options, guard.option), before, options.slack)
        if not _holds(guard, value, bound):
            tripped.append(_in_words(guard, value, bound, before, options))
    return tripped


def start_values(results: Sequence[RoundResult]) -> dict[str, float]:
    """The first number of each measure: the start's own, or that of round 0, whose pairs the start has made."""
    first: dict[str, float] = {}
    for result in results:
        for name, value in result.measures.items():
            if value is not None and not math.isnan(value):
                first.setdefault(name, value)
    return first


def _holds(guard: _Guard, value: float, bound: float) -> bool:
    """Whether a value has not passed its bound; NaN has."""
    return value <= bound if guard.worst else value >= bound


def _bound(guard: _Guard, limit: float, start: float | None, slack: float) -> float:
    """What the measure must not pass: the limit or, where the start is past that, a little more than the start."""
    if guard.relative:
        return -math.inf if start is None else limit * start
    if start is None or math.isinf(guard.worst) or _holds(guard, start, limit):
        return limit
    # Of the start's distance from the worst value all but `slack` must be left.
    return guard.worst + (start - guard.worst) * (1 - slack)


def _in_words(
    guard: _Guard, value: float, bound: float, start: float | None, options: GuardOptions
) -> str:
    limit = getattr(options, guard.option)
    unit = guard.unit
    named = f"{guard.option} = {limit:{'.3g' if guard.relative else unit}}"
    if guard.relative:
        named = f"{guard.option}'s share of the start"
        named += "" if start is None else f": {bound:{unit}}"
    elif bound != limit:
        named = f"what a start past {guard.option} allows: {bound:{unit}}"
    beside = "" if start is None or math.isinf(guard.worst) else f" (the start: {start:{unit}})"
    return guard.sentence.format(f"{value:{unit}}", named) + beside
