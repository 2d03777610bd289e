"""Small run folders written by hand, as the loop leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from prefloop.records import (
    Candidates,
    Message,
    Pair,
    PairRatios,
    Prompt,
    Reject,
    Response,
    RoundResult,
    TokenLogps,
    write_jsonl,
)
from prefloop.run_folder import RoundDir, RunDir, open_run

RECIPE = """\
name: made
method: {name: arop, margin: {kind: axes}}
model: {source: a-model, tuning: lora}
data: {train: prompts.jsonl}
loop: {rounds: 2, prompts_per_round: 4}
train: {lr: 0.0001, batch_size: 2, epochs: 1}
generate: {chunk_size: 64}
evaluate: {prompts: 2}
"""

Text = Callable[[str, int, str], str]
"""The text of (prompt's id, round, name of the response)."""


def plain_text(prompt: str, round: int, name: str) -> str:
    """Different for each, and alike enough to have differences worth marking."""
    return f"The {name} answer to {prompt} in round {round} says seven."


def group(name: str, round: int, text: Text) -> Candidates:
    """All that AROP writes for one prompt; scores and ratings differ by prompt."""
    number = sum(map(ord, name)) % 7
    responses = {
        key: Response(text=text(name, round, key), token_ids=(1, 2, 3, number), mean_logprob=-1.5)
        for key in ("draft_a", "draft_b", "refined", "critique", "flawed")
    }
    return Candidates(
        prompt=Prompt(
            id=name, messages=(Message(role="user", content=text(name, round, "question")),)
        ),
        responses=responses,
        scores={"refined": float(number), "flawed": 0.5},
        ratings={"severity_helpfulness": 1 + number / 2, "severity_honesty": 2.0},
    )


def write_round(round_dir: RoundDir, names: Sequence[str], text: Text, *, reject: str = "") -> None:
    """A whole round: groups, pairs, one reject, training, measures."""
    groups = [group(name, round_dir.number, text) for name in names]
    write_jsonl(round_dir.path / "candidates.jsonl", groups)
    round_dir.finish("candidates", records=len(groups), rejects={}, seconds=2.0)
    write_jsonl(round_dir.path / "ranked.jsonl", groups)
    round_dir.finish("ranked", records=len(groups), rejects={}, seconds=1.0)
    pairs = [
        Pair(
            prompt_id=found.prompt.id,
            round=round_dir.number,
            prompt=found.prompt.messages,
            chosen=found.responses["refined"].text,
            rejected=found.responses["flawed"].text,
            margin=0.25 * (n + 1),
            origin={"chosen": "refined", "rejected": "flawed"},
            scores={"chosen": found.scores["refined"], "rejected": found.scores["flawed"]},
            ratings=found.ratings,
        )
        for n, found in enumerate(groups)
        if found.prompt.id != reject
    ]
    write_jsonl(round_dir.path / "pairs.jsonl", pairs)
    if reject:
        why = Reject(prompt_id=reject, stage="pair", reason="cut off", detail="after 48 tokens")
        write_jsonl(round_dir.path / "rejects.jsonl", [why])
    round_dir.finish("pairs", records=len(pairs), rejects={}, seconds=0.1)
    round_dir.train.mkdir()
    rows = [
        {"step": n, "loss": 1 / (n + 1 + round_dir.number), "reward_chosen": 0.1 * n, "lr": 1e-4}
        | {"reward_rejected": -0.1 * n, "M": 0.5, "tokens": 40}
        for n in range(2)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (round_dir.train / "metrics.jsonl").write_text(lines)
    round_dir.finish("train", tokens=80, steps=2, examples=len(pairs), seconds=4.0)


def write_measures(round_dir: RoundDir, text: Text, **measures: float | None) -> None:
    """Two held-out answers and the measures of a round."""
    answers = [
        Candidates(
            prompt=Prompt(id=name, messages=(Message(role="user", content=f"Held-out {name}?"),)),
            responses={"answer": Response(text=text(name, round_dir.number, "held-out"))},
            scores={"answer": 2.0 + round_dir.number},
        )
        for name in ("eval-0", "eval-1")
    ]
    write_jsonl(round_dir.path / "answers.jsonl", answers)
    round_dir.finish("answers", records=2, rejects={}, seconds=1.0)
    write_jsonl(
        round_dir.path / "result.jsonl", [RoundResult(round=round_dir.number, measures=measures)]
    )
    round_dir.finish("result", seconds=1.5)


def make_run(
    path: Path,
    *,
    rounds: int = 2,
    names: Sequence[str] = ("p0", "p1", "p2", "p3"),
    text: Text = plain_text,
    reject: str = "p3",
    recipe: str = RECIPE,
) -> Path:
    """A finished run of AROP with one reject a round, and log-ratios of the first pair."""
    with open_run(path, recipe) as run:
        run.event("begin")
        write_measures(run.round(-1), text, score=1.0, win_rate=0.5, kl=0.0)
        for number in range(rounds):
            round_dir = run.round(number)
            write_round(round_dir, names, text, reject=reject)
            low_high = {"win_rate_low": 0.3, "win_rate_high": 0.8}
            write_measures(round_dir, text, score=2.0 + number, win_rate=0.6, kl=0.1, **low_high)
            run.event("stage", round=number, stage="train", pairs=3, steps=2, seconds=4.0)
        run.event("guard", round=0, sentence="distinct_2 fell to half of the start's")
        write_ratios(run)
        run.event("end")
    return path


def write_ratios(run: RunDir) -> None:
    """Of the first pair: the rejected answer's last token became much less likely."""
    first = next(run.round(0).stream("pairs", Pair))
    roles = {
        role: TokenLogps(pieces=(answer, ""), policy=(-1.0, change), reference=(-1.0, -0.5))
        for role, answer, change in (
            ("chosen", first.chosen, -0.5),
            ("rejected", first.rejected, -4.5),
        )
    }
    write_jsonl(run.path / "logratios.jsonl", [PairRatios(pair=first.id, roles=roles)])


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for tests that only read it."""
    return make_run(tmp_path_factory.mktemp("runs") / "made")


def write_metrics(run: Path, data: bytes) -> None:
    """Other metrics in the first round, sealed as if its training had left them."""
    (run / "rounds/0000/train/metrics.jsonl").write_bytes(data)
    RoundDir(run / "rounds/0000", 0).finish("train", tokens=1, seconds=1.0)
