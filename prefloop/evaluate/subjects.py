"""The subjects of `prefloop evaluate`: a model, a run's policy, or its policy after a round."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from prefloop.errors import RunFolderError, nearest
from prefloop.generate.engine import Engine
from prefloop.generate.hf_engine import HFEngine, open_engine
from prefloop.models.chat_template import set_template_date
from prefloop.models.policy import Policy
from prefloop.models.sources import (
    ModelOptions,
    local_folder,
    quiet,
    resolve_source,
    without_code,
)
from prefloop.recipe import Recipe, initial_source, load_recipe
from prefloop.records import Candidates, Prompt, Request, Response, Sampling, Scored
from prefloop.run_folder import PUBLISHED, RunDir, read_run

# Files of a model's folder on which its outputs depend.
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
_NOT_THE_MODEL = ("training_args.json", "README.md")


@dataclass(frozen=True)
class Source:
    """A subject by name, not yet loaded."""

    text: str
    """The subject as the user wrote it."""
    run: RunDir | None = None
    round: int | None = None
    """-1 is the model from which the run's training started; None is the policy that the run recommends."""
    trust: bool = False
    """Whether code that comes with the run's model may run; its recipe alone does not decide that."""

    @property
    def recipe(self) -> Recipe | None:
        """The run's recipe; None where the subject is a bare model."""
        return load_recipe(str(self.run.path / "recipe.yaml")) if self.run else None

    @property
    def base(self) -> ModelOptions:
        """The model from which training started, or the model itself."""
        if self.run is None:
            return ModelOptions(source=self.text, tuning="full")
        recipe = self.recipe
        assert recipe is not None
        source = initial_source(recipe, self.run)
        return without_code(source, self.trust and source.trust_remote_code)

    @property
    def folder(self) -> Path | None:
        """Folder of the trained policy; None where the subject is a bare model, or a run's start."""
        if self.run is None or self.round == -1:
            return None
        if self.round is None:
            return self.run.verify_published() or self.run.path / PUBLISHED
        round_dir = self.run.round(self.round)
        round_dir.verify_policy()
        return round_dir.policy

    def weights_hash(self) -> str:
        """A hash of the weights, the tokenizer's files and the options of loading. Raises ModelError."""
        options = self.base
        hashes = [content_hash(local_folder(resolve_source(options.source), options))]
        if self.folder is not None:
            hashes.append(content_hash(self.folder))
        hashes.append(str((options.dtype, options.chat_template, options.tuning)))
        if options.quantization is not None:
            hashes.append(options.quantization.model_dump_json())
        return sha256("/".join(hashes).encode()).hexdigest()

    def initial_hash(self) -> str | None:
        """`weights_hash` of the model from which training started; None where that is not known."""
        return Source(self.text, self.run, -1, self.trust).weights_hash() if self.run else None


def find_subject(text: str, *, trust: bool = False) -> Source:
    """The subject that a text names: RUN, RUN@ROUND, RUN@start, or a model. Raises RunFolderError."""
    path, at, round_name = text.rpartition("@")
    if at and (Path(path).expanduser() / "recipe.yaml").is_file():
        run = read_run(Path(path).expanduser())
        if round_name != "start" and not round_name.isdecimal():
            raise RunFolderError(
                f"{text}: {round_name!r} is no round; write {path}@start or {path}@0"
            )
        source = Source(text, run, -1 if round_name == "start" else int(round_name), trust)
        rounds = [round_dir.number for round_dir in run.rounds() if round_dir.policy.is_dir()]
        if source.round != -1 and source.round not in rounds:
            available = f"it has {', '.join(map(str, rounds))}" if rounds else "it has none yet"
            raise RunFolderError(
                f"{text}: the run has no policy of round {source.round}; {available}"
            )
        return source
    folder = Path(text).expanduser()
    if not (folder / "recipe.yaml").is_file():
        _check_is_no_lost_run(Path(path if at else text).expanduser())
        return Source(text)
    if not (folder / "policy").is_dir():
        run = read_run(folder)
        rounds = [one.number for one in run.rounds() if one.policy.is_dir()]
        raise RunFolderError(
            f"{text} has no policy; {run.to_finish()}, or name a round: "
            f"{text}@{max(rounds, default='start')}"
        )
    return Source(text, read_run(folder), trust=trust)


