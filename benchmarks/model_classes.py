"""Causal LM classes of the installed transformers, tiny and random: is what is trained what generates and is saved?

    python benchmarks/model_classes.py                          # all classes, as text
    python benchmarks/model_classes.py --classes llama qwen3_moe --json
    python benchmarks/model_classes.py --markdown docs/models.md

Each class is built from its own configuration, two layers and a few wide, with random weights, and gets the
default adapter of a recipe with weights that are not zero. Then the trained policy's plain forward pass is
held against everything else that prefloop computes with it. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from prefloop.errors import PrefloopError
from prefloop.generate.hf_engine import HFEngine
from prefloop.models.policy import Policy
from prefloop.models.sources import ModelOptions, quiet
from prefloop.records import Sampling
from prefloop.run.self_check import check_policy
from prefloop.train.logprobs import group_logprobs, supports_packing
from prefloop.train.options import TrainOptions
from prefloop.train.packing import TokenGroup

_VOCABULARY = 264
_NEW = 6
_TOLERANCE = 1e-3
"""Largest difference of a logit in standard deviations of all, and of a log-prob in nats, in float32."""

_SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 512),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "vocab_size": _VOCABULARY,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
"""Set in every configuration that has such a field."""

_OWN = object()
"""Stands for: leave what the class has."""
_MLA = {"head_dim": 8, "num_key_value_heads": 4}
_FULL = ["full_attention", "full_attention"]
_MORE: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "falcon": {"head_dim": _OWN},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, **_MLA},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8,
        "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {
        "text_config": {**_SMALL, "intermediate_size_mlp": 48, "num_local_experts": 4},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        "image_token_index": 263, "boi_token_index": 261, "eoi_token_index": 262,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4,
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_d_state": 8,
        "mamba_ngroups": 1, "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "gemma3": {
        "text_config": {**_SMALL, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 263, "boi_token_index": 261, "eoi_token_index": 262,
    },
}  # fmt: skip
"""What single classes need besides."""

CLASSES: tuple[str, ...] = (
    "afmoe", "apertus", "arcee", "aria_text", "bamba", "bitnet", "bloom", "codegen", "cohere", "cohere2",
    "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1", "ernie4_5",
    "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "gemma",
    "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "helium",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "jamba", "jetmoe", "lfm2", "lfm2_moe", "llama", "llama4", "llama4_text",
    "mamba", "mamba2", "minimax", "minimax_m2", "ministral", "mistral", "mixtral", "mpt", "nanochat",
    "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next",
    "recurrent_gemma", "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm",
    "zamba", "zamba2",
)  # fmt: skip


@dataclass
class Row:
    """What was seen of one class; differences are in standard deviations of all logits."""

    model_type: str
    name: str = ""
    parameters: int = 0
    engine: str = ""
    packed: bool = False
    greedy_equal: bool | None = None
    """The engine's greedy tokens are those of transformers' generate on the merged model."""
    scored: float | None = None
    """Engine's log-probs of given tokens against the trained policy's plain forward pass, nats."""
    trained: float | None = None
    """The trainer's log-probs (packed where the model allows) against the same, nats."""
    under_adapter: float | None = None
    """Share of the parameters under the adapter."""
    idle: int | None = None
    """Adapter weights that no gradient reaches."""
    modules: list[str] = field(default_factory=list)
    moved: float | None = None
    """How far the adapter moves the logits: the others are to be small beside it."""
    merged: float | None = None
    """Inside `merged` and after `merge`, against the trained policy."""
    reopened: float | None = None
    """The saved adapter on the base, and the saved merged model, both opened by transformers and PEFT alone."""
    verdict: str = ""


def config_of(model_type: str) -> Any:
    """The class's configuration, small."""
    kind = CONFIG_MAPPING[model_type]
    more = _MORE.get(model_type, {})
    usual = kind()
    small = {name: value for name, value in _SMALL.items() if hasattr(usual, name)}
    kept = {name: value for name, value in {**small, **more}.items() if value is not _OWN}
    return kind(**kept)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and two turns' ends; the ids of text matter nowhere here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    made.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    return made


