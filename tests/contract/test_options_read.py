"""Which options a stage may read is told from a method's source: cells of a comparison share text on its word."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

import prefloop.methods
from prefloop.compare.reuse import options_read
from prefloop.config import find_plugin, plugin_names
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges.similarity import Similarity
from prefloop.methods import Actors, Method
from prefloop.records import Candidates
from tests.conftest import labelled_prompts

PROMPTS = labelled_prompts(3)
BASE = {"generator", "prompt_set", "sampling"}


def kind_of(name: str) -> type[Method]:
    return find_plugin(prefloop.methods, name, Method, "method")


def watched(kind: type[Method], seen: set[str]) -> Method:
    """The method with its defaults, noting which of its options are looked at."""

    class Watched(kind):  # type: ignore[valid-type,misc]
        def __getattribute__(self, name: str) -> Any:
            if name in kind.model_fields:
                seen.add(name)
            return super().__getattribute__(name)

    Watched.__module__ = kind.__module__
    return Watched()


@pytest.mark.parametrize("name", plugin_names(prefloop.methods))
def test_what_a_stage_reads_was_told_from_the_source(name: str) -> None:
    seen: set[str] = set()
    method = watched(kind_of(name), seen)
    judge = Similarity().open(None, PromptSet("compact"))
    actors = Actors(FakeEngine(), judge, PromptSet("compact"), round=0, seed=3)
    seen.clear()
    groups = [g for g in method.generate(PROMPTS, actors) if isinstance(g, Candidates)]
    assert groups
    assert seen <= options_read(kind_of(name), "generate")
    list(method.rank(groups, actors))
    assert seen <= options_read(kind_of(name), "rank")


@pytest.mark.parametrize(
    ("name", "stage", "later"),
    [
        ("ial", "rank", {"gates", "eta", "gamma", "lam", "objective", "penalty"}),
        ("arop", "generate", {"margin", "gates", "beta"}),
        ("arop", "rank", {"gates", "beta"}),
        ("spa", "rank", {"gates", "alpha", "least_confident"}),
        ("dpop", "rank", {"gates", "beta", "gamma"}),
    ],
)
def test_options_of_later_stages_do_not_keep_cells_from_sharing(
    name: str, stage: str, later: set[str]
) -> None:
    kind = kind_of(name)
    assert kind.model_fields.keys() - options_read(kind, stage) == later | {"reference"}


class Plain(Method):
    deep: int = 1
    late: int = 2
    limit: ClassVar = 3

    def generate(self, prompts: Any, actors: Any) -> Any:
        return [self.limit for _ in prompts if self._helps]

    @property
    def _helps(self) -> bool:
        return bool(self.deep)


class Child(Plain):
    own: int = 4

    def generate(self, prompts: Any, actors: Any) -> Any:
        return super().generate(prompts, actors)

    def rank(self, groups: Any, actors: Any) -> Any:
        return [super().rank, self.own]


class WholeSelf(Plain):
    def generate(self, prompts: Any, actors: Any) -> Any:
        return getattr(self, "deep")  # noqa: B009


class OtherName(Plain):
    def generate(this, prompts: Any, actors: Any) -> Any:  # noqa: N805
        return this.deep


class Cached(Plain):
    @functools.cached_property
    def _helps(self) -> int:
        return self.late


class Dumps(Plain):
    def generate(self, prompts: Any, actors: Any) -> Any:
        return self.model_dump()


def made_elsewhere() -> Callable[..., Any]:
    space: dict[str, Any] = {}
    exec("def generate(self, prompts, actors): return self.late", space)
    return space["generate"]  # type: ignore[no-any-return]


class NoSource(Plain):
    generate = made_elsewhere()


def test_reads_are_followed_through_helpers_and_parents() -> None:
    assert options_read(Plain, "generate") == BASE | {"deep"}
    assert options_read(Child, "generate") == BASE | {"deep"}
    assert options_read(Child, "rank") == BASE | {"deep", "own"}


@pytest.mark.parametrize("kind", [WholeSelf, OtherName, Cached, Dumps, NoSource])
def test_what_cannot_be_followed_counts_as_reading_every_option(kind: type[Method]) -> None:
    assert options_read(kind, "generate") == set(kind.model_fields)
