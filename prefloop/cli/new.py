"""`prefloop new`: a commented recipe after a few questions, or from options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefloop.cli.switches import note

if TYPE_CHECKING:
    from prefloop.recipe.draft import Choices

_QUESTIONS = {
    "method": "Method (prefloop ls methods)",
    "model": "Model: a folder, a hub id, or embedded:NAME",
    "train": "Prompts to train on: a file, a folder, a hub data set, or embedded:instructions",
    "eval": "Prompts to evaluate on (empty: hold some out)",
    "judge": "Judge (empty: one that fits; prefloop ls judges)",
}


def _plugin_words(kind: str) -> Any:
    """Completion: names of plug-ins, by their files, so that nothing heavy is imported."""

    def words(incomplete: str) -> list[str]:
        folder = Path(__file__).parents[1] / kind
        names = sorted(path.stem for path in folder.glob("[!_]*.py"))
        return [name for name in names if name.startswith(incomplete)]

    return words


METHOD = Annotated[
    str | None,
    typer.Option("--method", help="As ls methods has it.", autocompletion=_plugin_words("methods")),
]
JUDGE = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help='A name, or "{name: reward_model, model: FOLDER}".',
        autocompletion=_plugin_words("judges"),
    ),
]


def new(  # noqa: PLR0913 - an option of the command line is a parameter
    file: Annotated[
        Path | None, typer.Argument(help="The recipe to write.  [default: METHOD.yaml]")
    ] = None,
    method: METHOD = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A folder, a hub id, or embedded:NAME.")
    ] = None,
    train: Annotated[
        str | None, typer.Option("--train", metavar="SOURCE", help="Prompts to train on.")
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--eval", metavar="SOURCE", help="Prompts to evaluate on; else some are held out."
        ),
    ] = None,
    judge: JUDGE = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights, not an adapter.")
    ] = False,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1)] = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", min=1, help="Prompts a round, at most.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Tokens an answer, at most.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there.")
    ] = False,
) -> None:
    """Write a commented recipe, after a few questions; without them where options are given or nobody can answer.

    What is written has passed `prefloop check`.
    """
    given: dict[str, Any] = {
        "method": method,
        "model": model,
        "train": train,
        "eval": evaluation,
        "judge": judge,
        "tuning": "full" if full else None,
        "rounds": rounds,
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if not chosen and sys.stdin.isatty():
        chosen = _ask()
    from prefloop.recipe.draft import Choices

    _write(Choices(**chosen), file, force=force)


def _ask() -> dict[str, Any]:
    from prefloop.recipe.draft import Choices

    answers = {
        name: typer.prompt(question, default=getattr(Choices(), name) or "", err=True).strip()
        for name, question in _QUESTIONS.items()
    }
    return {name: answer for name, answer in answers.items() if answer}


def _write(choices: Choices, file: Path | None, *, force: bool) -> None:
    """Write the recipe where it passes the check; else nothing."""
    from prefloop.config import read_recipe
    from prefloop.errors import RecipeError, counted
    from prefloop.manifest import write_atomically
    from prefloop.recipe import Recipe
    from prefloop.recipe.check import check_recipe
    from prefloop.recipe.draft import draft_recipe

    path = file or Path(f"{choices.method}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{path} does not end in .yaml; name it so")
    if path.exists() and not force:
        raise RecipeError(f"{path} exists; name another file, or give --force")
    text = draft_recipe(choices, path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    try:
        part.write_text(text, encoding="utf-8")
        recipe = read_recipe(part, Recipe, (), needs="method")
        notes = check_recipe(recipe)
    finally:
        part.unlink(missing_ok=True)
    write_atomically(path, text)
    if (taken := recipe.loop.prompts_per_round) < choices.prompts:
        besides = f" besides the {recipe.data.holdout} held out" if recipe.data.holdout else ""
        notes.insert(
            0,
            f"{choices.train} has {counted(taken, 'prompt')} to train on{besides}; a round takes these, "
            f"not {choices.prompts}",
        )
    for sentence in notes:
        note(f"note: {sentence}")
    typer.echo(f"recipe in {path}; next: prefloop run {path}")
