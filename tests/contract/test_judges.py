"""What every judge owes the methods. A new file in prefloop/judges is tested here without a line added."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
from pydantic import ValidationError

import prefloop.judges
from prefloop.config import find_plugin, plugin_names
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges import Judge, NoVerdict, OpenJudge, Verdict
from prefloop.records import Message, Prompt
from tests.contract.examples import example_in_tests

JUDGES = plugin_names(prefloop.judges)
PROMPTS = [
    Prompt(
        id=f"p{n}",
        messages=(Message(role="user", content=f"Where does river {n} end?"),),
        target=f"River {n} ends in the sea.",
    )
    for n in range(4)
]
GROUPS = [
    ["In the sea.", "In a lake."],
    ["Nobody knows.", "River 1 ends in the sea, like most of them."],
    ["A", "B"],
    ["In the north.", "Rivers end."],
]

every_judge = pytest.mark.parametrize("name", JUDGES)


def kind(name: str) -> type[Judge]:
    return find_plugin(prefloop.judges, name, Judge, "judge")


HOW = (
    "judge {name} cannot be put to work here ({why}): give it a ClassVar `example` with options or, where it loads or "
    "asks something, let tests/judges/test_{name}.py have a function `example(folder)` that makes it and returns options"
)


def build(name: str, options: Mapping[str, Any] | None) -> Judge:
    """The judge as its tests put it to work, else as its own example does; a failure says what is missing."""
    try:
        judge = kind(name).model_validate(kind(name).example if options is None else options)
    except ValidationError as error:
        pytest.fail(HOW.format(name=name, why=error.errors()[0]["msg"]))
    if options is None and judge.sources:
        pytest.fail(HOW.format(name=name, why=f"it loads {judge.sources}"))
    return judge


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Judge]]:
    """Every judge with its example's options, whose weights or servers last as long as the tests of this file."""
    with ExitStack() as stack:

        @cache
        def get(name: str) -> Judge:
            made = example_in_tests("judges", name, tmp_path_factory.mktemp(name))
            return build(name, stack.enter_context(made))

        yield get


@pytest.fixture(scope="module")
def opened(judges: Callable[[str], Judge]) -> Callable[[str], OpenJudge]:
    """Every judge at work, with a fake policy."""
    return cache(lambda name: judges(name).open(FakeEngine(), PromptSet("compact")))


def test_there_are_judges() -> None:
    assert {"similarity", "self_judge", "rules", "pairrm", "reward_model", "api"} <= set(JUDGES)


def test_a_judge_that_cannot_be_put_to_work_is_told_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its checks fail; they are not left out."""
    with pytest.raises(pytest.fail.Exception, match=r"judge python .*tests/judges/test_python\.py"):
        build("python", None)
    monkeypatch.setattr(kind("similarity"), "example", {"model": "owner/name"})
    with pytest.raises(pytest.fail.Exception, match=r"it loads .*owner/name"):
        build("similarity", None)


@every_judge
def test_it_says_what_it_is(name: str) -> None:
    first_line = (kind(name).__doc__ or "").strip().partition("\n")[0]
    assert first_line.endswith("."), "the class docstring's first line is what `ls judges` shows"


@every_judge
def test_every_option_says_what_it_does(name: str) -> None:
    fields = kind(name).model_fields
    assert [field for field, info in fields.items() if not info.description] == []


@every_judge
def test_its_options_survive_json(name: str, judges: Callable[[str], Judge]) -> None:
    judge = judges(name)
    assert kind(name).model_validate_json(judge.model_dump_json(), strict=True) == judge


@every_judge
def test_its_check_passes_what_it_then_opens(name: str, judges: Callable[[str], Judge]) -> None:
    judges(name).check()


def same(one: list[Verdict], other: list[Verdict]) -> bool:
    """Equal but for the rounding of models, whose batches differ."""
    return all(
        a == b
        if isinstance(a, NoVerdict) or isinstance(b, NoVerdict)
        else a == pytest.approx(b, rel=1e-4)
        for a, b in zip(one, other, strict=True)
    )


@every_judge
def test_it_gives_one_verdict_a_group_whatever_stands_beside_it(
    name: str, opened: Callable[[str], OpenJudge]
) -> None:
    judge = opened(name)
    together = judge.score(PROMPTS, GROUPS)
    alone = [judge.score([p], [g])[0] for p, g in zip(PROMPTS, GROUPS, strict=True)]
    assert same(together, alone)
    assert same(judge.score(PROMPTS[::-1], GROUPS[::-1]), together[::-1])
    for verdict, group in zip(together, GROUPS, strict=True):
        assert not isinstance(verdict, NoVerdict)
        assert len(verdict) == len(group)
        assert all(map(math.isfinite, verdict))
    assert len(set(together)) > 1


@every_judge
def test_an_empty_answer_has_no_verdict_and_spoils_no_other_groups(
    name: str, opened: Callable[[str], OpenJudge]
) -> None:
    judge = opened(name)
    alone = judge.score(PROMPTS[1:2], [GROUPS[1]])
    assert isinstance(alone[0], tuple)
    verdicts = judge.score(PROMPTS[:2], [["In the sea.", " "], GROUPS[1]])
    assert isinstance(verdicts[0], NoVerdict)
    assert verdicts[0].reason
    assert same(verdicts[1:], alone)


@every_judge
def test_no_groups_make_no_verdicts(name: str, opened: Callable[[str], OpenJudge]) -> None:
    assert opened(name).score([], []) == []
