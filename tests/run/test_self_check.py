"""A policy that is not one is stopped before the first round."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from prefloop.errors import ModelError
from prefloop.models.policy import Policy
from prefloop.run import self_check
from prefloop.run.self_check import TOLERANCE, _without_warnings, check_policy
from prefloop.train.options import TrainOptions
from tests.conftest import model_options


@pytest.fixture
def policy(model_folder: Path) -> Policy:
    return Policy.load(model_options(model_folder))


def test_all_ways_are_one_and_nothing_is_left_behind(policy: Policy, tmp_path: Path) -> None:
    before = [weight.clone() for weight in policy.model.parameters()]
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    found = check_policy(policy, TrainOptions(), tmp_path)
    assert torch.equal(torch.rand(2), expected)
    assert all(map(torch.equal, policy.model.parameters(), before))
    assert found.pop("moved") > 20 * TOLERANCE
    assert set(found) == {"trainer", "merged", "scored", "decoded", "initial", "reopened"}
    assert max(found.values()) <= TOLERANCE
    assert not list(tmp_path.iterdir())


def test_a_merge_that_loses_the_adapter_is_found(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "merged", lambda policy: policy.at_start())
    with pytest.raises(ModelError, match="the policy merged for generation differ"):
        check_policy(policy, TrainOptions(), tmp_path)
    assert not any(w.any() for n, w in policy.model.named_parameters() if "lora_B" in n)


def test_a_saved_adapter_with_another_number_is_found(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_file(path: Path) -> dict[str, torch.Tensor]:
        weights = real(path)
        next(iter(weights.values()))[0, 0] += 1e-6
        return weights

    real: Any = self_check.load_file
    monkeypatch.setattr(self_check, "load_file", load_file)
    with pytest.raises(ModelError, match="saved and opened again"):
        check_policy(policy, TrainOptions(), tmp_path)


def test_an_engine_that_scores_another_policy_is_found(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = self_check.HFEngine.score_tokens

    def stale(engine: Any, *asked: Any) -> Any:
        with policy.at_start():
            return real(engine, *asked)

    monkeypatch.setattr(self_check.HFEngine, "score_tokens", stale)
    with pytest.raises(ModelError, match="the engine's scores"):
        check_policy(policy, TrainOptions(), tmp_path)


def test_full_fine_tuning_is_checked_without_changing_weights(
    model_folder: Path, tmp_path: Path
) -> None:
    whole = Policy.load(model_options(model_folder, tuning="full"))
    before = [weight.clone() for weight in whole.model.parameters()]
    found = check_policy(whole, TrainOptions(), tmp_path)
    assert set(found) == {"moved", "trainer", "merged", "scored", "decoded"}
    assert all(map(torch.equal, whole.model.parameters(), before))


def test_its_engines_warnings_are_left_to_the_runs_own(caplog: pytest.LogCaptureFixture) -> None:
    with _without_warnings():
        logging.getLogger("prefloop.generate.hf_engine").warning("said again by the run's engine")
        logging.getLogger("prefloop.generate.cpu.compiled").warning("said once a process")
    assert caplog.messages == ["said once a process"]
