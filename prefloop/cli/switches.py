"""What holds for every command: -h, --quiet and --verbose, and summaries that are not cut."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

from prefloop.errors import nearest

Level = Literal["quiet", "usual", "verbose"]
HELP_NAMES = {"help_option_names": ["-h", "--help"]}


class Verbosity:
    """How much the command line tells besides its results; one for the process."""

    level: ClassVar[Level] = "usual"

    @classmethod
    def reset(cls) -> None:
        """Tell as much as usual."""
        if cls.level != "usual":
            cls.set("usual")

    @classmethod
    def set(cls, level: Level) -> None:
        """Begin to tell so much. Quiet also switches bars off; verbose lets libraries speak."""
        from prefloop.machine import Bar

        cls.level = level
        Bar.hidden = level == "quiet"
        if level == "verbose":
            log_to_stderr()
        logging.getLogger("prefloop").setLevel(
            logging.INFO if level == "verbose" else logging.NOTSET
        )


def log_to_stderr() -> None:
    """Give what is logged a plain form, on stderr."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)


def note(line: str) -> None:
    """Print a line that is no result, on stderr; nothing under --quiet."""
    if Verbosity.level != "quiet":
        typer.echo(line, err=True)


def results_console() -> Console:
    """Where results are printed. Rich leaves colours out in a pipe, and where NO_COLOR is set."""
    return Console(highlight=False)


def progress_console(*, quiet: bool = False) -> Console:
    """Where the lines of finished stages go; nowhere if `quiet`, or under --quiet."""
    return Console(highlight=False, quiet=quiet or Verbosity.level == "quiet")


def _on(level: Level) -> Callable[[bool], bool]:
    def callback(given: bool) -> bool:
        # Asked before and after the verb: what was not given there must not undo what was given here.
        if given and Verbosity.level not in ("usual", level):
            raise typer.BadParameter("--quiet and --verbose exclude each other; give one of them")
        if given:
            Verbosity.set(level)
        return given

    return callback


def _declared(
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            callback=_on("quiet"),
            expose_value=False,
            help="No notes, progress and lines by stage; results, warnings and errors stay.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            callback=_on("verbose"),
            expose_value=False,
            help="More of what happens; an error with where in the code it arose.",
        ),
    ] = False,
) -> None:
    """Both switches, declared where typer reads them; never called."""


@cache
def _switches() -> tuple[Any, ...]:
    """Both switches as options, which all commands share: parsing leaves an option as it is."""
    declaring = typer.Typer(add_completion=False)
    declaring.command()(_declared)
    return tuple(typer.main.get_command(declaring).params)


class Group(TyperGroup):
    """Commands with --quiet and --verbose before and after them, listed with their whole first sentence."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.params += _switches()
        for command in self.commands.values():
            if not isinstance(command, TyperGroup):
                command.params += _switches()

    def invoke(self, ctx: Any) -> Any:
        """Run the command; of a word that is none of its choices, the nearest one is named."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = _choice_in_words(error.message)
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands; a summary that is too long for its line goes on in the next."""
        rows = [
            (name, _summary(command.help or ""))
            for name, command in self.commands.items()
            if not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _choice_in_words(message: str) -> str:
    """What typer says of a wrong value, without the prefix that is pydantic's, and with the nearest choice."""
    message = message.removeprefix("Value error, ")
    if found := re.fullmatch(r"'(.*)' is not one of (.*)\.", message):
        hint = nearest(found[1], re.findall(r"'(.*?)'", found[2]))
        if hint.startswith("did"):
            return f"{message[:-1]}; {hint}"
    return message


def _summary(help: str) -> str:
    """The first paragraph of a command's help."""
    return " ".join(inspect.cleandoc(help).partition("\n\n")[0].split())
