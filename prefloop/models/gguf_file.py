"""A whole model as one GGUF file, for llama.cpp, Ollama and what is built on them.

Names of tensors and fields are those of the package gguf. Written are the architectures whose form is known here
(Llama, Mistral, Qwen2, Qwen3, with byte-level BPE); everything else is refused with the converter's name.

Shapes: H heads of query or key, D dimension of a head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from prefloop.errors import ModelError
from prefloop.models.chat import Chat

Kind = Literal["f16", "q8_0"]
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_ROPES = ("default", "linear", "llama3")
"""Kinds of rotary positions that are no more than other frequencies."""
_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_WORD % r"\p{N}{1,3}": "llama-bpe", _WORD % r"\p{N}": "qwen2"}
"""llama.cpp's names of the patterns that cut a text into words."""
_BLOCK = 32
"""Weights that share one scale in Q8_0: rows must be whole blocks."""


def write_gguf(model: PreTrainedModel, tokenizer: Any, path: Path, kind: Kind) -> None:
    """Write `model` to `path`: matrices in `kind`, vectors in float32, tokenizer and chat template inside.

    Raises ModelError for what cannot be written so that llama.cpp would compute the same.
    """
    gguf = _package()
    config: Any = model.config
    architecture = _architecture(model)
    vocabulary = _vocabulary(tokenizer, int(config.vocab_size))
    rope = _rope_factors(model, architecture)
    writer = gguf.GGUFWriter(path, architecture)
    try:
        _write_facts(writer, gguf, config, kind)
        _write_tokenizer(writer, gguf, Chat.of(model, tokenizer), vocabulary)
        if rope is not None:
            writer.add_tensor("rope_freqs.weight", rope.numpy())
        _write_weights(writer, gguf, model, architecture, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _package() -> ModuleType:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModelError(
            "a GGUF file needs the package gguf; install it with pip install 'prefloop[embedded]'"
        ) from error
    module: ModuleType = gguf
    return module


def _refused(what: str) -> ModelError:
    return ModelError(
        f"{what} cannot be written as GGUF here; leave --gguf out, and convert the merged folder with "
        "convert_hf_to_gguf.py of llama.cpp"
    )


def _architecture(model: PreTrainedModel) -> str:
    name = type(model).__name__
    config: Any = model.config
    if name not in _ARCHITECTURES:
        raise _refused(f"the class {name}")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise _refused(f"hidden_act {config.hidden_act!r}")
    return _ARCHITECTURES[name]


def _write_facts(writer: Any, gguf: ModuleType, config: Any, kind: Kind) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Beyond a sliding window llama.cpp would look further back than the model was made to.
    window = getattr(config, "sliding_window", None)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(str(config.name_or_path)).name or "model")
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(config.max_position_embeddings, window or 2**31))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _rope_factors(model: Any, architecture: str) -> torch.Tensor | None:
    """What llama.cpp divides each rotary frequency by, (D / 2,); None where they are the plain ones."""
    rope = model.config.rope_parameters
    kind = rope.get("rope_type", "default")
    rotary = model.model.rotary_emb
    if kind not in _ROPES or rotary.attention_scaling != 1.0:
        raise _refused(f"rope_type {kind!r}")
    if kind == "default":
        return None
    if architecture != "llama":
        raise _refused(f"rope_type {kind!r} of {architecture}")
    found: torch.Tensor = rotary.inv_freq.float().cpu()
    steps = torch.arange(len(found), dtype=torch.float32) / len(found)
    plain = torch.tensor(rope["rope_theta"], dtype=torch.float32).pow(-steps)
    return plain / found


def _write_weights(
    writer: Any, gguf: ModuleType, model: Any, architecture: str, kind: Kind
) -> None:
    config = model.config
    (arch,) = (a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise _refused(f"the weight {name}")
        if architecture == "llama" and ".attn_q." in new:
            weight = _interleaved(weight, config.num_attention_heads)
        elif architecture == "llama" and ".attn_k." in new:
            weight = _interleaved(weight, config.num_key_value_heads)
        _write_tensor(writer, gguf, new, weight.detach().float().cpu(), kind)


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, (H * D, ...), as llama.cpp's Llama rotates them.

    Transformers rotates dimension i with i + D / 2, llama.cpp 2 i with 2 i + 1.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _write_tensor(
    writer: Any, gguf: ModuleType, name: str, weight: torch.Tensor, kind: Kind
) -> None:
    types = gguf.GGMLQuantizationType
    if weight.ndim < 2:
        writer.add_tensor(name, weight.numpy())
        return
    limit = torch.finfo(torch.float16).max
    if not bool((weight.abs() <= limit).all()):
        raise _refused(f"{name}, which has values beyond {limit:g},")
    number = types.Q8_0 if kind == "q8_0" and weight.shape[-1] % _BLOCK == 0 else types.F16
    writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), number), raw_dtype=number)


def _vocabulary(tokenizer: Any, size: int) -> Mapping[str, Any]:
    """What a byte-level BPE tokenizer is made of: tokens by id, what each is, merges, the name of its words' pattern."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = backend["model"]
    if parts["type"] != "BPE" or parts.get("byte_fallback"):
        raise _refused("a tokenizer that is no byte-level BPE (SentencePiece among them)")
    pre = _pattern(backend["pre_tokenizer"])
    # llama.cpp takes whole words from the vocabulary before it merges under this name alone.
    if pre is None or bool(parts.get("ignore_merges")) != (pre == "llama-bpe"):
        raise _refused("a tokenizer that cuts text into words by a pattern that is not known here")
    added = tokenizer.added_tokens_decoder
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise _refused("a tokenizer with more tokens than the model")
    merges = [m if isinstance(m, str) else " ".join(m) for m in parts["merges"]]
    return {"pre": pre, "merges": merges, "added": added, "by_id": by_id, "size": size}


def _pattern(pre: Mapping[str, Any] | None) -> str | None:
    """llama.cpp's name of how a text is cut into words; None where it has none that is known here."""
    steps = [pre] if pre and pre["type"] != "Sequence" else (pre or {}).get("pretokenizers", [])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    own = steps[-1].get("use_regex", True)
    match steps[:-1]:
        case [] if own:
            return "gpt-2"
        case [{"type": "Digits", "individual_digits": True}] if own:
            return "smollm"
        case [{"type": "Split", "behavior": "Isolated", "invert": False} as split] if not own:
            return _SPLITS.get(split["pattern"].get("Regex", ""))
    return None


def _write_tokenizer(
    writer: Any, gguf: ModuleType, chat: Chat, vocabulary: Mapping[str, Any]
) -> None:
    tokenizer = chat.tokenizer
    tokens, kinds = [], []
    for number in range(vocabulary["size"]):
        token, added = vocabulary["by_id"].get(number), vocabulary["added"].get(number)
        kind = gguf.TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{number}]", gguf.TokenType.UNUSED
        elif added is not None:
            kind = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
        tokens.append(token)
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(vocabulary["merges"])
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_eot_token_id(chat.end_id)
    begun = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begun)
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat.template.source)
