"""Scores in slots against plain forward passes, for several families, with cut and shared beginnings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from prefloop.generate import hf_engine, scoring
from prefloop.generate.hf_engine import HFEngine
from prefloop.records import Message, Request, Response, Sampling
from tests.generate.test_decode import FAMILIES, family

__all__ = ["family"]


def rows(seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Three groups with a beginning in common, of 150, 70 and 20 tokens; some rows and starts twice."""
    draw = torch.Generator().manual_seed(seed)

    def some(length: int) -> list[int]:
        return torch.randint(2, 250, (length,), generator=draw).tolist()

    found, starts = [], []
    for length in (150, 70, 20):
        beginning = some(length)
        for size in (1, 2, 9, 70):
            question = some(size)
            for answer in (some(5), some(1), some(1), [7, *some(1)], [7, *some(1)]):
                found.append(beginning + question + answer)
                starts.append(length + size)
    found += [[5, 6], [5, 9], found[3], [5, 6, 7]]
    starts += [1, 1, 2, 1]
    return found, starts


@pytest.mark.usefixtures("computing")
@pytest.mark.parametrize("family", FAMILIES, indirect=True, ids=lambda f: f.__name__)
def test_scores_equal_a_plain_forward_pass(
    family: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "STEP_TOKENS", 128)
    ids, starts = rows()
    found = HFEngine(family, tokenizer, batch_size=5).score_tokens(ids, starts)
    for row, start, scores in zip(ids, starts, found, strict=True):
        with torch.no_grad():
            logps = family(input_ids=torch.tensor([row])).logits[0, start - 1 : -1].log_softmax(-1)
        targets = torch.tensor(row[start:])
        expected = logps.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores.logprobs), expected, atol=2e-4, rtol=2e-4)
        best = logps.topk(2).values
        clear = (best[:, 0] - best[:, 1]) > 1e-3  # rounding decides what is closer
        found_best = torch.tensor(scores.likeliest)
        assert (found_best == (logps.argmax(-1) == targets))[clear].all()


