"""The benchmark of the training step: all its ways do the same work."""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prefloop.models.policy import Policy
from prefloop.train.packing import TokenGroup, build_tree
from tests.conftest import model_options

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "train_step.py"
pytestmark = [
    # TRL 1.16 uses the names that transformers 5.23 deprecates.
    pytest.mark.filterwarnings(f"ignore:`{name}gradient_checkpointing` is deprecated:FutureWarning")
    for name in ("", "is_")
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        # Where a script's own folder is when it is run.
        patch.syspath_prepend(str(SCRIPT.parent))
        spec.loader.exec_module(module)
    return module


def bench(script, model_folder, **changes):
    values = {
        "model": str(model_folder),
        "tuning": "lora",
        "dtype": "float32",
        "token_budget": 512,
        "groups": 2,
        "pairs": None,
        "clock": "wall",
    }
    return script.Bench(argparse.Namespace(**values | changes))


def small(batch):
    """The benchmark's groups, cut to a test's size; the last answer is the shorter."""
    groups, reference = batch
    cut = [
        TokenGroup(g.prompt[:4], tuple(c[: 9 - n] for n, c in enumerate(g.completions)))
        for g in groups
    ]
    return cut, reference


def test_pairs_like_arop_s_share_60_percent_and_the_others_only_the_prompt(script):
    (group,) = script.draw_groups("arop", 1, 1000, seed=0)
    length = len(group.completions[0])
    assert build_tree(group).size == len(group.prompt) + 2 * length - int(0.6 * length)
    for case, answers in (("prompt", 2), ("ial", 3)):
        (group,) = script.draw_groups(case, 1, 1000, seed=0)
        assert len(group.completions) == answers
        assert build_tree(group).size == len(group.prompt) + sum(map(len, group.completions))


def gradients(model):
    found = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    assert found
    return found


@pytest.mark.parametrize("case", ["arop", "ial"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_own_and_plain_rows_give_one_loss_and_one_gradient(script, model_folder, case, tuning):
    found = bench(script, model_folder, tuning=tuning)
    batch = small(found.batch(case, 0))
    losses, slopes = [], []
    for way in ("plain", "tree", "padded"):
        losses.append(found.step(way)(batch))
        slopes.append(gradients(found.policy.model))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    for other in slopes[1:]:
        torch.testing.assert_close(other, slopes[0], atol=1e-4, rtol=1e-3)


@pytest.mark.oracle
@pytest.mark.parametrize("way", ["trl", "trl, plain head", "trl, eager attention"])
def test_trl_s_step_takes_the_gradient_that_ours_takes(script, model_folder, way, tmp_path):
    found = bench(script, model_folder, tuning="full")
    batch = small(found.batch("prompt", 0))
    loss = found.step("tree")(batch)
    wanted = gradients(found.policy.model)
    policy = Policy.load(model_options(model_folder, tuning="full"))
    step = script.trl_step(policy, False, fused="plain head" not in way, folder=str(tmp_path))
    assert step(batch) == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(gradients(policy.model), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trl_s_frozen_weights_have_the_dtype_that_is_measured(
    script, model_folder, dtype, monkeypatch
):
    found = bench(script, model_folder, dtype=dtype)
    monkeypatch.setattr(script, "trl_step", lambda policy, *_, **__: policy.model.dtype)
    assert found.step("trl") == found.policy.model.dtype == getattr(torch, dtype)


def test_work_counts_what_lora_needs_and_full_training_more(script, model_folder):
    model = bench(script, model_folder, tuning="full").policy.model
    body = sum(w.numel() for n, w in model.named_parameters() if "proj" in n and "embed" not in n)
    head = model.lm_head.weight.numel()
    assert script.work(model, 10, 3, lora=False) == 6 * (10 * body + 3 * head)
    assert script.work(model, 10, 3, lora=True) == 4 * (10 * body + 3 * head)
