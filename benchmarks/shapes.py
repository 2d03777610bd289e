"""A whole round of IAL and of AROP on tiny models in the shape of what people use: what is sampled and trained.

    python benchmarks/shapes.py                       # all shapes and methods, as a table
    python benchmarks/shapes.py --shapes zephyr r1 --methods ial --json

Tokenizers and templates are those of tests/shapes.py. Each model writes what its family writes, by a table of which
token follows which: lower-case letters where it thinks, capitals where it answers, one of the family's ends of turn
after them. The generation_config names the ends that the family's does. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import prefloop.train.trainer
from prefloop.models.chat_template import set_template_date
from prefloop.models.sources import quiet
from prefloop.recipe import Recipe
from prefloop.records import Candidates, Pair
from prefloop.run.loop import run
from prefloop.run_folder import read_run
from prefloop.train.packing import TokenGroup
from tests import shapes

Follows = Mapping[str, Mapping[str, float]]
"""By token, the tokens that may follow it with their weights."""

_FLOOR = 12.0
"""How many nats a token that may not follow lies below the likeliest."""
_NOISE = 0.02
"""What is left of attention and MLP: enough for an adapter to train, too little to spoil the table."""
_OPEN = {"identical": False, "max_edit_share": None, "max_length_ratio": None}
_PROMPTS, _HELD_OUT = 6, 1
_CUT, _TEXT = "length limit", "text: "


def _speech(
    begins: str, ends: Mapping[str, float], letters: str = "BCDEFG", space: str | None = "Ġ"
) -> Follows:
    """Words of letters after the token `begins`, and at last an end."""
    weights = {letter: 0.2 - 0.02 * n for n, letter in enumerate(letters)}
    further = {**weights, **ends} if space is None else {**weights, space: 0.1, **ends}
    gap = {} if space is None else {space: weights}
    return {begins: weights, **gap, **dict.fromkeys(letters, further)}


@dataclass(frozen=True)
class Shape:
    """A family: its tokenizer, the ends that its generation_config names, and what its model writes."""

    tokenizer: Callable[[], Any]
    named_ends: tuple[str, ...]
    follows: Follows
    arguments: dict[str, Any] = field(default_factory=dict)
    """model.chat_template_kwargs."""
    max_new_tokens: int = 8
    silenced: tuple[str, str] | None = None
    """A token, and the letters that are not written once it has been said."""


def _gpt_oss() -> Any:
    """With the words of roles and channels as one token each, as in its vocabulary."""
    tokenizer = shapes.gpt_oss()
    words = ("assistant", "analysis", "final")
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    return tokenizer


_NEWLINE = "Ċ"
_R1_END = "<｜end▁of▁sentence｜>"
_CHATML_ENDS = {"<|im_end|>": 0.3, "<|endoftext|>": 0.1}
SHAPES: dict[str, Shape] = {
    "zephyr": Shape(
        shapes.zephyr,
        ("</s>",),
        # With the parts of "is", which encoding would join.
        _speech("\n", {"</s>": 0.4}, "isBCDE", "▁"),
    ),
    "gemma3": Shape(
        shapes.gemma3,
        ("<eos>", "<end_of_turn>"),
        _speech(_NEWLINE, {"<end_of_turn>": 0.3, "<eos>": 0.1}),
    ),
    "phi3": Shape(
        shapes.phi3,
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
        _speech(_NEWLINE, {"<|end|>": 0.3, "<|endoftext|>": 0.1}),
    ),
    "llama3": Shape(
        shapes.llama3,
        ("<|end_of_text|>",),  # as first released
        _speech(_NEWLINE, {"<|eot_id|>": 0.3, "<|end_of_text|>": 0.1}),
    ),
    "qwen3, thinking": Shape(
        shapes.qwen3,
        ("<|im_end|>", "<|endoftext|>"),
        {
            _NEWLINE: {"<think>": 1.0},
            **_speech("<think>", {"</think>": 0.5}, "xyz", None),
            **_speech("</think>", _CHATML_ENDS),
        },
        {"enable_thinking": True},
        16,
    ),
    "qwen3, not thinking": Shape(
        shapes.qwen3,
        ("<|im_end|>", "<|endoftext|>"),
        _speech(_NEWLINE, _CHATML_ENDS),
        {"enable_thinking": False},
    ),
    "gpt-oss": Shape(
        _gpt_oss,
        ("<|return|>", "<|endoftext|>", "<|call|>"),
        {
            **_speech("final", {"<|return|>": 0.4}),
            **_speech("<|message|>", {"<|end|>": 0.5}, "xyz", None),
            # Hardly a capital, unless "final" has silenced the others.
            "<|message|>": {**dict.fromkeys("xyz", 1.0), **dict.fromkeys("BCD", math.exp(-3))},
            "<|end|>": {"<|start|>": 1.0},
            "<|start|>": {"assistant": 1.0},
            "assistant": {"<|channel|>": 1.0},
            "<|channel|>": {"analysis": 0.3, "final": 0.7},
            "analysis": {"<|message|>": 1.0},
            "final": {"<|message|>": 1.0},
        },
        {"reasoning_effort": "low"},
        24,
        ("final", "xyz"),
    ),
    "glm4": Shape(
        shapes.glm4,
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        _speech(_NEWLINE, {"<|user|>": 0.3, "<|observation|>": 0.1}),
    ),
    "r1": Shape(
        shapes.r1,
        (_R1_END,),
        {
            **_speech(_NEWLINE, {"</think>": 0.5}, "xyz", None),
            **_speech("</think>", {_R1_END: 0.4}),
        },
        max_new_tokens=16,
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "ial": {"name": "ial"},
    "arop": {"name": "arop"},
    "arop, infilled flaw": {"name": "arop", "flaw": "infill"},
}


@dataclass(frozen=True)
class Row:
    """What one round did: an answer is everything that was sampled, advice too."""

    shape: str
    method: str
    answers: int
    stops: dict[str, int]
    """How often each token ended an answer; "length limit" for those that none ended."""
    thoughts: int
    """Answers with a thought, which is kept apart."""
    rejects: dict[str, int]
    pairs: int
    trained: dict[str, str]
    """The first pair's tokens by role: as they were sampled, or after "text:" as its text was encoded."""
    first_loss: float
    expected_loss: float


