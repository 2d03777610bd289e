"""What requests share is computed once: samples of a prompt, drafts, infilled copies, questions; counted in tokens fed."""

from __future__ import annotations

from typing import Any

import pytest

from prefloop.generate import decode, scoring
from prefloop.generate.hf_engine import HFEngine
from prefloop.generate.templates import PromptSet
from prefloop.records import Message, Request, Sampling
from tests.conftest import tiny_llama

SAMPLING = Sampling(temperature=1.0, max_new_tokens=6)
ASKS = [
    Request(messages=(Message(role="user", content=f"{word} " * 12 + "and why?"),))
    for word in ("Rivers", "Names of birds", "Seven", "Old maps", "Bread", "Who sings")
]


def asked_of(task: str) -> list[Request]:
    """Other prompts that quote these."""
    texts = [ask.messages[0].content for ask in ASKS]
    return [Request(messages=(Message(role="user", content=f"{task}: {text}"),)) for text in texts]


@pytest.fixture
def model(tokenizer: Any) -> Any:
    """A model of which no bit depends on the other rows: torch's SiLU gives the numbers beyond a multiple of 32 other last bits."""
    return tiny_llama(len(tokenizer), intermediate_size=64)


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens of more than one a conversation each step feeds: prompts, not running answers."""
    found: list[int] = []
    real = decode.feed

    def watched(model: Any, ids: list[int], ends: list[int], step: Any) -> Any:
        found.append(sum(segment.length for segment in step.segments))
        return real(model, ids, ends, step)

    monkeypatch.setattr(decode, "feed", watched)
    monkeypatch.setattr(scoring, "feed", watched)
    return found


def prompt_tokens(engine: HFEngine) -> int:
    return sum(len(engine.chat.prompt_ids(ask.messages)) for ask in ASKS)


@pytest.mark.usefixtures("computing")
@pytest.mark.parametrize("slots", [4, 7, 64])
def test_samples_of_a_prompt_compute_it_once(
    model: Any, tokenizer: Any, fed: list[int], slots: int
) -> None:
    """Also where they are more than the slots; two tokens of a shared prompt are always fed."""
    engine = HFEngine(model, tokenizer, batch_size=slots)
    asked = [ask for ask in ASKS for _ in range(3)]
    found = engine.sample(asked, SAMPLING, seed=0)
    alone = HFEngine(model, tokenizer, batch_size=1)
    again = 2 * (len(asked) - len(ASKS))
    assert sum(fed) <= prompt_tokens(engine) + again
    assert found == alone.sample(asked, SAMPLING, seed=0)


def test_many_prompts_are_fed_in_one_step_though_each_is_sampled_twice(
    model: Any, tokenizer: Any, fed: list[int]
) -> None:
    """The second sample waits for the first's prompt; others do not wait with it."""
    engine = HFEngine(model, tokenizer, batch_size=64)
    engine.sample([ask for ask in ASKS for _ in range(2)], SAMPLING, seed=0)
    assert fed[0] > 0.9 * min(prompt_tokens(engine), decode.STEP_TOKENS) - 60


def test_a_second_draft_does_not_compute_the_prompt_again(
    model: Any, tokenizer: Any, fed: list[int]
) -> None:
    engine = HFEngine(model, tokenizer, batch_size=len(ASKS))
    engine.sample(ASKS, SAMPLING, seed=1)
    fed.clear()
    second = engine.sample(ASKS, SAMPLING, seed=2)
    assert sum(fed) == 2 * len(ASKS)
    assert second == HFEngine(model, tokenizer).sample(ASKS, SAMPLING, seed=2)


def test_scores_start_from_prompts_that_are_there_and_no_bit_tells(
    model: Any, tokenizer: Any, fed: list[int]
) -> None:
    engine = HFEngine(model, tokenizer, batch_size=8)
    answers = engine.sample(ASKS, SAMPLING, seed=1)
    fed.clear()
    found = engine.score(ASKS, answers, top=3)
    answer_tokens = sum(len(answer.token_ids) for answer in answers)
    assert sum(fed) <= answer_tokens + 2 * len(ASKS)
    assert found == HFEngine(model, tokenizer).score(ASKS, answers, top=3)


def test_no_row_waits_for_an_answer_that_was_sampled_in_more_slots_than_scoring_takes(
    model: Any, tokenizer: Any
) -> None:
    """Its sampled tokens are not shared with scores, and nobody computes them again."""
    engine = HFEngine(model, tokenizer, batch_size=2)
    prompts = [[5, 6, 7, 8, 9, 10], [15, 6, 7, 8, 9, 10]]
    longer = SAMPLING.model_copy(update={"max_new_tokens": 40})
    answers = engine.continue_tokens(prompts, longer, seed=1)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) > 2 * decode.WORTH_WAITING
        row = [*prompt, *answer, 20, 21, 22, 23]
        found = engine.score_tokens([row], [len(row) - 2])
        assert found == HFEngine(model, tokenizer).score_tokens([row], [len(row) - 2])


