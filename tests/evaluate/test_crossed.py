"""The interval of a share over attacks times prompts: coverage on simulated data, and its edges."""

import numpy as np
import pytest

from prefloop.evaluate.stats import crossed_proportion, wilson


@pytest.mark.parametrize(
    ("clusters", "student"), [(2, 12.7062), (3, 4.3027), (5, 2.7764), (10, 2.2622), (20, 2.0930)]
)
def test_few_clusters_widen_it_by_students_t(clusters: int, student: float) -> None:
    """All trials agree on c attacks and c prompts: Wilson's end at 0 of c, with t for z: (t²/c) / (1 + t²/c)."""
    names = [(f"a{a}", f"p{p}") for a in range(clusters) for p in range(clusters)]
    found = crossed_proportion([False] * clusters**2, [a for a, _ in names], [p for _, p in names])
    assert found is not None
    ratio = student**2 / clusters
    assert found.high == pytest.approx(ratio / (1 + ratio), rel=1e-4)


def trials(effects_A: np.ndarray, effects_P: np.ndarray, draws: np.random.Generator):
    logits = effects_A[:, None] + effects_P[None, :]
    hits = draws.random(logits.shape) < 1 / (1 + np.exp(-logits))
    names = [(f"a{a}", f"p{p}") for a in range(len(effects_A)) for p in range(len(effects_P))]
    return [bool(hit) for hit in hits.ravel()], [a for a, _ in names], [p for _, p in names]


def test_it_covers_the_rate_of_all_attacks_and_prompts_where_the_plain_interval_does_not() -> None:
    draws = np.random.default_rng(0)
    mean, spread, runs = -1.0, 1.2, 300
    wide = mean + draws.normal(size=400_000) * spread * 2**0.5
    truth = float((1 / (1 + np.exp(-wide))).mean())
    covered, plainly = 0, 0
    for _ in range(runs):
        attacks_A = mean + draws.normal(size=20) * spread
        hits, first, second = trials(attacks_A, draws.normal(size=15) * spread, draws)
        estimate, plain = crossed_proportion(hits, first, second), wilson(sum(hits), len(hits))
        assert estimate is not None
        assert plain is not None
        covered += estimate.low <= truth <= estimate.high
        plainly += plain.low <= truth <= plain.high
    assert covered / runs > 0.92
    assert plainly / runs < 0.6


def test_where_all_trials_agree_it_still_has_a_width() -> None:
    names = [(f"a{a}", f"p{p}") for a in range(10) for p in range(6)]
    found = crossed_proportion([False] * 60, [a for a, _ in names], [p for _, p in names])
    plain = wilson(0, 60)
    assert found is not None
    assert plain is not None
    assert (found.value, found.low, found.count) == (0.0, 0.0, 60)
    assert (
        found.high > 2 * plain.high
    )  # ten attacks and six prompts are not sixty independent trials


def test_one_attack_alone_counts_as_fixed() -> None:
    hits = [True, False] * 20
    found = crossed_proportion(hits, ["only"] * 40, [f"p{place}" for place in range(40)])
    plain = wilson(20, 40)
    assert found is not None
    assert plain is not None
    assert found.high == pytest.approx(plain.high, abs=0.02)


def test_nothing_tried_has_no_share() -> None:
    assert crossed_proportion([], [], []) is None
