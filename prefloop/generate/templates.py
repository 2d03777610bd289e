"""Prompt templates: sandboxed Jinja files, which users can replace."""

from __future__ import annotations

from pathlib import Path

from jinja2 import (
    FileSystemLoader,
    StrictUndefined,
    TemplateError,
    TemplateNotFound,
    TemplateSyntaxError,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prefloop.errors import RecipeError
from prefloop.records import Message

SHIPPED = Path(__file__).parent / "prompts"


def shipped_sets() -> list[str]:
    """Names of the prompt sets that come with the package."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir())


class PromptSet:
    """A folder of Jinja files, one per role ("advisor.jinja"); missing files are taken from "compact"."""

    def __init__(self, name: str) -> None:
        """`name` is a shipped set ("compact", "paper", "shared") or a user's folder. Raises RecipeError."""
        folder = SHIPPED / name if name in shipped_sets() else Path(name)
        if not any(folder.glob("*.jinja")):
            raise RecipeError(
                f"no prompt set {name!r}: name one of {', '.join(shipped_sets())}, "
                "or a folder with your own .jinja files"
            )
        self.name = name
        self._environment = ImmutableSandboxedEnvironment(
            loader=FileSystemLoader([folder, SHIPPED / "compact"]),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        for file in sorted(folder.glob("*.jinja")):
            self._check_syntax(file.name)

    def _check_syntax(self, file: str) -> None:
        try:
            self._environment.get_template(file)
        except TemplateSyntaxError as error:
            raise RecipeError(
                f"{file} of prompt set {self.name!r}, line {error.lineno}: "
                f"{str(error.message).rstrip('.')}; correct it there"
            ) from error
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"{file} of prompt set {self.name!r} is not UTF-8 text; save it as UTF-8"
            ) from error

    def render(self, role: str, **values: object) -> tuple[Message, ...]:
        """The prompt of a role, a single user turn with the rendered template. Raises RecipeError."""
        try:
            text = self._environment.get_template(f"{role}.jinja").render(**values)
        except TemplateNotFound as error:
            raise RecipeError(
                f"prompt set {self.name!r} has no file {error.name}; write it there"
            ) from error
        except (TemplateError, ArithmeticError, TypeError, ValueError) as error:
            raise RecipeError(
                f"{role}.jinja of prompt set {self.name!r} fails ({str(error).rstrip('.')}); "
                f"it is given {', '.join(values)}"
            ) from error
        return (Message(role="user", content=text.strip()),)
