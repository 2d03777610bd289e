"""The engine without a model keeps the promises that real engines make."""

import pytest

from prefloop.generate.engines.fake import FakeEngine
from prefloop.records import Message, Request, Response, Sampling


def ask(text: str, prefix: str = "") -> Request:
    return Request(messages=(Message(role="user", content=text),), prefix=prefix)


ASKS = [ask("Why?"), ask("Name two birds."), ask("Why?")]


def test_request_place_and_seed_decide_an_answer() -> None:
    engine = FakeEngine()
    first = engine.sample(ASKS, Sampling(), seed=1)
    assert first == FakeEngine().sample(ASKS, Sampling(), seed=1)
    assert first != engine.sample(ASKS, Sampling(), seed=2)
    assert first[0] != first[2], "the same question twice is two samples"
    assert engine.sample([ask("Why?", "Because ")], Sampling(), seed=1)[0] != first[0]


def test_greedy_decoding_ignores_the_seed() -> None:
    greedy = Sampling(temperature=0)
    assert FakeEngine().sample(ASKS, greedy, seed=1) == FakeEngine().sample(ASKS, greedy, seed=2)


def test_an_answer_ends_within_the_limit_with_end_of_turn() -> None:
    for response in FakeEngine().sample(ASKS, Sampling(max_new_tokens=2), seed=0):
        assert len(response.text.split()) <= 2
        assert response.token_ids[-1] == 0
        assert response.finish == "stop"


def test_a_function_replaces_the_babble() -> None:
    engine = FakeEngine(lambda request, seed: request.messages[-1].content.upper())
    assert [r.text for r in engine.sample(ASKS, Sampling(), seed=0)] == [
        "WHY?",
        "NAME TWO BIRDS.",
        "WHY?",
    ]


@pytest.mark.parametrize("answer", ["", "One word", " two  words two\n"])
def test_scores_cover_every_word_and_the_end(answer: str) -> None:
    scored = FakeEngine().score([ask("x")], [Response(text=answer)], top=3)[0]
    spans = [answer[start:end].strip() for start, end in scored.offsets]
    assert spans == [*answer.split(), ""]
    assert scored.offsets[-1] == (len(answer), len(answer))
    assert {len(row) for row in (*scored.top_texts, *scored.top_logprobs)} == {3}
    assert len(scored.token_ids) == len(scored.logprobs) == len(scored.top_texts) == len(spans)
    assert all(logprob < 0 for logprob in scored.logprobs)


def test_choices_are_distributions_that_the_question_decides() -> None:
    first, other, again = FakeEngine().choose(ASKS, "12345")
    assert first == again
    assert first != other
    assert sum(first) == pytest.approx(1)
    assert len(first) == 5
    assert min(first) > 0
