"""The chain of one prompt: all that was written for it, in the order in which it was written.

A pair, a reject or a held-out prompt becomes one `Chain`, which the page and the terminal both show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from prefloop.data.text_distance import Kind as SpanKind
from prefloop.data.text_distance import Span, spans
from prefloop.records import Candidates, Message, Pair, PairRatios, Reject, Response
from prefloop.report.console import show_text
from prefloop.report.formats import coloured, marked, printable
from prefloop.run_folder import RoundDir, RunDir

Kind = Literal["pair", "reject", "held-out"]

# What each text is a changed copy of, by the names that the methods give; for others nothing is marked
# but the difference between chosen and rejected.
BASES = {"rewrite": "draft", "refined": "draft_a", "flawed": "refined", "rejected": "chosen"}

# The records keep the order in which texts were stored; read is the order in which they were written.
_ROLES = ("chosen", "rejected", "target", "sample")

_ORDER = ("draft", "advice", "rewrite", "draft_a", "draft_b", "critique", "refined", "flawed")


@dataclass(frozen=True)
class Step:
    """One text of a chain."""

    name: str
    text: str
    base: str = ""
    """The step that this one is a changed copy of."""
    roles: tuple[str, ...] = ()
    """What the pair uses it as: chosen, rejected, target."""
    score: float | None = None
    tokens: int | None = None
    mean_logprob: float | None = None
    unfinished: bool = False
    ratios: dict[str, Any] | None = None
    """Its tokens with their log-probs under policy and reference, where they were computed."""


@dataclass(frozen=True)
class Chain:
    """One prompt of one round with all that became of it."""

    id: str
    kind: Kind
    round: int
    prompt: tuple[tuple[str, str], ...]
    """(role, text) of each turn."""
    steps: tuple[Step, ...]
    margin: float | None = None
    gap: float | None = None
    """The judge's score of chosen minus rejected."""
    ratings: dict[str, float] = field(default_factory=dict)
    stage: str = ""
    reason: str = ""
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, empty ones left out, but of a step's text: an empty answer is an answer."""
        full = asdict(self)
        full["steps"] = [{**_without_empty(step), "text": step["text"]} for step in full["steps"]]
        return _without_empty(full)


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    # A round or score of 0 is a value; in Python it would equal False.
    return {
        name: value
        for name, value in values.items()
        if value or (isinstance(value, int | float) and value is not False)
    }


def pair_chain(pair: Pair, group: Candidates | None, ratios: PairRatios | None = None) -> Chain:
    """A pair with everything that led to it; `group` is None where only the pair is left."""
    answers = {role: getattr(pair, role) for role in _ROLES}
    # Methods that train on single answers leave the others empty.
    texts = {role: text for role, text in answers.items() if text or role in pair.origin}
    found = _responses(group)
    roles: dict[str, tuple[str, ...]] = {}
    for role, text in texts.items():
        origin = pair.origin.get(role, role)
        if origin not in found or found[origin].text != text:
            origin = role
            found[role] = Response(text=text)
        roles[origin] = (*roles.get(origin, ()), role)
    scores = {**(group.scores if group else {}), **_scores_by_step(pair, roles)}
    steps = [
        _step(name, response, found, roles.get(name, ()), scores.get(name), pair, ratios)
        for name, response in found.items()
    ]
    return Chain(
        id=pair.id,
        kind="pair",
        round=pair.round,
        prompt=_turns(pair.prompt),
        steps=tuple(steps),
        margin=pair.margin,
        gap=_gap(pair.scores),
        ratings={**(group.ratings if group else {}), **pair.ratings},
    )


def reject_chain(reject: Reject, group: Candidates | None, round: int) -> Chain:
    """A prompt that gave no pair, with what was written for it, as far as that was kept."""
    found = _responses(group)
    if group is not None and group.prompt.target is not None:
        found["target"] = Response(text=group.prompt.target)
    scores = group.scores if group else {}
    return Chain(
        id=f"{round:04d}/{reject.prompt_id}",
        kind="reject",
        round=round,
        prompt=_turns(group.prompt.messages) if group else (),
        steps=tuple(_step(n, r, found, (), scores.get(n)) for n, r in found.items()),
        gap=None,
        ratings=dict(group.ratings) if group else {},
        stage=reject.stage,
        reason=reject.reason,
        detail=reject.detail,
    )


