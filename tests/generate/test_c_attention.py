"""The C function for attention over slots against torch's own attention, and what happens where there is no compiler."""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prefloop.generate.cache_attention import Step
from prefloop.generate.cpu import attention, compiled
from prefloop.generate.kv_cache import Slots
from tests.c_compiler import needs_c_compiler

# S slots, C positions, N tokens, K key/value heads, G query heads for each of those, D head dimension.

S, C = 5, 192
# Slots and last positions of one step's tokens: new ones of three conversations, and two prompts, the longer one cut.
STEP = [(4, 0), (2, 100), (0, 191), *[(1, t) for t in range(40, 60)], *[(3, t) for t in range(17)]]
SHAPES = [(2, 3, 64), (2, 1, 8), (1, 7, 128), (3, 2, 80), (1, 4, 256), (2, 5, 12), (1, 71, 64)]


pytestmark = needs_c_compiler


@pytest.fixture
def afresh() -> Iterator[None]:
    """Nothing compiled so far; and what this test could not compile, the next ones can."""
    for wait in (True, False):
        compiled.c_functions.cache_clear()
        attention._compiled.cache_clear()
        if wait:
            yield


def made(
    shape: tuple[int, int, int], dtype: torch.dtype, step: list[tuple[int, int]] = STEP
) -> tuple[Tensor, ...]:
    """Queries (N, H, D), new keys and values (K, N, D), and slots of noise (S, K, C, D)."""
    K, G, D = shape
    N = len(step)
    gen = torch.Generator().manual_seed(K * G * D)
    sizes = [(N, K * G, D), (K, N, D), (K, N, D), (S, K, C, D), (S, K, C, D)]
    return tuple(torch.randn(size, generator=gen).to(dtype) for size in sizes)


def attended(
    parts: tuple[Tensor, ...],
    tokens: slice | list[int] = slice(None),
    window: int | None = None,
    step: list[tuple[int, int]] = STEP,
) -> Tensor:
    query, new_keys, new_values, keys, values = parts
    slots, positions = torch.tensor(step)[tokens].T.contiguous()
    new = new_keys[:, tokens].transpose(0, 1), new_values[:, tokens].transpose(0, 1)
    found = attention.attend(
        query[tokens], new, (keys, values), (slots, positions), window=window, scale=0.3
    )
    assert found is not None
    return found


def expected(parts: tuple[Tensor, ...], window: int | None) -> Tensor:
    """By torch, token by token; the slots hold the step's keys and values already."""
    query, _, _, keys, values = (part.double() for part in parts)
    K = keys.shape[1]
    rows = []
    for row, (slot, position) in zip(query, STEP, strict=True):
        seen = slice(max(0, position + 1 - (window or C)), position + 1)
        rows.append(
            functional.scaled_dot_product_attention(
                row.view(K, -1, row.shape[-1]),
                keys[slot, :, seen],
                values[slot, :, seen],
                scale=0.3,
            ).flatten(0, 1)
        )
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 24])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_torchs_attention(shape: tuple[int, int, int], window: int | None) -> None:
    parts = made(shape, torch.float32)
    found = attended(parts, window=window)
    torch.testing.assert_close(found.double(), expected(parts, window), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_rounded_once(shape: tuple[int, int, int]) -> None:
    parts = made(shape, torch.bfloat16)
    found = attended(parts)
    assert found.dtype == torch.bfloat16
    exact = expected(parts, None)
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=2**-8 * 1.01)