def write_model(shape: Shape, folder: Path) -> Any:
    """Save the shape's tiny model and tokenizer to `folder`; returns the tokenizer."""
    tokenizer = shape.tokenizer()
    model = _following(tokenizer, shape.follows)
    if shape.silenced:
        _silence(model, tokenizer, *shape.silenced)
    ids = tokenizer.convert_tokens_to_ids
    model.generation_config.eos_token_id = [ids(end) for end in shape.named_ends]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return tokenizer


def _following(tokenizer: Any, follows: Follows) -> LlamaForCausalLM:
    """A Llama whose next token depends, but for some noise, on the last one alone."""
    rows = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=rows,
                hidden_size=(rows // 8 + 1) * 8,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        ).eval()
    width = model.config.hidden_size
    head = torch.zeros(rows, width)
    for token, weights in follows.items():
        total = sum(weights.values())
        for following, weight in weights.items():
            place = tokenizer.convert_tokens_to_ids(following)
            logit = _FLOOR + math.log(weight / total)
            # A normalised one-hot state is sqrt(width) long.
            head[place, tokenizer.convert_tokens_to_ids(token)] = logit / math.sqrt(width)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(rows, width))
        model.lm_head.weight.copy_(head)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(_NOISE)
            layer.mlp.down_proj.weight.mul_(_NOISE)
    return model


def _silence(model: LlamaForCausalLM, tokenizer: Any, said: str, letters: str) -> None:
    """Make the first layer note in the state's last place that `said` has been said, and the head heed it."""
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for part in (attention.q_proj, attention.v_proj, attention.o_proj):
            part.weight.zero_()
        # Without queries a head averages over all that was said.
        attention.v_proj.weight[0, tokenizer.convert_tokens_to_ids(said)] = 1.0
        attention.o_proj.weight[-1, 0] = 1.0
        for letter in letters:
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(letter), -1] = -10.0


