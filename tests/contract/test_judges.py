"""What every judge owes the methods. A new file in prefloop/rank is tested here without a line added."""

import math

import pytest

import prefloop.rank
from prefloop import plugins
from prefloop.generate.fake_engine import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.rank import Judge, NoVerdict
from prefloop.records import Message, Prompt

JUDGES = plugins.names(prefloop.rank)
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
    return plugins.find(prefloop.rank, name, Judge, "judge")


def build(name: str) -> Judge:
    """The judge with its defaults; what has none is the name of a model."""
    required = [field for field, info in kind(name).model_fields.items() if info.is_required()]
    return kind(name).model_validate(dict.fromkeys(required, "owner/model"))


# A judge with weights of its own is put to work by its own tests.
WITHOUT_WEIGHTS = [name for name in JUDGES if "model" not in kind(name).model_fields]


def test_there_are_judges() -> None:
    assert {"similarity", "self_judge"} <= set(WITHOUT_WEIGHTS)


@every_judge
def test_it_says_what_it_is(name: str) -> None:
    first_line = (kind(name).__doc__ or "").strip().partition("\n")[0]
    assert first_line.endswith("."), "the class docstring's first line is what `ls judges` shows"


@every_judge
def test_every_option_says_what_it_does(name: str) -> None:
    fields = kind(name).model_fields
    assert [field for field, info in fields.items() if not info.description] == []


@every_judge
def test_its_options_survive_json(name: str) -> None:
    judge = build(name)
    assert kind(name).model_validate_json(judge.model_dump_json(), strict=True) == judge


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_it_gives_one_verdict_a_group_whatever_stands_beside_it(name: str) -> None:
    judge = build(name).open(FakeEngine(), PromptSet("compact"))
    together = judge.score(PROMPTS, GROUPS)
    alone = [judge.score([p], [g])[0] for p, g in zip(PROMPTS, GROUPS, strict=True)]
    assert together == alone
    assert judge.score(PROMPTS[::-1], GROUPS[::-1]) == together[::-1]
    for verdict, group in zip(together, GROUPS, strict=True):
        assert not isinstance(verdict, NoVerdict)
        assert len(verdict) == len(group)
        assert all(map(math.isfinite, verdict))
    assert len(set(together)) > 1


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_an_empty_answer_has_no_verdict_and_spoils_no_other_groups(name: str) -> None:
    judge = build(name).open(FakeEngine(), PromptSet("compact"))
    verdicts = judge.score(PROMPTS[:2], [["In the sea.", " "], GROUPS[1]])
    assert isinstance(verdicts[0], NoVerdict)
    assert verdicts[0].reason
    assert verdicts[1] == judge.score(PROMPTS[1:2], [GROUPS[1]])[0]


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_no_groups_make_no_verdicts(name: str) -> None:
    assert build(name).open(FakeEngine(), PromptSet("compact")).score([], []) == []
