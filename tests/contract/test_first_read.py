"""What a method says it reads late is read late: cells of a comparison share text on its word."""

from typing import Any

import pytest

import prefloop.methods
from prefloop.config import find_plugin, plugin_names
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges.similarity import Similarity
from prefloop.methods import Actors, Method
from prefloop.records import Candidates
from tests.conftest import labelled_prompts

PROMPTS = labelled_prompts(3)


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
def test_options_that_are_said_to_come_later_are_not_read_before(name: str) -> None:
    """In round 0, the only one whose text is shared."""
    kind = find_plugin(prefloop.methods, name, Method, "method")
    assert kind.first_read.keys() <= kind.model_fields.keys()
    if not kind.first_read:
        return
    seen: set[str] = set()
    method = watched(kind, seen)
    judge = Similarity().open(None, PromptSet("compact"))
    actors = Actors(FakeEngine(), judge, PromptSet("compact"), round=0, seed=3)
    seen.clear()
    groups = [g for g in method.generate(PROMPTS, actors) if isinstance(g, Candidates)]
    assert groups
    assert seen, "the watching does not work"
    assert [option for option in seen if option in kind.first_read] == []
    ranked = [g for g in method.rank(groups, actors) if isinstance(g, Candidates)]
    method.measures(ranked)
    assert [o for o in seen if kind.first_read.get(o) in ("pair", "loss")] == []
    list(method.pair(ranked, 0))
    assert [option for option in seen if kind.first_read.get(option) == "loss"] == []
