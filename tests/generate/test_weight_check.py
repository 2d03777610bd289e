"""The probe: what passes for the trainer's weights, and what does not."""

from __future__ import annotations

import math
import random

import pytest

from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.weight_check import TOLERANCE, mismatch, probe


def rows(noise: float, change: float, count: int = 120, seed: int = 0) -> list[list[float]]:
    """Log-probs before and after an update of mean size `change`, and what rounding makes of each."""
    draw = random.Random(seed)
    before = [-3 * draw.random() for _ in range(count)]
    after = [value + draw.gauss(0, change) for value in before]
    return [before, after, *([v + draw.gauss(0, noise) for v in row] for row in (before, after))]


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_rounding_passes_and_another_model_does_not(dtype, noise):
    before, after, _, engine = rows(noise, change=0.3)
    assert mismatch(engine, after, None, dtype) is None
    assert mismatch(engine, after, before, dtype) is None
    assert "nats a token away" in str(mismatch(engine, before, None, dtype))


@pytest.mark.parametrize("seed", range(20))
def test_stale_weights_show_below_the_tolerance_and_fresh_ones_are_not_suspected(seed):
    """An update as small as the rounding of bfloat16, found over 120 tokens."""
    before, after, stale, fresh = rows(noise=0.03, change=0.05, seed=seed)
    assert "weights before" in str(mismatch(stale, after, before, "bfloat16"))
    assert mismatch(fresh, after, before, "bfloat16") is None


@pytest.mark.parametrize("seed", range(20))
def test_an_update_far_below_the_rounding_raises_no_alarm(seed):
    before, after, _, engine = rows(noise=0.05, change=1e-4, seed=seed)
    assert mismatch(engine, after, before, "bfloat16") is None
    assert mismatch(engine, before, before, "bfloat16") is None


def test_a_number_that_is_none_is_a_mismatch():
    assert mismatch([math.nan, -1.0], [-1.0, -1.0], None, "float32") is not None


def test_every_token_of_the_known_answers_is_compared():
    found = probe(FakeEngine())
    assert len(found) > 60
    assert mismatch(found, found, None, "float32") is None
    assert set(TOLERANCE) == {"float32", "bfloat16", "float16"}
