"""Whether the model's chat template takes the conversations that a recipe will put to it, told before a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefloop.models.sources import ModelOptions, local_folder, unpacked
from prefloop.records import Message

Conversation = tuple[Message, ...]


def check_template(options: ModelOptions, conversations: Iterable[Conversation]) -> Iterator[str]:
    """Render each conversation; yield what the user should know. Nothing for a model that is not on this disk.

    Raises ModelError where the template refuses one of them, or leaves out one of its turns.
    """
    folder = unpacked(options.source)
    if folder is None:
        return
    from prefloop.models.chat import Chat

    template = options.chat_template and Path(options.chat_template).expanduser().resolve()
    tokenizer = _tokenizer(local_folder(str(folder), options), str(template or ""), options)
    chat = Chat(tokenizer, template_kwargs=options.chat_template_kwargs)
    found = [chat.differences(conversation) for conversation in conversations]
    yield from [difference for difference in found if difference][:1]


def _tokenizer(folder: Path, template: str, options: ModelOptions) -> Any:
    stamp = Path(template).stat().st_mtime_ns if template else 0
    return _loaded(folder, stamp, options.model_dump_json())


@lru_cache(maxsize=4)
def _loaded(folder: Path, stamp: int, options: str) -> Any:
    """The tokenizer; several recipes of a comparison share it. `stamp` tells an edited template apart."""
    from prefloop.models.sources import quiet
    from prefloop.models.tokenizer import load_tokenizer

    with quiet():
        return load_tokenizer(folder, ModelOptions.model_validate_json(options))
