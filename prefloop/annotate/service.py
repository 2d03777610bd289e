"""What an annotator can do: give a name, vote, skip, undo. Knows nothing of HTTP; the page shows what it returns."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, Literal, TypeAlias

from prefloop.annotate.items import Comparison, Item, Plan, Side
from prefloop.annotate.votes import Choice, Joined, Undo, Vote, VoteFile, key
from prefloop.errors import DataError

Answer: TypeAlias = Literal["first", "second", "tie", "skip"]
_LONGEST_NAME, _LONGEST_REASON = 40, 300
_OTHER: dict[Side, Side] = {"a": "b", "b": "a"}


class AnnotationService:
    """One round of annotation. Safe to be called by several threads.

    Every call returns the annotator's state: the next item with its two answers in the order of this annotator, how many
    are done, and the item that undoing would bring back. Which policy wrote what is never in it. Calls may
    be repeated: a vote that already stands and an undo of nothing write no line.
    """

    def __init__(
        self,
        comparison: Comparison,
        plan: Plan,
        file: VoteFile,
        *,
        instructions: str | None = None,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        """`instructions` are shown to everybody; `say` is told who came and who is done."""
        self._comparison, self._plan, self._file = comparison, plan, file
        self._lock = Lock()
        self._instructions, self._say = instructions, say
        self._orders: dict[str, list[str]] = {}

    def join(self, name: str) -> dict[str, Any]:
        """Begin, or go on, under a name. Raises DataError where it is none."""
        name = " ".join(name.split())
        if not name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise DataError(f"a name has 1 to {_LONGEST_NAME} visible characters; give another one")
        with self._lock:
            if key(name) not in self._file.ballots.names:
                self._file.append(Joined(annotator=name))
            state = self._state(key(name))
            self._say(f"{state['name']} is here, {state['done']} of {state['total']} done")
            return {**state, "instructions": self._instructions}

    def vote(
        self, name: str, item: str, answer: Answer, reason: str | None, seconds: float | None
    ) -> dict[str, Any]:
        """Write a decision on an item of this annotator's. Raises DataError, and OSError where the disk refuses."""
        with self._lock:
            who = self._known(name, item)
            first = self._plan.first(who, item)
            choice = _choice(answer, first)
            if choice == "skip":
                reason = " ".join((reason or "").split())[:_LONGEST_REASON]
                if not reason:
                    raise DataError("a skipped item needs a reason; say why in a few words")
            else:
                reason = None
            before = self._file.ballots.votes(who).get(item)
            if before is None or (before.choice, before.reason) != (choice, reason):
                self._file.append(
                    Vote(
                        annotator=self._file.ballots.names[who],
                        item=item,
                        choice=choice,
                        first=first,
                        reason=reason,
                        seconds=seconds,
                    )
                )
            state = self._state(who)
            if state["item"] is None:
                self._say(f"{state['name']} is done with all {state['total']}")
            return state

    def undo(self, name: str, item: str) -> dict[str, Any]:
        """Take the vote on an item back, so that it is shown again. Raises DataError and OSError."""
        with self._lock:
            who = self._known(name, item)
            if item in self._file.ballots.votes(who):
                self._file.append(Undo(annotator=self._file.ballots.names[who], item=item))
            return self._state(who)

    def close(self) -> None:
        """Wait for a line that is being written, then let the file go."""
        with self._lock:
            self._file.close()

    def _known(self, name: str, item: str) -> str:
        who = key(name)
        if who not in self._file.ballots.names:
            raise DataError("nobody of that name has begun; give your name first")
        if item not in self._order(who):
            raise DataError("that item is not among yours; load the page again")
        return who

    def _order(self, who: str) -> list[str]:
        if who not in self._orders:
            number = list(self._file.ballots.names).index(who)
            self._orders[who] = self._plan.order(list(self._comparison.items), who, number)
        return self._orders[who]

    def _state(self, who: str) -> dict[str, Any]:
        votes, order = self._file.ballots.votes(who), self._order(who)
        waiting = next((item for item in order if item not in votes), None)
        return {
            "name": self._file.ballots.names[who],
            "done": len(votes),
            "total": len(order),
            "undo": next(reversed(list(votes)), None),
            "item": None if waiting is None else self._shown(self._comparison.items[waiting], who),
        }

    def _shown(self, item: Item, who: str) -> dict[str, Any]:
        first = self._plan.first(who, item.id)
        return {
            "id": item.id,
            "messages": [{"role": turn.role, "text": turn.content} for turn in item.messages],
            "first": item.answers[first],
            "second": item.answers[_OTHER[first]],
        }


def _choice(answer: Answer, first: Side) -> Choice:
    """What an answer by place means, given the side that was shown first."""
    if answer == "first":
        return first
    return _OTHER[first] if answer == "second" else answer
