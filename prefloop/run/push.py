"""A run's policy and its pairs on the Hugging Face Hub: what would go, then exactly that.

Files are put together in RUN/.push first, so that what is listed is what is sent. Contents that the Hub has
already are not sent twice, so a push that was cut off goes on by the same call.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloop.config import dump_yaml
from prefloop.data.export import export_pairs
from prefloop.errors import HubError, RunFolderError
from prefloop.manifest import write_atomically
from prefloop.recipe import load_recipe
from prefloop.records import Pair, read_json
from prefloop.report.dataset_card import dataset_card
from prefloop.report.model_card import without_paths
from prefloop.run.hub_refusals import NO_TOKEN, in_words
from prefloop.run.publish import verify_merged
from prefloop.run_folder import RunDir, read_run

if TYPE_CHECKING:
    from huggingface_hub import HfApi

STAGED = ".push"
NOTE = "pushed.json"
PAIRS = "pairs.jsonl"
_NAMES_OF_MODELS = ("base_model_name_or_path", "_name_or_path", "name_or_path")
_CONFIGS = ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json")
_TEXTS = {".json", ".md", ".yaml", ".jinja", ".txt", ".py"}


@dataclass(frozen=True)
class Shipment:
    """What one repository on the Hub is to get."""

    repo_id: str
    kind: str
    """"model" or "dataset"."""
    folder: Path
    """Holds exactly the files that go, under the names that they get."""
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, int]:
        """Sizes in bytes, by name."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}


def prepare(
    run_folder: Path, repo_id: str, *, merged: Path | None = None, pairs: bool = True
) -> list[Shipment]:
    """Put together what would go: the model first, then, where `pairs`, the data set owner/name-pairs.

    `merged` is a folder that `prefloop merge` wrote, to go in place of the adapter. Sends nothing. Raises
    RunFolderError where the run has not ended, its policy would be of no use alone, or `merged` is not of that
    policy; HubError for a name that cannot be a repository's.
    """
    _check_name(repo_id)
    run = read_run(run_folder)
    policy = run.verify_published()
    if policy is None:
        raise RunFolderError(f"{run.path} has no policy; {run.to_finish()}")
    recipe = load_recipe(str(run.path / "recipe.yaml")).model_dump(mode="json")
    if merged is None and recipe["sft"] and recipe["model"]["tuning"] == "lora":
        raise RunFolderError(
            f"the adapter of {run.path} is for the fine-tuned model of its round 0, which others do not have; "
            f"run prefloop merge {run.path} FOLDER, then push with --merged FOLDER"
        )
    if merged is not None:
        verify_merged(run, merged)
    staged = run.path / STAGED
    shutil.rmtree(staged, ignore_errors=True)
    shown = without_paths(recipe)
    shipments = [_model(merged or policy, staged / "model", repo_id, shown)]
    if pairs and any(True for _ in _finished_pairs(run)):
        shipments.append(_pairs(run, staged / "dataset", f"{repo_id}-pairs", shown))
    elif pairs:
        reason = "no pairs go: the run has none whose answers both ended by themselves"
        shipments[0] = replace(shipments[0], notes=(*shipments[0].notes, reason))
    for shipment in shipments:
        _refuse_paths(shipment, run)
    return shipments


def send(
    run_folder: Path,
    shipments: list[Shipment],
    *,
    public: bool = False,
    update: bool = False,
    say: Callable[[str], None] = lambda line: None,
    api: HfApi | None = None,
) -> list[str]:
    """Send what was prepared, each repository in one commit; returns their addresses.

    Repositories are made private unless `public`. One that is there already gets a commit only where an
    earlier push of this run made it, or `update` says so. Raises HubError; what was sent until then stays, and
    the same call goes on.
    """
    from huggingface_hub import HfApi

    api = api or HfApi()
    note = run_folder / NOTE
    made: dict[str, Any] = dict(read_json(note)) if note.exists() else {}
    addresses = []
    for shipment in shipments:
        with in_words(shipment.repo_id):
            if api.token is None and not _has_token():
                raise HubError(NO_TOKEN)
            address = _repository(
                api, shipment, public=public, known=update or shipment.repo_id in made
            )
            made[shipment.repo_id] = shipment.kind
            write_atomically(note, json.dumps(made, indent=1) + "\n")
            say(f"sending  {shipment.kind} {shipment.repo_id}")
            _commit(api, shipment)
        addresses.append(address)
    shutil.rmtree(run_folder / STAGED, ignore_errors=True)
    return addresses


