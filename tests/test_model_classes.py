"""The table of docs/models.md: one class of each kind here, all of them in the slow tier."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "model_classes.py"
spec = importlib.util.spec_from_file_location("model_classes", SCRIPT)
assert spec is not None
assert spec.loader is not None
model_classes: Any = importlib.util.module_from_spec(spec)
sys.modules["model_classes"] = model_classes
spec.loader.exec_module(model_classes)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, on opening what we wrote


@pytest.mark.parametrize(
    ("model_type", "engine"),
    [("llama", "slots"), ("qwen3_moe", "slots"), ("gemma3", "slots"), ("mamba", "fallback"), ("rwkv", "fallback")],
)  # fmt: skip
def test_one_class_of_each_kind_is_right(model_type: str, engine: str, tmp_path: Path) -> None:
    row = model_classes.examine(model_type, tmp_path)
    assert (row.verdict, row.engine) == ("right", engine)
    assert row.moved > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_classes.CLASSES)
def test_no_class_is_silently_wrong(model_type: str, tmp_path: Path) -> None:
    verdict = model_classes.examine(model_type, tmp_path).verdict
    assert verdict == "right" or verdict.startswith("refused: "), verdict


def test_a_policy_that_is_not_one_is_called_wrong() -> None:
    numbers = dict.fromkeys(("scored", "trained", "merged", "reopened"), 0.0)
    good = model_classes.Row("x", greedy_equal=True, idle=0, moved=1.0, **numbers)
    assert model_classes.verdict(good) == "right"
    for change in ({"merged": 0.1}, {"greedy_equal": False}, {"idle": 3}, {"scored": float("nan")}):
        row = model_classes.Row(**{**vars(good), **change})
        assert model_classes.verdict(row).startswith("wrong: ")
