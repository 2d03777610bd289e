"""What a draw must know of its logits, in C against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prefloop.generate.cpu.draws import Survey, survey
from prefloop.generate.decode import draw
from prefloop.records import Sampling
from tests.c_compiler import needs_c_compiler

pytestmark = needs_c_compiler


def surveyed(logits: Tensor, temperature: float, size: int) -> Survey:
    found = survey(logits, temperature, size)
    assert found is not None
    return found


def rows(vocabulary: int) -> Tensor:
    """Ordinary logits, tied ones, one that is far above, and masked ones."""
    torch.manual_seed(vocabulary)
    logits = torch.randn(6, vocabulary) * 5
    logits[1] = logits[1].round()
    logits[2] = 3.0
    logits[3, vocabulary // 2] = 1e4
    logits[4, 2:] = -torch.inf
    logits[5, : vocabulary // 2] = -1e30
    return logits


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("vocabulary", [2, 15, 33, 258, 5003])
def test_sums_and_the_greatest_equal_torchs(vocabulary: int, temperature: float) -> None:
    logits = rows(vocabulary)
    exact = logits.double()
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    for size in {1, min(64, vocabulary - 1), min(1024, vocabulary - 1), vocabulary - 1}:
        found = surveyed(logits, temperature, size)
        assert torch.equal(found.logits_BC, values[:, :size])
        assert torch.equal(found.ids_BC, ids[:, :size])
        close: Any = {"atol": 1e-5, "rtol": 1e-6}
        torch.testing.assert_close(found.total_B.double(), exact.logsumexp(-1), **close)
        scaled = (exact / temperature).logsumexp(-1)
        torch.testing.assert_close(found.scaled_B.double(), scaled, **close)


def test_no_bit_depends_on_the_other_rows_or_the_threads() -> None:
    logits = rows(5003)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            together = surveyed(logits, 0.7, 64)
            for number in range(len(logits)):
                # A view that begins anywhere.
                alone = surveyed(logits[number : number + 1], 0.7, 64)
                for one, all_of_them in zip(alone, together, strict=True):
                    assert torch.equal(one[0], all_of_them[number])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_is_not_hidden(bad: float) -> None:
    logits = torch.randn(2, 300)
    logits[0, 200] = bad
    for temperature in (0.0, 0.7):
        _, logprobs = draw(logits, Sampling(temperature=temperature), torch.rand(2))
        assert logprobs.isfinite().tolist() == [False, True]


def test_what_it_does_not_know_is_torchs_work() -> None:
    assert survey(torch.randn(2, 300, dtype=torch.float64), 1.0, 64) is None
    assert survey(torch.randn(2, 64), 1.0, 64) is None