@pytest.mark.usefixtures("computing")
def test_no_bit_depends_on_the_other_rows_or_the_size_of_a_step(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, starts = rows()
    alone = [
        HFEngine(model, tokenizer, batch_size=1).score_tokens([row], [start])[0]
        for row, start in zip(ids, starts, strict=True)
    ]
    for size, step in [(1, 512), (3, 512), (64, 512), (8, 65), (8, 130), (8, 200)]:
        monkeypatch.setattr(scoring, "STEP_TOKENS", step)
        engine = HFEngine(model, tokenizer, batch_size=size)
        assert engine.score_tokens(ids, starts) == alone, (size, step)


def test_a_beginning_in_common_is_computed_once(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = []
    real = scoring.feed

    def counting(model: Any, ids: list[int], ends: list[int], step: Any) -> Any:
        fed.append((len(ids), len(ends)))
        return real(model, ids, ends, step)

    monkeypatch.setattr(scoring, "feed", counting)
    beginning = list(range(2, 202))
    endings = [[10 + n, 20, 30 + n] for n in range(4)]
    HFEngine(model, tokenizer).score_tokens([beginning + e for e in endings], [200] * 4)
    # The first feeds all but its last token, the others their own tokens and the one before.
    assert [sum(column) for column in zip(*fed, strict=True)] == [202 + 3 * 3, 4 * 3]
    fed.clear()
    HFEngine(model, tokenizer).score_tokens([[*beginning, n, 5] for n in range(4)], [201] * 4)
    # Single tokens are computed otherwise than several, so two are fed where one would do.
    assert [sum(column) for column in zip(*fed, strict=True)] == [201 + 3 * 2, 4]
    fed.clear()
    HFEngine(model, tokenizer).score_tokens([[*beginning, n] for n in range(4)], [200] * 4)
    assert fed == [(200, 1)], "rows that differ in the last token are one row"


def test_no_piece_of_a_row_is_a_single_token() -> None:
    for length in (2, 3, 64, 65, 66, 129, 130, 513, 577):
        for room in (1, 2, 63, 64, 65, 100, 512):
            for present in range(0, length - 1, 7):
                row = scoring._Row(list(range(length)), [0], 0, present=present)
                count = scoring._piece(row, room)
                assert 0 <= count <= room or count == row.pending <= room
                assert count != 1
                assert row.pending - count != 1
                assert count or room < 66, "a step always feeds something"


def test_rows_too_many_for_the_memory_are_scored_by_fewer_slots(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, starts = rows()
    expected = HFEngine(model, tokenizer).score_tokens(ids, starts)
    real, sizes = hf_engine.score, []

    def tight(model: Any, slots: Any, *rest: Any) -> None:
        sizes.append(slots.count)
        if slots.count > 8:
            raise torch.OutOfMemoryError("no room")
        real(model, slots, *rest)

    monkeypatch.setattr(hf_engine, "score", tight)
    engine = HFEngine(model, tokenizer, batch_size=32)
    assert engine.score_tokens(ids, starts) == expected
    assert sizes == [32, 16, 8]


def test_what_slots_cannot_serve_is_scored_in_padded_batches(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, starts = rows()
    expected = HFEngine(model, tokenizer).score_tokens(ids, starts)
    monkeypatch.setattr(
        hf_engine, "slot_decoding_unsupported", lambda model, longest: "so the test wants it"
    )
    found = HFEngine(model, tokenizer, batch_size=8).score_tokens(ids, starts)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=1e-4)
    assert HFEngine(model, tokenizer).score_tokens([], []) == []


def test_tokens_are_continued_as_generate_continues_them(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[[0, 1]] *= 30  # both special tokens come often
    model.generation_config.eos_token_id = [1]
    engine = HFEngine(model, tokenizer, batch_size=3)
    prompts = [tokenizer.encode(text) for text in ("Why? ", "A longer text, to go on with", "x")]
    greedy = Sampling(temperature=0, max_new_tokens=9)
    for prompt, found in zip(prompts, engine.continue_tokens(prompts, greedy, seed=0), strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False
        )
        assert found == out[0, len(prompt) :].tolist()


def test_stop_texts_may_be_special_tokens_and_other_ends_are_the_models_own(
    model: Any, tokenizer: Any
) -> None:
    prompt = tokenizer.encode("abc")
    free = Sampling(temperature=0, max_new_tokens=4)
    with torch.no_grad():
        hidden = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[0], model.lm_head.weight[2] = hidden, -hidden  # one of them is next
    engine = HFEngine(model, tokenizer)
    (whole,) = engine.continue_tokens([prompt], free, seed=0)
    assert (len(whole), whole[0]) == (4, 0)
    named = free.model_copy(update={"stop": (tokenizer.decode([0]),)})
    assert engine.continue_tokens([prompt], named, seed=0) == [[0]]
    model.generation_config.eos_token_id = [1, 0]
    assert engine.continue_tokens([prompt], free, seed=0) == [[0]]


def test_answers_to_one_question_are_scored_as_each_alone(model: Any, tokenizer: Any) -> None:
    request = Request(messages=(Message(role="user", content="Which bird is it, and why? " * 6),))
    texts = ["An owl.", "An owl, by its face", "A wren", "", "An owl."]
    answers = [Response(text=text) for text in texts]
    together = HFEngine(model, tokenizer).score([request] * 5, answers, top=2)
    alone = [HFEngine(model, tokenizer).score([request], [a], top=2)[0] for a in answers]
    assert together == alone


@pytest.mark.usefixtures("computing")
def test_tokens_that_nobody_asks_for_are_not_scored_and_no_bit_of_the_others_tells(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["One  two, three four.", "A longer answer, of more words, than one.", "é", ""]
    asks = [Request(messages=(Message(role="user", content=f"Say {n}."),)) for n in range(4)]
    answers = [Response(text=text) for text in texts]
    characters = [{5, 10}, {0, 9, 33}, {0}, {0}]
    ends = []
    real = scoring.feed

    def counting(model: Any, ids: list[int], at: list[int], step: Any) -> Any:
        ends.append(len(at))
        return real(model, ids, at, step)

    whole = HFEngine(model, tokenizer).score(asks, answers, top=3)
    monkeypatch.setattr(scoring, "feed", counting)
    monkeypatch.setattr(scoring, "STEP_TOKENS", 65)
    found = HFEngine(model, tokenizer).score(asks, answers, top=3, at=characters)
    assert sum(ends) == 7, "one for each character, two for that of two tokens"
    for text, one, other, at in zip(texts, found, whole, characters, strict=True):
        assert (one.token_ids, one.offsets) == (other.token_ids, other.offsets)
        places = [n for n, (start, end) in enumerate(one.offsets) if start in at and start < end]
        assert {one.offsets[n][0] for n in places} == (at if text else set())
        for n, logprob in enumerate(one.logprobs):
            if n in places:
                assert logprob == other.logprobs[n]
                assert one.top_texts[n] == other.top_texts[n]
                assert one.top_logprobs[n] == other.top_logprobs[n]
            else:
                assert math.isnan(logprob)
                assert one.top_texts[n] == one.top_logprobs[n] == ()


def test_padded_batches_score_what_is_asked_for(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = [Request(messages=(Message(role="user", content="Say it."),))]
    answer = [Response(text="One two, three four.")]
    expected = HFEngine(model, tokenizer).score(ask, answer, at=[{4, 9}])[0].logprobs
    monkeypatch.setattr(
        hf_engine, "slot_decoding_unsupported", lambda model, longest: "so the test wants it"
    )
    found = HFEngine(model, tokenizer).score(ask, answer, at=[{4, 9}])[0].logprobs
    assert [n for n, value in enumerate(found) if value == value] == [4, 9]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
