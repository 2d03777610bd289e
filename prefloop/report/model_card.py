"""README.md of a trained policy: a Hugging Face model card with facts of the run only.

A base model, data set or licence that is not known as a Hub id or name is left out of the header. Absolute
paths become bare names, so that a published card reveals nothing about the machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from prefloop.errors import counted
from prefloop.records import RoundResult
from prefloop.report.console import format_values, measure_names, round_name, visible_rounds
from prefloop.report.meanings import ROUND_MEASURES

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FOLDERS_OF_A_WORD = re.compile(r"(?:(?<=\s)|(?<==))~?/(?:[^\s/]+/)+")
_DATA_FILES = {".jsonl", ".json", ".csv", ".parquet"}


@dataclass(frozen=True)
class CardFacts:
    """The contents of a model card."""

    recipe: Mapping[str, Any]
    """The resolved recipe, as a plain dict."""
    results: Sequence[RoundResult]
    """Every evaluated round in order, round -1 (before training) included where there is one."""
    environment: Mapping[str, Any]
    """Versions and machine, as far as they may be published; nested mappings are flattened."""
    pairs: int
    """Training pairs over all rounds."""
    rejects: Mapping[str, int] = field(default_factory=dict)
    """Prompts that gave no pair, by reason."""
    base_model: str | None = None
    """Hub id of the base model where the recipe's `model.source` is not one itself."""
    license: str | None = None
    """Licence identifier as the Hub spells it; left out of the card where unknown."""
    round: int | None = None
    """The round whose policy the folder holds, for the Hub's table of results; None leaves that out."""
    merged: bool = False
    """Whether the folder holds the whole model that an adapter was merged into."""
    opens_with: str = ""
    """A sentence on the versions of libraries that open the folder."""
    base_note: str = ""
    """A sentence about the base that users must know, such as that it differs from the one on the Hub."""


def write_model_card(folder: Path, facts: CardFacts) -> Path:
    """Write the card as `folder`/README.md, replacing one that a library may have written."""
    path = folder / "README.md"
    path.write_text(model_card(facts), encoding="utf-8")
    return path


def model_card(facts: CardFacts) -> str:
    """The card's text: YAML header, summary, training data, measures, use, and the recipe."""
    header = yaml.safe_dump(_header(facts), sort_keys=False, allow_unicode=True)
    sections = [_summary(facts), _data(facts), _measures(facts), _use(facts), _origin(facts)]
    return f"---\n{header}---\n\n" + "\n\n".join(sections) + "\n"


def is_hub_id(name: str) -> bool:
    """Whether a name can be a Hub id, and is no local file or folder."""
    local = Path(name).exists() or Path(name).suffix in _DATA_FILES
    return _HUB_ID.fullmatch(name) is not None and not local


def _header(facts: CardFacts) -> dict[str, Any]:
    base = facts.base_model or _source(facts)
    adapter = _library(facts) == "peft"
    train = _data_name(facts, "train")
    header: dict[str, Any] = {}
    if is_hub_id(base):
        header |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    header |= {"library_name": _library(facts), "pipeline_tag": "text-generation"}
    header["tags"] = ["prefloop", "preference-optimization", "self-alignment", _method(facts)]
    if _is_lora(facts):
        header["tags"].append("lora")
    if train and is_hub_id(train):
        header["datasets"] = [train]
    if facts.license:
        header["license"] = facts.license
    return header | _model_index(facts)


