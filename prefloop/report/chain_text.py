"""A prompt's whole chain on a console: what was asked, all that was written, and where each text differs from its base."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from prefloop.data.text_distance import Kind, Span, spans
from prefloop.report.chain import Chain, Step
from prefloop.report.console import printable, show_text
from prefloop.report.formats import coloured, marked

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


def _differing(base: Step, step: Step, console: Console, hide: Kind | None = None) -> str | Text:
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
