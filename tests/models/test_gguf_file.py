"""A GGUF file is the model: read back by transformers it has the same logits, tokens and template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prefloop.errors import ModelError
from prefloop.models.gguf_file import _SPLITS, write_gguf
from prefloop.models.policy import Policy
from prefloop.models.sources import ModelOptions
from tests import shapes

gguf = pytest.importorskip("gguf", reason="needs the extra embedded, which make setup installs")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BASE = {"rope_type": "default", "rope_theta": 70000.0}
QUICK: dict[str, tuple[type, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=BASE)),
    "tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=128, head_dim=16)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, rope_parameters=BASE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=128)),
}
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
AFTER_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TEXTS = [
    "It's 1234 o'clock,  isn't it?\n\n\tYes — naïve “quotes” 漢字 🙂.",
    "the then there 00 12 3.5e-7",
    "<|im_start|>user\nHi<|im_end|>",
]


def split(pattern: str) -> Any:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, AFTER_SPLIT])


PATTERNS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTE_LEVEL]),
    **{name: split(pattern) for pattern, name in _SPLITS.items()},
}


def byte_bpe(pre: Any = BYTE_LEVEL, ignore_merges: bool = False) -> Any:
    """Bytes, a few merges, ChatML's tokens, and one added token that is not special."""
    vocabulary = {t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("Ġ", "12")]
    for one, other in merges:
        vocabulary[one + other] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    core.pre_tokenizer, core.decoder = pre, decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    core.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = shapes.CHATML
    return tokenizer


def tiny(kind: type, config: Any, tokenizer: Any) -> Any:
    """A model whose weights float16 holds exactly."""
    torch.manual_seed(0)
    config.vocab_size = len(tokenizer) + 3
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model = kind(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight).mul(0.2).half().float())
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 45)[None]).logits  # type: ignore[no-any-return]


def fields(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("name", QUICK)
def test_read_back_it_has_the_same_logits(name: str, tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    model = tiny(*QUICK[name], tokenizer)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=1e-4)


def test_q8_0_is_near_and_half_as_large(tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    model = tiny(*QUICK["llama"], tokenizer)
    for kind in ("f16", "q8_0"):
        write_gguf(model, tokenizer, tmp_path / f"{kind}.gguf", kind)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="q8_0.gguf", dtype=torch.float32
    )
    found, expected = logits(again), logits(model)
    assert 0 < (found - expected).std() < 0.05 * expected.std()
    sizes = {
        k: sum(t.n_bytes for t in gguf.GGUFReader(tmp_path / f"{k}.gguf").tensors)
        for k in ("f16", "q8_0")
    }
    assert sizes["q8_0"] < 0.6 * sizes["f16"]


def test_read_back_its_tokenizer_and_template_are_the_same(tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    write_gguf(tiny(*QUICK["llama"], tokenizer), tokenizer, tmp_path / "m.gguf", "f16")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token == "<|im_end|>"
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.eot_token_id"] == tokenizer.eos_token_id
    assert found["tokenizer.ggml.add_bos_token"] is False
    types = dict(
        zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True)
    )
    kinds = gguf.TokenType
    assert types["<|im_start|>"] == kinds.CONTROL
    assert types["<think>"] == kinds.USER_DEFINED
    assert types["the"] == kinds.NORMAL
    assert list(types.values())[-3:] == [kinds.UNUSED] * 3


@pytest.mark.parametrize("name", PATTERNS)
def test_the_pattern_of_words_is_named(name: str, tmp_path: Path) -> None:
    tokenizer = byte_bpe(PATTERNS[name], ignore_merges=name == "llama-bpe")
    write_gguf(tiny(*QUICK["tied"], tokenizer), tokenizer, tmp_path / "m.gguf", "f16")
    assert fields(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == name


def test_llama_3s_frequencies_are_written_as_factors(tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    model = tiny(LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3), tokenizer)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f16")
    (tensor,) = (t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if "rope" in t.name)
    factors = torch.tensor(tensor.data)
    # Wavelengths below 64 / 4 stay; those above 64 / 1 are stretched by 8.
    waves = 2 * torch.pi * 500000.0 ** (torch.arange(8) / 8)
    torch.testing.assert_close(factors[waves < 16], torch.ones(int((waves < 16).sum())))
    torch.testing.assert_close(factors[waves > 64], torch.full((int((waves > 64).sum()),), 8.0))
    assert ((factors > 0.999) & (factors < 8.001)).all()


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    write_gguf(tiny(*QUICK["mistral"], tokenizer), tokenizer, tmp_path / "m.gguf", "f16")
    assert fields(tmp_path / "m.gguf")["llama.context_length"] == 128


@pytest.mark.parametrize("what", ["class", "sentencepiece", "pattern", "rope", "float16"])
def test_what_llama_cpp_would_compute_otherwise_is_refused(what: str, tmp_path: Path) -> None:
    tokenizer = byte_bpe(split(r"\w+") if what == "pattern" else BYTE_LEVEL)
    kind, config = LlamaForCausalLM, LlamaConfig(**SIZES)
    if what == "sentencepiece":
        tokenizer = shapes.zephyr()
    if what == "rope":
        yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
        config = LlamaConfig(**SIZES, rope_parameters=yarn)
    model = tiny(kind, config, tokenizer)
    if what == "class":
        model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=300))
    if what == "float16":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = 7e4
    with pytest.raises(ModelError, match=r"cannot be written as GGUF here.*convert_hf_to_gguf\.py"):
        write_gguf(model, tokenizer, tmp_path / "m.gguf", "f16")


