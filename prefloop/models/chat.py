"""Conversations into tokens and back, for one tokenizer: the only place that knows a chat template.

A completion is the answer's tokens and then one end-of-turn token; whatever reads `answer_ids` scores
exactly that span, so this is also where the completion mask is made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from prefloop.errors import GenerationError, ModelError
from prefloop.records import Message

# Stands for a special string while the template is rendered; _OPEN inside a text is masked like one.
_OPEN = "\ue0f0"
_MARK = _OPEN + "{}\ue0f1"
_MARKS = re.compile(_OPEN + "(\\d+)\ue0f1")


class Answer(NamedTuple):
    """What a policy said, and what it thought before."""

    text: str
    reasoning: str = ""


class Chat:
    """Encodes conversations with the tokenizer's chat template.

    Text of a user or a model is encoded with special tokens split: a prompt that contains
    ``<|im_end|>`` cannot end its own turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; "
                "name a jinja file in model.chat_template"
            )
        self.tokenizer = tokenizer
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._special = re.compile(
            "|".join(re.escape(text) for text in [*sorted(special, key=len, reverse=True), _OPEN])
        )
        self.end_id = self._end_of_turn()
        self.stop_ids = frozenset({self.end_id, tokenizer.eos_token_id} - {None})

    def prompt_ids(self, messages: Sequence[Message], prefix: str = "") -> list[int]:
        """Tokens of a conversation up to where the assistant's answer begins, or begins anew after `prefix`."""
        prompt = self._ids(messages, add_generation_prompt=True)
        return prompt + (self.completion_ids(messages, prefix, ended=False) if prefix else [])

    def completion_ids(
        self, messages: Sequence[Message], answer: str, *, ended: bool = True
    ) -> list[int]:
        """Tokens of an answer that no policy sampled, in its conversation; with the end token if it ended."""
        prompt = self._ids(messages, add_generation_prompt=True)
        said = Message(role="assistant", content=answer)
        whole = self._ids((*messages, said), add_generation_prompt=False)
        rest = whole[len(prompt) :]
        ids = self.text_ids(answer)
        if whole[: len(prompt)] == prompt and self.end_id in rest:
            rest = rest[: len(rest) - 1 - rest[::-1].index(self.end_id)]
            ids = rest if self.decode(rest) == answer else ids
        return [*ids, self.end_id] if ended else ids

    def option_ids(
        self, messages: Sequence[Message], options: Sequence[str], prefix: str = ""
    ) -> list[int]:
        """The token by which each option goes on; GenerationError where two have the same one."""
        begun = self.completion_ids(messages, prefix, ended=False) if prefix else []
        found = [
            self.completion_ids(messages, prefix + option, ended=False)[len(begun)]
            for option in options
        ]
        if len(set(found)) < len(found):
            raise GenerationError(
                f"the options {', '.join(options)} do not differ in their first token; "
                "use options that do, such as digits or letters"
            )
        return found

    def is_ended(self, ids: Sequence[int]) -> bool:
        """Whether sampled tokens end with one that ends a turn."""
        return bool(ids) and ids[-1] in self.stop_ids

    def split(self, ids: Sequence[int]) -> Answer:
        """The answer in sampled tokens."""
        return Answer(self.decode(ids[:-1] if self.is_ended(ids) else ids).strip())

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What ends a turn that is trained on."""
        return (self.end_id,)

    def _ids(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        found: list[str] = []
        turns = [{"role": m.role, "content": self._mask(m.content, found)} for m in messages]
        text = self._render(turns, add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        for place, piece in enumerate(_MARKS.split(text)):
            ids += self.text_ids(found[int(piece)]) if place % 2 else self._encode(piece)
        return ids

    def answer_ids(self, answer: str) -> list[int]:
        """Tokens of a whole answer: its text, then end-of-turn."""
        return [*self.text_ids(answer), self.end_id]

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a text in which nothing is special."""
        return list(
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )

    def text_offsets(self, text: str) -> list[tuple[int, int]]:
        """Character span of each of `text_ids(text)`."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        return [(int(start), int(end)) for start, end in encoded["offset_mapping"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled tokens, special tokens left out."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def token_texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Each token as text. Some decoders drop the space of a text's first token, so another goes first."""
        first = self.text_ids("x")
        rows = [first, *([*first, token] for token in ids)]
        texts = self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        return tuple(text[len(texts[0]) :] for text in texts[1:])

    def first_ids(self, options: Sequence[str]) -> list[int]:
        """The first token of each option; GenerationError where two begin with the same one."""
        firsts = [self.text_ids(option)[0] for option in options]
        if len(set(firsts)) < len(firsts):
            raise GenerationError(
                f"the options {', '.join(options)} do not differ in their first token; "
                "use options that do, such as digits or letters"
            )
        return firsts

    def count(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.text_ids(text))

    def _mask(self, content: str, found: list[str]) -> str:
        def mark(match: re.Match[str]) -> str:
            found.append(match.group())
            return _MARK.format(len(found) - 1)

        return self._special.sub(mark, content)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path} refuses the turns {roles}: "
                f"{str(error).rstrip('.')}; name another jinja file in model.chat_template"
            ) from error

    def _end_of_turn(self) -> int:
        """The special token that the template puts right after an answer; else the tokenizer's EOS."""
        answer = _MARK.format(0)
        text = self._render(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}],
            add_generation_prompt=False,
        )
        after = self._encode(text.rpartition(answer)[2])
        if after and after[0] in self.tokenizer.all_special_ids:
            return after[0]
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no end-of-turn token; "
                "set eos_token in its tokenizer_config.json"
            )
        return int(self.tokenizer.eos_token_id)
