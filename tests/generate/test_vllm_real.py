"""vLLM itself: PREFLOOP_VLLM_PYTHON names the Python of an environment that has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prefloop.errors import GenerationError
from prefloop.generate.engine import EngineContext, Weights
from prefloop.generate.engines.vllm import VLLM, VLLMEngine
from prefloop.generate.hf_engine import HFEngine
from prefloop.generate.weight_check import mismatch, probe
from prefloop.models.policy import ModelOptions, Policy
from prefloop.models.sources import local_folder, resolve_source
from prefloop.records import Message, Request, Sampling
from tests.conftest import trainable_weights

PYTHON = os.environ.get("PREFLOOP_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None,
        reason="vLLM has an environment of its own: name its Python in PREFLOOP_VLLM_PYTHON",
    ),
]
MODEL = ModelOptions(source="embedded:smollm2-135m", device="cpu", dtype="float32")
QUESTIONS = (
    "On which continent would you find the Sahara Desert?",
    "Write one sentence about rain.",
    "What is 7 times 8?",
    "Name three colours.",
)


def trained(folder: Path, seed: int) -> Policy:
    """A policy whose adapter has been moved at random, saved in `folder`."""
    policy = Policy.load(MODEL, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in trainable_weights(policy):
            weight += 0.02 * torch.randn_like(weight)
    policy.save(folder)
    return policy


def requests() -> list[Request]:
    return [Request(messages=(Message(role="user", content=text),)) for text in QUESTIONS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def policies(place: Path) -> list[Policy]:
    return [trained(place / str(seed), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def served(place: Path, policies: list[Policy]) -> Iterator[VLLMEngine]:
    chat = HFEngine(policies[0].model, policies[0].tokenizer).chat
    modules = tuple("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    setting = EngineContext(chat, "float32", MODEL.lora.r, modules, False, place / "engine.log")
    engine = VLLM(python=PYTHON, eager=True, max_num_seqs=16).open(setting)
    yield engine
    engine.close()


def weights(folder: Path) -> Weights:
    return Weights(local_folder(resolve_source(MODEL.source), MODEL), folder)


def test_greedy_answers_scores_and_choices_are_those_of_the_trainers_model(place, policies, served):
    for number, policy in enumerate(policies):
        ours = HFEngine(policy.model, policy.tokenizer)
        served.load_weights(weights(place / str(number)), lambda ours=ours: probe(ours))
        sampling = Sampling(temperature=0.0, max_new_tokens=24)
        theirs = served.sample(requests(), sampling, seed=0)
        expected = ours.sample(requests(), sampling, seed=0)
        assert [r.token_ids for r in theirs] == [r.token_ids for r in expected]
        for mine, their in zip(expected, theirs, strict=True):
            assert their.mean_logprob == pytest.approx(mine.mean_logprob, abs=1e-4)
        answers = ["In Africa.", "It rains.", "56", "Red, green and blue."]
        scores = served.score(requests(), answers, top=4), ours.score(requests(), answers, top=4)
        for their, mine in zip(*scores, strict=True):
            assert their.token_ids == mine.token_ids
            assert their.logprobs == pytest.approx(mine.logprobs, abs=1e-3)
            assert their.top_texts == mine.top_texts
        rows = served.choose(requests(), "12345"), ours.choose(requests(), "12345")
        for their, mine in zip(*rows, strict=True):
            assert their == pytest.approx(mine, abs=1e-4)


def test_sampled_answers_depend_on_their_seed(place, policies, served):
    ours = HFEngine(policies[1].model, policies[1].tokenizer)
    served.load_weights(weights(place / "1"), lambda: probe(ours))
    sampling = Sampling(temperature=0.9, max_new_tokens=12)
    first, again, other = (served.sample(requests(), sampling, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_stale_adapter_stops_the_run(place, policies, served):
    """The trainer stands at the second adapter, the folder that is named holds the first one."""
    newer = HFEngine(policies[1].model, policies[1].tokenizer)
    with pytest.raises(GenerationError, match=r"does not answer with the weights in .*/0: its log"):
        served.load_weights(weights(place / "0"), lambda: probe(newer))


def test_the_tolerance_is_far_above_what_rounding_does(place, policies, served):
    ours = HFEngine(policies[0].model, policies[0].tokenizer)
    served.load_weights(weights(place / "0"), lambda: probe(ours))
    found, known = probe(served), probe(ours)
    distance = sum(abs(a - b) for a, b in zip(found, known, strict=True)) / len(known)
    assert distance < 2e-4, distance
    assert mismatch(found, known, None, "float32") is None
