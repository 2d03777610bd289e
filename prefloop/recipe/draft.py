"""A recipe written for somebody who has none: few choices become a short file with comments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import prefloop.judges
import prefloop.methods
from prefloop.config import build, dump_yaml, find_plugin, parse_yaml
from prefloop.data.rows import EMBEDDED
from prefloop.errors import DataError, RecipeError
from prefloop.methods import Method
from prefloop.recipe import Recipe
from prefloop.recipe.check import count_prompts

_HELD_OUT_SHARE = 5
_HELD_OUT = 64
_ADAPTER_RATE = 1e-4
_BATCH = 8


@dataclass(frozen=True)
class Choices:
    """What a recipe cannot be written without; the defaults run on two CPU cores without a network."""

    method: str = "ial"
    model: str = "embedded:smollm2-135m"
    train: str = EMBEDDED
    eval: str | None = None
    """None: a part of `train` is held out."""
    judge: str | None = None
    """A judge's name, or its options as YAML in braces; None: one that the method and its data allow, if it needs any."""
    tuning: str = "lora"
    rounds: int = 2
    prompts: int = 64
    """Prompts a round; fewer where the data have fewer."""
    max_new_tokens: int = 64


def draft_recipe(choices: Choices, name: str) -> str:
    """The recipe as commented YAML. Raises RecipeError or DataError where these choices make none."""
    method = _method(choices)
    judge = _judge(choices, method)
    sections: dict[str, Any] = {
        "model": {"source": choices.model, "tuning": choices.tuning},
        "data": {"train": choices.train, **({"eval": choices.eval} if choices.eval else {})},
        "method": method,
        **({"judge": judge} if judge else {}),
    }
    held_out, prompts = _sizes(choices, build(Recipe, {"name": name, **sections}, ""))
    if held_out:
        sections["data"]["holdout"] = held_out
    batch = min(_BATCH, prompts)
    adapter = {"lr": _ADAPTER_RATE, "optimizer": "adamw"} if choices.tuning == "lora" else {}
    sections |= {
        "loop": {"rounds": choices.rounds, "prompts_per_round": prompts},
        "train": {**adapter, "batch_size": batch, "micro_batch_size": 4 if batch % 4 == 0 else 1},
        "evaluate": {"prompts": held_out or _HELD_OUT},
    }
    comments = _comments(choices, held_out)
    return _header(choices, name) + "".join(
        "".join(f"# {line}\n" for line in comments.get(section, ())) + dump_yaml({section: values})
        for section, values in sections.items()
    )


def _method(choices: Choices) -> dict[str, Any]:
    kind = find_plugin(prefloop.methods, choices.method, Method, "method")
    values: dict[str, Any] = {"name": choices.method}
    # Labelled pairs are in the user's data or nowhere; else a judge orders drafts.
    if "pairs" in kind.model_fields and (choices.train == EMBEDDED or choices.judge):
        values["pairs"] = "drafts"
    # A small model cannot plant a subtle flaw when asked to; replacing one word by a less likely one it can.
    if "flaw" in kind.model_fields and choices.model.startswith("embedded:"):
        values["flaw"] = "infill"
    # What is trained token by token must be drawn as the policy is.
    temperature = 1.0 if kind.trains == "tokens" else 0.7
    sampling = {"temperature": temperature, "max_new_tokens": choices.max_new_tokens}
    return {**values, "sampling": sampling}


def _judge(choices: Choices, method: Mapping[str, Any]) -> dict[str, Any] | None:
    if choices.judge:
        value = parse_yaml(choices.judge, "--judge")
        if not isinstance(value, str | dict):
            raise RecipeError(
                f"--judge {choices.judge} is neither a judge's name nor options in braces; "
                "prefloop ls judges lists them"
            )
        return value if isinstance(value, dict) else {"name": value}
    options = {key: value for key, value in method.items() if key != "name"}
    built = build(
        find_plugin(prefloop.methods, choices.method, Method, "method"), options, "method"
    )
    if not built.needs_judge:
        return None
    targets = built.needs_target or choices.train == EMBEDDED
    return {"name": "similarity" if targets else "self_judge"}


def _sizes(choices: Choices, recipe: Recipe) -> tuple[int, int]:
    """Prompts to hold out, and prompts a round, as far as the data are here to be counted."""
    hold_out = choices.eval is None and choices.train != EMBEDDED
    counting = count_prompts(recipe, "train", {})
    try:
        while True:
            next(counting)
    except StopIteration as end:
        counts = end.value
    if None in counts:
        return (_HELD_OUT if hold_out else 0), choices.prompts
    total = sum(counts)
    held_out = min(_HELD_OUT, total // _HELD_OUT_SHARE) if hold_out else 0
    if hold_out and not held_out:
        raise DataError(
            f"{choices.train} has too few prompts ({total}) to hold some out for evaluation; "
            "give more, or name others with --eval"
        )
    return held_out, min(choices.prompts, total - held_out)


def _header(choices: Choices, name: str) -> str:
    return (
        f"# {choices.method} on {choices.model}, prompts of {choices.train}; written by prefloop new.\n"
        f"# Every option: docs/recipe.md, or prefloop check FILE --dump. Next: prefloop run FILE\n"
        + dump_yaml({"name": name})
    )


def _comments(choices: Choices, held_out: int) -> dict[str, list[str]]:
    """What somebody should know before changing a section."""
    held_out_line = (
        "holdout: so many prompts of train are kept for evaluation; or name others as eval."
        if held_out
        else "Evaluation prompts are never trained on."
    )
    rate = (
        "The papers' rates are for full fine-tuning over thousands of steps; an adapter needs far more."
        if choices.tuning == "lora"
        else "Learning rate and optimiser are the method's own, from its paper: lr, optimizer, epochs."
    )
    return {
        "model": [
            "source: a folder, a hub id (owner/name), or embedded:NAME; tuning: lora or full."
        ],
        "data": [
            "A file, a folder or a hub data set; prefloop data SOURCE shows how it is read.",
            held_out_line,
        ],
        "method": [
            "prefloop ls methods lists the others; docs/methods/ says what each does.",
            "max_new_tokens: answers that reach it are cut off, and gates take such pairs out.",
        ],
        "judge": ["Scores the answers; prefloop ls judges lists the others: docs/judges.md."],
        "loop": ["Each round generates, ranks, pairs and trains on so many prompts."],
        "train": [rate, "micro_batch_size: lower it where memory is short."],
        "evaluate": ["Held-out prompts answered after each round; fewer where there are fewer."],
    }