def _model_index(facts: CardFacts) -> dict[str, Any]:
    """The published round's measures as the Hub's `model-index`, intervals in the metrics' names."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    measures = next((r.measures for r in facts.results if r.round == facts.round), {})
    name = _without_path(str(facts.recipe.get("name", "policy")))
    held_out = _without_path(_data_name(facts, "eval") or _data_name(facts, "train") or "unnamed")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=held_out if is_hub_id(held_out) else "custom",
            dataset_name=f"held-out prompts of {held_out}",
            metric_type=measure,
            metric_name=_with_interval(meaning.title, measure, measures),
            metric_value=round(value, 4),
        )
        for measure, meaning in ROUND_MEASURES.items()
        if (value := measures.get(measure)) is not None and math.isfinite(value)
    ]
    index: list[Any] = eval_results_to_model_index(name, results) if results else []
    return {"model-index": index} if index else {}


def _with_interval(title: str, measure: str, measures: Mapping[str, float | None]) -> str:
    low, high = (measures.get(f"{measure}_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return title
    return f"{title} (95 % interval {low:.3f} to {high:.3f}, over prompts)"


def _summary(facts: CardFacts) -> str:
    base = _code(facts.base_model or _without_path(_source(facts)))
    what = "A full fine-tune of"
    if _is_lora(facts):
        what = "A LoRA adapter, merged into" if facts.merged else "A LoRA adapter for"
    rounds = sum(result.round >= 0 for result in facts.results)
    return (
        f"# {_without_path(str(facts.recipe.get('name', 'policy')))}\n\n"
        f"{what} {base}, trained in a closed loop with the method `{_method(facts)}`: in each round the "
        "policy generates answers to prompts, they are made into preference pairs, and the policy is "
        f"trained on them. {counted(rounds, 'round was', 'rounds were')} measured."
        + f" {facts.base_note}"
        * bool(facts.base_note)
    )


def _data(facts: CardFacts) -> str:
    judge = _section(facts, "judge").get("name")
    train = _data_name(facts, "train")
    source = _code(_without_path(train)) if train else "not recorded"
    lines = [
        "## Training data",
        "",
        f"- Prompts (and target answers, where the data have them): {source}.",
        f"- {counted(facts.pairs, 'preference pair')} made by the loop, which has no step where a person checks them.",
        f"- Judge: {_code(str(judge))}, a program; its mistakes and biases are in the pairs."
        if judge
        else "- No judge: the method itself decides which answer of a pair is preferred.",
    ]
    if facts.rejects:
        reasons = "; ".join(f"{_cell(why)}: {n:,}" for why, n in sorted(facts.rejects.items()))
        lines.append(
            f"- {counted(sum(facts.rejects.values()), 'prompt')} gave no pair ({reasons})."
        )
    return "\n".join(lines)


def _measures(facts: CardFacts) -> str:
    if not any(result.measures for result in facts.results):
        return "## Measures\n\nThis policy was not evaluated."
    shown = visible_rounds(facts.results)
    names = ["…" if result is None else round_name(result.round) for result in shown]
    lines = ["## Measures", "", _row(["round", *names]), _row(["---", *["---:"] * len(names)])]
    for name in measure_names(facts.results):
        values = format_values([result.measures.get(name) for result in facts.results])
        by_round = dict(zip((result.round for result in facts.results), values, strict=True))
        lines.append(_row([_cell(name), *("…" if r is None else by_round[r.round] for r in shown)]))
    size = _section(facts, "evaluate").get("prompts")
    data_text = f"at most {size} held-out prompts" if size else "held-out prompts"
    held_out = _data_name(facts, "eval")
    data_text += f" of {_code(_without_path(held_out))}" if held_out else ""
    lines += [
        "",
        f"Measured automatically by the training program itself on {data_text} with seed "
        f"{facts.recipe.get('seed', 'unknown')}, from one run: differences between rounds may be chance. "
        "`start` is the policy before training. Truthfulness, safety and bias were not assessed beyond "
        "what the table names.",
    ]
    return "\n".join(lines)


def _use(facts: CardFacts) -> str:
    adapter = _library(facts) == "peft"
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    return (
        "## Use\n\n```python\n"
        f"from {_library(facts)} import {kind}\n"
        "from transformers import AutoTokenizer\n\n"
        'path = "."  # this folder, or its name on the Hub\n'
        f"model = {kind}.from_pretrained(path)\n"
        "tokenizer = AutoTokenizer.from_pretrained(path)\n```"
        + f"\n\n{facts.opens_with}"
        * bool(facts.opens_with)
    )


def _origin(facts: CardFacts) -> str:
    recipe = yaml.safe_dump(without_paths(dict(facts.recipe)), sort_keys=False, allow_unicode=True)
    # Longer than any run of backquotes inside, so that the recipe cannot end the block.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))
    lines = ["## How it was made", "", f"{fence}yaml\n{recipe}{fence}"]
    versions = list(_flat(without_paths(dict(facts.environment))))
    if versions:
        lines += ["", _row(["environment", ""]), _row(["---", "---"])]
        lines += [_row([_cell(name), _cell(value)]) for name, value in versions]
    return "\n".join(lines)


def _section(facts: CardFacts, name: str) -> Mapping[str, Any]:
    return facts.recipe.get(name) or {}


def _source(facts: CardFacts) -> str:
    return str(_section(facts, "model").get("source", "an unnamed model"))


def _library(facts: CardFacts) -> str:
    adapter = _is_lora(facts) and not facts.merged
    return "peft" if adapter else "transformers"


def _is_lora(facts: CardFacts) -> bool:
    return bool(_section(facts, "model").get("tuning") == "lora")


def _method(facts: CardFacts) -> str:
    return str(_section(facts, "method").get("name", "unknown"))


def _data_name(facts: CardFacts, which: str) -> str | None:
    name = _section(facts, "data").get(which)
    return str(name) if name else None


def _without_path(name: str) -> str:
    """The last part of an absolute path, alone or among the words of a command; other names unchanged."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(name)
        if path.is_absolute() or name.startswith("~"):
            return path.name
    return _FOLDERS_OF_A_WORD.sub("", name)


def without_paths(value: Any) -> Any:
    """A plain value, such as a recipe's, in which absolute paths are bare names."""
    if isinstance(value, Mapping):
        return {str(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return _without_path(value) if isinstance(value, str) else value


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(item)


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def _cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
