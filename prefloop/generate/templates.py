"""The prompts we put to a model, as sandboxed Jinja files that users may replace by their own."""

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
    """A folder of Jinja files, one per role ("advisor.jinja"); files missing in a user's folder fall back."""

    def __init__(self, name: str) -> None:
        """`name` is a shipped set ("compact", "paper") or a folder of the user's."""
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
            self._demand_syntax(file.name)

    def _demand_syntax(self, file: str) -> None:
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
        """The conversation that asks a model to play `role`; the template's text is the user's turn."""
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
