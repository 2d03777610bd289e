"""A tokenizer's chat template as text: what it puts around an answer, and what it cannot do, in words.

Nothing here knows tokens; `chat.Chat` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import Any, NamedTuple

from jinja2 import TemplateError, UndefinedError

from prefloop.errors import ModelError, nearest

# Stands for the answer while a conversation is rendered; a private-use character, which no template looks for.
ANSWER = "\ue0f2"
_LONGEST = 1_000_000
# What strange input or a strange template make Python raise inside a template.
_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    AssertionError,
)
# apply_chat_template's own arguments; another name would never reach the template.
_RESERVED = frozenset(
    "conversation messages chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs "
    "sanitize_control_tokens strftime_now".split()
)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])([^"'\\]*)\1\s*\)""")

_today: date | None = None


def set_template_date(day: date | None) -> None:
    """Fix the date that templates of this process get; None: the day on which each one renders."""
    global _today
    _today = day


def dated(source: str) -> str:
    """A template's source with its calls for the date answered by the fixed date, if one is fixed."""
    if _today is None:
        return source
    noon = datetime.combine(_today, time(12))
    return _DATE_CALL.sub(lambda call: repr(noon.strftime(call[2])), source)


class Turn(NamedTuple):
    """One turn of a conversation, before the template."""

    role: str
    content: str
    thought: str = ""


class Layout(NamedTuple):
    """Where an answer stands in the template's text of a conversation: prompt + lead + answer + tail."""

    prompt: str
    """Up to where the policy begins to write."""
    lead: str
    """What the template puts between there and an answer that has no thought: a channel, a closed thought."""
    tail: str
    """What it puts after the answer."""


