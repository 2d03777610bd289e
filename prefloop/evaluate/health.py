"""Signs of collapse in what a policy writes, and the guards that read them. All functions are pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from operator import ge, le
from typing import Protocol

from prefloop.data.text_distance import fold_whitespace
from prefloop.records import Response


class GuardOptions(Protocol):
    """Where a run counts as collapsing; None switches one guard off."""

    @property
    def max_kl(self) -> float | None:
        """Highest KL divergence from the initial policy, nats per token."""
        ...

    @property
    def min_distinct2(self) -> float | None:
        """Lowest distinct-2, as a share of the initial policy's."""
        ...

    @property
    def min_stop_rate(self) -> float | None:
        """Lowest share of answers that end by themselves."""
        ...

    @property
    def max_identical_rate(self) -> float | None:
        """Highest share of prompts with y' = y."""
        ...


def distinct_2(texts: Iterable[str]) -> float | None:
    """Distinct word bigrams over all bigrams of the whole set; None where no text has two words.

    After Li et al. (2016), arXiv:1510.03055, who divide by the number of words instead. No bigram
    reaches over the end of a text. It falls as the set grows: compare sets of the same prompts only.
    """
    bigrams = [bigram for text in texts for bigram in pairwise(text.split())]
    return len(set(bigrams)) / len(bigrams) if bigrams else None


def mean_length(responses: Sequence[Response]) -> float | None:
    """Mean number of tokens, end-of-turn included; None where no response carries its tokens.

    A response without tokens was not sampled by an engine, so its length is unknown, not 0.
    """
    lengths = [len(response.token_ids) for response in responses if response.token_ids]
    return sum(lengths) / len(lengths) if lengths else None


def stop_rate(responses: Sequence[Response]) -> float | None:
    """Share of responses that ended by themselves, not at the length limit; None where there are none."""
    if not responses:
        return None
    return sum(response.finish == "stop" for response in responses) / len(responses)


def identical_rate(pairs: Iterable[tuple[str, str]]) -> float | None:
    """Share of (y, y') equal after whitespace folding; None where there are none (IAL App. B.4)."""
    same = [fold_whitespace(first) == fold_whitespace(second) for first, second in pairs]
    return sum(same) / len(same) if same else None


def check_guards(
    measures: Mapping[str, float | None],
    start_measures: Mapping[str, float | None],
    options: GuardOptions,
) -> list[str]:
    """One sentence for each guard that the measures trip, against the initial policy's measures.

    Reads `kl` (nats/token), `distinct_2`, `stop_rate` and `identical_rate`. A measure that is missing
    or None trips nothing; one that is NaN trips its guard.
    """
    start, share = start_measures.get("distinct_2"), options.min_distinct2
    floor = None if start is None or share is None else share * start
    rules: list[tuple[str, float | None, Callable[[float, float], bool], str]] = [
        (
            "kl",
            options.max_kl,
            le,
            "KL from the initial policy is {:.3g} nats/token, above max_kl = {:.3g}",
        ),
        (
            "distinct_2",
            floor,
            ge,
            "distinct-2 is {:.3g}, below min_distinct2's share of the start: {:.3g}",
        ),
        (
            "stop_rate",
            options.min_stop_rate,
            ge,
            "{:.1%} of answers end by themselves, below min_stop_rate = {:.1%}",
        ),
        (
            "identical_rate",
            options.max_identical_rate,
            le,
            "{:.1%} of rewritten answers equal their draft, above max_identical_rate = {:.1%}",
        ),
    ]
    found = []
    for name, bound, holds, sentence in rules:
        value = measures.get(name)
        # Written as "does not hold" because a comparison with NaN is false either way round.
        if value is not None and bound is not None and not holds(value, bound):
            found.append(sentence.format(value, bound))
    return found
