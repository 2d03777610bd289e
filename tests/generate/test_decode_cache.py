"""The decoding cache and attention: what transformers' own give, and everything undone at the end."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from prefloop.generate.decode_cache import ATTENTION, GrowingLayer, decoding, reserve


def steps(model: Any, cache: Any) -> torch.Tensor:
    """Logits (B, steps, V) of a padded prompt followed by three single tokens; row 1 leaves after two."""
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [0, 11, 12, 13]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    found = []
    for step in range(4):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits[:, -1]
        if step == 1:
            keep = torch.tensor([0, 2])
            cache.batch_select_indices(keep)
            logits, mask = logits[keep], mask[keep]
        found.append(logits[-2:] if step > 0 else logits[[0, 2]])
        ids = torch.full((len(logits), 1), 20 + step)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(found, 1)


def test_decoding_gives_what_transformers_gives(model: Any) -> None:
    with torch.inference_mode():
        expected = steps(model, DynamicCache(config=model.config))
    with decoding(model):
        found = steps(model, reserve(model, 8))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_reserved_room_is_written_in_place(model: Any) -> None:
    cache = reserve(model, 7)
    with decoding(model):
        model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache)
        before = cache.layers[0].keys.data_ptr()
        model(input_ids=torch.tensor([[8]]), past_key_values=cache)
    assert all(type(layer) is GrowingLayer for layer in cache.layers)
    assert cache.layers[0].keys.data_ptr() == before
    assert cache.get_seq_length() == 4


def test_single_queries_take_the_grouped_attention(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the prompt, with its several queries a row, still goes through SDPA."""
    from prefloop.generate import decode_cache

    queries: list[int] = []
    real = decode_cache.sdpa_attention_forward

    def watched(module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        queries.append(query.shape[2])
        return real(module, query, *rest, **options)

    monkeypatch.setattr(decode_cache, "sdpa_attention_forward", watched)
    with decoding(model):
        steps(model, reserve(model, 8))
    assert queries == [4] * model.config.num_hidden_layers


def fail_while_decoding(model: Any) -> None:
    with decoding(model):
        assert not model.training
        assert model.config._attn_implementation == ATTENTION
        assert torch.is_inference_mode_enabled()
        raise ZeroDivisionError


def test_mode_and_attention_are_restored_even_after_an_error(model: Any) -> None:
    model.train()
    with pytest.raises(ZeroDivisionError):
        fail_while_decoding(model)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not torch.is_inference_mode_enabled()


def test_another_attention_is_left_alone(model: Any) -> None:
    model.set_attn_implementation("eager")
    with decoding(model):
        assert model.config._attn_implementation == "eager"
