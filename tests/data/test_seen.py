"""Numbers that have been met are known, others are not, and few of them are kept as objects."""

import random

import pytest

from prefloop.data import seen
from prefloop.data.seen import Seen


def test_it_is_a_set_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "_FEW", 4)
    draw, ours, plain = random.Random(0), Seen(), set[int]()
    for _ in range(3000):
        number = draw.choice([draw.randrange(-(2**63), 2**63), draw.randrange(-200, 200)])
        assert ours.add(number) == (number not in plain)
        plain.add(number)
        assert len(ours) == len(plain)
    assert not any(ours.add(number) for number in plain)


def test_most_take_eight_bytes_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "_FEW", 64)
    ours = Seen()
    for number in range(20_000):
        ours.add(hash(f"row-{number}"))
    assert len(ours._latest) <= len(ours) // 8 + 64
    assert ours._sorted.itemsize == 8
