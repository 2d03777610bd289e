"""Padded and packed log-probs against one plain forward pass per sequence."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoConfig, AutoModelForCausalLM

from prefloop.errors import ModelError
from prefloop.models import lora_linear
from prefloop.models.policy import ModelOptions, Policy
from prefloop.train import logprobs
from prefloop.train.logprobs import (
    group_logprobs,
    packed_logprobs,
    padded_logprobs,
    supports_packing,
)
from prefloop.train.packing import TokenGroup, pack

VOCABULARY = 61
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 12}
SPECIAL = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bloom": {"n_head": 2, "attn_implementation": "eager"},
    "gemma2": {"final_logit_softcapping": 1.0, "attn_implementation": "eager"},
    "gemma3_text": {"sliding_window": 32},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "phi": {"num_key_value_heads": 2},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 12},
    "qwen3_moe": EXPERTS | {"num_experts_per_tok": 2},
}
# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
WAYS = pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])


def tiny(kind: str, **options):
    """A random model whose logits differ clearly between tokens."""
    torch.manual_seed(0)
    options = TINY | SPECIAL.get(kind, {}) | options
    attention = options.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(kind, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def one_at_a_time(model, groups) -> list[list[Tensor]]:
    """The definition: log-softmax of the logits before each completion token of each sequence."""

    def score(prompt, completion):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].float()
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return logps.gather(1, torch.tensor(completion)[:, None])[:, 0]

    return [
        [score(group.prompt, completion) for completion in group.completions] for group in groups
    ]


def draw_group(rng: random.Random) -> TokenGroup:
    """1-5 completions that share prefixes of random length, some equal, some a prefix of another."""

    def draw(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, most)))

    completions = [draw(9)]
    for _ in range(rng.randrange(5)):
        other = rng.choice(completions)
        shared = other[: rng.randrange(len(other) + 1)]
        completions.append(rng.choice([other, shared or other, shared + draw(5)]))
    return TokenGroup(draw(9), tuple(completions))


def draw_groups(seed: int, count: int = 4) -> list[TokenGroup]:
    rng = random.Random(seed)
    return [draw_group(rng) for _ in range(count)]


def assert_same(got, wanted, atol: float = 1e-4):
    assert [len(group) for group in got] == [len(group) for group in wanted]
    for got_group, wanted_group in zip(got, wanted, strict=True):
        for got_L, wanted_L in zip(got_group, wanted_group, strict=True):
            assert got_L.dtype == torch.float32
            torch.testing.assert_close(got_L, wanted_L, atol=atol, rtol=0)


def gradients(model, logps) -> dict[str, Tensor]:
    """Of a sum with another weight for each token, so that no error can cancel."""
    model.zero_grad()
    flat = torch.cat([completion for group in logps for completion in group])
    (flat * torch.linspace(-1, 2, len(flat))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, wanted):
    assert got.keys() == wanted.keys()
    assert wanted
    for name, gradient in wanted.items():
        error = (got[name] - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert error <= 1e-4, name


shared = cache(tiny)


@contextmanager
def mask_of_the_whole_row() -> Iterator[None]:
    """What SDPA gets on other devices than CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(logprobs._MASKS, "sdpa", logprobs._bool_mask)
        yield


