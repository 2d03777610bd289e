"""README.md of a run's pairs as a data set on the Hub: where they come from, and what no column says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from prefloop.errors import counted
from prefloop.report.model_card import is_hub_id

COLUMNS = {
    "prompt": "the turns that were answered",
    "chosen": "the answer that is preferred, one assistant turn",
    "rejected": "the other answer, one assistant turn",
    "target": "the data's own answer; null where there is none",
    "margin": "by how much the chosen answer should win, 0 where the method has no margin",
    "round": "the round that made the pair, from 0",
    "prompt_id": "the prompt's id in the run",
    "chosen_token_ids": "the tokens that the policy sampled; null where it sampled none",
    "rejected_token_ids": "the same of the other answer",
}


def dataset_card(recipe: Mapping[str, Any], by_round: Mapping[int, int], file: str) -> str:
    """The card's text. `by_round` are pairs by round; `recipe` is a plain dict without paths."""
    method = str((recipe.get("method") or {}).get("name", "unknown"))
    source = str((recipe.get("data") or {}).get("train", ""))
    judge = (recipe.get("judge") or {}).get("name")
    header: dict[str, Any] = {
        "pretty_name": f"Pairs of {recipe.get('name', 'a run')}",
        "tags": ["prefloop", "preference", "synthetic", method],
        "task_categories": ["text-generation"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": file}]}],
    }
    if is_hub_id(source) and "/" in source:
        header["source_datasets"] = [source]
    rounds = "; ".join(f"round {number}: {count:,}" for number, count in sorted(by_round.items()))
    judged = (
        f"Judge: `{judge}`, a program; its mistakes and biases are in the pairs."
        if judge
        else "No judge: the method itself decides which answer is preferred."
    )
    rows = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in COLUMNS.items())
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# {header['pretty_name']}\n\n"
        f"{counted(sum(by_round.values()), 'preference pair')} that a closed loop with the method `{method}` made "
        f"and trained on ({rounds}). Answers were written by a language model and no person has checked them. {judged} "
        f"Pairs with an answer that the length limit cut off are left out.\n\n"
        f"| column | meaning |\n| --- | --- |\n{rows}\n\n"
        "The format is TRL's conversational preference format."
        + (f" Prompts: `{source.replace('`', '')}`." if source else "")
        + "\n"
    )
