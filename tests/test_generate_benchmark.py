"""benchmarks/generate.py: the limit that an engine is compared with is that of its own dtype."""

from pathlib import Path

import pytest

from benchmarks import generate


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_limit_is_measured_in_the_dtype_that_the_job_names(
    model_folder: Path, dtype: str
) -> None:
    found = generate.run_limit({"folder": str(model_folder), "dtype": dtype, "slots": 4})
    assert found["dtype"] == dtype
    assert found["decode_seconds"] > 0


def test_shares_count_the_products_of_prompts_and_answers() -> None:
    engine = {"stops": {"tokens": 10, "seconds": 2.0}}
    limit = {"decode_seconds": 0.1, "prefill_seconds": 0.01}
    assert generate._shares(engine, limit, 20) == {
        "share_stops": pytest.approx(0.6),
        "share_stops_decode_only": pytest.approx(0.5),
    }
