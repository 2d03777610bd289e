"""A run's end: its policy as an adapter with a card, or as one whole model."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prefloop.errors import RunFolderError
from prefloop.manifest import Manifest
from prefloop.models.gguf_file import Kind, write_gguf
from prefloop.models.policy import Policy
from prefloop.models.sources import EMBEDDED, Embedded, quiet, without_code
from prefloop.recipe import Recipe, initial_source, load_recipe
from prefloop.records import RoundResult, read_json
from prefloop.report.model_card import CardFacts, write_model_card
from prefloop.run_folder import (
    PUBLISHED,
    RoundDir,
    RunDir,
    disk_in_words,
    give_usual_modes,
    read_run,
    replace_folder,
)

OLDEST_PEFT = "0.14"
"""The oldest peft that opened an adapter of ours when it was tried (docs/run-folder.md)."""
OLDEST_PEFT_EXPERTS = "0.20"
"""The same for an adapter on the stacked experts of a mixture."""
OLDEST_TRANSFORMERS = "5.0"
"""The oldest transformers that read `rope_parameters` of a config.json."""
MERGED = "merged.done.json"
"""In a merged model's folder: what merge wrote there, and from which policy."""
_TUNED = "rounds/start/policy"
"""Where the fine-tuned model of round 0 lies in a run's folder."""
_NEEDS_TUNED = (
    "Its base is the fine-tuned model in that folder of the run, which must go along; `prefloop merge` "
    "writes both as one model."
)
_NEARLY = (
    "It was trained on a copy in fewer bits ({}), so on the original it is nearly, not exactly, the policy "
    "that was measured; `prefloop merge` writes that one."
)


def publish(
    recipe: Recipe, rundir: RunDir, round_dir: RoundDir, results: Sequence[RoundResult]
) -> Path:
    """Copy a round's policy, with a card made from the run, to RUN/policy."""
    final = rundir.path / PUBLISHED
    temporary = rundir.path / ".policy"
    shutil.rmtree(temporary, ignore_errors=True)
    round_dir.verify_policy()
    shutil.copytree(round_dir.policy, temporary)
    embedded = _embedded(recipe)
    if embedded is not None and recipe.sft is None and recipe.model.tuning == "lora":
        _name_base(temporary / "adapter_config.json", embedded.hub_id)
    facts = _card_facts(recipe, rundir, results, temporary, round_dir.number)
    write_model_card(temporary, facts)
    rundir.published.path.unlink(missing_ok=True)
    replace_folder(temporary, final)
    # A card is the user's to write on.
    files = [path for path in final.rglob("*") if path.is_file() and path.name != "README.md"]
    rundir.published.write({"round": round_dir.number}, sorted(files))
    return final


