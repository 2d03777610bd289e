"""Measures of a policy's held-out answers: score, win rate against the start, length, distinct-2, KL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from prefloop.data.text_distance import fold_whitespace
from prefloop.evaluate.win_rates import points, win_rate
from prefloop.records import Candidates, Response

ANSWER = "answer"
_WINS = ("win_rate", "win_rate_low", "win_rate_high")
ANSWER_MEASURES = ("distinct_2", "mean_length", "stop_rate", "kl", "score", *_WINS)
"""What `answer_measures` may give."""


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
        measures |= dict(zip(_WINS, (wins.value, wins.low, wins.high), strict=True))
    return measures


def set_measures(
    names: Sequence[str], groups: Sequence[Candidates], start: Sequence[Candidates], *, seed: int
) -> dict[str, float | None]:
    """`answer_measures` of each evaluation set by itself: "score_on_NAME". Its prompts' ids begin with "NAME:"."""
    found: dict[str, float | None] = {}
    for name in names:
        own = [group for group in groups if group.prompt.id.startswith(f"{name}:")]
        before = [group for group in start if group.prompt.id.startswith(f"{name}:")]
        measures = answer_measures(own, before, seed=seed)
        found |= {f"{measure}_on_{name}": value for measure, value in measures.items()}
    return found


def prompt_values(
    groups: Sequence[Candidates], start: Sequence[Candidates]
) -> dict[str, dict[str, float]]:
    """The measures of `answer_measures` that are means over prompts: each prompt's value, by measure and id."""
    before = {g.prompt.id: g.scores[ANSWER] for g in start if ANSWER in g.scores}
    values: dict[str, dict[str, float]] = {
        name: {} for name in ("score", "win_rate", "mean_length", "stop_rate")
    }
    for group in groups:
        name, answer = group.prompt.id, group.responses[ANSWER]
        values["stop_rate"][name] = float(answer.finish == "stop")
        if answer.token_ids:
            values["mean_length"][name] = float(len(answer.token_ids))
        score = group.scores.get(ANSWER)
        if score is None:
            continue
        values["score"][name] = score
        if name in before:
            values["win_rate"][name] = points(score, before[name])
    return values


def _kl(groups: Sequence[Candidates]) -> float | None:
    def weighted(ratings: Mapping[str, float], tokens: int) -> float:
        return (ratings["logprob"] - ratings["logprob_initial"]) * tokens

    rated = [g for g in groups if "logprob_initial" in g.ratings]
    lengths = [len(g.responses[ANSWER].token_ids) for g in rated]
    if not sum(lengths):
        return None
    return sum(weighted(g.ratings, n) for g, n in zip(rated, lengths, strict=True)) / sum(lengths)


def distinct_2(texts: Iterable[str]) -> float | None:
    """Distinct word bigrams over all bigrams of the whole set; None where no text has two words.

    After Li et al. (2016), arXiv:1510.03055, who divide by the number of words instead. Bigrams do not
    cross the end of a text. It falls as the set grows: compare sets of the same prompts only.
    """
    bigrams = [bigram for text in texts for bigram in pairwise(text.split())]
    return len(set(bigrams)) / len(bigrams) if bigrams else None


def mean_length(responses: Sequence[Response]) -> float | None:
    """Mean number of tokens, end-of-turn included; None where no response carries its tokens.

    A response without token ids was not sampled by an engine: its length is unknown, not 0.
    """
    lengths = [len(response.token_ids) for response in responses if response.token_ids]
    return sum(lengths) / len(lengths) if lengths else None


def stop_rate(responses: Sequence[Response]) -> float | None:
    """Share of responses that ended by themselves, not at the length limit; None where there are none."""
    if not responses:
        return None
    return sum(response.finish == "stop" for response in responses) / len(responses)


def no_verdict_rate(groups: Sequence[Candidates]) -> float | None:
    """Share of the answers on which the judge had no verdict: they are in no score and no win rate."""
    return sum(ANSWER not in g.scores for g in groups) / len(groups) if groups else None


def identical_rate(pairs: Iterable[tuple[str, str]]) -> float | None:
    """Share of (y, y') equal after whitespace folding; None where there are none (IAL App. B.4)."""
    identical = [fold_whitespace(first) == fold_whitespace(second) for first, second in pairs]
    return sum(identical) / len(identical) if identical else None
