"""benchmarks/plot_curves.py: what it reads from a comparison's cells, and that it draws."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import plot_curves


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """Two variants, two seeds; of one seed the second round is missing a step."""
    for variant, slope in (("spac", -1.0), ("gamma-5", 1.0)):
        for seed in (0, 1):
            for round, steps in ((0, 2), (1, 2 - seed)):
                folder = tmp_path / variant / f"seed-{seed}/rounds/{round:04d}/train"
                folder.mkdir(parents=True)
                values = [slope * (2 * round + step) + seed for step in range(steps)]
                rows = [json.dumps({"step": n, "real_reward": v}) for n, v in enumerate(values)]
                (folder / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return tmp_path


def test_steps_are_counted_over_all_rounds_and_the_mean_ends_with_the_shortest_seed(comparison):
    found = plot_curves.curves(comparison, "real_reward", None)
    assert found["spac"] == {"seed-0": [0.0, -1.0, -2.0, -3.0], "seed-1": [1.0, 0.0, -1.0]}
    assert plot_curves.means(found["spac"]) == [0.5, -0.5, -1.5]
    assert list(plot_curves.curves(comparison, "real_reward", ["gamma-5"])) == ["gamma-5"]


def test_it_draws(comparison, monkeypatch, capsys):
    out = comparison / "curves.png"
    monkeypatch.setattr(sys, "argv", ["plot_curves.py", str(comparison), "--out", str(out)])
    plot_curves.main()
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "spac: 0.500 at the first step, -1.500 at the last" in capsys.readouterr().out


def test_a_measure_that_no_cell_has_is_an_error(comparison, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot_curves.py", str(comparison), "--measure", "nothing"])
    with pytest.raises(SystemExit) as ended:
        plot_curves.main()
    assert ended.value.code == 2
