"""Which slot a conversation gets, what it starts from, and how slots are read together."""

from __future__ import annotations

import errno
import subprocess
import sys
from mmap import mmap
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale

from prefloop.generate import decode, kv_cache
from prefloop.generate.cache_attention import ATTENTION, _group, slot_attention
from prefloop.generate.cpu import products
from prefloop.generate.cpu.prepared import Prepared, fingerprint
from prefloop.generate.hf_engine import HFEngine
from prefloop.generate.kv_cache import Slots
from prefloop.machine import is_out_of_memory
from prefloop.models import lora_linear
from prefloop.records import Message, Request, Sampling


def begun(slots: Slots, slot: int, ids: list[int], present: int) -> None:
    found = slots.find(ids, [slot])
    slots.begin(found, ids)
    slots.computed(slot, present, tiled=True)


def test_a_conversation_starts_from_the_longest_common_beginning() -> None:
    slots = Slots(4, 32)
    begun(slots, 0, [1, 2, 3, 4, 5, 6, 7], 7)
    begun(slots, 1, [1, 2, 3, 9, 9], 5)
    found = slots.find([1, 2, 3, 4, 5, 8, 8, 8], [2, 3])
    assert (found.source, found.shared) == (0, 5)
    assert found.slot == 2


def test_the_slot_that_shares_most_is_taken_itself() -> None:
    slots = Slots(3, 32)
    begun(slots, 1, [1, 2, 3, 4], 4)
    found = slots.find([1, 2, 3, 4, 5, 6], [0, 1, 2])
    assert (found.slot, found.source, found.shared) == (1, 1, 4)


def test_only_what_has_keys_is_shared_and_what_is_coming_is_told() -> None:
    slots = Slots(2, 32)
    begun(slots, 0, list(range(20)), 3)
    found = slots.find([*range(18), 90, 91, 92], [1])
    assert (found.shared, found.coming) == (3, 18)


def test_the_last_two_tokens_are_always_computed() -> None:
    slots = Slots(2, 32)
    begun(slots, 0, [1, 2, 3, 4], 4)
    assert slots.find([1, 2, 3, 4], [1]).shared == 2


def test_what_was_computed_singly_is_not_shared_where_bits_count() -> None:
    slots = Slots(3, 32)
    begun(slots, 0, list(range(9)), 6)
    slots.computed(0, 7, tiled=False)
    slots.computed(0, 9, tiled=True)
    asked = [*range(9), 50, 51, 52]
    assert slots.find(asked, [1]).shared == 9
    assert slots.find(asked, [1], tiled=True).shared == 6
    slots.begin(slots.find(asked, [1]), asked)
    assert slots.find(asked, [2], tiled=True).shared == 6, "a copy knows it too"


def test_a_prompt_asked_for_twice_stays_when_its_slot_is_needed() -> None:
    """One that was asked for once does not, nor does what was only scored."""
    slots = Slots(1, 32, shelf=1)
    twice, once, scored = [1, *range(2, 12)], [1, *range(20, 30)], [1, *range(30, 40)]
    begun(slots, 0, twice, 11)
    begun(slots, 0, twice, 11)
    begun(slots, 0, once, 11)
    assert slots.find([*twice, 50, 51], [0]).shared == 11
    assert slots.find([*twice, 50, 51], [0], tiled=True).source == 1
    for _ in range(2):
        slots.begin(slots.find(scored, [0]), scored, prompt=False)
        slots.computed(0, 11, tiled=True)
    begun(slots, 0, [1, 90, 91], 3)
    assert slots.find([*once, 50, 51], [0]).shared == 1
    assert slots.find([*scored, 50, 51], [0]).shared == 1
    assert slots.find([*twice, 50, 51], [0]).shared == 11
    slots.grow(2, 64, shelf=2)
    assert slots.find([*twice, 50, 51], [0]).shared == 1


def test_a_prompt_stays_in_its_slot_while_conversations_there_begin_with_it() -> None:
    slots = Slots(1, 32, shelf=1)
    prompt = list(range(1, 12))
    for ids in (prompt, prompt, [*prompt, 40, 41], [*prompt, 50, 51], [1, 2, 60]):
        begun(slots, 0, ids, len(ids))
    found = slots.find([*prompt, 50, 51, 52, 53], [0])
    assert (found.source, found.shared) == (1, 11)


