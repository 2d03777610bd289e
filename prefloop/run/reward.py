"""From a reward recipe to a folder that the judge `reward_model` loads, with its measured accuracy beside it.

REWARDS/NAME/recipe.yaml       the recipe with every value; another one is refused in the same folder
             held_out.jsonl    the pairs that only measure: `prefloop judge check` takes them
             training/         metrics by step, and checkpoints while it trains
             config.json, model.safetensors, tokenizer files    the model, for anything that loads classifiers
             report.json       written last: a folder that has it is finished and not trained again
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefloop.config import read_yaml
from prefloop.data.formats import FieldOptions
from prefloop.data.preferences import (
    LabelledPairs,
    Preference,
    counts,
    read_preferences,
    split_by_prompt,
)
from prefloop.errors import DataError, RunFolderError, counted
from prefloop.evaluate.judge_check import by_source, score_pairs
from prefloop.generate.templates import PromptSet
from prefloop.judges.reward_model import RewardModel
from prefloop.machine import Stopwatch, environment, keep_freed_memory
from prefloop.manifest import Manifest, write_atomically
from prefloop.models.reward import (
    CONFIG_KEY,
    REPORT,
    EmbeddingHead,
    RewardEncoder,
    features,
    has_segments,
    reward_manifest,
    window_of,
)
from prefloop.models.sources import quiet
from prefloop.recipe.reward import RewardRecipe
from prefloop.records import write_jsonl
from prefloop.run_folder import alone_in, differences, give_usual_modes
from prefloop.train import checkpoint

if TYPE_CHECKING:
    from prefloop.train.reward_trainer import EncodedPair

HELD_OUT = "held_out.jsonl"
Say = Callable[[str], None]


def train_reward(
    recipe: RewardRecipe, folder: Path, say: Say = lambda line: None
) -> dict[str, Any]:
    """Train and measure; returns the report. The same call goes on with what was stopped.

    `say` gets a line for each finished stage. Raises RunFolderError where the folder belongs to another
    recipe, and what reading, loading and training raise.
    """
    keep_freed_memory()
    with alone_in(folder, "training"):
        _claim(folder, recipe)
        return _train_and_measure(recipe, folder, say)


def _train_and_measure(recipe: RewardRecipe, folder: Path, say: Say) -> dict[str, Any]:
    if (report := reward_manifest(folder).verify()) is not None:
        say(f"{folder} is trained and measured already")
        del report["files"]
        return report
    train, held_out, dropped = load_pairs(recipe, say)
    write_jsonl(folder / HELD_OUT, held_out)
    say(
        f"data     {counted(len(train), 'pair')} to train on, {len(held_out):,} held out, by prompt"
    )
    fit = _fit_head if recipe.model.tuning == "head" else _train
    if trained := (folder / "config.json").is_file():
        _trained(folder).verify()
    facts = {} if trained else fit(recipe, folder, train, say)
    watch = Stopwatch()
    judge = RewardModel(model=str(folder), device=recipe.model.device)
    with quiet():
        opened = judge.open(None, PromptSet("compact"))
    scored = score_pairs(opened, held_out)
    report = {
        "model": str(folder),
        "dropped": dropped,
        "training": facts or _facts(folder),
        "held_out": by_source(held_out, scored, calibrated=True),
        "environment": environment(),
    }
    reward_manifest(folder).write(report, [*_model_files(folder), folder / HELD_OUT])
    checkpoint.drop_checkpoints(folder / "training")
    say(f"measure  {counted(len(held_out), 'held-out pair')}  {watch.seconds} s")
    return report


def load_pairs(
    recipe: RewardRecipe, say: Say = lambda line: None
) -> tuple[list[Preference], list[Preference], dict[str, int]]:
    """Training pairs, held-out pairs, and rows dropped by reason; `say` gets how rows were read. Raises DataError."""
    read: list[LabelledPairs] = []
    for source in recipe.data.train:
        fields = FieldOptions(
            **{name: getattr(recipe.data, name) for name in FieldOptions.model_fields}
        )
        source_pairs = read_preferences(
            source,
            margin_field=recipe.data.margin_field,
            fields=fields,
            split=recipe.data.split,
        )
        for line in source_pairs.notes:
            say(f"data     {line}")
        read.append(
            source_pairs.model_copy(update={"pairs": source_pairs.pairs[: recipe.data.limit]})
        )
    pairs = [pair for source_pairs in read for pair in source_pairs.pairs]
    train, held_out = split_by_prompt(pairs, recipe.data.holdout, recipe.seed)
    decided = [pair for pair in train if not pair.tie]
    if not decided or not held_out:
        raise DataError(
            f"{counted(len(pairs), 'pair gives', 'pairs give')} {len(decided)} to train on and {len(held_out)} to measure; give more "
            "data, or change data.holdout"
        )
    dropped = counts([source_pairs.dropped for source_pairs in read])
    ties = len(train) - len(decided)
    return decided, held_out, dropped | ({"tie: not trained on": ties} if ties else {})


def _claim(folder: Path, recipe: RewardRecipe) -> None:
    path = folder / "recipe.yaml"
    if not path.is_file():
        if any(path.name not in (".lock", "recipe.yaml.tmp") for path in folder.iterdir()):
            raise RunFolderError(f"{folder} holds something else; choose another folder with --out")
        write_atomically(path, recipe.dump())
        return
    old = read_yaml(path, needs="data")
    changed = differences(old, recipe.model_dump(mode="json"))
    if changed:
        raise RunFolderError(
            f"{folder} was made by another recipe ({'; '.join(changed[:3])}); choose another folder "
            "with --out, or delete it"
        )


def _train(
    recipe: RewardRecipe, folder: Path, pairs: Sequence[Preference], say: Say
) -> dict[str, Any]:
    from peft import PeftModel

    from prefloop.train.reward_trainer import EncodedPair, load_base, train_reward_model

    watch = Stopwatch()
    base = load_base(recipe.model, recipe.seed)
    config = base.model.config.get_text_config()
    window = window_of(recipe.train.max_length, config, base.tokenizer)
    encoder = RewardEncoder(base.tokenizer, has_segments(base.model), window, cut=True)
    encoded = []
    for pair in pairs:
        chosen = encoder.encode(pair.messages, pair.chosen)
        rejected = encoder.encode(pair.messages, pair.rejected)
        assert chosen is not None, "cut, not refused"
        assert rejected is not None, "cut, not refused"
        encoded.append(EncodedPair(pair.id, chosen, rejected, pair.margin))
    encoded, same = _that_differ(encoded, window)
    facts = train_reward_model(base.model, encoded, recipe.train, folder / "training", recipe.seed)
    model: Any = base.model
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(safe_merge=True)
    setattr(model.config, CONFIG_KEY, {"max_length": window})
    facts |= {"seconds": watch.seconds, "equal_after_cut": same}
    part = folder / ".model"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with quiet():
            model.save_pretrained(part)
            base.tokenizer.save_pretrained(part)
        give_usual_modes(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    # config.json says that the model is whole, so it comes last.
    for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
        if file.name == "config.json":
            _trained(folder).write(facts, _model_files(folder))
        file.replace(folder / file.name)
    part.rmdir()
    say(
        f"train    {counted(facts['pairs'], 'pair')}, {counted(facts['steps'], 'step')}, loss {facts['first_loss']:.3f} to "
        f"{facts['last_loss']:.3f}  {watch.seconds} s"
    )
    return facts


def _that_differ(pairs: list[EncodedPair], window: int) -> tuple[list[EncodedPair], int]:
    """The pairs whose sides still differ where the window ends, and how many do not: they teach nothing."""
    kept = [pair for pair in pairs if pair.chosen.ids != pair.rejected.ids]
    if not kept:
        raise DataError(
            f"all {len(pairs)} pairs are equal in the first {window} tokens; raise train.max_length"
        )
    return kept, len(pairs) - len(kept)


def _fit_head(
    recipe: RewardRecipe, folder: Path, pairs: Sequence[Preference], say: Say
) -> dict[str, Any]:
    from prefloop.models.embedding import Embedder
    from prefloop.train.reward_trainer import fit_head

    watch = Stopwatch()
    source, window = recipe.model.source, recipe.train.max_length
    with quiet():
        embedder = Embedder(source)
    both_NF = features(
        embedder,
        [pair.messages for pair in pairs] * 2,
        [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)],
        window,
    )
    weights, losses = fit_head(
        both_NF[: len(pairs)],
        both_NF[len(pairs) :],
        np.array([pair.margin for pair in pairs], dtype=np.float32),
        l2=recipe.train.l2,
    )
    facts = {"pairs": len(pairs), **losses, "seconds": watch.seconds}
    (folder / "training").mkdir(exist_ok=True)
    _trained(folder).write(facts, [])
    EmbeddingHead(source, window, weights).save(folder)
    say(
        f"train    {counted(len(pairs), 'pair')}, loss {losses['first_loss']:.3f} to {losses['last_loss']:.3f}  "
        f"{watch.seconds} s"
    )
    return facts


def _facts(folder: Path) -> dict[str, Any]:
    facts = _trained(folder).read() or {}
    return {key: value for key, value in facts.items() if key != "files"}


def _trained(folder: Path) -> Manifest:
    return Manifest(
        folder / "training" / "facts.json",
        f"delete {folder / 'config.json'} and {folder / 'training'}, and the same command trains again",
    )


def _model_files(folder: Path) -> list[Path]:
    """What makes up the model, config.json too once it is there."""
    mine = ("recipe.yaml", REPORT, HELD_OUT, ".lock")
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in mine)