@pytest.mark.parametrize("way", ["tree", "mask", "padded"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma3_text"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_log_probs_and_gradients_are_those_of_single_sequences(kind, way, seed):
    model, groups = shared(kind), draw_groups(seed)
    assert supports_packing(model, longest=16) is None
    wanted = one_at_a_time(model, groups)
    with mask_of_the_whole_row() if way == "mask" else nullcontext():
        got = group_logprobs(model, groups, packing=way != "padded", token_budget=40)
    assert_same(got, wanted)
    assert_same_gradients(gradients(model, got), gradients(model, wanted))


@WAYS
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "lm_head"]], ids=["inner", "head"])
def test_a_lora_is_part_of_the_policy_and_gets_its_gradients(target, tied, packing):
    groups = draw_groups(1)
    lora = LoraConfig(r=2, target_modules=target, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama", tie_word_embeddings=tied and target == "all-linear"), lora)
    wanted = one_at_a_time(model, groups)
    lora_linear.fuse(model)
    got = group_logprobs(model, groups, packing=packing, token_budget=40)
    assert_same(got, wanted)
    assert_same_gradients(gradients(model, got), gradients(model, wanted))
    assert logprobs._is_frozen(model.get_output_embeddings()) == (target == "all-linear")
    with model.disable_adapter(), torch.no_grad():
        assert_same(
            group_logprobs(model, groups, packing=packing, token_budget=40),
            one_at_a_time(model, groups),
        )


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", sorted(logprobs.CHECKED_MODEL_TYPES))
def test_every_known_model_type_gives_the_log_probs_of_single_sequences(kind, attention):
    groups = draw_groups(2, count=6)
    options = {"attn_implementation": attention} if kind != "gemma2" else {}
    model = tiny(kind, **options).eval()
    with torch.no_grad():
        wanted = one_at_a_time(model, groups)
        assert_same(packed_logprobs(model, pack(groups, 40)), wanted)
        assert_same(padded_logprobs(model, groups), wanted)


@WAYS
@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_what_a_model_does_to_its_heads_output_is_honoured(kind, packing):
    model, groups = tiny(kind), draw_groups(3)
    wanted = one_at_a_time(model, groups)
    got = group_logprobs(model, groups, packing=packing, token_budget=40)
    assert_same(got, wanted)
    assert_same_gradients(gradients(model, got), gradients(model, wanted))


@WAYS
@pytest.mark.parametrize("kind", ["llama", "granite", "bloom"])
def test_values_are_those_of_the_states_that_predict_beside_the_same_log_probs(kind, packing):
    """A plain head, one that does more, and a type that is only padded."""
    model, groups = tiny(kind), draw_groups(5)
    head = nn.Sequential(nn.Linear(16, 1, bias=False), nn.Flatten(0))

    def beside(prompt, completion, logps_L):
        states = model.get_decoder()(input_ids=torch.tensor([prompt + completion]))
        values_L = head(states.last_hidden_state[0, len(prompt) - 1 : -1])
        return torch.stack([logps_L, values_L], dim=-1).flatten()

    found = group_logprobs(model, groups, packing=packing, token_budget=40, value_head=head)
    got = [[each_L2.flatten() for each_L2 in group] for group in found]
    wanted = [
        [beside(g.prompt, each, logps) for each, logps in zip(g.completions, known, strict=True)]
        for g, known in zip(groups, one_at_a_time(model, groups), strict=True)
    ]
    assert_same(got, wanted)
    assert_same_gradients(gradients(model, got), gradients(model, wanted))


def test_eager_attention_is_masked_along_the_tree_too():
    model, groups = tiny("llama", attn_implementation="eager"), draw_groups(4)
    got = group_logprobs(model, groups, packing=True, token_budget=40)
    assert_same(got, one_at_a_time(model, groups))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_flex_attention_is_told_the_same_ancestors(seed):
    """Its block mask, that is: its kernels' backward pass needs CUDA, where this was not tried."""
    for row in pack(draw_groups(seed), 200):
        blocks = logprobs._block_mask(row, torch.zeros(1))
        size = len(row.ends)
        seen = create_mask(blocks.mask_mod, 1, 1, size, size, device="cpu")
        assert torch.equal(seen[0, 0], row.mask())
        wanted = [row.mask()[a : a + 128, b : b + 128].any() for a, b in corners(size)]
        assert blocks.to_dense().flatten().bool().tolist() == wanted


def corners(size: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(0, size, 128) for b in range(0, size, 128)]


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_smollm2_as_training_loads_it_is_as_exact(tuning):
    policy = Policy.load(ModelOptions(tuning=tuning, dtype="float32", device="cpu"))
    if tuning == "lora":
        with torch.no_grad():
            for name, weight in policy.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.02)
    policy.model.train()
    rng = random.Random(0)
    answers = [tuple(rng.randrange(10, 49_000) for _ in range(n)) for n in (40, 23, 31)]
    pair = TokenGroup(answers[0][:20], (answers[0], answers[0][:25] + answers[1]))
    groups = [pair, TokenGroup(answers[1], (answers[2], answers[2][:9], answers[0], answers[2]))]
    got = group_logprobs(policy.model, groups, packing=True, token_budget=512)
    got_gradients = gradients(policy.model, got)
    wanted = one_at_a_time(policy.model, groups)
    assert_same(got, wanted)
    assert_same_gradients(got_gradients, gradients(policy.model, wanted))


@WAYS
def test_chunks_of_the_head_do_not_change_the_numbers(packing, monkeypatch):
    model, groups = shared("llama"), draw_groups(5)
    whole = group_logprobs(model, groups, packing=packing, token_budget=40)
    whole_gradients = gradients(model, whole)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    got = group_logprobs(model, groups, packing=packing, token_budget=40)
    assert_same(got, whole, atol=1e-5)
    assert_same_gradients(gradients(model, got), whole_gradients)


