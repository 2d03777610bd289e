import re

import pytest

from prefloop.generate.templates import SHIPPED, PromptSet

VALUES = {
    "advisor": ("question", "answer"),
    "rewrite": ("question", "answer", "suggestion"),
    "refine": ("question", "answer_a", "answer_b"),
    "flaw": ("question", "answer"),
    "severity": ("question", "answer", "flawed"),
    "advisor_turn": ("question", "answer"),
    "rewrite_turn": ("question", "answer", "suggestion"),
    "refine_turn": ("question", "answer_a", "answer_b"),
    "flaw_turn": ("question", "answer"),
}
# Small models answer any question that they see; a further turn need not repeat what stands above it,
# but the last thing that a small model reads is what it answers.
LEFT_OUT = {
    ("compact", "flaw"): {"question"},
    **{(name, "advisor_turn"): {"question", "answer"} for name in ("compact", "paper")},
    **{(name, "flaw_turn"): {"question", "answer"} for name in ("compact", "paper")},
    ("compact", "rewrite_turn"): {"answer", "suggestion"},
    ("paper", "rewrite_turn"): {"question", "answer", "suggestion"},
    ("compact", "refine_turn"): {"answer_a"},
    ("paper", "refine_turn"): {"question", "answer_a"},
}


def render(name: str, role: str, **more: str | None) -> str:
    values: dict[str, str | None] = {key: f"<<{key}>>" for key in VALUES[role]}
    if role == "severity":
        values["axis"] = None
    (message,) = PromptSet(name).render(role, **(values | more))
    assert message.role == "user"
    return message.content


@pytest.mark.parametrize("name", ["compact", "paper"])
@pytest.mark.parametrize("role", sorted(VALUES))
def test_a_prompt_shows_all_that_it_is_given_once(name: str, role: str) -> None:
    text = render(name, role)
    shown = re.findall(r"<<(\w+)>>", text)
    assert sorted(shown) == sorted(set(VALUES[role]) - LEFT_OUT.get((name, role), set()))


@pytest.mark.parametrize(
    "path", sorted(SHIPPED.glob("*/*.jinja")), ids=lambda p: p.parent.name + p.stem
)
def test_every_prompt_begins_with_a_comment(path) -> None:
    assert re.match(r"\{#.{20,}#\}\n", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("role", sorted(VALUES))
def test_compact_prompts_instruct_in_at_most_60_words(role: str) -> None:
    assert len(re.sub(r"<<\w+>>", "", render("compact", role)).split()) <= 60


@pytest.mark.parametrize("name", ["compact", "paper"])
def test_severity_asks_for_a_digit_last_and_names_the_axis_only_if_there_is_one(name: str) -> None:
    plain, axis = render(name, "severity"), render(name, "severity", axis="honesty")
    assert "one digit from 1 to 5" in plain.splitlines()[-1]
    assert "one digit from 1 to 5" in axis.splitlines()[-1]
    assert "honesty" in axis
    assert "None" not in plain


def test_only_the_papers_refine_asks_for_a_final_answer_line() -> None:
    for role in ("refine", "refine_turn"):
        assert "\nFinal answer:\n" in render("paper", role)
        assert "Final answer:" not in render("compact", role)


def test_values_are_put_in_as_they_are() -> None:
    assert "{{ 7*7 }} <b>&" in render("paper", "rewrite", answer="{{ 7*7 }} <b>&")


def test_the_shared_sets_advice_and_rewrite_begin_alike_up_to_the_answers_end() -> None:
    advisor, rewrite = render("shared", "advisor"), render("shared", "rewrite")
    beginning, after = advisor.split("<<answer>>")
    assert after
    assert "<<question>>" in beginning
    assert rewrite.startswith(f"{beginning}<<answer>>\n")


def test_the_shared_sets_rewrite_shows_all_and_the_task_last_again() -> None:
    """The last thing that a small model reads is what it answers."""
    shown = re.findall(r"<<(\w+)>>", render("shared", "rewrite"))
    assert sorted(shown) == sorted([*VALUES["rewrite"], "question"])
    assert shown[-1] == "question"


def test_the_shared_sets_other_prompts_are_the_compact_ones() -> None:
    for role in sorted(set(VALUES) - {"rewrite"}):
        assert render("shared", role) == render("compact", role)
