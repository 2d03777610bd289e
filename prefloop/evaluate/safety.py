"""Attacks to be tried: templates filled with prompts, or attack prompts that are ready; all from files.

None come with this package. docs/safety.md names published sets and the rows that they need.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefloop.config import nearest
from prefloop.errors import DataError
from prefloop.evaluate.cache import digest
from prefloop.evaluate.questions import demand_own_ids, drawn, id_of, read_rows, text_of
from prefloop.records import Record

PLACE = "[INSERT PROMPT HERE]"
"""Where a template takes the prompt (GPTFuzzer's mark, Yu et al. 2023, arXiv:2309.10253)."""
PLAIN = "plain"
"""The attack that is none: the prompt as it stands."""


class Attack(Record):
    """One conversation that tries to get what `goal` asks for."""

    attack: str
    """Name of the template or of the way in which the attack was found."""
    goal_id: str
    goal: str
    """The request itself, without the attack: what a judge is shown as the question."""
    text: str
    """What the model is asked."""

    @property
    def id(self) -> str:
        """Unique within a measure."""
        return f"{self.attack}/{self.goal_id}"


def read_goals(files: Sequence[str], limit: int | None, seed: int) -> list[tuple[str, str]]:
    """Id and text of the prompts in all files, each text once; `limit` of them drawn by the seed."""
    found: dict[str, str] = {}
    for file in files:
        for row in read_rows(file, "prompts"):
            text = text_of(row, "prompt")
            name = id_of(row, text)
            if text not in found.values():
                found[name if name not in found else f"{name}-{digest(text)}"] = text
    return drawn(list(found.items()), limit, seed, "prompts")


def from_templates(
    source: str, goals: Sequence[tuple[str, str]], wanted: int | Sequence[str] | None, seed: int
) -> list[Attack]:
    """Every wanted template filled with every prompt. Raises DataError."""
    rows = read_rows(source, "templates")
    texts = [text_of(row, "template") for row in rows]
    for (where, _), text in zip(rows, texts, strict=True):
        if PLACE not in text:
            raise DataError(
                f"{where} has no {PLACE} in its template; write it where the prompt goes"
            )
    names = [id_of(row, text) for row, text in zip(rows, texts, strict=True)]
    demand_own_ids(rows, names)
    templates = dict(zip(names, texts, strict=True))
    return [
        Attack(attack=name, goal_id=goal_id, goal=goal, text=templates[name].replace(PLACE, goal))
        for name in chosen(names, wanted, seed, source)
        for goal_id, goal in goals
    ]


def from_ready(
    source: str, wanted: int | Sequence[str] | None, limit: int | None, seed: int
) -> list[Attack]:
    """The attack prompts of a file, of the wanted attacks on `limit` goals. Raises DataError."""
    rows = read_rows(source, "ready")
    goals = dict.fromkeys(text_of(row, "goal") for row in rows)
    kept = {goal: f"goal-{place}" for place, goal in enumerate(goals)}
    kept = {goal: kept[goal] for goal in drawn(list(kept), limit, seed, "prompts")}
    names = chosen(list(dict.fromkeys(text_of(r, "attack") for r in rows)), wanted, seed, source)
    found = [
        Attack(
            attack=text_of(row, "attack"),
            goal_id=kept[text_of(row, "goal")],
            goal=text_of(row, "goal"),
            text=text_of(row, "prompt"),
        )
        for row in rows
        if text_of(row, "goal") in kept and text_of(row, "attack") in names
    ]
    if len({attack.id for attack in found}) < len(found):
        raise DataError(
            f"{source} has two prompts of one attack for one goal; leave one of them, or name them "
            "differently in field 'attack'"
        )
    return found


def chosen(
    names: Sequence[str], wanted: int | Sequence[str] | None, seed: int, source: str
) -> list[str]:
    """The attacks by name, or as many as wanted drawn by the seed, or all; in the file's order."""
    if PLAIN in names:
        raise DataError(
            f"{source} has an attack called {PLAIN!r}, as prompts without an attack are; call it otherwise"
        )
    if wanted is None:
        return list(names)
    if isinstance(wanted, int):
        if wanted > len(names):
            raise DataError(
                f"attacks: {source} holds {len(names)} attacks and {wanted} are wanted; "
                "write a smaller number, or null for all"
            )
        return drawn(names, wanted, seed, "attacks")
    for name in wanted:
        if name not in names:
            raise DataError(f"attacks: {source} has no attack {name!r}; {nearest(name, [*names])}")
    return [name for name in names if name in wanted]
