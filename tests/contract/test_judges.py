"""What every judge owes the methods. A new file in prefloop/judges is tested here without a line added."""

import math

import pytest

import prefloop.judges
from prefloop.config import find_plugin, plugin_names
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges import Judge, NoVerdict
from prefloop.records import Message, Prompt

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


def lengths(prompt: Prompt, responses: list[str]) -> list[int]:
    """A user's function, for the judge that calls one."""
    return [len(text) for text in responses]


# What a judge is told where its defaults alone make no judge. A judge that is not here and has required
# options is one that loads weights or asks a server; its own tests put it to work.
EXAMPLES: dict[str, dict[str, object]] = {
    "rules": {"max_characters": 12, "exclude": ["nobody"]},
    "python": {"function": f"{__name__}:lengths"},
    "ensemble": {
        "judges": [{"name": "similarity"}, {"name": "self_judge"}],
        "weights": [0.01, 1.0],
    },
}
URL = "http://127.0.0.1:1/v1"


def build(name: str) -> Judge:
    """The judge with its defaults; what has none is the name of a model or a server's address."""
    required = [field for field, info in kind(name).model_fields.items() if info.is_required()]
    given = {field: URL if field == "url" else "owner/model" for field in required}
    return kind(name).model_validate(EXAMPLES.get(name, given))


def _needs_weights(name: str) -> bool:
    required = any(info.is_required() for info in kind(name).model_fields.values())
    return name not in EXAMPLES and (required or bool(build(name).sources))


# It compares the policy with its past, which a fake engine does not have.
WITHOUT_WEIGHTS = [name for name in JUDGES if not _needs_weights(name) and name != "implicit"]


def test_there_are_judges() -> None:
    assert {"similarity", "self_judge", "rules", "python", "ensemble"} == set(WITHOUT_WEIGHTS)
    assert {"pairrm", "reward_model", "api", "implicit"} <= set(JUDGES)


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
    assert isinstance(judge.score(PROMPTS[1:2], [GROUPS[1]])[0], tuple)
    verdicts = judge.score(PROMPTS[:2], [["In the sea.", " "], GROUPS[1]])
    assert isinstance(verdicts[0], NoVerdict)
    assert verdicts[0].reason
    assert verdicts[1] == judge.score(PROMPTS[1:2], [GROUPS[1]])[0]


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_no_groups_make_no_verdicts(name: str) -> None:
    assert build(name).open(FakeEngine(), PromptSet("compact")).score([], []) == []