def _scores_by_step(pair: Pair, roles: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    return {
        name: pair.scores[role]
        for name, played in roles.items()
        for role in played
        if role in pair.scores
    }


def _gap(scores: Mapping[str, float]) -> float | None:
    if "chosen" not in scores or "rejected" not in scores:
        return None
    return scores["chosen"] - scores["rejected"]


def _responses(group: Candidates | None) -> dict[str, Response]:
    found = dict(group.responses) if group else {}
    known = [name for name in _ORDER if name in found]
    return {name: found[name] for name in [*known, *(n for n in found if n not in known)]}


def _step(
    name: str,
    response: Response,
    all: Mapping[str, Response],
    roles: tuple[str, ...],
    score: float | None,
    pair: Pair | None = None,
    ratios: PairRatios | None = None,
) -> Step:
    base = BASES.get(name, "")
    tokens = next((ratios.roles[role] for role in roles if ratios and role in ratios.roles), None)
    unfinished = response.finish == "length" or any(
        role in (pair.unfinished if pair else ()) for role in roles
    )
    return Step(
        name=name,
        text=response.text,
        base=base if base in all else "",
        roles=roles,
        score=score,
        tokens=len(response.token_ids) or None,
        mean_logprob=response.mean_logprob,
        unfinished=unfinished,
        ratios=tokens.model_dump() if tokens else None,
    )


def _turns(messages: tuple[Message, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((message.role, message.content) for message in messages)


def round_chains(round_dir: RoundDir, ratios: Mapping[str, PairRatios]) -> Iterator[Chain]:
    """All chains of a round: its pairs in their order, then its rejects. Reads record by record."""
    aside: dict[str, Candidates] = {}
    if round_dir.manifest("pairs"):
        groups = (
            round_dir.stream("ranked", Candidates) if round_dir.manifest("ranked") else iter(())
        )
        for pair in round_dir.stream("pairs", Pair):
            yield pair_chain(pair, _take(groups, pair.prompt_id, aside), ratios.get(pair.id))
        aside |= {group.prompt.id: group for group in groups}
    rejects = list(round_dir.rejects())
    missing = {reject.prompt_id for reject in rejects} - aside.keys()
    if missing and round_dir.manifest("candidates"):
        # What the judge gave no verdict on never came to be ranked.
        for group in round_dir.stream("candidates", Candidates):
            if group.prompt.id in missing:
                aside[group.prompt.id] = group
    for reject in rejects:
        yield reject_chain(reject, aside.get(reject.prompt_id), round_dir.number)


def _take(
    groups: Iterator[Candidates], wanted: str, aside: dict[str, Candidates]
) -> Candidates | None:
    """The group of one prompt. Pairs mostly keep the groups' order, so few have to be put aside."""
    if wanted in aside:
        return aside.pop(wanted)
    for group in groups:
        if group.prompt.id == wanted:
            return group
        aside[group.prompt.id] = group
    return None


def held_out_chains(run: RunDir) -> Iterator[Chain]:
    """The answers to each held-out prompt, round by round: how the policy changed."""
    places = [run.start, *run.rounds()]
    by_prompt: dict[str, list[tuple[int, Candidates]]] = {}
    for round_dir in places:
        if round_dir.manifest("answers"):
            for group in round_dir.stream("answers", Candidates):
                by_prompt.setdefault(group.prompt.id, []).append((round_dir.number, group))
    for name, answers in by_prompt.items():
        steps: list[Step] = []
        for number, group in answers:
            (response,) = group.responses.values()
            steps.append(
                Step(
                    name="start" if number < 0 else f"after round {number}",
                    text=response.text,
                    base=steps[-1].name if steps else "",
                    score=next(iter(group.scores.values()), None),
                    tokens=len(response.token_ids) or None,
                    mean_logprob=response.mean_logprob,
                    unfinished=response.finish == "length",
                )
            )
        last = answers[-1][1].prompt
        if last.target is not None:
            steps.append(Step(name="target", text=last.target, roles=("target",)))
        first_score, last_score = steps[0].score, steps[len(answers) - 1].score
        yield Chain(
            id=name,
            kind="held-out",
            round=answers[-1][0],
            prompt=_turns(last.messages),
            steps=tuple(steps),
            gap=None if first_score is None or last_score is None else last_score - first_score,
        )


_TOKENS = 6


def show_chain(chain: Chain, console: Console) -> None:
    """Print a chain. Red or `[-...-]` is only in a text's base, green or `{+...+}` only in the text itself."""
    details = [f"margin {chain.margin:.3g}"] if chain.margin else []
    details += [f"score gap {chain.gap:+.3g}"] if chain.gap is not None else []
    details += [f"{name} {value:.3g}" for name, value in chain.ratings.items()]
    show_text(console, Text(printable("  ".join([f"{chain.kind} {chain.id}", *details])), "bold"))
    if chain.reason:
        why = ": ".join(part for part in (chain.reason, chain.detail) if part)
        show_text(console, Text(printable(f"rejected by {chain.stage}: {why}"), "red"))
    for role, text in chain.prompt:
        _block(console, role, printable(text))
    steps = {step.name: step for step in chain.steps}
    for step in chain.steps:
        base = steps.get(step.base)
        body = _differing(base, step, console) if base else printable(step.text or "(empty)")
        _block(console, _head(step), body)
    _beside(chain, steps, console)
    for step in chain.steps:
        if step.ratios:
            _block(console, f"what training changed in {', '.join(step.roles)}", _learnt(step))
    show_text(console, "")


def _head(step: Step) -> str:
    name = step.name.replace("_", " ")
    facts = [role for role in step.roles if role != step.name]
    facts += [f"scores {step.score:.3g}"] if step.score is not None else []
    facts += [f"{step.tokens} tokens"] if step.tokens else []
    facts += ["cut off"] if step.unfinished else []
    facts += [f"beside {step.base.replace('_', ' ')}"] if step.base else []
    return f"{name} ({', '.join(facts)})" if facts else name


def _differing(
    base: Step, step: Step, console: Console, hide: SpanKind | None = None
) -> str | Text:
    found = [Span(kind, printable(text)) for kind, text in spans(base.text, step.text)]
    return marked(found, hide) if console.color_system is None else coloured(found, hide)


def _beside(chain: Chain, steps: dict[str, Step], console: Console) -> None:
    """Chosen and rejected beside each other, where neither is shown as a copy of the other already."""
    by_role = {role: step for step in chain.steps for role in step.roles}
    if not {"chosen", "rejected"} <= by_role.keys():
        return
    chosen, rejected = by_role["chosen"], by_role["rejected"]
    if rejected.base == chosen.name or chosen.base == rejected.name:
        return
    for role, hide in (("chosen", "old"), ("rejected", "new")):
        _block(console, f"{role}, the two compared", _differing(rejected, chosen, console, hide))  # type: ignore[arg-type]


def _learnt(step: Step) -> str:
    """The sum of the log-ratio, and the tokens that changed most."""
    assert step.ratios is not None
    ratios = [p - r for p, r in zip(step.ratios["policy"], step.ratios["reference"], strict=True)]
    most = sorted(range(len(ratios)), key=lambda n: -abs(ratios[n]))[:_TOKENS]
    lines = [f"r = {sum(ratios):+.3g} nats over {len(ratios)} tokens; most in"]
    for n in sorted(most):
        piece = step.ratios["pieces"][n]
        name = repr(printable(piece)) if piece else "end of turn"
        lines.append(
            f"{ratios[n]:+8.2f}  {name}  ({step.ratios['reference'][n]:.2f} before, "
            f"{step.ratios['policy'][n]:.2f} after)"
        )
    return "\n".join(lines)


def _block(console: Console, name: str, body: str | Text) -> None:
    show_text(console, Text(printable(name), style="dim"))
    show_text(console, body)