class ChatTemplate:
    """Renders conversations with the tokenizer's template and fixed further arguments."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> None:
        """Raises ModelError where there is no template, or one that loses what it is given."""
        self.name = tokenizer.name_or_path or "this model"
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {self.name} has no chat template; "
                "name a jinja file in model.chat_template"
            )
        self._tokenizer = tokenizer
        self.source = self._chosen_source()
        self.arguments = dict(arguments or {})
        self._check_arguments(self.arguments)
        self._tried: set[tuple[str, ...]] = set()
        self._in_parts = False
        """Whether content must be a list of text parts, as for some multimodal models."""
        self._in_parts = self._needs_parts()
        question = [Turn("user", "x")]
        self.asks_for_answer = self._render(question, True) != self._render(question, False)
        """Whether the template has a generation prompt of its own."""
        self.added_header = "" if self.asks_for_answer else self._header(question)
        """What stands in for the generation prompt that the template has not."""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The conversation up to where the policy begins to write."""
        return self._render(turns, True) + self.added_header

    def whole(self, turns: Sequence[Turn]) -> str:
        """A finished conversation, without a generation prompt."""
        return self._render(turns, False)

    def layout(self, turns: Sequence[Turn]) -> Layout:
        """Where the template would put the next answer. `lead` is empty where the rendering with an answer differs."""
        self._check_no_turn_is_lost(tuple(turn.role for turn in turns))
        prompt = self.prompt(turns)
        before, separator, tail = self.whole([*turns, Turn("assistant", ANSWER)]).rpartition(ANSWER)
        if not separator:
            raise ModelError(
                f"the chat template of {self.name} leaves out what the assistant answers; "
                "name another jinja file in model.chat_template"
            )
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        return Layout(prompt, lead, tail)

    def trims(self) -> tuple[bool, bool]:
        """Whether the template strips white space before, and after, an answer."""
        question = [Turn("user", "x")]
        wide = self.whole([*question, Turn("assistant", f" \n{ANSWER} \n")])
        before, _, after = self.whole([*question, Turn("assistant", ANSWER)]).rpartition(ANSWER)
        before_wide, _, after_wide = wide.rpartition(ANSWER)
        return before_wide == before, after_wide == after

    def around_thought(self) -> tuple[str, str]:
        """What stands before a thought, and between it and the answer; empty where the template writes none."""
        turns = [Turn("user", "x"), Turn("assistant", ANSWER, thought="\ue0f3")]
        try:
            before, separator, after = self.whole(turns).partition(ANSWER)[0].partition("\ue0f3")
        except ModelError:
            return "", ""
        return (before, after) if separator else ("", "")

    def tail_in_history(self) -> str:
        """What stands after an answer that another question follows; empty where the template refuses that."""
        turns = [Turn("user", "x"), Turn("assistant", ANSWER), Turn("user", "y")]
        try:
            return self.whole(turns).partition(ANSWER)[2]
        except ModelError:
            return ""

    def _chosen_source(self) -> str:
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError as error:
            raise ModelError(
                f"the tokenizer of {self.name} has several chat templates and none is the default; "
                "name a jinja file in model.chat_template"
            ) from error

    def _check_arguments(self, arguments: Mapping[str, Any]) -> None:
        for key in arguments:
            if key in _RESERVED:
                raise ModelError(
                    f"model.chat_template_kwargs.{key} is set by prefloop itself; leave it out"
                )
            if not re.search(rf"\b{re.escape(key)}\b", self.source):
                known = sorted(set(re.findall(r"\b([a-z_]+) is (?:not )?defined", self.source)))
                hint = nearest(key, known) if known else "it asks for none"
                raise ModelError(
                    f"model.chat_template_kwargs.{key}: the chat template of {self.name} does not look at it; {hint}"
                )

    def _needs_parts(self) -> bool:
        """Try text, then a list of text parts: the form in which question and answer come out again."""
        problem: ModelError | None = None
        for self._in_parts in (False, True):
            try:
                text = self.whole([Turn("user", "\ue0f3"), Turn("assistant", ANSWER)])
                if "\ue0f3" in text and ANSWER in text and "\ue0f3" in self._probe():
                    return self._in_parts
            except ModelError as error:
                problem = problem or error
        if problem:
            raise problem
        raise ModelError(
            f"the chat template of {self.name} leaves out what it is given to render; "
            "name another jinja file in model.chat_template"
        )

    def _check_no_turn_is_lost(self, roles: tuple[str, ...]) -> None:
        """Every turn must come out of the template; a conversation's roles are tried once."""
        if roles in self._tried:
            return
        marks = [chr(0xE100 + number % 4096) for number in range(len(roles))]
        text = self._render([Turn(r, m) for r, m in zip(roles, marks, strict=True)], True)
        if lost := [role for role, mark in zip(roles, marks, strict=True) if mark not in text]:
            raise ModelError(
                f"the chat template of {self.name} leaves out the {lost[0]} turn of the turns "
                f"{', '.join(roles)}; take it out of the data, or name another jinja file in model.chat_template"
            )
        self._tried.add(roles)

    def _probe(self) -> str:
        return self._render([Turn("user", "\ue0f3")], True)

    def _header(self, question: Sequence[Turn]) -> str:
        """What a template without a generation prompt puts before an answer."""
        prompt, whole = (
            self._render(question, True),
            self.whole([*question, Turn("assistant", ANSWER)]),
        )
        before, _, tail = whole.rpartition(ANSWER)
        if self._always_ends_with_header(prompt, tail):
            return ""
        if not before.startswith(prompt.rstrip()):
            raise ModelError(
                f"the chat template of {self.name} has no generation prompt (it does not look at "
                "add_generation_prompt), and its finished conversations do not begin like unfinished ones; "
                "add one to it, or name another jinja file in model.chat_template"
            )
        header = before[len(prompt.rstrip()) :]
        # A space goes with the word after it.
        return before[len(prompt) :].rstrip(" ") if header.strip() else ""

    def _always_ends_with_header(self, prompt: str, tail: str) -> bool:
        """Whether every rendering ends with an answer's header, also one whose last turn is an answer."""
        goes_on = self.tail_in_history()
        common = next(
            (n for n, (a, b) in enumerate(zip(tail, goes_on, strict=False)) if a != b), None
        )
        last = tail[min(len(tail), len(goes_on)) if common is None else common :]
        is_end = last.strip() in ("", self._tokenizer.eos_token)
        return not is_end and prompt.endswith(last)

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        conversation = [self._as_message(turn) for turn in turns]
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    conversation,
                    chat_template=dated(self.source),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **self.arguments,
                )
            )
        except _FAILURES as error:
            raise self._refusal(error, turns) from error
        if len(text) > _LONGEST + 100 * sum(len(turn.content) for turn in turns):
            raise ModelError(
                f"the chat template of {self.name} makes {len(text):,} characters of "
                f"{len(turns)} turns; name another jinja file in model.chat_template"
            )
        return text

    def _as_message(self, turn: Turn) -> dict[str, Any]:
        text = turn.content
        given: dict[str, Any] = {"role": turn.role, "content": text}
        if self._in_parts:
            given["content"] = [{"type": "text", "text": text}]
        if turn.thought:
            given |= dict.fromkeys(("reasoning_content", "thinking", "reasoning"), turn.thought)
        return given

    def _refusal(self, error: Exception, turns: Sequence[Turn]) -> ModelError:
        roles = ", ".join(turn.role for turn in turns)
        words = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if isinstance(error, UndefinedError) or not isinstance(error, TemplateError):
            remedy = "set what it wants in model.chat_template_kwargs, or name another jinja file in model.chat_template"
            return ModelError(
                f"the chat template of {self.name} fails on the turns {roles} "
                f"({type(error).__name__}: {words}); {remedy}"
            )
        return ModelError(
            f"the chat template of {self.name} refuses the turns {roles}: {words}; "
            "name another jinja file in model.chat_template"
        )
