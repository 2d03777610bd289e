"""What `prefloop evaluate` can measure, found and opened: a model, a run's policy, the policy after a round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from prefloop.errors import RunFolderError
from prefloop.generate.causal_lm import open_engine
from prefloop.generate.engine import Engine
from prefloop.generate.hf_engine import HFEngine
from prefloop.models.chat_template import set_template_date
from prefloop.models.policy import Policy
from prefloop.models.sources import ModelOptions, local_folder, quiet, resolve_source
from prefloop.recipe import Recipe, initial_source, load_recipe
from prefloop.records import Candidates, Prompt, Request, Response, Sampling, Scored
from prefloop.run_folder import RunDir, read_run

# What a model computes depends on these of its files.
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
_NOT_THE_MODEL = ("training_args.json", "README.md")


@dataclass(frozen=True)
class Source:
    """A subject that is not opened yet."""

    text: str
    """As it was named."""
    run: RunDir | None = None
    round: int | None = None
    """-1 is the model from which the run's training started; None is the policy that the run recommends."""

    @property
    def recipe(self) -> Recipe | None:
        """The run's."""
        return load_recipe(str(self.run.path / "recipe.yaml")) if self.run else None

    @property
    def base(self) -> ModelOptions:
        """The model from which training started, or the model itself."""
        if self.run is None:
            return ModelOptions(source=self.text, tuning="full")
        recipe = self.recipe
        assert recipe is not None
        return initial_source(recipe, self.run)

    @property
    def folder(self) -> Path | None:
        """Where the trained policy lies; None where the subject is a model, or a run's start."""
        if self.run is None or self.round == -1:
            return None
        if self.round is None:
            return self.run.path / "policy"
        return self.run.path / "rounds" / f"{self.round:04d}" / "policy"

    def weights(self) -> str:
        """A hash of all that decides what the model computes. Raises ModelError."""
        options = self.base
        parts = [contents(local_folder(resolve_source(options.source), options))]
        if self.folder is not None:
            parts.append(contents(self.folder))
        parts.append(str((options.dtype, options.chat_template, options.tuning)))
        return sha256("/".join(parts).encode()).hexdigest()

    def initial(self) -> str | None:
        """The same of the model from which training started; None where that is not known."""
        return Source(self.text, self.run, -1).weights() if self.run else None


def find(text: str) -> Source:
    """The subject that a text names: RUN, RUN@ROUND, RUN@start, or a model. Raises RunFolderError."""
    path, at, place = text.rpartition("@")
    if at and (Path(path).expanduser() / "recipe.yaml").is_file():
        run = read_run(Path(path).expanduser())
        if place != "start" and not place.isdecimal():
            raise RunFolderError(f"{text}: {place!r} is no round; write {path}@start or {path}@0")
        found = Source(text, run, -1 if place == "start" else int(place))
        rounds = [round_dir.number for round_dir in run.rounds() if round_dir.policy.is_dir()]
        if found.round != -1 and found.round not in rounds:
            there = f"it has {', '.join(map(str, rounds))}" if rounds else "it has none yet"
            raise RunFolderError(f"{text}: the run has no policy of round {found.round}; {there}")
        return found
    folder = Path(text).expanduser()
    if not (folder / "recipe.yaml").is_file():
        return Source(text)
    if not (folder / "policy").is_dir():
        raise RunFolderError(
            f"{text} has no policy yet; finish it with prefloop run, or name a round: {text}@0"
        )
    return Source(text, read_run(folder))


def names(sources: Sequence[Source]) -> list[str]:
    """How tables call them: the last part of what was named, or all of it where two would be alike."""
    short = [source.text.rstrip("/").rpartition("/")[2] or source.text for source in sources]
    return [
        name if short.count(name) == 1 else source.text
        for name, source in zip(short, sources, strict=True)
    ]


def held_out(source: Source) -> list[Prompt]:
    """The prompts that a run measures on, as its start has answered them; [] for a model or where it has not."""
    if source.run is None:
        return []
    start = source.run.path / "rounds" / "start"
    if not (start / "answers.done.json").is_file():
        return []
    return [group.prompt for group in source.run.round(-1).stream("answers", Candidates)]


@dataclass(frozen=True)
class Opened:
    """A subject in memory."""

    engine: Engine
    initial: Engine | None
    model: Any
    tokenizer: Any


@contextmanager
def opened(source: Source, initial: str | None) -> Iterator[Opened]:
    """Load the subject, LoRA merged inside the context. `initial`: a model's start, where it is not a run's."""
    set_template_date(source.run.first_day() if source.run else None)
    if source.run is None:
        engine: Any = open_engine(source.text)
        start: Engine | None = open_engine(initial) if initial else None
        yield Opened(engine, start, engine.model, engine.chat.tokenizer)
        return
    recipe = source.recipe
    assert recipe is not None
    with quiet():
        policy = Policy.load(source.base, source.folder, trainable=False, seed=recipe.seed)
    told: dict[str, Any] = {
        "batch_size": recipe.generate.batch_size,
        "template_kwargs": source.base.chat_template_kwargs,
    }
    engine = HFEngine(policy.model, policy.tokenizer, **told)
    if source.round == -1:
        with policy.at_start():
            yield Opened(engine, engine, engine.model, policy.tokenizer)
    elif source.base.tuning == "lora":
        with policy.merged():
            yield Opened(engine, _AtStart(policy, engine), engine.model, policy.tokenizer)
    else:
        first = Policy.load(source.base, None, trainable=False)
        before = HFEngine(first.model, first.tokenizer, **told)
        yield Opened(engine, before, engine.model, policy.tokenizer)


@dataclass(frozen=True)
class _AtStart:
    """The initial policy in the memory of the trained one."""

    policy: Policy
    engine: HFEngine

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        with self.policy.at_start():
            return self.engine.sample(requests, sampling, seed=seed, label=label)

    def score(
        self, requests: Sequence[Request], answers: Sequence[str], *, top: int = 0
    ) -> list[Scored]:
        with self.policy.at_start():
            return self.engine.score(requests, answers, top=top)

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        with self.policy.at_start():
            return self.engine.choose(requests, options)


def contents(path: Path) -> str:
    """A hash of a file, or of the files of a model's or data set's folder, names included."""
    if path.is_file():
        return _file(path, path.stat().st_size, path.stat().st_mtime_ns)
    found = sha256()
    model = (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    for file in sorted(path.rglob("*")):
        wanted = not model or file.suffix in _MODEL_FILES
        if file.is_file() and wanted and file.name not in _NOT_THE_MODEL:
            stat = file.stat()
            name = file.relative_to(path)
            found.update(f"{name}\0{_file(file, stat.st_size, stat.st_mtime_ns)}\0".encode())
    return found.hexdigest()


@lru_cache
def _file(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
