"""`prefloop judge check`: judges against human choices: agreement, biases, failures.

Two baselines need no judge and are what a judge must beat: chance, and the longer answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import prefloop.judges
from prefloop.config import build_plugin, overridden, parse_yaml, read_yaml
from prefloop.data.preferences import Preference, read_preferences, sources
from prefloop.data.prompts import DataOptions, read_prompts
from prefloop.errors import DataError, PrefloopError, RecipeError
from prefloop.evaluate.agreement import Scored, agreement, calibration, position_bias
from prefloop.generate.hf_engine import open_engine
from prefloop.generate.templates import PromptSet
from prefloop.judges import CachedJudge, Judge, NoVerdict, OpenJudge, Verdict
from prefloop.judges.reward_model import RewardModel
from prefloop.models.sources import quiet
from prefloop.records import derive_seed

LONGER, CHANCE = "longer answer", "chance"


def parse_judge(text: str, overrides: Sequence[str] = ()) -> tuple[str, Judge]:
    """A judge from a name, a YAML section as text ("{name: reward_model, model: ...}"), or a file with one.

    The file holds the section itself, or a recipe with a section `judge`. `overrides` are "key=value" of
    its options. Returns a label for tables, and the judge. Raises RecipeError.
    """
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        section: Any = read_yaml(path, needs="judge") if path.is_file() else None
        if section is None:
            raise RecipeError(f"no file {path}; correct the path, or name a judge")
        section = section.get("judge", section)
    elif "{" in text or ":" in text:
        section = parse_yaml(text, f"judge {text}")
    else:
        section = {"name": text}
    for override in overrides:
        if not isinstance(section, Mapping):
            break
        section = overridden(section, override)
    judge = build_plugin(prefloop.judges, section, Judge, "judge")
    shown = {key: value for key, value in section.items() if key != "name"}
    options = ", ".join(f"{key} {value}" for key, value in shown.items())
    return f"{section['name']}" + (f" ({options})" if options else ""), judge


def load_pairs(files: Sequence[str], limit: int | None, seed: int) -> list[Preference]:
    """The pairs of all files; with `limit`, so many pairs of each data set, drawn by the seed. Raises DataError."""
    pairs = [pair for file in files for pair in read_preferences(file).pairs]
    if limit is None:
        return pairs
    drawn = []
    for name, group in sources(pairs):
        size = min(limit, len(group))
        indices = Random(derive_seed(seed, "judge check", name)).sample(range(len(group)), size)
        drawn += [group[index] for index in sorted(indices)]
    return drawn


def with_targets(pairs: Sequence[Preference], source: str) -> list[Preference]:
    """The pairs whose lone prompt has a response in `source` (rows as in a run's data), as their target.

    White space is ignored in matching prompts. Pairs in which an answer is the target itself are left out: a
    similarity judge is always right on them. Raises DataError where no pair is left.
    """
    targets = {
        _fold_whitespace(prompt.text): prompt.target
        for prompt in read_prompts(source, DataOptions())
        if len(prompt.messages) == 1 and prompt.target
    }
    matched = []
    for pair in pairs:
        target = targets.get(_fold_whitespace(pair.messages[-1].content))
        if len(pair.messages) > 1 or target is None:
            continue
        if _fold_whitespace(target) not in (
            _fold_whitespace(pair.chosen),
            _fold_whitespace(pair.rejected),
        ):
            matched.append(pair.model_copy(update={"target": target}))
    if not matched:
        raise DataError(
            f"{source} has a response to none of these pairs' prompts; name a file that has"
        )
    return matched


def score_pairs(
    judge: OpenJudge, pairs: Sequence[Preference], rejected_first: Sequence[bool] | None = None
) -> list[Scored]:
    """Each pair with the judge's scores, or the reason why there are none.

    The order in which the two answers are shown is drawn from the pair's id, unless `rejected_first` gives it
    for each pair: a fixed order would tell a judge with a position bias which answer is better.
    """
    if rejected_first is None:
        rejected_first = _random_order(pairs)
    groups = [
        (pair.rejected, pair.chosen) if exchanged else (pair.chosen, pair.rejected)
        for pair, exchanged in zip(pairs, rejected_first, strict=True)
    ]
    verdicts = CachedJudge(judge).score([pair.prompt for pair in pairs], groups)
    return [
        scored(pair, _exchanged(verdict) if exchanged else verdict)
        for pair, verdict, exchanged in zip(pairs, verdicts, rejected_first, strict=True)
    ]


def scored(pair: Preference, verdict: Verdict) -> Scored:
    """A pair with its verdict on (chosen, rejected), as `agreement` takes it."""
    return Scored(
        cluster=pair.key,
        tie=pair.tie,
        chosen_length=len(pair.chosen),
        rejected_length=len(pair.rejected),
        scores=verdict.reason
        if isinstance(verdict, NoVerdict)
        else (float(verdict[0]), float(verdict[1])),
    )


def baselines(pairs: Sequence[Preference]) -> dict[str, dict[str, Any]]:
    """The baselines' agreement, by data set."""
    return {
        CHANCE: by_source(pairs, [scored(pair, (0.0, 0.0)) for pair in pairs]),
        LONGER: by_source(
            pairs, [scored(p, (float(len(p.chosen)), float(len(p.rejected)))) for p in pairs]
        ),
    }


def check_judges(
    judges: Mapping[str, Judge],
    pairs: Sequence[Preference],
    *,
    policy: str | None = None,
    prompt_set: str = "compact",
    both_orders: bool = False,
) -> dict[str, dict[str, Any]]:
    """Agreement, biases and calibration of the two baselines and each judge, by name and data set.

    `policy` is the model for judges that need one. A judge that cannot be opened raises; failures on single
    pairs are counted.
    """
    report = baselines(pairs)
    for name, judge in judges.items():
        opened = _open(name, judge, pairs, policy, prompt_set)
        if not both_orders:
            rows = score_pairs(opened, pairs)
            report[name] = by_source(pairs, rows, calibrated=isinstance(judge, RewardModel))
            continue
        orders = [
            score_pairs(opened, pairs, [exchanged] * len(pairs)) for exchanged in (False, True)
        ]
        rows = [orders[exchanged][index] for index, exchanged in enumerate(_random_order(pairs))]
        report[name] = by_source(pairs, rows, calibrated=isinstance(judge, RewardModel))
        for source, indices in _indices_by_source(pairs).items():
            report[name][source]["position"] = position_bias(
                *([rows[index] for index in indices] for rows in orders)
            )
    return report


def _open(
    name: str, judge: Judge, pairs: Sequence[Preference], policy: str | None, prompt_set: str
) -> OpenJudge:
    if judge.needs_target and not all(pair.target for pair in pairs):
        raise DataError(
            f"judge {name} compares with a target, and some of these pairs have none; "
            "give rows with a field target, or check another judge"
        )
    if judge.needs_policy and policy is None:
        raise PrefloopError(f"judge {name} asks the policy; name a model with --policy")
    with quiet():
        engine = open_engine(policy) if judge.needs_policy and policy is not None else None
        return judge.open(engine, PromptSet(prompt_set))


def by_source(
    pairs: Sequence[Preference], rows: Sequence[Scored], *, calibrated: bool = False
) -> dict[str, Any]:
    """By data set, and under "all" for all of them: agreement and biases, and calibration where `calibrated`."""
    report: dict[str, Any] = {}
    for name, indices in _indices_by_source(pairs).items():
        group = [rows[index] for index in indices]
        report[name] = asdict(agreement(group))
        curve = calibration(group) if calibrated else None
        report[name]["calibration"] = asdict(curve) if curve else None
    return report


def _indices_by_source(pairs: Sequence[Preference]) -> dict[str, list[int]]:
    """Indices of each data set's pairs."""
    indices = {
        name: [index for index, pair in enumerate(pairs) if pair.source == name]
        for name in dict.fromkeys(pair.source for pair in pairs)
    }
    return indices if len(indices) == 1 else {**indices, "all": list(range(len(pairs)))}


def _random_order(pairs: Sequence[Preference]) -> list[bool]:
    return [derive_seed("order", pair.source, pair.id) % 2 == 1 for pair in pairs]


def _fold_whitespace(text: str) -> str:
    return " ".join(text.split())


def _exchanged(verdict: Verdict) -> Verdict:
    return verdict if isinstance(verdict, NoVerdict) else tuple(reversed(verdict))
