"""The protocol's memory: nothing is judged twice, and what it answers is what the judge said."""

from collections.abc import Sequence

import pytest

from prefloop.judges import CachedJudge, NoVerdict, Verdict
from prefloop.records import Message, Prompt


class Counting:
    """Scores are lengths; a group with "?" has no verdict."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, ...]]] = []

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        self.batches.append([tuple(group) for group in groups])
        return [
            NoVerdict("odd") if "?" in group else tuple(float(len(text)) for text in group)
            for group in groups
        ]


def prompt(text: str = "q", target: str | None = None, role: str = "user") -> Prompt:
    return Prompt(id=text, messages=(Message(role=role, content=text),), target=target)  # type: ignore[arg-type]


def test_a_group_is_judged_once_within_a_call_and_between_calls() -> None:
    counting = Counting()
    judge = CachedJudge(counting)
    groups = [["a", "bb"], ["?", "b"], ["a", "bb"]]
    expected = [(1.0, 2.0), NoVerdict("odd"), (1.0, 2.0)]
    assert judge.score([prompt()] * 3, groups) == expected
    assert judge.score([prompt()] * 3, groups) == expected
    assert counting.batches == [[("a", "bb"), ("?", "b")]]


@pytest.mark.parametrize(
    ("other", "group"),
    [
        (prompt("other"), ["a", "bb"]),
        (prompt(target="t"), ["a", "bb"]),
        (prompt(role="system"), ["a", "bb"]),
        (prompt(), ["bb", "a"]),
        (prompt(), ["a", "bb", ""]),
        (prompt(), ["ab", "b"]),
        (prompt(target="None"), ["a", "bb"]),
    ],
)
def test_what_differs_in_anything_is_judged_anew(other: Prompt, group: list[str]) -> None:
    counting = Counting()
    judge = CachedJudge(counting)
    judge.score([prompt()], [["a", "bb"]])
    judge.score([other], [group])
    assert len(counting.batches) == 2


def test_the_prompts_id_changes_no_verdict_and_is_not_looked_at() -> None:
    counting = Counting()
    judge = CachedJudge(counting)
    judge.score([prompt()], [["a"]])
    judge.score([prompt().model_copy(update={"id": "another"})], [["a"]])
    assert len(counting.batches) == 1


def test_many_groups_go_to_the_judge_in_batches_and_come_back_in_order() -> None:
    counting = Counting()
    groups = [["x" * n] for n in range(150)]
    assert CachedJudge(counting).score([prompt()] * 150, groups) == [
        (float(n),) for n in range(150)
    ]
    assert [len(batch) for batch in counting.batches] == [64, 64, 22]


def test_memory_is_bounded_and_a_call_is_answered_whole_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CachedJudge, "CACHE_SIZE", 3)
    counting = Counting()
    judge = CachedJudge(counting)
    groups = [["x" * n] for n in range(5)]
    assert judge.score([prompt()] * 5, groups) == [(float(n),) for n in range(5)]
    judge.score([prompt()], [groups[4]])
    assert len(counting.batches) == 1
    judge.score([prompt()], [groups[0]])
    assert len(counting.batches) == 2