def test_nothing_is_coming_from_a_conversation_that_has_ended() -> None:
    slots = Slots(2, 64)
    begun(slots, 0, list(range(40)), 3)
    assert slots.find([*range(40), 1, 2], [1]).coming == 40
    assert slots.find([*range(40), 1, 2], [0, 1]).coming == 0


def test_after_an_interruption_the_same_prompt_is_not_waited_for(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C in a notebook, between two pieces of a prompt."""
    monkeypatch.setattr(decode, "STEP_TOKENS", 16)
    request = Request(messages=(Message(role="user", content="Which bird is it? " * 5),))
    greedy = Sampling(temperature=0, max_new_tokens=4)
    expected = HFEngine(model, tokenizer).sample([request], greedy, seed=0)
    engine, fed, usual = HFEngine(model, tokenizer), [], decode.feed

    def interrupted(*step: Any) -> Any:
        fed.append(step)
        if len(fed) == 2:
            raise KeyboardInterrupt
        return usual(*step)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "feed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.sample([request], greedy, seed=0)
    assert engine.sample([request], greedy, seed=0) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_room_takes_memory_when_it_is_written_also_where_freed_memory_is_kept() -> None:
    """The second cache took as much as both the first and its empty shelf."""
    code = """
from mmap import PAGESIZE
import torch
from prefloop.generate.kv_cache import Slots
from prefloop.machine import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * PAGESIZE

def made():
    return Slots(8, 4096, shelf=8).layer(0, 4, 64, torch.zeros(1))

keep_freed_memory()
before = resident()
size = sum(store.fill_(1).nbytes for store in made())
again = made()
assert not any(store[:, :, ::64].any() for store in again)
print((resident() - before) / size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.2


@pytest.mark.skipif(sys.platform != "linux", reason="the size is more than Linux has addresses for")
def test_no_room_for_a_cache_is_out_of_memory_as_torch_says_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        Slots(1, 64).layer(0, 2**20, 2**20, torch.zeros(1))
    assert is_out_of_memory(caught.value)


def test_where_there_is_no_room_for_a_cache_fewer_conversations_are_tried(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tight(*args: Any, **options: Any) -> Any:
        if args[1] > 2**15:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return mmap(*args, **options)

    requests = [Request(messages=(Message(role="user", content=c),)) for c in "abcdefgh"]
    greedy = Sampling(temperature=0, max_new_tokens=4)
    expected = HFEngine(model, tokenizer).sample(requests, greedy, seed=0)
    monkeypatch.setattr(kv_cache, "mmap", tight)
    engine = HFEngine(model, tokenizer, batch_size=8)
    assert engine.sample(requests, greedy, seed=0) == expected
    assert engine.batch_size == 4


def test_growing_keeps_what_is_there() -> None:
    slots = Slots(2, 5)
    keys = torch.arange(12.0).view(2, 3, 2)
    slots.layer(0, keys.shape[0], keys.shape[2], keys)
    slots.write(0, (keys, -keys), (torch.tensor([1, 1, 1]), torch.arange(3)))
    begun(slots, 1, [4, 5, 6], 3)
    slots.grow(4, 100)
    assert slots.count == 4
    assert slots.capacity >= 100
    read_keys, read_values = slots.read(0, slice(1, 2), 3)
    assert torch.equal(read_keys[0], keys)
    assert torch.equal(read_values[0], -keys)
    assert slots.find([4, 5, 6, 7, 8], [0]).shared == 3


def test_neighbours_of_like_length_are_read_together() -> None:
    groups = _group([(0, 99), (1, 100), (2, 110), (5, 100), (6, 4000)])
    assert [(g.slots.start, g.slots.stop) for g in groups] == [(0, 3), (5, 6), (6, 7)]
    assert [(g.rows.start, g.rows.stop) for g in groups] == [(0, 3), (3, 4), (4, 5)]
    assert [g.length for g in groups] == [128, 128, 4032]


def test_groups_read_the_fewest_positions() -> None:
    """Conversations are admitted longest first, so that lengths fall by little from slot to slot."""
    singles = [(slot, 413 - 5 * slot) for slot in range(64)]
    groups = _group(singles)
    assert [slot for g in groups for slot in range(g.slots.start, g.slots.stop)] == list(range(64))
    for g in groups:
        longest = max(position + 1 for _, position in singles[g.rows])
        assert longest <= g.length < longest + 32
    needed = sum(position + 1 for _, position in singles)
    assert sum(g.length * (g.slots.stop - g.slots.start) for g in groups) < 1.2 * needed
    assert needed < 0.65 * 64 * 414, "one group would read much more"


def test_slots_apart_are_never_read_together() -> None:
    assert [g.slots for g in _group([(0, 9), (2, 9), (3, 9)])] == [slice(0, 1), slice(2, 4)]
    assert _group([]) == []


def fail_inside(model: Any) -> None:
    with slot_attention(model):
        assert model.config._attn_implementation == ATTENTION
        raise ZeroDivisionError


def test_everything_is_undone_after_an_error(model: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_inside(model)
    assert model.config._attn_implementation == "sdpa"


def test_mode_and_layers_are_as_before(model: Any, tokenizer: Any) -> None:
    model.train()
    request = Request(messages=(Message(role="user", content="Hm"),))
    HFEngine(model, tokenizer).sample([request], Sampling(max_new_tokens=2), seed=0)
    assert model.training
    assert not any("forward" in layer.__dict__ for layer in model.modules())
    assert not torch.is_inference_mode_enabled()


def test_a_fingerprint_sees_a_single_bit(model: Any) -> None:
    before = fingerprint(model)
    assert before == fingerprint(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(torch.inf))
    assert fingerprint(model) != before


# PEFT asks transformers by a name of before.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_prepared_layers_follow_an_adapters_scale_and_hooks(model: Any, tokenizer: Any) -> None:
    """Neither is a weight; what was prepared before holds the scale, and calls no hook of what it replaces."""
    torch.manual_seed(0)
    options = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, options).eval()
    engine, row = HFEngine(adapted, tokenizer), list(range(40, 60))

    def follows() -> None:
        with torch.inference_mode():
            logps = adapted(input_ids=torch.tensor([row])).logits[0].log_softmax(dim=-1)
        expected = [float(logps[n, token]) for n, token in enumerate(row[1:])]
        found = engine.score_tokens([row], [1])[0].logprobs
        assert found == pytest.approx(expected, abs=1e-4)

    follows()
    with rescale_adapter_scale(adapted, 0.1):
        follows()
    follows()
    layer = engine.model.model.layers[0]
    for part in (layer.mlp, layer.input_layernorm, layer.self_attn.q_proj.base_layer):
        hook = part.register_forward_hook(lambda _, inputs, output: output * 3)
        follows()
        hook.remove()
        follows()


@pytest.mark.parametrize("width", [64, 1536, 4096])
def test_a_row_of_reordered_linears_is_the_same_among_any_number_of_rows(width: int) -> None:
    """Real widths: with AVX-512 a long row alone was summed in another order."""
    layer = torch.nn.Linear(width, 96)
    rows = torch.randn(1, 64, width)
    with torch.inference_mode(), Prepared(layer).in_use():
        together = layer(rows)
        for count in (1, 2, 3, 5, 17, 63):
            assert torch.equal(layer(rows[:, :count]), together[:, :count]), count
    torch.testing.assert_close(together, layer(rows))


def test_bfloat16_layers_are_reordered_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = torch.nn.Linear(64, 96, dtype=torch.bfloat16)
    rows = torch.randn(1, 3, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = torch.nn.functional.linear(
            rows.float(), layer.weight.float(), layer.bias.float()
        )
        with Prepared(layer).in_use():
            assert ("forward" in layer.__dict__) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
            for count in (1, 3):
                found = layer(rows[:, :count])
                torch.testing.assert_close(found.float(), expected[:, :count], atol=0.02, rtol=0.02)
        monkeypatch.setattr(products, "_has_bfloat16", lambda: False)
        with Prepared(layer).in_use():
            assert "forward" not in layer.__dict__, "oneDNN would refuse it"


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not multiply bfloat16"
)
def test_an_adapter_in_bfloat16_is_a_part_of_the_reordered_layer() -> None:
    """Beside the weights, not merged into them, where most of it would be rounded away."""
    base = torch.nn.Sequential(torch.nn.Linear(64, 96)).to(torch.bfloat16)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    ).eval()
    lora_linear.fuse(model)
    rows = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    layer = model.base_model.model[0]
    usual = layer.forward
    with torch.inference_mode():
        expected = model(rows)
        prepared = Prepared(model)
        with prepared.in_use():
            assert layer.forward is not usual
            for count in (1, 5):
                found = model(rows[:, :count])
                torch.testing.assert_close(found, expected[:, :count], atol=0.02, rtol=0.02)
        assert torch.equal(model(rows), expected), "put back"
        with model.disable_adapter(), Prepared(model).in_use():
            torch.testing.assert_close(model(rows), layer.base_layer(rows), atol=0.02, rtol=0.02)
