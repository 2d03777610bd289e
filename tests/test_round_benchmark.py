"""benchmarks/round.py: medians, shares and ratios of turns."""

import pytest

from benchmarks import round as benchmark


def turn(ours: float, other: float) -> dict[str, dict[str, float]]:
    """One turn of two pipelines: a round takes ours three quarters of its time to generate, the other a half."""
    facts = {"generated_tokens": 10, "pairs": 2, "memory_gb": 1.5}
    return {
        "prefloop float32": {"generate": 0.75 * ours, "rank": 0.0, "train": 0.25 * ours, **facts},
        "a script": {"generate": 0.5 * other, "rank": 0.1 * other, "train": 0.4 * other, **facts},
    }


def test_a_ratio_is_one_of_the_same_turn() -> None:
    # The machine was three times as slow in the second turn, for both.
    found = benchmark.summary([turn(2.0, 4.0), turn(6.0, 12.0), turn(2.0, 5.0)])
    times = found["times"]["a script over prefloop float32"]
    assert times["round"] == pytest.approx({"median": 2.0, "least": 2.0, "most": 2.5})
    assert times["train"] == pytest.approx({"median": 3.2, "least": 3.2, "most": 4.0})
    assert list(found["times"]) == ["a script over prefloop float32"]


def test_shares_are_of_a_turn_s_own_time_and_add_up() -> None:
    pipelines = benchmark.summary([turn(2.0, 4.0), turn(6.0, 12.0), turn(2.0, 5.0)])["pipelines"]
    assert pipelines["prefloop float32"]["seconds"]["round"] == pytest.approx(2.0)
    assert pipelines["a script"]["share"] == pytest.approx(
        {"generate": 0.5, "rank": 0.1, "train": 0.4}
    )
    assert pipelines["a script"]["memory_gb"] == 1.5


def test_the_dtypes_of_prefloop_are_pipelines_and_vllm_is_one_where_it_is_named() -> None:
    options = benchmark.arguments(["--dtype", "float32", "bfloat16"])
    assert list(benchmark.pipelines(options)) == [
        "prefloop float32",
        "prefloop bfloat16",
        "transformers + TRL",
    ]
    options = benchmark.arguments(["--dtype", "float32", "--vllm-python", "python"])
    assert list(benchmark.pipelines(options))[1:] == ["transformers + TRL", "vLLM + TRL"]
