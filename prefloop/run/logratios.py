"""What training did to each token of some pairs: log-probs after the round beside those of its reference.

Needs the models, so it is computed on request (`prefloop report RUN --logratios N`) and kept in the run's folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from prefloop.errors import RunFolderError
from prefloop.generate.hf_engine import HFEngine
from prefloop.machine import Bar
from prefloop.manifest import write_atomically
from prefloop.models.sources import quiet
from prefloop.recipe import load_recipe
from prefloop.records import Pair, PairRatios, Request, Response, Scored, TokenLogps
from prefloop.report.facts import LOGRATIOS, read_ratios
from prefloop.run.session import Session
from prefloop.run_folder import RoundDir, RunDir, read_run


def add_logratios(folder: Path, count: int) -> int:
    """Compute the log-ratios of `count` pairs, evenly picked over the rounds; how many were new.

    Raises RunFolderError if no round of the run has been trained, ModelError if a model cannot be loaded.
    """
    run = read_run(folder)
    recipe = load_recipe(str(folder / "recipe.yaml"))
    known = {ratios.pair for ratios in read_ratios(run)}
    trained = [
        round_dir
        for round_dir in run.rounds()
        if round_dir.manifest("train") and round_dir.manifest("pairs") and round_dir.policy.is_dir()
    ]
    if not trained:
        raise RunFolderError(f"{folder} has no trained round; log-ratios need one")
    session = Session(recipe, run)
    wanted = [
        (round_dir, [pair for pair in _picked(round_dir, share) if pair.id not in known])
        for round_dir, share in zip(trained, _shares(count, len(trained)), strict=True)
    ]
    new = sum(len(pairs) for _, pairs in wanted)
    with Bar("log-ratios", new) as bar, quiet():
        for round_dir, pairs in wanted:
            if pairs:
                # A round at a time: two policies are loaded for it, and what was done is kept.
                _append(run, list(_compare(session, round_dir, pairs)))
                bar.advance(len(pairs))
    return new


def _shares(count: int, rounds: int) -> list[int]:
    """`count` over the rounds, the later ones first in line for what is left over."""
    return [count // rounds + (rounds - n <= count % rounds) for n in range(rounds)]


def _picked(round_dir: RoundDir, count: int) -> list[Pair]:
    total = round_dir.count("pairs")
    return [
        pair
        for n, pair in enumerate(round_dir.stream("pairs", Pair))
        if (n + 1) * count // total > n * count // total
    ]


def _compare(session: Session, round_dir: RoundDir, pairs: Sequence[Pair]) -> Iterator[PairRatios]:
    method = session.recipe.method
    answers = [
        {role: answer for role in method.roles if (answer := pair.answer(role)).text}
        for pair in pairs
    ]
    if method.reference == "round_start":
        # First: where the rounds are gone through in order, it is in memory.
        before = session.rundir.round(round_dir.number - 1)
        references = _scores(session.engine_after(before), pairs, answers)
    policies = _scores(session.engine_after(round_dir), pairs, answers)
    if method.reference == "initial":
        with session.initial_policy():
            references = _scores(session.engine_after(round_dir), pairs, answers)
    for pair, of_pair, policy, reference in zip(pairs, answers, policies, references, strict=True):
        yield PairRatios(
            pair=pair.id,
            roles={
                role: _tokens(answer.text, policy[role], reference[role])
                for role, answer in of_pair.items()
            },
        )


def _scores(
    engine: HFEngine, pairs: Sequence[Pair], answers: Sequence[dict[str, Response]]
) -> list[dict[str, Scored]]:
    flat = [
        (Request(messages=pair.prompt), answer)
        for pair, of_pair in zip(pairs, answers, strict=True)
        for answer in of_pair.values()
    ]
    scored = iter(engine.score([ask for ask, _ in flat], [answer for _, answer in flat]))
    return [{role: next(scored) for role in of_pair} for of_pair in answers]


def _tokens(text: str, policy: Scored, reference: Scored) -> TokenLogps:
    return TokenLogps(
        pieces=tuple(pieces(text, policy.offsets)),
        policy=policy.logprobs,
        reference=reference.logprobs,
    )


def pieces(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """The stretch of text of each token. Tokens that share one character: the first of them has it."""
    texts, at = [], 0
    for n, (_, end) in enumerate(offsets):
        # What lies between two tokens goes to the later one, what is left over to the last.
        until = max(at, len(text) if n + 1 == len(offsets) else end)
        texts.append(text[at:until])
        at = until
    return texts


def _append(run: RunDir, ratios: Sequence[PairRatios]) -> None:
    path = run.path / LOGRATIOS
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = "".join(one.model_dump_json() + "\n" for one in ratios)
    write_atomically(path, known + lines)