@WAYS
def test_no_more_logits_exist_than_a_chunk_holds(packing, monkeypatch):
    model, seen = shared("llama"), []
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    hook = model.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape[0]))
    logps = group_logprobs(model, draw_groups(5), packing=packing, token_budget=40)
    forward = len(seen)
    gradients(model, logps)
    hook.remove()
    assert max(seen) == 7
    assert len(seen) == 2 * forward, "the backward pass computes each chunk's logits once more"


@WAYS
def test_log_probs_follow_the_order_of_the_groups(packing):
    model, groups = shared("llama"), draw_groups(6)
    with torch.no_grad():
        got = group_logprobs(model, groups, packing=packing, token_budget=40)
        turned = group_logprobs(model, groups[::-1], packing=packing, token_budget=40)
    assert_same(turned[::-1], got, atol=0 if packing else 1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_of_the_model_changes_no_gradient():
    model, groups = tiny("llama"), draw_groups(12)
    wanted = gradients(model, one_at_a_time(model, groups))
    model.train().gradient_checkpointing_enable()
    got = group_logprobs(model, groups, packing=True, token_budget=40)
    assert_same_gradients(gradients(model, got), wanted)


def test_bf16_weights_give_float32_log_probs_near_the_exact_ones():
    groups = draw_groups(7)
    model = tiny("llama").to(torch.bfloat16)
    with torch.no_grad():
        wanted = one_at_a_time(model, groups)
        assert_same(group_logprobs(model, groups, packing=True, token_budget=40), wanted, atol=0.1)
        assert_same(group_logprobs(model, groups, packing=False, token_budget=40), wanted, atol=0.1)


def test_packing_is_right_under_autocast():
    model, groups = shared("llama"), draw_groups(8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = one_at_a_time(model, groups)
        assert_same(group_logprobs(model, groups, packing=True, token_budget=40), wanted, atol=0.1)


def test_a_wrapped_model_is_called_as_a_whole():
    """A stand-in for the wrappers of several processes, whose hooks sit on their own forward."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, **inputs):
            self.calls += 1
            return self.module(**inputs)

    groups, model = draw_groups(9), Wrapper(shared("llama"))
    got = group_logprobs(model, groups, packing=True, token_budget=40)
    assert model.calls == 1
    assert "sharded" in supports_packing(model, longest=16)
    assert_same(got, one_at_a_time(shared("llama"), groups))


def test_a_window_that_would_slide_is_a_reason_not_to_pack():
    model = tiny("gemma3_text", sliding_window=8)
    group = TokenGroup((3, 4, 5, 6, 7, 8), ((9, 10, 11, 12), (9, 10, 13)))
    assert supports_packing(model, longest=8) is None
    assert supports_packing(model, longest=9) == supports_packing(model)
    assert "slides over 8 tokens" in supports_packing(model)
    got = group_logprobs(model, [group], packing=True, token_budget=40)
    assert_same(got, one_at_a_time(model, [group]))


def test_a_window_without_layer_types_counts_for_all_layers():
    assert "slides over 8" in supports_packing(tiny("mistral", sliding_window=8), longest=9)
    assert supports_packing(tiny("mistral", sliding_window=None)) is None


def test_full_attention_layers_have_no_window_even_where_the_config_names_one():
    layers = ["full_attention"] * 2
    model = tiny("gemma3_text", sliding_window=8, layer_types=layers)
    assert supports_packing(model) is None


def test_unknown_models_are_padded_and_right():
    model = tiny("bloom")
    groups = draw_groups(10)
    assert "'bloom' have not been checked" in supports_packing(model)
    assert_same(
        group_logprobs(model, groups, packing=True, token_budget=40), one_at_a_time(model, groups)
    )
    with pytest.raises(ModelError, match=r"bloom.*set packing to false"):
        packed_logprobs(model, pack(groups, 40))


def test_attention_without_masks_per_token_is_a_reason():
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in supports_packing(model)


def test_adapters_that_add_tokens_are_refused():
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(tiny("llama"), tuning)
    with pytest.raises(ModelError, match=r"PROMPT_TUNING.*LoRA"):
        group_logprobs(model, draw_groups(11), packing=False, token_budget=40)


@WAYS
def test_groups_without_tokens_to_score_keep_their_places(packing):
    groups = [TokenGroup((3, 4), ((), (5,))), TokenGroup((3,), ((),))]
    got = group_logprobs(shared("llama"), groups, packing=packing, token_budget=40)
    assert [[len(completion) for completion in group] for group in got] == [[0, 1], [0]]
    assert group_logprobs(shared("llama"), [], packing=packing, token_budget=40) == []