def test_an_infilled_copy_starts_from_its_scored_answer(
    model: Any, tokenizer: Any, fed: list[int]
) -> None:
    engine = HFEngine(model, tokenizer, batch_size=8)
    answers = engine.sample(ASKS, SAMPLING.model_copy(update={"max_new_tokens": 30}), seed=1)
    # Read as text, as infilled answers are; the next words come after the most of it.
    texts = [answer.model_copy(update={"token_ids": ()}) for answer in answers]
    engine.score(ASKS, texts, top=3)
    fed.clear()
    asked = [
        ask.model_copy(update={"prefix": text.text[:-4] + " x"})
        for ask, text in zip(ASKS, texts, strict=True)
    ]
    found = engine.sample(asked, SAMPLING, seed=3)
    whole = sum(len(engine.chat.prompt_ids(a.messages, a.prefix)) for a in asked)
    assert sum(fed) < 0.3 * whole
    assert found == HFEngine(model, tokenizer).sample(asked, SAMPLING, seed=3)


def test_a_scored_answer_stays_for_its_infilled_copy_though_other_rows_begin_alike(
    model: Any, tokenizer: Any, fed: list[int]
) -> None:
    """Each row is scored in a slot of its own while there are some; in between the slots held something else."""
    engine = HFEngine(model, tokenizer, batch_size=len(ASKS))
    asks = asked_of("Write this again")
    long = SAMPLING.model_copy(update={"max_new_tokens": 120})
    answers = engine.sample(asks, long, seed=1)
    texts = [answer.model_copy(update={"token_ids": ()}) for answer in answers]
    engine.sample(ASKS, SAMPLING, seed=2)
    engine.score(asks, texts, top=3)
    fed.clear()
    asked = [
        ask.model_copy(update={"prefix": text.text[:-4] + " x"})
        for ask, text in zip(asks, texts, strict=True)
    ]
    engine.sample(asked, SAMPLING, seed=3)
    whole = sum(len(engine.chat.prompt_ids(a.messages, a.prefix)) for a in asked)
    assert sum(fed) < 0.2 * whole


@pytest.mark.usefixtures("computing")
def test_prompts_of_two_drafts_are_there_for_scores_though_others_took_all_slots(
    model: Any, tokenizer: Any, fed: list[int]
) -> None:
    engine = HFEngine(model, tokenizer, batch_size=len(ASKS))
    others = asked_of("Improve this")
    for seed in (1, 2):
        engine.sample(ASKS, SAMPLING, seed=seed)
    texts = [
        answer.model_copy(update={"token_ids": ()})
        for answer in engine.sample(others, SAMPLING, seed=3)
    ]
    fed.clear()
    found = engine.score(ASKS, texts, top=3)
    assert sum(fed) <= sum(len(one.token_ids) + 1 for one in found)
    assert found == HFEngine(model, tokenizer).score(ASKS, texts, top=3)


def test_questions_that_begin_alike_are_asked_once_and_no_bit_tells(
    model: Any, tokenizer: Any, fed: list[int]
) -> None:
    beginning = "Here is a long answer about rivers and about birds. " * 3
    asked = [
        Request(messages=(Message(role="user", content=beginning + axis),))
        for axis in ("How kind?", "How true?", "How short?")
    ]
    engine = HFEngine(model, tokenizer, batch_size=8)
    found = engine.choose(asked, ("1", "2", "3"))
    one = len(engine.chat.prompt_ids(asked[0].messages))
    assert sum(fed) < 1.6 * one
    alone = [
        HFEngine(model, tokenizer, batch_size=1).choose([ask], ("1", "2", "3"))[0] for ask in asked
    ]
    assert found == alone


@pytest.mark.parametrize("prompt_set", ["compact", "shared"])
def test_the_shared_sets_rewrites_start_from_the_advisors_prompts(
    model: Any, tokenizer: Any, fed: list[int], prompt_set: str
) -> None:
    """What both quote, question and answer, is fed for the advice alone; in the compact set it is fed twice."""
    engine = HFEngine(model, tokenizer, batch_size=len(ASKS))
    prompts = PromptSet(prompt_set)
    values = [
        {"question": ask.messages[0].content, "answer": f"Because of {n} reasons. " * 5}
        for n, ask in enumerate(ASKS)
    ]
    advise = [Request(messages=prompts.render("advisor", **given)) for given in values]
    engine.sample(advise, SAMPLING, seed=1)
    fed.clear()
    rewrite = [
        Request(messages=prompts.render("rewrite", suggestion="Be brief.", **given))
        for given in values
    ]
    found = engine.sample(rewrite, SAMPLING, seed=2)
    whole = sum(len(engine.chat.prompt_ids(ask.messages)) for ask in rewrite)
    assert sum(fed) < 0.6 * whole if prompt_set == "shared" else sum(fed) > 0.8 * whole
    assert found == HFEngine(model, tokenizer).sample(rewrite, SAMPLING, seed=2)
