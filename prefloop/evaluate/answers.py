"""What held-out answers say about a policy: score, win rate against the start, length, variety, divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefloop.evaluate.health import distinct_2, mean_length, stop_rate
from prefloop.evaluate.winrate import points, win_rate
from prefloop.records import Candidates

ANSWER = "answer"


def answer_measures(
    groups: Sequence[Candidates], start: Sequence[Candidates], *, seed: int
) -> dict[str, float | None]:
    """Measures of one policy's answers; `start` holds the initial policy's answers to the same prompts.

    `score` is the judge's mean, `win_rate` the share of prompts on which it beats the start (ties one half,
    95 % bootstrap interval in `win_rate_low` and `win_rate_high`). `kl` (nats per token) is the mean of
    log π − log π_initial over the tokens of answers sampled from π with the recipe's sampling: an
    estimate of KL(π‖π_initial) that is exact in expectation at temperature 1 only.
    """
    responses = [group.responses[ANSWER] for group in groups]
    measures: dict[str, float | None] = {
        "distinct_2": distinct_2(response.text for response in responses),
        "mean_length": mean_length(responses),
        "stop_rate": stop_rate(responses),
        "kl": _kl(groups),
    }
    scores = {group.prompt.id: group.scores[ANSWER] for group in groups if ANSWER in group.scores}
    if not scores:
        return measures
    before = {group.prompt.id: group.scores.get(ANSWER) for group in start}
    wins = win_rate(
        list(scores.values()), [before.get(name) for name in scores], seed=seed
    ).estimate
    measures["score"] = sum(scores.values()) / len(scores)
    if wins is not None:
        measures |= {"win_rate": wins.value, "win_rate_low": wins.low, "win_rate_high": wins.high}
    return measures


def prompt_values(
    groups: Sequence[Candidates], start: Sequence[Candidates]
) -> dict[str, dict[str, float]]:
    """The measures of `answer_measures` that are means over prompts: each prompt's value, by measure and id."""
    before = {g.prompt.id: g.scores[ANSWER] for g in start if ANSWER in g.scores}
    found: dict[str, dict[str, float]] = {
        name: {} for name in ("score", "win_rate", "mean_length", "stop_rate")
    }
    for group in groups:
        name, answer = group.prompt.id, group.responses[ANSWER]
        found["stop_rate"][name] = float(answer.finish == "stop")
        if answer.token_ids:
            found["mean_length"][name] = float(len(answer.token_ids))
        score = group.scores.get(ANSWER)
        if score is None:
            continue
        found["score"][name] = score
        if name in before:
            found["win_rate"][name] = points(score, before[name])
    return found


def _kl(groups: Sequence[Candidates]) -> float | None:
    def weighted(ratings: Mapping[str, float], tokens: int) -> float:
        return (ratings["logprob"] - ratings["logprob_initial"]) * tokens

    rated = [g for g in groups if "logprob_initial" in g.ratings]
    lengths = [len(g.responses[ANSWER].token_ids) for g in rated]
    if not sum(lengths):
        return None
    return sum(weighted(g.ratings, n) for g, n in zip(rated, lengths, strict=True)) / sum(lengths)