def make(model_type: str, folder: Path) -> None:
    """Write the class's tiny random model and the tokenizer into a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config_of(model_type), dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                # Some classes leave what they do not set up as it was in memory, or at zero.
                if not torch.isfinite(weight).all() or not weight.any():
                    weight.copy_(torch.randn(weight.shape) * 0.02)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def examine(model_type: str, folder: Path) -> Row:
    """Try all that a run does with a model of the class."""
    row = Row(model_type)
    try:
        make(model_type, folder / "base")
        row.name = type(_opened(folder / "base")).__name__
        _try(row, folder)
    except PrefloopError as error:
        row.verdict = f"refused: {error}"
    except Exception as error:  # noqa: BLE001 (the table goes on)
        row.verdict = f"traceback: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return row


def _try(row: Row, folder: Path) -> None:
    options = ModelOptions(source=str(folder / "base"), device="cpu", dtype="float32")
    policy = Policy.load(options)
    found = policy.share()
    assert found is not None
    row.parameters, row.modules = found.weights, list(found.modules)
    row.under_adapter = found.under_adapter / found.weights
    check_policy(policy, TrainOptions(), folder)
    rows = [[(7919 * n + 3) % 256 + 2 for n in range(size)] for size in (5, 12)]
    initial = _logits(policy.model, rows)
    _disturb(policy)
    expected = _logits(policy.model, rows)
    row.moved = _apart(initial, expected)
    row.idle = _idle_after_backward(policy, rows)
    _try_trainer(row, policy, rows, expected)
    engine = HFEngine(policy.model, policy.tokenizer)
    with policy.merged():
        row.merged = _apart(_logits(policy.model, rows), expected)
        row.engine = "slots" if engine._servable(40) else "fallback"
        scores = engine.score_tokens(rows, [1] * len(rows))
        row.scored = _worst(scores, rows, expected)
        greedy = engine.continue_tokens(
            rows, Sampling(temperature=0.0, max_new_tokens=_NEW), seed=0
        )
    row.merged = max(row.merged, _apart(_logits(policy.model, rows), expected))
    _try_saved(row, policy, folder, rows, expected, greedy)
    row.verdict = verdict(row)


def _try_trainer(row: Row, policy: Policy, rows: list[list[int]], expected: list[Tensor]) -> None:
    groups = [TokenGroup(tuple(ids[:3]), (tuple(ids[3:]),)) for ids in rows]
    row.packed = supports_packing(policy.model, longest=64) is None
    with torch.no_grad():
        found = group_logprobs(policy.model, groups, packing=True, token_budget=256)
    row.trained = max(
        float((logps[0] - _logps(ids, logits)[2:]).abs().max())
        for logps, ids, logits in zip(found, rows, expected, strict=True)
    )


def _try_saved(
    row: Row,
    policy: Policy,
    folder: Path,
    rows: list[list[int]],
    expected: list[Tensor],
    greedy: list[list[int]],
) -> None:
    policy.save(folder / "adapter")
    again = peft.PeftModel.from_pretrained(_opened(folder / "base"), str(folder / "adapter"))
    row.reopened = _apart(_logits(again, rows), expected)
    merged = policy.merge()
    assert row.merged is not None
    row.merged = max(row.merged, _apart(_logits(merged, rows), expected))
    merged.save_pretrained(folder / "merged")
    opened = _opened(folder / "merged")
    row.reopened = max(row.reopened, _apart(_logits(opened, rows), expected))
    row.greedy_equal = greedy == [_greedy(opened, ids) for ids in rows]


def _opened(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def _greedy(model: Any, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=_NEW,
            eos_token_id=1,
            pad_token_id=0,
        )
    found: list[int] = out[0, len(ids) :].tolist()
    return found


def _disturb(policy: Policy) -> None:
    """A stand-in for training: the adapter's second matrices are no longer zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if weight.requires_grad and "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def _idle_after_backward(policy: Policy, rows: list[list[int]]) -> int:
    """Adapter weights without a gradient; experts that no token chose have one of zeros."""
    policy.model.train()
    for ids in rows:
        logits = policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        logits.log_softmax(-1)[0, torch.arange(len(ids)), ids].sum().backward()
    policy.model.eval()
    trained = [weight for weight in policy.model.parameters() if weight.requires_grad]
    idle = sum(weight.grad is None for weight in trained)
    policy.model.zero_grad(set_to_none=True)
    return idle


