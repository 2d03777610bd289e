"""The results of an annotation: win rate, figures by annotator, agreement, position bias."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import median
from typing import Any

from prefloop.annotate.items import Comparison
from prefloop.annotate.votes import Ballots, Vote
from prefloop.evaluate.agreement import cohen_kappa, krippendorff_alpha
from prefloop.evaluate.stats import Estimate, bootstrap_mean, clustered_mean

_POINTS = {"a": 1.0, "tie": 0.5, "b": 0.0}


def results(
    comparison: Comparison, ballots: Ballots, *, torn_bytes: int = 0, seed: int = 0
) -> dict[str, Any]:
    """All figures as JSON values; estimates are {value, low, high, count} with 95 % intervals, or None.

    A prompt's value is the mean over its votes of 1 for A, 1/2 for a tie, 0 for B, and the win rate is the mean
    over prompts, so that prompts with many votes weigh no more; intervals resample prompts. `with_identical`
    counts prompts with identical answers as ties, once all others have a vote. Skipped items are in no rate.
    """
    by_name = {name: list(ballots.votes(who).values()) for who, name in ballots.names.items()}
    votes = [vote for own in by_name.values() for vote in own]
    means = list(_by_prompt(votes).values())
    complete = len(means) == len(comparison.items)
    identical = [0.5] * comparison.identical
    return {
        "a": comparison.names["a"],
        "b": comparison.names["b"],
        "prompts": len(comparison.items),
        "identical": comparison.identical,
        "judged": len(means),
        "torn_bytes": torn_bytes,
        "everybody": _figures(votes, seed),
        "with_identical": _plain(bootstrap_mean([*means, *identical], seed=seed))
        if complete and identical
        else None,
        "annotators": {name: _figures(own, seed) for name, own in by_name.items()},
        "agreement": _agreement(by_name, seed),
    }


def _figures(votes: Sequence[Vote], seed: int) -> dict[str, Any]:
    decisions = [vote for vote in votes if vote.choice != "skip"]
    choices = Counter(vote.choice for vote in decisions)
    skipped = Counter(vote.reason for vote in votes if vote.choice == "skip")
    seconds = [vote.seconds for vote in votes if vote.seconds is not None]
    return {
        "win_rate": _plain(bootstrap_mean(list(_by_prompt(votes).values()), seed=seed)),
        "votes": len(decisions),
        "a": choices["a"],
        "tie": choices["tie"],
        "b": choices["b"],
        "first_wins": _plain(
            clustered_mean(
                [_first_wins(vote) for vote in decisions],
                [vote.item for vote in decisions],
                seed=seed,
            )
        ),
        "skipped": sum(skipped.values()),
        "reasons": dict(skipped),
        "median_seconds": median(seconds) if seconds else None,
    }


def _by_prompt(votes: Sequence[Vote]) -> dict[str, float]:
    """The mean of each prompt's votes, in points for A."""
    points: defaultdict[str, list[float]] = defaultdict(list)
    for vote in votes:
        if vote.choice != "skip":
            points[vote.item].append(_POINTS[vote.choice])
    return {item: sum(values) / len(values) for item, values in sorted(points.items())}


def _first_wins(vote: Vote) -> float:
    """1 where the answer shown first won, 1/2 for a tie, else 0."""
    return 0.5 if vote.choice == "tie" else float(vote.choice == vote.first)


def _agreement(by_name: Mapping[str, Sequence[Vote]], seed: int) -> dict[str, Any] | None:
    """Chance-corrected agreement on A, tie and B; None with fewer than two people or without common items."""
    labels: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name, votes in by_name.items():
        for vote in votes:
            if vote.choice != "skip":
                labels[vote.item][name] = vote.choice
    common = [unit for _, unit in sorted(labels.items()) if len(unit) > 1]
    people = sorted({name for unit in common for name in unit})
    if len(people) < 2:
        return None
    same = [x == y for unit in common for x, y in combinations(unit.values(), 2)]
    if len(people) == 2:
        measure = "Cohen's kappa"
        estimate = cohen_kappa(*([unit[name] for unit in common] for name in people), seed=seed)
    else:
        measure, estimate = "Krippendorff's alpha", krippendorff_alpha(common, seed=seed)
    return {
        "measure": measure,
        "estimate": _plain(estimate),
        "people": len(people),
        "items": len(common),
        "same": sum(same) / len(same),
    }


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate)
