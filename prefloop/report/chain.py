"""The chain of one prompt: every text generated for it, in the order of generation.

A pair, a reject or a held-out prompt becomes one `Chain`, which both the page and the terminal show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from prefloop.data.text_distance import Kind as SpanKind
from prefloop.data.text_distance import Span, spans
from prefloop.errors import counted
from prefloop.records import Candidates, Message, Pair, PairRatios, Reject, Response
from prefloop.report.console import in_colour, show_text
from prefloop.report.formats import coloured, marked, printable
from prefloop.run_folder import RoundDir, RunDir

Kind = Literal["pair", "reject", "held-out"]

# Response -> the response that it is an edited copy of, by the methods' names; for other names only the
# difference between chosen and rejected is marked.
BASES = {"rewrite": "draft", "refined": "draft_a", "flawed": "refined", "rejected": "chosen"}

# Records hold responses in any order; chains show them in the order of generation.
_PAIR_ROLES = ("chosen", "rejected", "target", "sample")

_WRITING_ORDER = (
    "draft",
    "advice",
    "rewrite",
    "draft_a",
    "draft_b",
    "critique",
    "refined",
    "flawed",
)


@dataclass(frozen=True)
class Step:
    """One text of a chain, with its score and log-probs."""

    name: str
    text: str
    base: str = ""
    """Name of the step that this one is an edited copy of; "": none."""
    roles: tuple[str, ...] = ()
    """Its roles in the pair: chosen, rejected, target."""
    score: float | None = None
    tokens: int | None = None
    mean_logprob: float | None = None
    unfinished: bool = False
    ratios: dict[str, Any] | None = None
    """Its tokens with their log-probs under policy and reference; None where not computed."""


@dataclass(frozen=True)
class Chain:
    """One prompt of one round with all its responses and what became of them."""

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
        """The chain as JSON values without empty fields; a step's text stays, as an answer may be empty."""
        # Not asdict: it copies every value deeply, at a third of a report's time.
        steps = [{**_without_empty(vars(step)), "text": step.text} for step in self.steps]
        return _without_empty({**vars(self), "steps": steps})


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    # 0 is a value (a round, a score), although it is falsy.
    return {
        name: value
        for name, value in values.items()
        if value or (isinstance(value, int | float) and value is not False)
    }


