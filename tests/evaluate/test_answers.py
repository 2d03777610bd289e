"""Measures of held-out answers, counted by hand."""

import pytest

from prefloop.evaluate.answers import ANSWER, ANSWER_MEASURES, answer_measures
from prefloop.records import Candidates, Finish, Message, Prompt, Response


def answered(
    name: str,
    text: str = "some words here",
    score: float | None = None,
    tokens: int = 4,
    finish: Finish = "stop",
    ratings: tuple[float, float] | None = None,
) -> Candidates:
    return Candidates(
        prompt=Prompt(id=name, messages=(Message(role="user", content="?"),)),
        responses={ANSWER: Response(text=text, token_ids=tuple(range(tokens)), finish=finish)},
        scores={} if score is None else {ANSWER: score},
        ratings=dict(zip(("logprob", "logprob_initial"), ratings, strict=True)) if ratings else {},
    )


def test_length_variety_and_endings_are_counted_over_all_answers() -> None:
    """Bigrams "a b", "b a", "a b": two of three; 4 and 8 tokens; one of two ended by itself."""
    found = answer_measures(
        [answered("p", "a b a"), answered("q", "a b", tokens=8, finish="length")], [], seed=0
    )
    assert found["distinct_2"] == pytest.approx(2 / 3)
    assert found["mean_length"] == 6
    assert found["stop_rate"] == 0.5


def test_a_win_is_against_the_starts_answer_to_the_same_prompt() -> None:
    """Win, tie, loss: 1.5 of 3, whatever the order of the start's answers."""
    now = [answered("p", score=3.0), answered("q", score=2.0), answered("r", score=0.0)]
    start = [answered("r", score=1.0), answered("p", score=1.0), answered("q", score=2.0)]
    found = answer_measures(now, start, seed=0)
    assert found["score"] == pytest.approx(5 / 3)
    assert found["win_rate"] == pytest.approx(0.5)
    low, high = found["win_rate_low"], found["win_rate_high"]
    assert low is not None
    assert high is not None
    assert 0 <= low < 0.5 < high <= 1
    assert found == answer_measures(now, start, seed=0)


def test_the_names_of_the_measures_are_those_that_are_measured() -> None:
    scored = [answered("p", score=1.0), answered("q", score=2.0)]
    assert sorted(answer_measures(scored, scored, seed=0)) == sorted(ANSWER_MEASURES)


def test_a_prompt_without_a_score_is_neither_won_nor_lost() -> None:
    """p has no score now and q none at the start: only r counts, and it is a win."""
    now = [answered("p"), answered("q", score=2.0), answered("r", score=4.0)]
    start = [answered("p", score=9.0), answered("q"), answered("r", score=1.0)]
    found = answer_measures(now, start, seed=0)
    assert found["win_rate"] == 1.0
    assert found["score"] == 3.0


def test_without_scores_there_is_no_score_and_no_win_rate() -> None:
    found = answer_measures([answered("p")], [answered("p")], seed=0)
    assert not {"score", "win_rate", "win_rate_low", "win_rate_high"} & found.keys()


def test_where_nothing_can_be_compared_there_is_a_score_but_no_win_rate() -> None:
    found = answer_measures([answered("p", score=2.0)], [answered("p")], seed=0)
    assert found["score"] == 2.0
    assert "win_rate" not in found


def test_kl_is_a_mean_over_tokens_not_over_answers() -> None:
    """1 nat a token over 2 tokens and 0 over 6: 2 nats by 8 tokens."""
    found = answer_measures(
        [
            answered("p", tokens=2, ratings=(-1.0, -2.0)),
            answered("q", tokens=6, ratings=(-1.0, -1.0)),
            answered("r", tokens=50),
        ],
        [],
        seed=0,
    )
    assert found["kl"] == pytest.approx(0.25)


def test_the_start_diverges_from_itself_by_nothing() -> None:
    start = [answered("p", score=1.0, ratings=(-1.5, -1.5))]
    found = answer_measures(start, start, seed=0)
    assert found["kl"] == 0.0
    assert found["win_rate"] == 0.5


def test_kl_is_unknown_without_log_probs() -> None:
    assert answer_measures([answered("p")], [], seed=0)["kl"] is None
