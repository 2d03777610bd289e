"""The annotators' actions: join, vote, skip, undo; independent of HTTP. The page shows the returned state."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, Literal, TypeAlias

from prefloop.annotate.items import AnnotationPlan, Comparison, Item, Side
from prefloop.annotate.votes import Choice, Joined, Undo, Vote, VoteFile, annotator_key
from prefloop.errors import DataError

Answer: TypeAlias = Literal["first", "second", "tie", "skip"]
_MAX_NAME_LENGTH, _MAX_REASON_LENGTH = 40, 300
_OTHER_SIDE: dict[Side, Side] = {"a": "b", "b": "a"}


class AnnotationService:
    """One annotation. Thread-safe.

    Every call returns the annotator's state: the next item with its two answers in this annotator's order, how many
    are done, and the item that undo would bring back; never which policy wrote which answer. Calls are idempotent:
    a vote that is already stored, or an undo without a vote, writes no line.
    """

    def __init__(
        self,
        comparison: Comparison,
        plan: AnnotationPlan,
        file: VoteFile,
        *,
        instructions: str | None = None,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        """`instructions` are shown to all annotators; `say` prints who joined and who is done."""
        self._comparison, self._plan, self._file = comparison, plan, file
        self._lock = Lock()
        self._instructions, self._say = instructions, say
        self._orders: dict[str, list[str]] = {}

    def join(self, name: str) -> dict[str, Any]:
        """Start or continue under a name. Raises DataError for an unusable name."""
        name = " ".join(name.split())
        if not name or len(name) > _MAX_NAME_LENGTH or not name.isprintable():
            raise DataError(
                f"a name has 1 to {_MAX_NAME_LENGTH} visible characters; give another one"
            )
        with self._lock:
            if annotator_key(name) not in self._file.ballots.names:
                self._file.append(Joined(annotator=name))
            state = self._state(annotator_key(name))
            self._say(f"{state['name']} is here, {state['done']} of {state['total']} done")
            return {**state, "instructions": self._instructions}

    def vote(
        self, name: str, item: str, answer: Answer, reason: str | None, seconds: float | None
    ) -> dict[str, Any]:
        """Store a vote on one of the annotator's items. Raises DataError, and OSError where writing fails."""
        with self._lock:
            annotator = self._checked_annotator(name, item)
            first = self._plan.first(annotator, item)
            choice = _choice(answer, first)
            if choice == "skip":
                reason = " ".join((reason or "").split())[:_MAX_REASON_LENGTH]
                if not reason:
                    raise DataError("a skipped item needs a reason; say why in a few words")
            else:
                reason = None
            before = self._file.ballots.votes(annotator).get(item)
            if before is None or (before.choice, before.reason) != (choice, reason):
                self._file.append(
                    Vote(
                        annotator=self._file.ballots.names[annotator],
                        item=item,
                        choice=choice,
                        first=first,
                        reason=reason,
                        seconds=seconds,
                    )
                )
            state = self._state(annotator)
            if state["item"] is None:
                self._say(f"{state['name']} is done with all {state['total']}")
            return state

    def undo(self, name: str, item: str) -> dict[str, Any]:
        """Withdraw the vote on an item, so that it is shown again. Raises DataError and OSError."""
        with self._lock:
            annotator = self._checked_annotator(name, item)
            if item in self._file.ballots.votes(annotator):
                self._file.append(Undo(annotator=self._file.ballots.names[annotator], item=item))
            return self._state(annotator)

    def close(self) -> None:
        """Close the file of votes, after a line that is being written."""
        with self._lock:
            self._file.close()

    def _checked_annotator(self, name: str, item: str) -> str:
        annotator = annotator_key(name)
        if annotator not in self._file.ballots.names:
            raise DataError("nobody of that name has begun; give your name first")
        if item not in self._order(annotator):
            raise DataError("that item is not among yours; load the page again")
        return annotator

    def _order(self, annotator: str) -> list[str]:
        if annotator not in self._orders:
            number = list(self._file.ballots.names).index(annotator)
            self._orders[annotator] = self._plan.order(
                list(self._comparison.items), annotator, number
            )
        return self._orders[annotator]

    def _state(self, annotator: str) -> dict[str, Any]:
        votes, order = self._file.ballots.votes(annotator), self._order(annotator)
        waiting = next((item for item in order if item not in votes), None)
        return {
            "name": self._file.ballots.names[annotator],
            "done": len(votes),
            "total": len(order),
            "undo": next(reversed(list(votes)), None),
            "item": None
            if waiting is None
            else self._item_for_page(self._comparison.items[waiting], annotator),
        }

    def _item_for_page(self, item: Item, annotator: str) -> dict[str, Any]:
        first = self._plan.first(annotator, item.id)
        return {
            "id": item.id,
            "messages": [{"role": turn.role, "text": turn.content} for turn in item.messages],
            "first": item.answers[first],
            "second": item.answers[_OTHER_SIDE[first]],
        }


def _choice(answer: Answer, first: Side) -> Choice:
    """The side that an answer by position ("first", "second") chooses; "tie" and "skip" stay."""
    if answer == "first":
        return first
    return _OTHER_SIDE[first] if answer == "second" else answer
