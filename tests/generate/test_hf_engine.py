"""The in-process engine against transformers' own generate and plain forward passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prefloop.errors import GenerationError
from prefloop.generate import hf_engine
from prefloop.generate.hf_engine import HFEngine
from prefloop.records import Message, Request, Response, Sampling

QUESTIONS = ["Why?", "A rather longer question about nothing at all", "x", "Name two birds.", "Hm"]


def requests(count: int = 5) -> list[Request]:
    return [Request(messages=(Message(role="user", content=q),)) for q in QUESTIONS[:count]]


def said(texts: list[str]) -> list[Response]:
    return [Response(text=text) for text in texts]


def test_greedy_equals_generate(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer, batch_size=3)
    found = engine.sample(requests(), Sampling(temperature=0, max_new_tokens=12), seed=0)
    for request, response in zip(requests(), found, strict=True):
        ids = torch.tensor([engine.chat.prompt_ids(request.messages)])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )[0, ids.shape[1] :]
        assert list(response.token_ids) == expected.tolist()


def test_an_answer_does_not_depend_on_its_batch(model: Any, tokenizer: Any) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=10)
    alone = HFEngine(model, tokenizer, batch_size=1).sample(requests(), sampling, seed=4)
    together = HFEngine(model, tokenizer, batch_size=5).sample(requests(), sampling, seed=4)
    assert [r.token_ids for r in alone] == [r.token_ids for r in together]


def test_the_seed_decides(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer)
    sampling = Sampling(temperature=1.0, max_new_tokens=10)
    first, again, other = (engine.sample(requests(), sampling, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_rows_stop_at_end_of_turn_and_the_rest_go_on(model: Any, tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[end] *= 40  # random weights would hardly ever stop
    engine = HFEngine(model, tokenizer, batch_size=64)
    found = engine.sample(requests() * 12, Sampling(temperature=1.0, max_new_tokens=24), seed=0)
    lengths = {len(r.token_ids) for r in found}
    assert len(lengths) > 3, "answers of several lengths are needed to see compaction"
    for response in found:
        assert response.finish == ("stop" if response.token_ids[-1] == end else "length")
        assert end not in response.token_ids[:-1]
        assert response.finish == "stop" or len(response.token_ids) == 24
    alone = HFEngine(model, tokenizer, batch_size=1).sample(
        requests() * 12, Sampling(temperature=1.0, max_new_tokens=24), seed=0
    )
    assert [r.token_ids for r in alone] == [r.token_ids for r in found]


def test_mean_logprob_is_at_temperature_one(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer)
    response = engine.sample(requests(1), Sampling(temperature=0.3, max_new_tokens=6), seed=0)[0]
    prompt = engine.chat.prompt_ids(requests(1)[0].messages)
    ids = torch.tensor([prompt + list(response.token_ids)])
    with torch.no_grad():
        logps = model(ids).logits[0].log_softmax(-1)
    expected = [logps[len(prompt) - 1 + n, t].item() for n, t in enumerate(response.token_ids)]
    assert response.mean_logprob == pytest.approx(np.mean(expected), abs=1e-5)


def test_scores_equal_a_plain_forward_pass(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer, batch_size=8)
    answers = ["Because.", "", "y", "Owl and wren", "ok then"]
    for request, answer, scored in zip(
        requests(), answers, engine.score(requests(), said(answers), top=3), strict=True
    ):
        prompt = engine.chat.prompt_ids(request.messages)
        rest = engine.chat.completion_ids(request.messages, answer)
        with torch.no_grad():
            logps = (
                model(torch.tensor([prompt + rest])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            )
        expected = logps.gather(1, torch.tensor(rest)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scored.logprobs), expected, atol=1e-5, rtol=1e-5)
        assert scored.token_ids == tuple(rest)
        assert len(scored.offsets) == len(rest)
        assert scored.top_logprobs[0][0] == pytest.approx(logps[0].max().item(), abs=1e-5)


def test_a_choice_is_the_probability_of_each_option_as_the_next_token(
    model: Any, tokenizer: Any
) -> None:
    engine = HFEngine(model, tokenizer)
    request = requests(1)[0]
    with torch.no_grad():
        logits = model(torch.tensor([engine.chat.prompt_ids(request.messages)])).logits[0, -1]
    expected = logits.softmax(-1)[[engine.chat.text_ids(o)[0] for o in "12345"]]
    torch.testing.assert_close(torch.tensor(engine.choose([request], "12345")[0]), expected)


def test_options_that_begin_alike_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(GenerationError, match="first token"):
        HFEngine(model, tokenizer).choose(requests(1), ["yes", "yellow"])


def test_prefix_is_continued_not_repeated(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer)
    request = requests(1)[0].model_copy(update={"prefix": "Well, "})
    greedy = Sampling(temperature=0, max_new_tokens=5)
    ids = torch.tensor([engine.chat.prompt_ids(request.messages) + engine.chat.text_ids("Well, ")])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )[0, ids.shape[1] :]
    assert list(engine.sample([request], greedy, seed=0)[0].token_ids) == expected.tolist()


def test_out_of_memory_halves_the_batch_and_changes_no_answer(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=6)
    expected = HFEngine(model, tokenizer).sample(requests(), sampling, seed=9)
    real, sizes = hf_engine.decode, []

    def tight(model: Any, slots: Any, *rest: Any) -> Any:
        sizes.append(slots.count)
        if slots.count > 2:
            raise torch.OutOfMemoryError("no room")
        return real(model, slots, *rest)

    monkeypatch.setattr(hf_engine, "decode", tight)
    engine = HFEngine(model, tokenizer, batch_size=8)
    found = engine.sample(requests(), sampling, seed=9)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    assert sizes == [5, 4, 2]


def test_out_of_memory_with_one_row_says_what_to_lower(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(hf_engine, "decode", never)
    with pytest.raises(GenerationError, match="max_new_tokens"):
        HFEngine(model, tokenizer, batch_size=2).sample(requests(), Sampling(), seed=0)
