"""`prefloop data`: what a file, folder or data set holds, as a run would read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from prefloop.data.entries import Placed
    from prefloop.data.survey import Survey
    from prefloop.models.chat import Chat

_TOLD = "model.chat_template_kwargs."


def data(
    source: Annotated[
        str, typer.Argument(help="A file, a folder, or a data set on the hub (owner/name).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of a recipe's section data, such as prompt_field=question, or what the chat template is "
            "told, model.chat_template_kwargs.enable_thinking=false; repeatable.",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="Whose tokenizer and chat template are shown.")
    ] = "embedded:smollm2-135m",
    show: Annotated[int, typer.Option("-n", "--number", min=0, help="Conversations to show.")] = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of text.")
    ] = False,
) -> None:
    """Show how data are read: format, columns, what is dropped, lengths, duplicates, the first conversations."""
    from prefloop.data.survey import survey

    told = [text for text in overrides or [] if text.startswith(_TOLD)]
    options = _options(source, [text for text in overrides or [] if text not in told])
    chat = _chat(model, told)
    found = survey(
        options.sources("train")[0],
        split=options.split,
        limits=(options.max_prompt_tokens, options.max_response_tokens),
        count_tokens=chat.count,
        show=show,
    )
    if as_json:
        typer.echo(json.dumps(_as_json(found, chat), indent=1, ensure_ascii=False))
        return
    from prefloop.report.formats import printable

    for line in _lines(found, chat):
        typer.echo("\n".join(map(printable, line.split("\n"))))


def _options(source: str, overrides: list[str]) -> Any:
    from prefloop.config import build, overridden
    from prefloop.data.prompts import DataOptions

    values: dict[str, Any] = {"train": source}
    for override in overrides:
        values = overridden(values, override.removeprefix("data."))
    return build(DataOptions, values, "data")


def _chat(model: str, told: list[str]) -> Chat:
    """The tokenizer alone: no weights are read."""
    from transformers import AutoTokenizer

    from prefloop.config import overridden
    from prefloop.errors import ModelError
    from prefloop.models.chat import Chat
    from prefloop.models.sources import quiet, reason, resolve_source

    place = resolve_source(model)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{model} has no usable tokenizer ({reason(error)}); name another with --model"
        ) from error
    values: dict[str, Any] = {"model": {"chat_template_kwargs": {}}}
    for override in told:
        values = overridden(values, override)
    return Chat(tokenizer, template_kwargs=values["model"]["chat_template_kwargs"])


def _lines(found: Survey, chat: Chat) -> Iterator[str]:
    yield from found.notes
    yield ""
    for name, use in found.uses.items():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in use.without.most_common())
        yield f"{name:8} {use.usable:>9,}" + (f"   without: {reasons}" if reasons else "")
    yield (
        f"equal    {found.equal_prompts:>9,}   conversations that came before, "
        f"{found.equal_rows:,} of them with the same answers"
    )
    yield ""
    for name, lengths in found.lengths.items():
        percentiles = "  ".join(f"{p} {size:,}" for p, size in lengths.percentiles.items())
        option = "data.max_prompt_tokens" if name == "prompt" else "data.max_response_tokens"
        yield (
            f"{name:8} tokens: {percentiles}  max {lengths.longest:,}   "
            f"{lengths.over:,} over {option} ({lengths.limit:,})"
        )
    for placed in found.first:
        yield f"\n--- {placed.where}  id {placed.id}"
        yield from _shown(placed, chat)


def _shown(placed: Placed, chat: Chat) -> Iterator[str]:
    """A conversation as the model sees it; what is trained on stands between « and »."""
    entry = placed.entry
    answers = (
        {"chosen": entry.chosen, "rejected": entry.rejected}
        if entry.chosen is not None
        else {"answer": entry.target}
    )
    yield _text(chat, chat.prompt_ids(entry.messages))
    for name, answer in answers.items():
        if answer is not None:
            yield f"{name} «{_text(chat, chat.completion_ids(entry.messages, answer))}»"


def _text(chat: Chat, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _as_json(found: Survey, chat: Chat) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "notes": list(found.notes),
        "uses": {
            name: {"usable": use.usable, "without": dict(use.without)}
            for name, use in found.uses.items()
        },
        "lengths": {name: asdict(lengths) for name, lengths in found.lengths.items()},
        "equal_prompts": found.equal_prompts,
        "equal_rows": found.equal_rows,
        "first": [
            {"where": placed.where, "id": placed.id, "shown": list(_shown(placed, chat))}
            for placed in found.first
        ],
    }