def test_new_keys_and_values_are_written_and_nothing_else() -> None:
    parts = made((2, 3, 64), torch.float32)
    before = [part.clone() for part in parts]
    attended(parts)
    for store, old, new in zip(parts[3:], before[3:], parts[1:3], strict=True):
        for number, (slot, position) in enumerate(STEP):
            assert torch.equal(store[slot, :, position], new[:, number])
            old[slot, :, position] = new[:, number]
        assert torch.equal(store, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_bit_depends_on_the_other_tokens_or_the_threads(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    parts = made(shape, dtype)
    together = attended(parts)
    alone = [attended(parts, slice(number, number + 1)) for number in range(len(STEP))]
    assert torch.equal(together, torch.cat(alone))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(together, attended(parts))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_bit_depends_on_how_conversations_are_fed(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Token by token, or in blocks that begin anywhere, are cut by windows, or whose tokens come in any order."""
    conversations = [(slot, position) for slot in (1, 3) for position in range(50)]
    parts = made(shape, dtype, conversations)
    rng = random.Random(0)
    for window in (None, 1, 5, 24):
        for store in parts[3:]:
            store.fill_(torch.nan)  # what no token has written is read by none
        alone = [attended(parts, [row], window, conversations) for row in range(100)]
        for shuffled in (False, False, True):
            for store in parts[3:]:
                store.fill_(torch.nan)
            found = torch.full((100, *alone[0].shape[1:]), torch.nan, dtype=dtype)
            fed, sizes = [0, 50], [50, 100]
            while fed != sizes:
                rows: list[int] = []
                for number in (0, 1):
                    end = min(fed[number] + rng.randrange(30), sizes[number])
                    rows += range(fed[number], end)
                    fed[number] = end
                if shuffled:
                    rng.shuffle(rows)
                if rows:
                    found[rows] = attended(parts, rows, window, conversations)
            assert torch.equal(found, torch.cat(alone))


def test_large_scores_and_nan_come_out_as_they_should() -> None:
    """exp neither overflows nor makes a number of what is none."""
    parts = made((2, 3, 64), torch.float32)
    parts[0][0] *= 1e4
    parts[0][1] *= 1e4
    parts[0][2, 0, 0] = torch.nan
    found = attended(parts)
    torch.testing.assert_close(found[:2].double(), expected(parts, None)[:2], atol=1e-5, rtol=1e-5)
    assert found[2, 0].isnan().all()
    assert found[2, 1:].isfinite().all()


def test_half_precision_that_it_does_not_know_is_torchs_work() -> None:
    query, new_keys, new_values, keys, values = made((2, 3, 64), torch.float16)
    slots, positions = torch.tensor(STEP).T.contiguous()
    before = keys.clone()
    at, new = (slots, positions), (new_keys, new_values)
    assert attention.attend(query, new, (keys, values), at, window=None, scale=1.0) is None
    assert torch.equal(keys, before)


def test_what_does_not_belong_together_is_left_to_torch() -> None:
    """As where a model normalises its queries in float32: C would read beyond the numbers that are there."""
    query, new_keys, new_values, keys, values = made((2, 3, 64), torch.bfloat16)
    slots, positions = torch.tensor(STEP).T.contiguous()
    usual = query, (new_keys, new_values), (keys, values)
    for query_NHD, new, store in (
        (query.float(), *usual[1:]),
        (query[:, :5], *usual[1:]),
        (query[..., :32], *usual[1:]),
        (query, (new_keys, new_values.float()), usual[2]),
        (query, (new_keys[:, 1:], new_values), usual[2]),
        (query, usual[1], (keys, values.float())),
        (query, usual[1], (keys, values[..., :32])),
    ):
        found = attention.attend(query_NHD, new, store, (slots, positions), window=None, scale=1.0)
        assert found is None


def test_a_conversation_longer_than_its_slot_is_no_step() -> None:
    with pytest.raises(AssertionError, match="longer than its slot"):
        Step.plan(Slots(2, 64), [(0, 60, 5)], torch.device("cpu"))


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", '"'])
def test_without_a_compiler_it_is_torchs_work_and_said(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.INFO):
        assert attention._compiled(64, 3, torch.float32) is None
        assert attention._compiled(64, 3, torch.float32) is None
    assert caplog.text.count("torch does the work") == 1, "once a process"
    assert caplog.records[-1].levelname == "WARNING", "who names a compiler wants it"
    assert "or unset CC" in caplog.text


@pytest.mark.usefixtures("afresh")
def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert attention._compiled(64, 3, torch.float32) is None


@pytest.mark.usefixtures("afresh")
def test_compiling_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert attention._compiled(64, 3, torch.float32) is not None
    assert list(tmp_path.iterdir()) == []


def test_it_shares_torchs_threads() -> None:
    """Two pools of threads would wait for each other, each on all cores."""
    code = (
        "import torch\n"
        "from prefloop.generate.cpu import attention\n"
        "torch.randn(500, 500) @ torch.randn(500, 500)\n"
        "assert attention._compiled(64, 3, torch.float32)\n"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l}))\n"
    )
    if not Path("/proc/self/maps").exists() or shutil.which("gcc") is None:
        pytest.skip("counts copies of gcc's libgomp in /proc: no gcc, or not Linux")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