@pytest.mark.slow
def test_the_embedded_model_answers_the_same_from_its_file(tmp_path: Path) -> None:
    policy = Policy.load(ModelOptions(dtype="float32", device="cpu", tuning="full"))
    model: Any = policy.model
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half().float())
    write_gguf(model, policy.tokenizer, tmp_path / "m.gguf", "f16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    lines = [line for line in Path(__file__).read_text("utf-8").splitlines() if line.strip()]
    texts = [*TEXTS, *lines[:197]]
    assert len(texts) == 200
    assert [tokens(t)["input_ids"] for t in texts] == [
        policy.tokenizer(t)["input_ids"] for t in texts
    ]
    questions = ["What is the capital of France?", "Count from 1 to 12.", "Write a short poem."]
    for question in questions:
        turns = [{"role": "user", "content": question}]
        ids = policy.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        both = [m.generate(**ids, max_new_tokens=24, do_sample=False) for m in (model, again)]
        assert both[0].tolist() == both[1].tolist()


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama", "biases", "llama3", "qwen2", "qwen3"])
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    """Log-probs within 1e-3 nats (its cache is float16), and the same tokens; with heads of 32 for Qwen3."""
    llama_cpp = pytest.importorskip("xllamacpp", reason="not in constraints.txt: llama.cpp itself")
    more = {
        "biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True)),
        "llama3": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=32)),
    }
    tokenizer = byte_bpe()
    model = tiny(*(QUICK | more)[name], tokenizer)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f16")
    options = llama_cpp.CommonParams()
    options.model.path = str(tmp_path / "m.gguf")
    options.n_ctx, options.n_parallel, options.n_gpu_layers = 512, 1, 0
    options.cpuparams.n_threads = 1
    server = llama_cpp.Server(options)
    ids = torch.randint(5, 240, (100,), generator=torch.Generator().manual_seed(1))
    asked = {"prompt": ids.tolist(), "n_predict": 1, "temperature": 0.0, "n_probs": 8}
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0, -1].log_softmax(-1)
    said = post(f"{server.listening_address}/completion", asked)
    best = said["completion_probabilities"][0]["top_logprobs"]
    assert [entry["id"] for entry in best] == expected.topk(8).indices.tolist()
    found = torch.tensor([entry["logprob"] for entry in best])
    torch.testing.assert_close(found, expected.topk(8).values, atol=1e-3, rtol=0)
    for text in TEXTS:
        parsed = {"content": text, "parse_special": True}
        tokens = post(f"{server.listening_address}/tokenize", parsed)["tokens"]
        assert tokens == tokenizer(text)["input_ids"]


def post(url: str, body: dict[str, Any]) -> Any:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as reply:
        return json.load(reply)
