"""Conversations into tokens and back, for one tokenizer.

A prompt ends where the policy begins to write. A completion is what it should have written: what the template
puts before an answer (a channel, an empty thought), the answer, and one end-of-turn token. Texts that no policy
sampled are encoded in their context, so that prompt and completion are the tokens of the whole conversation.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from prefloop.errors import GenerationError, ModelError
from prefloop.models.chat_template import ANSWER, ChatTemplate, Layout, Turn
from prefloop.models.reasoning import thought_of
from prefloop.records import Message

# Stands for a masked string while the template is rendered; our own characters inside a text are masked too.
_OPEN = "\ue0f0"
_MARK = _OPEN + "{}\ue0f1"
_MARKS = re.compile(_OPEN + "(\\d+)\ue0f1")
# What a text is put after to encode it as a continuation: the first that does not join with it is taken.
_ANCHORS = ("\n", "x", "0", ".")
_PROBE = (Message(role="user", content="Why?"),)


class Answer(NamedTuple):
    """What a policy wrote: the answer, and the thought before it ("" without one)."""

    text: str
    reasoning: str = ""


class Place(NamedTuple):
    """A conversation's layout, with the strings that are masked in it."""

    layout: Layout
    masked: tuple[str, ...]


class Chat:
    """Encodes conversations with the tokenizer's chat template.

    Text of a user or a model is encoded with special tokens split: a prompt that contains
    ``<|im_end|>`` cannot end its own turn, and one that contains ``</think>`` is not cut by the template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos_token_ids: Iterable[int] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """`eos_token_ids`: those of the model's generation_config. `template_kwargs`: further arguments of the template.

        Raises ModelError for a template that cannot be used.
        """
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, template_kwargs)
        added = tokenizer.added_tokens_decoder
        self._added = {token.content: number for number, token in added.items()}
        self.thought = thought_of(
            self.template.source, frozenset(self._added), self.template.around_thought()
        )
        special = [t.content for t in added.values() if t.special]
        self._special = _any_of([*special, _OPEN, "\ue0f1", ANSWER])
        thoughts = [self.thought.open, self.thought.close] if self.thought else []
        self._special_or_thought = _any_of([*special, *thoughts, _OPEN, "\ue0f1", ANSWER])
        opening = self.thought.open if self.thought else ""
        self._spelled = "" if self._special.search(opening) else opening
        """The thought's opening, where a text can spell it because it is no special token."""
        self._place = lru_cache(maxsize=256)(self._find_place)
        # An engine, the count of what it read, and the completions of a prompt all ask for its tokens.
        self._prompt = lru_cache(maxsize=256)(self._encode_prompt)
        self._trims = self.template.trims()
        probe = self._place(_PROBE).layout
        self._opens_thought = self._opened(probe.prompt)
        self._end, self._end_in_template = self._end_of_turn(probe.tail)
        self.end_ids: tuple[int, ...] = (self._added_id(self._end),)
        """The end of turn that is trained: the template's own, else where the next turn would begin, else the EOS."""
        self.end_id = self.end_ids[0]
        stops = {self.end_id, tokenizer.eos_token_id, *eos_token_ids} - {None}
        self.stop_ids = frozenset(int(stop) for stop in stops)
        """Tokens that end an answer when sampled."""

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None
    ) -> Chat:
        """With the ends of turn that the model's generation_config names, else its config."""
        return cls(tokenizer, eos_token_ids=named_ends(model), template_kwargs=template_kwargs)

    # Conversations into tokens.

    def prompt_ids(
        self, messages: Sequence[Message], prefix: str = "", *, at_answer: bool = False
    ) -> list[int]:
        """Tokens of a conversation up to where the policy begins to write, then of the begun answer `prefix`.

        A begun answer stands where the template puts answers: after a closed thought, in the final channel.
        `at_answer` goes there without a prefix too, for asking what the answer's first token is.
        """
        if not prefix and not at_answer:
            return list(self._prompt(tuple(messages)))
        layout, masked = self._place(tuple(messages))
        text, masked = self._with(layout.prompt + layout.lead, prefix, masked)
        return self._ids(text if prefix else self._without_space(text), masked)

    def completion_ids(
        self, messages: Sequence[Message], answer: str, *, ended: bool = True
    ) -> list[int]:
        """Tokens of an answer that no policy sampled, and of its end: those of the whole conversation after the prompt.

        Where the answer's first characters would join the prompt's last ones in one token, the answer is
        encoded by itself, as a text that follows another.
        """
        layout, masked = self._place(tuple(messages))
        text, masked = self._with(*self._before_answer(layout, answer), masked)
        closing = self._closing(layout) if ended else ""
        before = list(self._prompt(tuple(messages)))
        ids = self._after(before, layout.prompt, text + closing, masked)
        return [*ids, *self.end_ids] if ended and not closing else ids

    def option_ids(
        self, messages: Sequence[Message], options: Sequence[str], prefix: str = ""
    ) -> list[int]:
        """The first token of each option, as an answer that begins with `prefix` would go on.

        It follows ``prompt_ids(messages, prefix, at_answer=True)``. GenerationError where two are the same.
        """
        layout, masked = self._place(tuple(messages))
        text, masked = self._with(layout.prompt + layout.lead, prefix, masked)
        before = text if prefix else self._without_space(text)
        begun = self._ids(before, masked)
        firsts = []
        for option in options:
            rest, all_masked = self._with(text[len(before) :], option, masked)
            firsts.append(self._after(begun, before, rest, all_masked)[0])
        return _different(options, firsts)

    # Sampled tokens.

    def is_ended(self, ids: Sequence[int]) -> bool:
        """Whether sampled tokens end with the end of a turn."""
        return bool(ids) and ids[-1] in self.stop_ids

    def split(self, ids: Sequence[int]) -> Answer:
        """Sampled tokens as text, up to the first end of turn, the thought apart."""
        ended = next((n for n, token in enumerate(ids) if token in self.stop_ids), None)
        kept = list(ids if ended is None else ids[:ended])
        thought, text = self._thought_apart(kept)
        lead, tail = self._around()
        if ended is not None:
            text = text.removesuffix(tail)
        if thought is not None:
            return Answer(text.lstrip() if text.strip() else "", thought)
        return Answer(text.removeprefix(lead))

    # Plain texts.

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

    def count(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.text_ids(text))

    # By construction.

    def differences(self, messages: Sequence[Message] = _PROBE) -> str | None:
        """In what prompt, completion and end are not the template's own rendering of the conversation; None if in nothing."""
        said = []
        if header := self.template.added_header:
            said.append(
                f"it has no generation prompt, so {header!r} is added, which it puts before answers"
            )
        if not self._end_in_template:
            said.append(f"it ends an answer with no token, so {self._end} ends it")
        if self.thought and self._end in self.thought.close + self.thought.end:
            said.append(
                f"{self._end} ends its thoughts and its answers, so sampling stops after a thought"
            )
        if difference := self._difference(messages, "Because."):
            said.append(difference)
        if not said:
            return None
        return f"the chat template of {self.template.name}: {'; '.join(said)}"

    def _difference(self, messages: Sequence[Message], answer: str) -> str | None:
        turns, masked = self._masked_turns(messages)
        whole = self.template.whole([*turns, Turn("assistant", answer)])
        layout, _ = self._place(tuple(messages))
        lead, text = self._before_answer(layout, answer)
        closing = self._closing(layout)
        both = layout.prompt + lead + text + closing
        if not whole.startswith(both):
            at = next(
                (n for n, (a, b) in enumerate(zip(both, whole, strict=False)) if a != b),
                min(len(both), len(whole)),
            )
            return (
                f"a finished conversation has {whole[at : at + 40]!r} where the prompt and an answer have "
                f"{both[at : at + 40]!r}, and the latter is trained"
            )
        ids = [*self.prompt_ids(messages), *self.completion_ids(messages, answer)]
        ids = ids if closing else ids[:-1]
        if ids != self._ids(both, tuple(masked)):
            return "prompt and answer join in one token, and are encoded apart"
        return None

    def _without_space(self, text: str) -> str:
        """A rendered text without its last spaces, where this tokenizer puts them into the token that follows."""
        cut = text.rstrip(" ")
        if cut == text:
            return text
        spaces = text[len(cut) :]
        firsts = {self._continued(spaces + letter, plain=False)[0] for letter in "AB"}
        return cut if len(firsts) == 2 else text

    # Places.

    def _find_place(self, messages: tuple[Message, ...]) -> Place:
        turns, masked = self._masked_turns(messages)
        prompt, lead, tail = self.template.layout(turns)
        if self.thought and self.thought.opened_by(prompt + lead):
            lead += self.thought.closing(prompt + lead)
        return Place(Layout(prompt, lead, tail), tuple(masked))

    def _encode_prompt(self, messages: tuple[Message, ...]) -> array[int]:
        """A conversation's tokens up to where the policy begins to write, in four bytes each."""
        layout, masked = self._place(messages)
        return array("I", self._ids(layout.prompt, masked))

    def _masked_turns(self, messages: Sequence[Message]) -> tuple[list[Turn], list[str]]:
        masked: list[str] = []
        turns = []
        for message in messages:
            # An earlier answer's thought is the template's to cut; a user's text is nobody's.
            pattern = self._special if message.role == "assistant" else self._special_or_thought
            turns.append(Turn(message.role, _mask(message.content, pattern, masked)))
        return turns, masked

    def _with(self, text: str, more: str, masked: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """A rendered text, then one of a user or a model."""
        found = list(masked)
        return text + _mask(more, self._special, found), tuple(found)

    def _before_answer(self, layout: Layout, answer: str) -> tuple[str, str]:
        """What stands before an answer, and the answer as the template would trim it.

        One that brings its thought takes the place of the template's empty one.
        """
        before, after = self._trims
        answer = answer.lstrip() if before else answer
        answer = answer.rstrip() if after else answer
        brings_thought = (
            re.match(r"\s*" + re.escape(self._spelled), answer) if self._spelled else None
        )
        if brings_thought is None or self.thought is None or self.thought.close not in answer:
            return layout.lead, answer
        if self._opened(layout.prompt):
            return "", answer[brings_thought.end() :].lstrip("\n")
        return layout.lead.partition(self._spelled)[0].rstrip(), answer.lstrip()

    def _opened(self, prompt: str) -> bool:
        return self.thought is not None and self.thought.opened_by(prompt)

    def _closing(self, layout: Layout) -> str:
        """What ends an answer, as the template writes it; empty where it writes no end."""
        before, end, _ = layout.tail.partition(self._end)
        return before + end if end and self._end_in_template else ""

    def _around(self) -> tuple[str, str]:
        """What the template's text adds to an answer before and after it, special tokens left out."""
        layout = self._place(_PROBE).layout
        lead = "" if self._special.search(layout.lead) else layout.lead
        return lead, self._closing(layout).removesuffix(self._end)

    # Tokens.

    def _ids(self, text: str, masked: Sequence[str]) -> list[int]:
        """Tokens of a rendered text. What is masked in it is encoded as text, and all after it as its continuation."""
        first, *rest = _MARKS.split(text)
        ids = self._encode(first) if first else []
        for place, piece in enumerate(rest):
            if place % 2:
                ids += self._continued(piece, plain=False)
            else:
                ids += self._continued(masked[int(piece)], plain=True)
        return ids

    def _after(self, before: list[int], prompt: str, text: str, masked: Sequence[str]) -> list[int]:
        """Tokens of a rendered text that follows a prompt, whose tokens are `before`."""
        whole = self._ids(prompt + text, masked)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        first, *rest = _MARKS.split(text)
        ids = self._continued(first, plain=False)
        for place, piece in enumerate(rest):
            plain = place % 2 == 0
            ids += self._continued(masked[int(piece)] if plain else piece, plain=plain)
        return ids

    def _continued(self, text: str, *, plain: bool) -> list[int]:
        """Tokens of a text that other text stands before."""
        encode = self.text_ids if plain else self._encode
        if not text:
            return []
        for anchor in _ANCHORS:
            first, both = encode(anchor), encode(anchor + text)
            if both[: len(first)] == first:
                return both[len(first) :]
        return encode(text)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # Ends and thoughts.

    def _end_of_turn(self, tail: str) -> tuple[str, bool]:
        """The token that ends an answer, and whether the template puts it there."""
        bos = self.tokenizer.bos_token
        tokens = [t for t in self._added if t != bos and not t.isspace()]
        if tokens and (found := _any_of(tokens).search(tail)):
            return found.group(), True
        # GLM-4: the token that begins the next turn.
        following = self.template.tail_in_history().lstrip()
        if tokens and (found := _any_of(tokens).match(following)):
            return found.group(), False
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {self.template.name} has no end-of-turn token; "
                "set eos_token in its tokenizer_config.json"
            )
        return str(self.tokenizer.eos_token), False

    def _added_id(self, token: str) -> int:
        return int(self._added.get(token, self.tokenizer.convert_tokens_to_ids(token)))

    def _thought_apart(self, ids: list[int]) -> tuple[str | None, str]:
        """The thought (None without one) and the answer."""
        thought = self.thought
        if thought is None:
            return None, self.decode(ids)
        closing = self._encode(thought.close)
        at = _find(ids, closing)
        if at is not None:
            return self._thought_text(ids[:at]), self.decode(ids[at + len(closing) :])
        text = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if thought.close in text and not self._special.search(thought.close):
            # Spelled in other tokens, joined with what stands around it.
            end = self.decode(ids).partition(thought.close)
            return end[0].strip().removeprefix(thought.open.rstrip()).strip(), end[2]
        if self._opens_thought or text.lstrip().startswith(thought.open.rstrip()):
            return self._thought_text(ids), ""
        return None, self.decode(ids)

    def _thought_text(self, ids: list[int]) -> str:
        assert self.thought is not None
        text = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        text = text.strip().removeprefix(self.thought.open.rstrip())
        if self.thought.end:
            text = text.partition(self.thought.end)[0]
        return text.strip()


def named_ends(model: Any) -> list[int]:
    """The end tokens that a model's generation_config names, else its config."""
    found: Any = None
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        if found is None:
            found = getattr(config, "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted({s for s in strings if s}, key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in longest_first))


def _mask(content: str, pattern: re.Pattern[str], found: list[str]) -> str:
    def mark(match: re.Match[str]) -> str:
        found.append(match.group())
        return _MARK.format(len(found) - 1)

    return pattern.sub(mark, content)


def _find(ids: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where the tokens `wanted` first stand in `ids`."""
    last = len(ids) - len(wanted)
    return next(
        (n for n in range(last + 1) if list(ids[n : n + len(wanted)]) == list(wanted)), None
    )


def _different(options: Sequence[str], firsts: list[int]) -> list[int]:
    if len(set(firsts)) < len(firsts):
        raise GenerationError(
            f"the options {', '.join(options)} do not differ in their first token; "
            "use options that do, such as digits or letters"
        )
    return firsts
