"""Decoding in slots against transformers' own generate, for several families, with eviction and refill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from prefloop.generate import decode as decode_loop
from prefloop.generate import fallback, hf_engine
from prefloop.generate.hf_engine import HFEngine
from prefloop.models.sources import quiet, resolve_source
from prefloop.records import Message, Request, Sampling
from tests.conftest import tiny_llama

GREEDY = Sampling(temperature=0, max_new_tokens=14)
QUESTIONS = [
    "Why?",
    "A rather longer question about nothing at all, which needs more tokens than the others",
    "x",
    "Name two birds.",
    "Hm",
    "Name two trees, please, and say why.",
    "Name two",
    "And then?",
]


def requests(count: int = len(QUESTIONS)) -> list[Request]:
    return [Request(messages=(Message(role="user", content=q),)) for q in QUESTIONS[:count]]


def llama(vocabulary: int) -> Any:
    return tiny_llama(vocabulary, intermediate_size=WIDTH)


def qwen2(vocabulary: int) -> Any:
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **SHAPE))


def gemma3(vocabulary: int) -> Any:
    """Windows of 24 tokens in every second layer: shorter than most of the conversations."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=vocabulary,
            head_dim=8,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
            **SHAPE,
        )
    )


def mistral(vocabulary: int) -> Any:
    return MistralForCausalLM(MistralConfig(vocab_size=vocabulary, sliding_window=30, **SHAPE))


def gpt2(vocabulary: int) -> Any:
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=512,
        bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama_with_lora(vocabulary: int) -> Any:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    with quiet():
        return get_peft_model(tiny_llama(vocabulary), config)