def _check_is_no_lost_run(folder: Path) -> None:
    """RunFolderError for a folder that is not there, beside runs: it is a run's misspelt name, no model's."""
    runs = sorted(str(file.parent) for file in folder.parent.glob("*/recipe.yaml"))
    if runs and not folder.exists():
        raise RunFolderError(f"no run and no folder {folder}; {nearest(str(folder), runs)}")


def display_names(sources: Sequence[Source]) -> list[str]:
    """The subjects' names in tables: the last part of the path, or all of it where two would be equal."""
    short = [source.text.rstrip("/").rpartition("/")[2] or source.text for source in sources]
    return [
        name if short.count(name) == 1 else source.text
        for name, source in zip(short, sources, strict=True)
    ]


def run_prompts(source: Source) -> list[Prompt]:
    """The run's held-out prompts; [] for a bare model, or before the run's start has answered them."""
    if source.run is None:
        return []
    start = source.run.path / "rounds" / "start"
    if not (start / "answers.done.json").is_file():
        return []
    return [group.prompt for group in source.run.round(-1).stream("answers", Candidates)]


@dataclass(frozen=True)
class OpenSubject:
    """A loaded subject."""

    engine: Engine
    initial: Engine | None
    model: Any
    tokenizer: Any


@contextmanager
def open_subject(source: Source, initial: str | None) -> Iterator[OpenSubject]:
    """Load the subject, LoRA merged inside the context. `initial` is the start of a subject that is no run's."""
    set_template_date(source.run.first_day() if source.run else None)
    if source.run is None:
        engine: Any = open_engine(source.text)
        initial_engine: Engine | None = open_engine(initial) if initial else None
        yield OpenSubject(engine, initial_engine, engine.model, engine.chat.tokenizer)
        return
    recipe = source.recipe
    assert recipe is not None
    with quiet():
        policy = Policy.load(source.base, source.folder, trainable=False, seed=recipe.seed)
    settings: dict[str, Any] = {
        "batch_size": recipe.generate.batch_size,
        "template_kwargs": source.base.chat_template_kwargs,
    }
    engine = HFEngine(policy.model, policy.tokenizer, **settings)
    if source.round == -1:
        with policy.at_start():
            yield OpenSubject(engine, engine, engine.model, policy.tokenizer)
    elif source.base.tuning == "lora":
        with policy.merged():
            yield OpenSubject(
                engine, _InitialEngine(policy, engine), engine.model, policy.tokenizer
            )
    else:
        initial_policy = Policy.load(source.base, None, trainable=False)
        initial_engine = HFEngine(initial_policy.model, initial_policy.tokenizer, **settings)
        yield OpenSubject(engine, initial_engine, engine.model, policy.tokenizer)


@dataclass(frozen=True)
class _InitialEngine:
    """The initial policy, computed with the trained one's weights by leaving its adapter out."""

    policy: Policy
    engine: HFEngine

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        with self.policy.at_start():
            return self.engine.sample(requests, sampling, seed=seed, label=label)

    def score(
        self,
        requests: Sequence[Request],
        answers: Sequence[Response],
        *,
        top: int = 0,
        at: Sequence[Collection[int]] | None = None,
    ) -> list[Scored]:
        with self.policy.at_start():
            return self.engine.score(requests, answers, top=top, at=at)

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        with self.policy.at_start():
            return self.engine.choose(requests, options)


def content_hash(path: Path) -> str:
    """A hash of a file, or of a model's or data set's folder: its files' names and bytes."""
    if path.is_file():
        return _file_hash(path, path.stat().st_size, path.stat().st_mtime_ns)
    hasher = sha256()
    is_model = (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    for file in sorted(path.rglob("*")):
        wanted = not is_model or file.suffix in _MODEL_FILES
        if file.is_file() and wanted and file.name not in _NOT_THE_MODEL:
            stat = file.stat()
            name = file.relative_to(path)
            hasher.update(f"{name}\0{_file_hash(file, stat.st_size, stat.st_mtime_ns)}\0".encode())
    return hasher.hexdigest()


@lru_cache
def _file_hash(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