def merge_policy(
    run_folder: Path, out: Path, *, trust_remote_code: bool = False, gguf: Kind | None = None
) -> Path:
    """Write the run's published policy, adapter merged in, to `out`, in the dtype it was trained in.

    In float32 where `auto` chose bfloat16 on a CPU, as nothing of a young adapter would be left in bfloat16 weights.

    With `gguf` the folder gets the same model as a file for llama.cpp too, NAME-KIND.gguf. Code that comes
    with the model is run only where the caller says so, whatever the run's recipe says.
    Raises RunFolderError if the run has published none, it has changed, or `out` holds something or cannot be
    written; ModelError if the model cannot be loaded.
    """
    run = read_run(run_folder)
    adapter = run.verify_published()
    if adapter is None:
        raise RunFolderError(f"{run.path} has no policy; {run.to_finish()}")
    if out.exists():
        raise RunFolderError(f"{out} exists; name a folder that does not")
    recipe = load_recipe(str(run.path / "recipe.yaml"))
    source = without_code(initial_source(recipe, run), trust_remote_code)
    if recipe.model.dtype == "auto" and run.inputs().get("device") == "cpu":
        source = source.model_copy(update={"dtype": "float32"})
    policy = Policy.load(source, adapter, trainable=False)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with quiet(), disk_in_words(out.parent):
            merged = policy.merge()
            if gguf is not None:
                part.mkdir(parents=True)
                write_gguf(merged, policy.tokenizer, part / f"{out.name}-{gguf}.gguf", gguf)
            merged.save_pretrained(part)
            policy.tokenizer.save_pretrained(part)
            number = (run.published.read() or {}).get("round")
            facts = _card_facts(recipe, run, run.results(), part, number, merged=True)
            write_model_card(part, facts)
            _seal_merged(run, part)
            give_usual_modes(part)
            replace_folder(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _seal_merged(run: RunDir, folder: Path) -> None:
    # The card is the user's to write on.
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    _merged_manifest(run, folder).write({"of": _policy_files(run)}, sorted(files))


def verify_merged(run: RunDir, folder: Path) -> None:
    """Raise RunFolderError where the folder is not what `merge_policy` wrote from the run's published policy."""
    manifest = _merged_manifest(run, folder)
    if not (folder / "config.json").is_file():
        raise RunFolderError(f"{folder} holds no model; {manifest.remedy}")
    facts = manifest.verify()
    if facts is None:
        raise RunFolderError(f"{folder} was not written by prefloop merge; {manifest.remedy}")
    if facts["of"] != _policy_files(run):
        raise RunFolderError(
            f"{folder} was merged from another policy than the one that {run.path} recommends; {manifest.remedy}"
        )


def _merged_manifest(run: RunDir, folder: Path) -> Manifest:
    return Manifest(
        folder / MERGED, f"run prefloop merge {run.path} FOLDER, and push that with --merged FOLDER"
    )


def _policy_files(run: RunDir) -> object:
    """Sizes and hashes of the published policy's files, by name."""
    return (run.published.read() or {}).get("files")


def _card_facts(
    recipe: Recipe,
    rundir: RunDir,
    results: Sequence[RoundResult],
    folder: Path,
    number: int | None,
    *,
    merged: bool = False,
) -> CardFacts:
    """`folder` holds what the card is about."""
    embedded = _embedded(recipe)
    base, note = (embedded.hub_id if embedded else None), ""
    if recipe.model.tuning == "lora" and not merged:
        if recipe.sft is not None:
            # The adapter fits the fine-tuned model of round 0, not the one it came from.
            base, note = _TUNED, _NEEDS_TUNED
        elif embedded is not None:
            note = _NEARLY.format(embedded.about)
    rounds = rundir.rounds()
    return CardFacts(
        recipe=recipe.model_dump(mode="json"),
        results=results,
        environment=read_json(rundir.path / "environment.json"),
        pairs=sum(folder.count("pairs") for folder in rounds),
        rejects=sum((folder.reasons() for folder in rounds), Counter[str]()),
        base_model=base,
        license=embedded.license if embedded else None,
        round=number,
        merged=merged and recipe.model.tuning == "lora",
        opens_with=opens_with(folder),
        base_note=note,
    )


def opens_with(folder: Path) -> str:
    """What older libraries would get wrong in silence, and from which version on they do not; "" for nothing."""
    if (folder / "adapter_config.json").is_file():
        if read_json(folder / "adapter_config.json").get("target_parameters"):
            return (
                f"Opens with peft {OLDEST_PEFT_EXPERTS} or newer. Older ones refuse it or, as 0.14 does "
                "without an error, leave out the adapter of the experts."
            )
        return f"Opens with peft {OLDEST_PEFT} or newer."
    if "rope_parameters" in (folder / "config.json").read_text(encoding="utf-8"):
        return (
            f"Opens with transformers {OLDEST_TRANSFORMERS} or newer. Older ones do not read `rope_parameters` "
            "of `config.json`, and compute with another rotary base without a word."
        )
    return ""


def _embedded(recipe: Recipe) -> Embedded | None:
    source = recipe.model.source
    return EMBEDDED[source.removeprefix("embedded:")] if source.startswith("embedded:") else None


def _name_base(config: Path, base: str) -> None:
    """Let an adapter's config name its base by a hub id, not by a folder of this machine."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = base
    config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