# A multiple of 32, as in real models: activations give the numbers beyond one other last bits.
WIDTH = 64
SHAPE = {
    "hidden_size": 48, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
FAMILIES = [llama, qwen2, gemma3, mistral, gpt2, llama_with_lora]


@pytest.fixture
def family(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = request.param(len(tokenizer)).eval()
        for parameter in model.parameters():  # the usual small weights answer with one token
            if parameter.ndim > 1:
                parameter.data.mul_(4)
    return model


def by_generate(model: Any, engine: HFEngine, request: Request, limit: int) -> list[int]:
    ids = torch.tensor([engine.chat.prompt_ids(request.messages)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=sorted(engine.chat.stop_ids),
    )
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found


def make_it_stop(model: Any, tokenizer: Any, weight: float) -> None:
    """Raise the end-of-turn logit, so that answers have several lengths."""
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[tokenizer.eos_token_id] *= weight


@pytest.mark.usefixtures("computing")
@pytest.mark.parametrize("family", FAMILIES, indirect=True, ids=lambda f: f.__name__)
def test_greedy_equals_generate_token_by_token(
    family: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slots for eight ragged prompts, fed in small pieces: prompts are cut, slots are refilled."""
    monkeypatch.setattr(decode_loop, "STEP_TOKENS", 16)
    monkeypatch.setattr(hf_engine, "generate", must_not_be_needed)
    engine = HFEngine(family, tokenizer, batch_size=3)
    found = engine.sample(requests(), GREEDY, seed=0)
    expected = [by_generate(family, engine, request, 14) for request in requests()]
    assert [list(response.token_ids) for response in found] == expected
    assert len({tuple(ids) for ids in expected}) > 3, (
        "answers must differ for this to show anything"
    )


def must_not_be_needed(*_: Any) -> Any:
    raise AssertionError("the model was not decoded in slots")


@pytest.mark.usefixtures("computing")
@pytest.mark.parametrize("family", [llama, gemma3], indirect=True, ids=lambda f: f.__name__)
def test_same_seed_same_text_whatever_the_batch_and_the_order(family: Any, tokenizer: Any) -> None:
    """Log-probs too, in every bit: answers are compared as a whole."""
    sampling = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=16)
    asked = requests() * 2
    expected = HFEngine(family, tokenizer, batch_size=1).sample(asked, sampling, seed=4)
    for size in (3, 64):
        found = HFEngine(family, tokenizer, batch_size=size).sample(asked, sampling, seed=4)
        assert found == expected
    # A request's numbers belong to its place, so another order is the same requests at these places.
    longer = requests(3) + [r.model_copy(update={"prefix": "And " * 9}) for r in requests(5)]
    first = HFEngine(family, tokenizer, batch_size=4).sample(longer, sampling, seed=4)
    assert first[:3] == expected[:3]


def loud() -> Any:
    """Its logits in bfloat16 are a quarter of a standard deviation apart between two exact ways to attend."""
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=64, num_hidden_layers=16,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(30)
    return model.to(torch.bfloat16)


def test_rounding_in_half_precision_is_no_reason_against_slots() -> None:
    """SmolLM2 in bfloat16 was generated with transformers' loop for it."""
    with torch.inference_mode():
        assert fallback.slot_decoding_unsupported(loud(), 64) is None


@pytest.mark.parametrize(("dtype", "served"), [(torch.bfloat16, True), (torch.float32, False)])
def test_conversations_that_rounding_moves_far_are_followed_by_others(
    dtype: torch.dtype, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2 in bfloat16 on a CPU with AMX: one pair of conversations was beyond the tolerance, the next were not."""
    in_slots, moved = fallback._in_slots, iter([0.3, 0.0, 0.0, 0.0])

    def unlucky(model: Any, rows: list[list[int]]) -> torch.Tensor:
        logits_EV = in_slots(model, rows)
        return logits_EV + next(moved) * logits_EV.std()

    monkeypatch.setattr(fallback, "_in_slots", unlucky)
    model = llama(258).to(dtype)
    with torch.inference_mode():
        assert (fallback.slot_decoding_unsupported(model, 64) is None) == served


def test_a_token_that_is_not_seen_is_a_reason_also_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_slots = fallback._in_slots

    def forgetful(model: Any, rows: list[list[int]]) -> torch.Tensor:
        return in_slots(model, [row[1:] for row in rows])

    monkeypatch.setattr(fallback, "_in_slots", forgetful)
    with torch.inference_mode():
        assert "logits differ" in str(fallback.slot_decoding_unsupported(loud(), 64))


def test_answers_of_many_lengths_do_not_depend_on_their_mates(tokenizer: Any) -> None:
    model = llama(len(tokenizer))
    make_it_stop(model, tokenizer, 30)
    asked, sampling = requests() * 4, Sampling(temperature=1.0, max_new_tokens=30)
    expected = HFEngine(model, tokenizer, batch_size=1).sample(asked, sampling, seed=2)
    assert len({len(response.token_ids) for response in expected}) > 3
    for size in (3, 8):
        found = HFEngine(model, tokenizer, batch_size=size).sample(asked, sampling, seed=2)
        assert found == expected


def test_a_slot_is_refilled_while_the_others_go_on(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_it_stop(model, tokenizer, 30)
    kinds: list[tuple[int, int]] = []
    real = decode_loop.Step.plan

    def watched(slots: Any, feeds: Any, device: Any) -> Any:
        counts = [count for _, _, count in feeds]
        kinds.append((counts.count(1), len(counts) - counts.count(1)))
        return real(slots, feeds, device)

    monkeypatch.setattr(decode_loop.Step, "plan", watched)
    found = HFEngine(model, tokenizer, batch_size=4).sample(
        requests() * 4, Sampling(temperature=1.0, max_new_tokens=30), seed=1
    )
    assert {response.finish for response in found} == {"stop", "length"}
    later = kinds[3:]
    assert any(running and fresh for running, fresh in later)
    assert max(running + fresh for running, fresh in later) == 4


def test_a_conversation_that_goes_on_is_not_computed_again(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = HFEngine(model, tokenizer, batch_size=8)
    fed: list[int] = []
    real = decode_loop.feed

    def watched(model: Any, ids: list[int], *rest: Any) -> Any:
        fed.append(len(ids))
        return real(model, ids, *rest)

    monkeypatch.setattr(decode_loop, "feed", watched)
    first = engine.sample(requests(), GREEDY, seed=0)
    turns = [
        Request(
            messages=(
                *request.messages,
                Message(role="assistant", content=answer.text),
                Message(role="user", content="Again."),
            )
        )
        for request, answer in zip(requests(), first, strict=True)
    ]
    fed.clear()
    found = engine.sample(turns, GREEDY, seed=0)
    # Random bytes are other tokens when read again, so only the old prompts are known to be found.
    old, new = (
        sum(len(engine.chat.prompt_ids(request.messages)) for request in asked)
        for asked in (requests(), turns)
    )
    generated = sum(len(answer.token_ids) for answer in found)
    assert sum(fed) <= new - old + generated
    fresh = HFEngine(model, tokenizer, batch_size=8).sample(turns, GREEDY, seed=0)
    # Keys of sampled tokens came from single queries, those of a prompt from tiles: last bits differ.
    assert [r.token_ids for r in fresh] == [r.token_ids for r in found]


def test_changed_weights_are_noticed(model: Any, tokenizer: Any) -> None:
    """Behind autograd's back, as merged adapters do it: neither old keys nor reordered weights survive."""
    engine = HFEngine(model, tokenizer)
    before = engine.sample(requests(), GREEDY, seed=0)
    model.model.layers[0].self_attn.k_proj.weight.data[3] += 3
    model.lm_head.weight.data = model.lm_head.weight.data.roll(5, 0)
    found = engine.sample(requests(), GREEDY, seed=0)
    assert found == HFEngine(model, tokenizer).sample(requests(), GREEDY, seed=0)
    assert found != before


def test_an_adapter_that_is_switched_off_is_noticed(tokenizer: Any) -> None:
    model = llama_with_lora(len(tokenizer)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    engine = HFEngine(model, tokenizer)
    adapted = engine.sample(requests(), GREEDY, seed=0)
    with model.disable_adapter():
        plain = engine.sample(requests(), GREEDY, seed=0)
        assert plain == HFEngine(model, tokenizer).sample(requests(), GREEDY, seed=0)
    assert plain != adapted
    assert engine.sample(requests(), GREEDY, seed=0) == adapted


def test_a_shared_beginning_is_computed_once(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = Message(role="system", content="You are a very patient assistant. " * 3)
    asked = [Request(messages=(system, *request.messages)) for request in requests()]
    engine = HFEngine(model, tokenizer, batch_size=8)
    fed: list[int] = []
    real = decode_loop.feed
    monkeypatch.setattr(
        decode_loop,
        "feed",
        lambda model, ids, *rest: (fed.append(len(ids)), real(model, ids, *rest))[1],
    )
    found = engine.sample(asked, Sampling(temperature=0, max_new_tokens=1), seed=0)
    lengths = [len(engine.chat.prompt_ids(request.messages)) for request in asked]
    assert sum(fed) < sum(lengths) - 7 * len(engine.chat.text_ids(system.content))
    assert [list(r.token_ids) for r in found] == [by_generate(model, engine, r, 1) for r in asked]


def test_a_stop_text_ends_an_answer_before_it(model: Any, tokenizer: Any) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=24)
    engine = HFEngine(model, tokenizer)
    free = engine.sample(requests(), sampling, seed=0)
    stop = free[0].text[5:7]
    found = engine.sample(requests(), sampling.model_copy(update={"stop": (stop,)}), seed=0)
    for before, after in zip(free, found, strict=True):
        head, there, _ = before.text.partition(stop)
        assert after.text == (head.strip() if there else before.text)
        assert after.finish == ("stop" if there else before.finish)
        # What comes before the stop text was sampled; the turn ends where it stood.
        kept = len(after.token_ids) - bool(there)
        assert after.token_ids[:kept] == before.token_ids[:kept]
        assert after.token_ids[kept:] == engine.chat.end_ids * bool(there)
    assert len(found[0].token_ids) < len(free[0].token_ids)


@pytest.mark.slow
def test_greedy_equals_generate_on_a_trained_model() -> None:
    folder = resolve_source("embedded:smollm2-135m")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = HFEngine(model, tokenizer, batch_size=3)
    sampling = Sampling(temperature=0, max_new_tokens=24)
    found = engine.sample(requests(), sampling, seed=0)
    for request, response in zip(requests(), found, strict=True):
        assert list(response.token_ids) == by_generate(model, engine, request, 24)
    hot = Sampling(temperature=0.7, top_p=0.95, max_new_tokens=24)
    alone = HFEngine(model, tokenizer, batch_size=1).sample(requests(), hot, seed=0)
    assert alone == HFEngine(model, tokenizer, batch_size=8).sample(requests(), hot, seed=0)
