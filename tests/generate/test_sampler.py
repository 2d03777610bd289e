"""Draws against the exact truncated distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefloop.generate import decode
from prefloop.generate.decode import draw
from prefloop.records import Sampling

SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_p=0.95),
    Sampling(temperature=1.5, top_k=7),
    Sampling(temperature=1.2, min_p=0.05),
    Sampling(temperature=1.1, top_k=40, top_p=0.9, min_p=0.02),
]
# Chance that one of the goodness-of-fit tests fails although all draws are right, for a fresh seed.
FALSE_ALARM = 1e-4


def exact(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that transformers' own warpers leave, in double precision."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    none = torch.zeros(1, 1, dtype=torch.long)
    return warpers(none, logits.double()[None])[0].softmax(-1)


@pytest.mark.usefixtures("computing")
@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("sizes", [(64, 1024), (8, 32)], ids=["first", "more"])
def test_draws_fit_the_exact_distribution(
    sampling: Sampling, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chi-square over the tokens expected at least ten times and the rest together."""
    monkeypatch.setattr(decode, "_CANDIDATE_COUNTS", sizes)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1200, generator=generator) * 2
    draws = 8_000
    uniforms = torch.rand(draws, generator=generator)
    found = torch.cat(
        [draw(logits.expand(len(part), -1), sampling, part)[0] for part in uniforms.split(2000)]
    )
    expected = exact(logits, sampling) * draws
    counts = torch.bincount(found, minlength=len(logits)).double()
    assert not counts[expected == 0].any()
    often = expected >= 10
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    seen, wanted = seen[wanted > 1e-6], wanted[wanted > 1e-6]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor(len(wanted) - 1.0)
    chance = torch.special.gammaincc(freedom / 2, statistic / 2)
    assert chance > FALSE_ALARM / (2 * len(SETTINGS))


@pytest.mark.usefixtures("computing")
@pytest.mark.parametrize("sampling", SETTINGS)
def test_few_candidates_decide_what_the_whole_vocabulary_would(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(200, 3000, generator=generator) * torch.linspace(0.1, 6, 200)[:, None]
    logits[:, 7] = logits[:, 2000]  # ties
    logits[5:40] = logits[5:40].round()
    logits[40:60, 100:220] = 20.0  # more than the first look takes
    uniforms = torch.rand(200, generator=generator)
    quick = draw(logits, sampling, uniforms)
    monkeypatch.setattr(decode, "_CANDIDATE_COUNTS", ())
    slow = draw(logits, sampling, uniforms)
    # Sums over a few and over all may round to either side of a uniform number, hardly ever.
    assert (quick[0] != slow[0]).sum() <= 1
    torch.testing.assert_close(quick[1][quick[0] == slow[0]], slow[1][quick[0] == slow[0]])


def test_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -torch.inf]])
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.8)):
        assert draw(logits, sampling, torch.tensor([0.0]))[0].item() == 1
    assert draw(logits, Sampling(temperature=1.0), torch.tensor([1.0]))[0].item() == 0
    assert draw(logits, Sampling(temperature=1.0, top_k=2), torch.tensor([1.0]))[0].item() == 2


def test_logprobs_are_at_temperature_one_whatever_is_sampled() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    for sampling in (Sampling(temperature=0), Sampling(temperature=0.3, top_k=5)):
        tokens, logprobs = draw(logits, sampling, torch.rand(6))
        torch.testing.assert_close(
            logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        )


def test_greedy_takes_the_maximum() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    tokens, _ = draw(logits, Sampling(temperature=0), torch.rand(6))
    assert tokens.tolist() == logits.argmax(-1).tolist()