def _logits(model: Any, rows: list[list[int]]) -> list[Tensor]:
    """Of each row by itself: (T, V)."""
    model.eval()
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in rows
        ]


def _logps(ids: list[int], logits: Tensor) -> Tensor:
    """Log-probs of the row's tokens but the first, nats."""
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def _worst(scores: Any, rows: list[list[int]], expected: list[Tensor]) -> float:
    return max(
        float((torch.tensor(score.logprobs) - _logps(ids, logits)).abs().max())
        for score, ids, logits in zip(scores, rows, expected, strict=True)
    )


def _apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, in standard deviations of the expected logits."""
    both = torch.cat(found), torch.cat(expected)
    return float((both[0] - both[1]).abs().max() / both[1].std().clamp(min=1e-6))


def verdict(row: Row) -> str:
    """What the numbers say in words: "right", or what is not."""
    numbers = {
        "merged is not what is trained": row.merged,
        "reopened is not what is trained": row.reopened,
        "scores differ": row.scored,
        "trainer's log-probs differ": row.trained,
    }
    wrong = [words for words, value in numbers.items() if value is None or not value <= _TOLERANCE]
    if not row.greedy_equal:
        wrong.append("greedy differs")
    if row.idle:
        wrong.append(f"{row.idle} adapter weights get no gradient")
    if row.moved is None or row.moved < 10 * _TOLERANCE:
        wrong.append("the adapter changes nothing")
    return "wrong: " + "; ".join(wrong) if wrong else "right"


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "| class | model type | engine | packed | greedy = generate | score - forward | adapted "
        "| merged - trained | reopened - trained | verdict |",
        "|---|---|---|---|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        share = "" if row.under_adapter is None else f"{row.under_adapter:.0%}"
        cells = [
            row.name,
            f"`{row.model_type}`",
            row.engine,
            "yes" if row.packed else "no",
            {True: "yes", False: "no", None: ""}[row.greedy_equal],
            *(_number(row.scored), share, _number(row.merged), _number(row.reopened)),
            row.verdict,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


_INTRODUCTION = """# Models

Causal language models of transformers, each tiny and with random weights, and whether what is trained is
what generates, scores, merges and is saved. Made by `python benchmarks/model_classes.py --markdown
docs/models.md` with transformers {transformers}, peft {peft} and torch {torch} on a CPU in float32.

- Each model gets the default adapter (`all-linear`, and the stacked experts of a mixture) with random weights, and passes the self-check of a run's start.
- *engine*: decoded in slots, or by transformers' own loop (fallback). *packed*: training computes shared prefixes once.
- *score - forward*: the engine's log-probs against the trained policy's plain forward pass, largest difference in nats.
- *adapted*: share of the parameters under the adapter; embeddings and output layer are a large part of models this small.
- *merged - trained*, *reopened - trained*: largest difference of a logit in standard deviations of all, merged for generation and for good; and the
  saved adapter on its base, and the saved merged model, opened by transformers and PEFT alone.
- *right*: all differences below 0.001, greedy answers equal to `generate` on the saved merged model, and every adapter weight gets a gradient.
"""


def _page(rows: list[Row]) -> str:
    versions = {m.__name__: m.__version__ for m in (transformers, peft, torch)}
    kinds = ("right", "refused", "wrong", "traceback")
    counts = ", ".join(
        f"{sum(row.verdict.startswith(kind) for row in rows)} {kind}" for kind in kinds
    )
    parts = [_INTRODUCTION.format(**versions), f"{len(rows)} classes: {counts}.\n", table(rows)]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Run the classes that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), metavar="MODEL_TYPE")
    parser.add_argument("--json", action="store_true", help="print one JSON object a class")
    parser.add_argument("--markdown", type=Path, help="write the page to this file")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for model_type in arguments.classes:
        with tempfile.TemporaryDirectory() as folder, quiet():
            rows.append(examine(model_type, Path(folder)))
        if arguments.json:
            print(json.dumps(asdict(rows[-1])), flush=True)
        elif arguments.markdown is None:
            print(f"{model_type:22} {rows[-1].engine:9} {rows[-1].verdict}", flush=True)
    if arguments.markdown is not None:
        arguments.markdown.write_text(_page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
