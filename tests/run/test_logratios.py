"""Log-ratios by token: their sums are the trainer's own log-probs, their pieces are the answers."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from prefloop.errors import RunFolderError
from prefloop.records import Pair
from prefloop.report.facts import read_ratios
from prefloop.run.logratios import _shares, add_logratios, pieces
from prefloop.run.loop import run
from prefloop.run_folder import open_run, read_run
from tests.run.test_loop import LIGHT, recipe


@pytest.mark.parametrize("method", ["ial", "arop"])
def test_their_sums_are_the_references_that_training_used(
    method: str, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / method
    loop = {"rounds": 2, "prompts_per_round": 3, "mix_previous": False}
    small = recipe(model_folder, method, loop=loop, evaluate=LIGHT)
    run(small, folder, Console(file=StringIO()))
    assert add_logratios(folder, 5) == 5
    found = {ratios.pair: ratios for ratios in read_ratios(read_run(folder))}
    assert sorted(pair[:4] for pair in found) == ["0000"] * 2 + ["0001"] * 3
    for round_dir in read_run(folder).rounds():
        logps = load_file(round_dir.train / "reference.safetensors")
        for n, pair in enumerate(round_dir.records("pairs", Pair)):
            for role, tokens in found[pair.id].roles.items() if pair.id in found else ():
                assert sum(tokens.reference) == pytest.approx(logps[role][n].item(), abs=1e-3)
                assert "".join(tokens.pieces) == getattr(pair, role)
                assert len(tokens.pieces) == len(tokens.policy) == len(tokens.reference)
                assert tokens.policy != tokens.reference
    assert {*next(iter(found.values())).roles} == set(small.method.roles)
    # What is known is not computed again.
    before = (folder / "logratios.jsonl").read_bytes()
    assert add_logratios(folder, 5) == 0
    assert (folder / "logratios.jsonl").read_bytes() == before


def test_pieces_of_an_emoji_that_several_tokens_share_join_to_the_text() -> None:
    # Bytes of one character: all four tokens span it.
    offsets = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3), (3, 3)]
    assert pieces("a🙂b", offsets) == ["a", "🙂", "", "", "b", ""]
    assert pieces("ab c", [(0, 2), (3, 4)]) == ["ab", " c"]
    assert pieces("ab c", [(0, 2)]) == ["ab c"]
    assert pieces("", [(0, 0)]) == [""]


def test_later_rounds_are_first_in_line_for_what_is_left_over() -> None:
    assert _shares(5, 2) == [2, 3]
    assert _shares(1, 3) == [0, 0, 1]
    assert _shares(6, 3) == [2, 2, 2]


def test_a_run_without_a_trained_round_says_so(model_folder: Path, tmp_path: Path) -> None:
    with open_run(tmp_path / "run", recipe(model_folder, "arop").dump()):
        pass
    with pytest.raises(RunFolderError, match="no trained round"):
        add_logratios(tmp_path / "run", 5)
