"""Log-probabilities of given tokens, in slots: what several rows begin with is computed once.

Answers to one prompt, and questions after the same examples, share most of their tokens. Rows are taken in
the order of their tokens, so that those which begin alike follow each other; what the first has computed
the others copy. Only the tokens that are asked for go through the output layer.

No result depends on the other rows, not even in its last bit, as in decode.py: long rows are cut where
attention is cut anyway.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from prefloop.generate.cache_attention import Step
from prefloop.generate.decode import STEP_TOKENS, WORTH_WAITING, feed
from prefloop.generate.engine import TokenScores
from prefloop.generate.kv_cache import TILE, Slots

# E positions whose logits are computed in a step, V vocabulary.


class Wanted(NamedTuple):
    """A row of tokens, some of which are scored."""

    ids: Sequence[int]
    positions: Sequence[int]
    """Of the tokens that are scored, ascending; at least 1, as nothing comes before the first token."""


class _Asked(NamedTuple):
    """One log-probability that a step gives."""

    at: int
    """Among the E positions."""
    place: int
    """Of the wanted row."""
    token: int


@dataclass
class _Row:
    """Wanted rows that differ in their last token at most; that one is never fed."""

    ids: list[int]
    places: list[int]
    first: int
    """Position of the first token whose logits are needed."""
    slot: int = -1
    present: int = 0
    """How many of the tokens have keys and values."""
    scores: dict[int, TokenScores] = field(default_factory=dict)

    @property
    def pending(self) -> int:
        return len(self.ids) - self.present


def score(
    model: Any,
    slots: Slots,
    count: int,
    wanted: Sequence[Wanted],
    top: int,
    finished: Callable[[int, TokenScores], None],
) -> None:
    """Score every row in the first `count` slots, starting from what any slot holds.

    `finished` is told each place and its scores, with `top` alternatives a token.
    """
    waiting = deque(_distinct(wanted))
    running: list[_Row] = []
    unused = set(range(count))
    while waiting or running:
        _admit(slots, count, waiting, running, unused)
        fed = _feed(running)
        _forward(model, slots, wanted, fed, top)
        for row in [row for row, _ in fed if not row.pending]:
            running.remove(row)
            for place, scores in row.scores.items():
                finished(place, scores)


def scores_of(
    logits_EV: Tensor, at: Sequence[int], tokens: Sequence[int], top: int
) -> list[TokenScores]:
    """The scores of `tokens[n]` by the logits at position `at[n]`, each as a TokenScores of one token."""
    logps_EV = logits_EV.float().log_softmax(dim=-1)
    rows, columns = list(at), list(tokens)
    logps = logps_EV[rows, columns].tolist()
    likeliest = logps_EV.argmax(dim=-1)[rows].tolist()
    if not top:
        return [
            TokenScores([logp], [token == best], [], [])
            for logp, token, best in zip(logps, columns, likeliest, strict=True)
        ]
    values, indices = logps_EV.topk(top, dim=-1)
    return [
        TokenScores([logp], [token == best], [ids], [alternatives])
        for logp, token, best, ids, alternatives in zip(
            logps, columns, likeliest, indices[rows].tolist(), values[rows].tolist(), strict=True
        )
    ]


def joined(parts: Sequence[TokenScores]) -> TokenScores:
    """Scores of following tokens as one."""
    whole = TokenScores([], [], [], [])
    for part in parts:
        _add(whole, part)
    return whole


def _add(scores: TokenScores, more: TokenScores) -> None:
    scores.logprobs.extend(more.logprobs)
    scores.likeliest.extend(more.likeliest)
    scores.top_ids.extend(more.top_ids)
    scores.top_logprobs.extend(more.top_logprobs)


def _distinct(wanted: Sequence[Wanted]) -> list[_Row]:
    """The rows to be fed, those that begin alike behind each other."""
    rows: dict[tuple[int, ...], _Row] = {}
    for place, (ids, positions) in enumerate(wanted):
        first, last = positions[0], positions[-1]
        assert 0 < first <= last < len(ids), f"row {place}: {first} to {last} of {len(ids)}"
        row = rows.setdefault(tuple(ids[:-1]), _Row(list(ids[:-1]), [], first - 1))
        row.places.append(place)
        row.first = min(row.first, first - 1)
        row.scores[place] = TokenScores([], [], [], [])
    return [rows[key] for key in sorted(rows)]


def _admit(
    slots: Slots, count: int, waiting: deque[_Row], running: list[_Row], unused: set[int]
) -> None:
    """Give free slots to waiting rows until a step is full; who can soon copy a beginning goes on waiting.

    While slots are left that this call has not used, no row is put in the place of one that was just scored: infilled
    copies start from scored answers.
    """
    free = set(range(count)) - {row.slot for row in running}
    pending = sum(row.pending for row in running)
    later: list[_Row] = []
    while waiting and free and pending < STEP_TOKENS and len(later) < count:
        row = waiting.popleft()
        # What is before `first` can be shared. `find` leaves two tokens or more to be fed in any case: a single
        # one is computed otherwise, and the last bits would differ.
        found = slots.find(row.ids[: row.first + 2], free & unused or free, tiled=True)
        if found.coming >= found.shared + WORTH_WAITING:
            later.append(row)
            continue
        slots.begin(found, row.ids, prompt=False)
        row.slot, row.present = found.slot, found.shared
        free.remove(row.slot)
        unused.discard(row.slot)
        running.append(row)
        pending += row.pending
    waiting.extendleft(reversed(later))


def _feed(running: Sequence[_Row]) -> list[tuple[_Row, int]]:
    """Rows and how many of their tokens this step feeds: single tokens by slot, then pieces."""
    fed = []
    room = STEP_TOKENS
    for row in running:
        if count := _piece(row, room):
            fed.append((row, count))
            room -= count
    return sorted(fed, key=lambda part: (part[1] > 1, part[0].slot))


def _piece(row: _Row, room: int) -> int:
    """How many tokens fit, up to a tile's end; neither it nor what is left is ever a single token of several."""
    if row.pending <= room:
        return row.pending
    count = (row.present + room) // TILE * TILE - row.present
    if row.pending - count == 1:
        count -= 1
    return count if count > 1 else 0


def _forward(
    model: Any,
    slots: Slots,
    wanted: Sequence[Wanted],
    fed: Sequence[tuple[_Row, int]],
    top: int,
) -> None:
    """Feed tokens; add what they tell to the rows' scores."""
    ids: list[int] = []
    ends: list[int] = []
    asked: list[_Asked] = []
    for row, count in fed:
        begin, end = row.present, row.present + count
        for position in range(max(begin, row.first), end):
            told = [place for place in row.places if position + 1 in wanted[place].positions]
            if told:
                asked += [
                    _Asked(len(ends), place, wanted[place].ids[position + 1]) for place in told
                ]
                ends.append(len(ids) + position - begin)
        ids += row.ids[begin:end]
    step = Step.plan(slots, [(row.slot, row.present, count) for row, count in fed], model.device)
    logits_EV = feed(model, ids, ends, step)
    found = scores_of(logits_EV, [a.at for a in asked], [a.token for a in asked], top)
    rows = {place: row for row, _ in fed for place in row.places}
    for (_, place, _), scores in zip(asked, found, strict=True):
        _add(rows[place].scores[place], scores)
    for row, count in fed:
        row.present += count
        slots.computed(row.slot, row.present, tiled=count > 1)