# Putting together.


def _check_name(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        if repo_id.count("/") != 1:
            raise HFValidationError("it names no owner")
        validate_repo_id(f"{repo_id}-pairs")
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not of the form owner/name ({error})") from error


def _model(source: Path, folder: Path, repo_id: str, recipe: Mapping[str, Any]) -> Shipment:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".*", "*.done.json"))
    notes = []
    for name in _CONFIGS:
        path = folder / name
        if path.is_file() and (changed := _without_own_paths(path)):
            notes += [
                f"{name}: {key} is {value}, a folder of this machine that others do not have; "
                "push a merged model, or name a base on the Hub there"
                for key, value in changed.items()
                if key == "base_model_name_or_path"
            ]
    text = f"# As it was run, paths left out.\n{dump_yaml(dict(recipe))}"
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return Shipment(repo_id, "model", folder, tuple(notes))


def _without_own_paths(config: Path) -> dict[str, str]:
    """Make absolute paths of models bare names in a config; which are changed."""
    values = json.loads(config.read_text(encoding="utf-8"))
    named = {key: values[key] for key in _NAMES_OF_MODELS if isinstance(values.get(key), str)}
    changed = {key: without_paths(value) for key, value in named.items()}
    changed = {key: value for key, value in changed.items() if value != named[key]}
    if changed:
        text = json.dumps({**values, **changed}, indent=2, ensure_ascii=False)
        config.write_text(f"{text}\n", encoding="utf-8")
    return changed


def _finished_pairs(run: RunDir) -> Iterator[Pair]:
    """Pairs with both answers whole, one by one; none for a method of single answers."""
    for _, pairs in run.pairs():
        yield from (pair for pair in pairs if pair.exportable)


def _pairs(run: RunDir, folder: Path, repo_id: str, recipe: Mapping[str, Any]) -> Shipment:
    folder.mkdir(parents=True)
    by_round = Counter[int]()

    def counting() -> Iterator[Pair]:
        for pair in _finished_pairs(run):
            by_round[pair.round] += 1
            yield pair

    export_pairs(counting(), folder / PAIRS)
    card = dataset_card(recipe, by_round, PAIRS)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return Shipment(repo_id, "dataset", folder)


def _refuse_paths(shipment: Shipment, run: RunDir) -> None:
    """Nothing that goes may name the user's folders; a card may have been edited by hand."""
    own = {
        str(path) for path in (Path.home(), Path.cwd(), run.path.resolve()) if len(path.parts) > 1
    }
    for name in shipment.files:
        path = shipment.folder / name
        if path.suffix not in _TEXTS or name == "tokenizer.json":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [folder for folder in own if f"{folder}/" in text or text.rstrip().endswith(folder)]
        if found:
            raise RunFolderError(
                f"{name} names {min(found, key=len)}, a folder of this machine; take that out of the file in "
                f"{run.path / 'policy'}, then push again"
            )


# Sending.


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _repository(api: HfApi, shipment: Shipment, *, public: bool, known: bool) -> str:
    """Make the repository, or find it where it may be used; its address."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        made = api.create_repo(shipment.repo_id, repo_type=shipment.kind, private=not public)
        return str(made)
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 409:
            raise
    if not known:
        raise HubError(
            f"{shipment.repo_id} is on the Hub already, and not by a push of this run; choose another name, or "
            "add a commit to it with --update"
        )
    there = api.repo_info(shipment.repo_id, repo_type=shipment.kind)
    if not there.private and not public:
        raise HubError(
            f"{shipment.repo_id} is public on the Hub; say --public, or make it private there first"
        )
    prefix = "datasets/" if shipment.kind == "dataset" else ""
    return f"{api.endpoint}/{prefix}{shipment.repo_id}"


def _commit(api: HfApi, shipment: Shipment) -> None:
    """One commit of exactly the files that were listed."""
    from huggingface_hub import CommitOperationAdd

    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=shipment.folder / name)
        for name in shipment.files
    ]
    with warnings.catch_warnings():
        # The Hub's advice on a card's header.
        warnings.filterwarnings("ignore", message="Warnings while validating metadata")
        api.create_commit(
            shipment.repo_id,
            operations,
            commit_message="Add what a run of prefloop made",
            repo_type=shipment.kind,
        )