def recipe(shape: Shape, method: str, model: Path, data: Path) -> Recipe:
    """One round of a method. The data are written to the file `data`, each with a target."""
    lines = [
        {"id": str(n), "prompt": f"Name {n}?", "response": f"Rome is {n}"}
        for n in range(_PROMPTS + _HELD_OUT)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sampling = {"temperature": 1.0, "max_new_tokens": shape.max_new_tokens}
    options = {**METHODS[method], "sampling": sampling, "gates": _OPEN}
    if method == "ial":
        options["advice"] = sampling
    return Recipe.model_validate(
        {
            "name": "shape",
            "model": {
                "source": str(model),
                "device": "cpu",
                "dtype": "float32",
                "chat_template_kwargs": shape.arguments,
                "lora": {"r": 4},
            },
            "data": {"train": str(data), "holdout": _HELD_OUT},
            "judge": {"name": "rules", "max_characters": 3} if method == "ial" else None,
            "method": options,
            "loop": {"rounds": 1, "prompts_per_round": _PROMPTS},
            # All pairs in one step, so that its loss is known from them.
            "train": {"epochs": 1, "lr": 1e-3, "batch_size": _PROMPTS, "micro_batch_size": 2},
            "evaluate": {"prompts": 1, "introspection": False, "every_round": False},
            "guard": {"min_stop_rate": 0.0},
        }
    )


@contextmanager
def trained_groups(found: list[TokenGroup]) -> Iterator[None]:
    """Inside, `found` is filled with what the trainer gives the model to compute."""
    compute = prefloop.train.trainer.group_logprobs

    def noting(model: Any, groups: Sequence[TokenGroup], **options: Any) -> Any:
        found.extend(groups)
        return compute(model, groups, **options)

    with mock.patch.object(prefloop.train.trainer, "group_logprobs", noting):
        yield


def play(name: str, method: str, folder: Path, groups: list[TokenGroup] | None = None) -> Row:
    """One round in `folder`, which then holds model/ and run/; `groups` is filled with what was trained on."""
    groups = [] if groups is None else groups
    shape = SHAPES[name]
    tokenizer = write_model(shape, folder / "model")
    chosen = recipe(shape, method, folder / "model", folder / "data.jsonl")
    try:
        with trained_groups(groups):
            run(chosen, folder / "run", Console(file=StringIO()))
    finally:
        set_template_date(None)
    round_dir = read_run(folder / "run").round(0)
    pairs = round_dir.records("pairs", Pair)
    sampled = [
        response
        for group in round_dir.records("candidates", Candidates)
        for response in group.responses.values()
        if response.token_ids
    ]
    names = tokenizer.convert_ids_to_tokens
    stops = Counter(names(r.token_ids[-1]) if r.finish == "stop" else _CUT for r in sampled)
    return Row(
        shape=name,
        method=method,
        answers=len(sampled),
        stops=dict(stops.most_common()),
        thoughts=sum(bool(r.reasoning) for r in sampled),
        rejects=dict(round_dir.reasons()),
        pairs=len(pairs),
        trained=_trained(pairs[0], chosen.method.roles, groups, names),
        first_loss=next(round_dir.metrics())["loss"],
        expected_loss=_expected(method, pairs),
    )


def _trained(
    pair: Pair, roles: Sequence[str], groups: Sequence[TokenGroup], names: Callable[..., list[str]]
) -> dict[str, str]:
    """The first pair's tokens as the trainer had them, found by the sampled ones."""
    ids = {role: pair.token_ids.get(role) for role in roles}
    group = next(
        group
        for group in groups
        if all(ids[r] in (None, c) for r, c in zip(roles, group.completions, strict=True))
    )
    return {
        role: ("" if ids[role] else _TEXT) + " ".join(names(list(completion)))
        for role, completion in zip(roles, group.completions, strict=True)
    }


def _expected(method: str, pairs: Sequence[Pair]) -> float:
    """The step's loss while policy and reference are equal: IAL's 2 log 2, AROP's mean of log(1 + e^M)."""
    if method == "ial":
        return 2 * math.log(2)
    return sum(math.log1p(math.exp(pair.margin)) for pair in pairs) / len(pairs)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| shape | method | ended by | thoughts | rejects | pairs | the first pair's trained tokens |",
        "|---|---|---|--:|---|--:|---|",
    ]
    for row in rows:
        trained = "; ".join(f"{role} {_code(tokens)}" for role, tokens in row.trained.items())
        stops = ", ".join(f"{_code(token)} {count}" for token, count in row.stops.items())
        rejects = ", ".join(f"{reason} {count}" for reason, count in row.rejects.items())
        lines.append(
            f"| {row.shape} | {row.method} | {stops} | {row.thoughts or ''} | {rejects} | {row.pairs} | {trained} |"
        )
    return "\n".join(lines)


def _code(tokens: str) -> str:
    if tokens == _CUT:
        return tokens
    kind, tokens = (_TEXT, tokens[len(_TEXT) :]) if tokens.startswith(_TEXT) else ("", tokens)
    return f"{kind}`" + tokens.replace("|", "\\|") + "`"


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for name in options.shapes:
        for method in options.methods:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(play(name, method, Path(folder)))
    print(json.dumps([asdict(row) for row in rows], indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