def pair_chain(pair: Pair, group: Candidates | None, ratios: PairRatios | None = None) -> Chain:
    """A pair with the responses behind it; `group` is None where these were not kept."""
    texts_by_role = {role: getattr(pair, role) for role in _PAIR_ROLES}
    # Methods that train on single answers leave the other roles empty.
    texts = {role: text for role, text in texts_by_role.items() if text or role in pair.origin}
    responses = _responses(group)
    roles: dict[str, tuple[str, ...]] = {}
    for role, text in texts.items():
        origin = pair.origin.get(role, role)
        if origin not in responses or responses[origin].text != text:
            origin = role
            responses[role] = Response(text=text)
        roles[origin] = (*roles.get(origin, ()), role)
    scores = {**(group.scores if group else {}), **_scores_by_step(pair, roles)}
    steps = [
        _step(name, response, responses, roles.get(name, ()), scores.get(name), pair, ratios)
        for name, response in responses.items()
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
    """A prompt that gave no pair, with its responses, as far as they were kept."""
    responses = _responses(group)
    if group is not None and group.prompt.target is not None:
        responses["target"] = Response(text=group.prompt.target)
    scores = group.scores if group else {}
    return Chain(
        id=f"{round:04d}/{reject.prompt_id}",
        kind="reject",
        round=round,
        prompt=_turns(group.prompt.messages) if group else (),
        steps=tuple(
            _step(name, response, responses, (), scores.get(name))
            for name, response in responses.items()
        ),
        gap=None,
        ratings=dict(group.ratings) if group else {},
        stage=reject.stage,
        reason=reject.reason,
        detail=reject.detail,
    )


def _scores_by_step(pair: Pair, roles: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    return {
        name: pair.scores[role]
        for name, step_roles in roles.items()
        for role in step_roles
        if role in pair.scores
    }


def _gap(scores: Mapping[str, float]) -> float | None:
    if "chosen" not in scores or "rejected" not in scores:
        return None
    return scores["chosen"] - scores["rejected"]


def _responses(group: Candidates | None) -> dict[str, Response]:
    responses = dict(group.responses) if group else {}
    ordered = [name for name in _WRITING_ORDER if name in responses]
    return {
        name: responses[name] for name in [*ordered, *(n for n in responses if n not in ordered)]
    }


def _step(
    name: str,
    response: Response,
    responses: Mapping[str, Response],
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
        base=base if base in responses else "",
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
    """All chains of a round: its pairs in order, then its rejects; records are streamed."""
    rejected = {reject.prompt_id: reject.stage for reject in round_dir.rejects()}
    if round_dir.manifest("pairs"):
        groups = _Groups(round_dir, "ranked", lambda name: name not in rejected)
        for pair in round_dir.stream("pairs", Pair):
            yield pair_chain(pair, groups.take(pair.prompt_id), ratios.get(pair.id))
    by_stage: dict[str, _Groups | None] = {"generate": None}
    for reject in round_dir.rejects():
        name, stage = reject.prompt_id, reject.stage
        if stage not in by_stage:
            # Prompts without a verdict are among the candidates only, not among the ranked.
            file = "candidates" if stage == "rank" else "ranked"
            by_stage[stage] = _Groups(round_dir, file, _rejected_at(stage, rejected))
        found = by_stage[stage]
        yield reject_chain(reject, found.take(name) if found else None, round_dir.number)


def _rejected_at(stage: str, rejected: Mapping[str, str]) -> Callable[[str], bool]:
    return lambda name: rejected.get(name) == stage


class _Groups:
    """A stage's groups by their prompts, read along with what was made of them in mostly the same order."""

    def __init__(self, round_dir: RoundDir, stage: str, wanted: Callable[[str], bool]) -> None:
        """`wanted` says whether a prompt's group, read on the way to another's, will be asked for."""
        made = round_dir.manifest(stage) is not None
        self._groups = round_dir.stream(stage, Candidates) if made else iter(())
        self._wanted = wanted
        self._waiting: dict[str, Candidates] = {}

    def take(self, name: str) -> Candidates | None:
        """The group of a prompt; None where there is none."""
        if name in self._waiting:
            return self._waiting.pop(name)
        for group in self._groups:
            if group.prompt.id == name:
                return group
            if self._wanted(group.prompt.id):
                self._waiting[group.prompt.id] = group
        return None


def held_out_chains(run: RunDir) -> Iterator[Chain]:
    """The answers to each held-out prompt, round by round: how the policy changed."""
    rounds = [run.start, *run.rounds()]
    by_prompt: dict[str, list[tuple[int, Candidates]]] = {}
    for round_dir in rounds:
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
        last_prompt = answers[-1][1].prompt
        if last_prompt.target is not None:
            steps.append(Step(name="target", text=last_prompt.target, roles=("target",)))
        first_score, last_score = steps[0].score, steps[len(answers) - 1].score
        yield Chain(
            id=name,
            kind="held-out",
            round=answers[-1][0],
            prompt=_turns(last_prompt.messages),
            steps=tuple(steps),
            gap=None if first_score is None or last_score is None else last_score - first_score,
        )


_SHOWN_TOKENS = 6


def show_chain(chain: Chain, console: Console) -> None:
    """Print a chain. Red or `[-...-]` is text of the base only, green or `{+...+}` text of the step only."""
    details = [f"margin {chain.margin:.3g}"] if chain.margin else []
    details += [f"score gap {chain.gap:+.3g}"] if chain.gap is not None else []
    details += [f"{name} {value:.3g}" for name, value in chain.ratings.items()]
    show_text(console, Text(printable("  ".join([f"{chain.kind} {chain.id}", *details])), "bold"))
    if chain.reason:
        reason = ": ".join(part for part in (chain.reason, chain.detail) if part)
        show_text(console, Text(printable(f"rejected by {chain.stage}: {reason}"), "red"))
    for role, text in chain.prompt:
        _print_block(console, role, printable(text))
    steps = {step.name: step for step in chain.steps}
    for step in chain.steps:
        base = steps.get(step.base)
        body = _difference(base, step, console) if base else printable(step.text or "(empty)")
        _print_block(console, _step_title(step), body)
    _print_comparison(chain, steps, console)
    for step in chain.steps:
        if step.ratios:
            _print_block(
                console, f"what training changed in {', '.join(step.roles)}", _largest_changes(step)
            )
    show_text(console, "")


def _step_title(step: Step) -> str:
    name = step.name.replace("_", " ")
    details = [role for role in step.roles if role != step.name]
    details += [f"scores {step.score:.3g}"] if step.score is not None else []
    details += [counted(step.tokens, "token")] if step.tokens else []
    details += ["cut off"] if step.unfinished else []
    details += [f"beside {step.base.replace('_', ' ')}"] if step.base else []
    return f"{name} ({', '.join(details)})" if details else name


def _difference(
    base: Step, step: Step, console: Console, hide: SpanKind | None = None
) -> str | Text:
    marked_spans = [Span(kind, printable(text)) for kind, text in spans(base.text, step.text)]
    return coloured(marked_spans, hide) if in_colour(console) else marked(marked_spans, hide)


def _print_comparison(chain: Chain, steps: dict[str, Step], console: Console) -> None:
    """Print chosen and rejected with their differences, unless one is already shown as a copy of the other."""
    by_role = {role: step for step in chain.steps for role in step.roles}
    if not {"chosen", "rejected"} <= by_role.keys():
        return
    chosen, rejected = by_role["chosen"], by_role["rejected"]
    if rejected.base == chosen.name or chosen.base == rejected.name:
        return
    hidden: tuple[tuple[str, SpanKind], ...] = (("chosen", "old"), ("rejected", "new"))
    for role, hide in hidden:
        body = _difference(rejected, chosen, console, hide)
        _print_block(console, f"{role}, the two compared", body)


def _largest_changes(step: Step) -> str:
    """The step's summed log-ratio, and the tokens whose log-prob changed most."""
    assert step.ratios is not None
    ratios = [p - r for p, r in zip(step.ratios["policy"], step.ratios["reference"], strict=True)]
    largest = sorted(range(len(ratios)), key=lambda index: -abs(ratios[index]))[:_SHOWN_TOKENS]
    lines = [f"r = {sum(ratios):+.3g} nats over {counted(len(ratios), 'token')}; most in"]
    for index in sorted(largest):
        token_text = step.ratios["pieces"][index]
        name = repr(printable(token_text)) if token_text else "end of turn"
        lines.append(
            f"{ratios[index]:+8.2f}  {name}  ({step.ratios['reference'][index]:.2f} before, "
            f"{step.ratios['policy'][index]:.2f} after)"
        )
    return "\n".join(lines)


def _print_block(console: Console, name: str, body: str | Text) -> None:
    show_text(console, Text(printable(name), style="dim"))
    show_text(console, body)
