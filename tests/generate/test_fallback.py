"""Models that slots cannot serve are decoded by transformers, with the same draws and the same answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
)

from prefloop.generate import hf_engine
from prefloop.generate.fallback import reads_padding
from prefloop.generate.hf_engine import HFEngine
from prefloop.records import Message, Request, Sampling

HOT = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=8)


def requests() -> list[Request]:
    return [
        Request(messages=(Message(role="user", content=q),))
        for q in ("Why?", "Name two birds.", "x")
    ]


def mamba(vocabulary: int) -> Any:
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=vocabulary, hidden_size=16, state_size=4, num_hidden_layers=2,
            bos_token_id=None, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


def bloom(vocabulary: int) -> Any:
    """Positions are a bias of the attention scores, which our attention function is not told."""
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=vocabulary, hidden_size=16, n_layer=2, n_head=2,
            bos_token_id=None, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("family", [mamba, bloom], ids=lambda f: f.__name__)
def test_what_slots_cannot_serve_is_decoded_by_transformers_and_said_once(
    family: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = family(len(tokenizer)).eval()
    engine = HFEngine(model, tokenizer, batch_size=2)
    found = engine.sample(requests(), HOT, seed=3)
    again = engine.sample(requests(), HOT, seed=3)
    assert found == again
    assert caplog.text.count("cannot be decoded in slots") == 1
    for request, response in zip(requests(), found, strict=True):
        prompt = engine.chat.prompt_ids(request.messages)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(response.token_ids)])).logits[0]
        places = range(len(prompt) - 1, len(prompt) - 1 + len(response.token_ids))
        logps = logits.log_softmax(-1)[list(places), list(response.token_ids)]
        assert response.mean_logprob == pytest.approx(logps.mean().item(), abs=1e-4)
        assert response.finish == ("stop" if response.token_ids[-1] == 1 else "length")


def test_both_ways_draw_the_same_answers(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 20
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        min_new_tokens=12,
        pad_token_id=1,
    )
    sampling = Sampling(temperature=1.0, top_k=60, max_new_tokens=12)
    expected = HFEngine(model, tokenizer).sample(requests() * 3, sampling, seed=3)
    monkeypatch.setattr(hf_engine, "slot_decoding_unsupported", lambda *_: "a test says so")
    found = HFEngine(model, tokenizer, batch_size=2).sample(requests() * 3, sampling, seed=3)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    assert {r.finish for r in found} == {"stop", "length"}
    assert model.generation_config.repetition_penalty == 9.0
    for mine, other in zip(found, expected, strict=True):
        assert mine.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-5)


def test_another_attention_is_left_alone(model: Any, tokenizer: Any) -> None:
    expected = HFEngine(model, tokenizer).sample(requests(), HOT, seed=3)
    model.set_attn_implementation("eager")
    found = HFEngine(model, tokenizer).sample(requests(), HOT, seed=3)
    assert model.config._attn_implementation == "eager"
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]


@pytest.mark.parametrize("first", ["linear_attention", "full_attention"])
def test_padding_that_is_seen_from_the_second_token_on_is_noticed(first: str) -> None:
    """MiniMax with a linear layer first, as published: its cache has no length, so the mask of the next token ends early."""
    torch.manual_seed(0)
    layers = [first, {"linear_attention": "full_attention"}.get(first, "linear_attention")]
    config = MiniMaxConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, block_size=8, num_local_experts=2, layer_types=layers,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = MiniMaxForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(3)
    with torch.inference_mode():
        assert reads_padding(model) == (first == "full_attention")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_a_longer_conversation_does_not_turn_the_tokens_of_others(
    rope: dict[str, Any], tokenizer: Any
) -> None:
    """Beyond a number of tokens these embeddings take other frequencies for all rows of a forward pass."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, eos_token_id=1,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(12)
    short, long = list(range(3, 13)), list(range(60, 100))
    with torch.inference_mode():
        logps = model(torch.tensor([short]), use_cache=False).logits[0].log_softmax(dim=-1)
    expected = [float(logps[n, token]) for n, token in enumerate(short[1:])]
    engine = HFEngine(model, tokenizer)
    assert engine.score_tokens([short], [1])[0].logprobs == pytest.approx(expected, abs=1e-4)
    assert engine._served == {0: True}
    found = engine.score_tokens([short, long], [1, 1])[0].logprobs
    assert found == pytest.approx(expected, abs=1e-4)
    assert engine._served == {0: True, 1: False}
    greedy = Sampling(temperature=0.0, max_new_tokens=4)
    alone = engine.continue_tokens([short], greedy, seed=0)
    assert engine.continue_tokens([short, long], greedy, seed=0)[:1] == alone
