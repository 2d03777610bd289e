"""The command line: one short function per verb; heavy modules are imported inside their verb."""

from __future__ import annotations

import errno
import json
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from prefloop import __version__
from prefloop.cli.annotate import annotate
from prefloop.cli.compare import compare
from prefloop.cli.data import data
from prefloop.cli.evaluate import evaluate
from prefloop.cli.judge import judge_app, reward_app
from prefloop.cli.new import new
from prefloop.cli.push import push
from prefloop.cli.report import RunArgument, clean, report, show, verify, watch
from prefloop.cli.switches import (
    HELP_NAMES,
    Group,
    Verbosity,
    log_to_stderr,
    note,
    progress_console,
    results_console,
)
from prefloop.errors import (
    DataError,
    PrefloopError,
    RecipeError,
    counted,
    out_of_memory,
    system_failure,
)

if TYPE_CHECKING:
    from prefloop.recipe import Recipe
    from prefloop.records import Pair

_TERMINATED = 128 + signal.SIGTERM
EXIT_CODES = {
    0: "done",
    1: "what was asked for was looked at, and is not well: a cell of a comparison failed, or a file of a run is damaged; "
    "a bug, with its traceback",
    2: "an error that you can correct, in one sentence on standard error; a command that was written wrongly",
    130: "interrupted by Ctrl-C",
    _TERMINATED: "ended by SIGTERM",
}
"""What the command line's exit codes say."""
_REMEDIES = {
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: "correct the path",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "shorten it",
    errno.EACCES: "choose a place that you may read and write",
    errno.EROFS: "choose a place that can be written",
    errno.EMFILE: "raise the limit (ulimit -n)",
}

app = typer.Typer(
    help="Closed-loop self-alignment of language models, from one recipe.",
    cls=Group,
    context_settings=HELP_NAMES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _recipe_words(incomplete: str) -> list[str]:
    """What a recipe may be called, for the shell's completion."""
    from prefloop.config import SHIPPED

    folders = (SHIPPED, Path(SHIPPED.name))
    names = [path.stem for folder in folders for path in sorted(folder.glob("*.yaml"))]
    names += [str(path) for path in sorted(Path().glob("*.yaml"))]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="A recipe file, or the name of a shipped one.", autocompletion=_recipe_words
    ),
]
ModelConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="With --estimate: the config.json of a model that is not here. Its tokens are counted with the "
        "embedded model's tokenizer."
    ),
]
PromptTokensOption = Annotated[
    int | None,
    typer.Option(min=1, help="With --estimate: of every prompt, where the data are not here."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, such as train.lr=5e-7; repeatable."),
]


class Kind(StrEnum):
    """The kinds of things that `ls` lists."""

    methods = "methods"
    judges = "judges"
    engines = "engines"
    measures = "measures"
    recipes = "recipes"
    reward_recipes = "reward-recipes"
    models = "models"


class Format(StrEnum):
    """The file formats that `export` writes."""

    jsonl = "jsonl"
    parquet = "parquet"
    sharegpt = "sharegpt"


def main() -> None:
    """Run the command line.

    Exit codes: docs/command-line.md, and EXIT_CODES.
    """
    Verbosity.reset()
    previous_handler = signal.signal(signal.SIGTERM, _terminate)
    try:
        _check_words(sys.argv[1:])
        app(prog_name="prefloop")
    except SystemExit as end:
        if end.code in (130, _TERMINATED):
            _print_error("interrupted; the same command goes on where it stopped")
        raise
    except PrefloopError as error:
        _print_origin()
        _print_error(str(error))
        sys.exit(2)
    except Exception as error:
        sentence = _in_words(error)
        if sentence is None:
            raise
        _print_origin()
        _print_error(sentence)
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _check_words(words: Sequence[str]) -> None:
    """Recipes, records and tokenizers are UTF-8, so a name in another encoding could not be written down."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{word!r} is not UTF-8; rename the file or the folder, or write the word in UTF-8"
            ) from error


def _in_words(error: Exception) -> str | None:
    """What the system or a library refused, with a remedy; None for what only a bug can cause."""
    if out_of_memory(error):
        return (
            f"out of memory ({error}); lower batch sizes, lengths or chunks, or take a smaller model; the same "
            "command goes on where it stopped"
        )
    name = error.filename if isinstance(error, OSError) and error.filename else "this machine"
    if (words := system_failure(error, name)) is not None:
        return words
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        remedy = _REMEDIES.get(error.errno or 0, "mend that, then try again")
        return f"{where}{error.strerror or error}; {remedy}"
    return None


def _terminate(*_: object) -> None:
    sys.exit(_TERMINATED)


def _print_origin() -> None:
    """Under --verbose, where in the code the error that is now handled arose."""
    if Verbosity.level == "verbose":
        traceback.print_exc()


def _print_error(sentence: str) -> None:
    """Print one line on stderr, without line breaks and control characters of library messages or files."""
    line = " ".join(sentence.split())
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    typer.echo(f"prefloop: {printable}", err=True)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"prefloop {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Closed-loop self-alignment of language models, from one recipe."""


# From a recipe to a run.

app.command()(new)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The run's folder.  [default: runs/NAME]")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="No lines by stage; one JSON object at the end.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes",
            help="Go on although model, data, judge or versions are not those of the run's start.",
        ),
    ] = False,
) -> None:
    """Play a recipe's closed loop; the same command goes on with a run that was stopped."""
    from prefloop.recipe import load_recipe
    from prefloop.recipe.check import check_recipe

    loaded = load_recipe(recipe, overrides or ())
    for text in check_recipe(loaded):
        note(f"note: {text}")
    from prefloop.report.summary import outcome_json, show_outcome
    from prefloop.run.loop import run as play

    log_to_stderr()
    console = progress_console(quiet=as_json)
    folder = out or Path("runs") / loaded.name
    if not console.quiet and _is_new(folder):
        from prefloop.run.estimate import first_line

        if line := first_line(loaded):
            console.print(line, highlight=False, soft_wrap=True)
    outcome = play(loaded, folder, console, accept_changes=accept_changes)
    # It draws: matplotlib is not waited for before the first round.
    from prefloop.report.html import write_report

    write_report([outcome.folder], outcome.folder / "report.html")
    if as_json:
        typer.echo(outcome_json(outcome))
    else:
        show_outcome(outcome, results_console())


def _is_new(folder: Path) -> bool:
    try:
        return not folder.exists()
    except OSError:  # a name that no folder can have; the run says so
        return False


app.command()(data)
app.command()(show)
app.command()(watch)
app.command()(report)
app.command()(verify)
app.command()(clean)


@app.command()
def export(
    run_folder: RunArgument,
    out: Annotated[Path, typer.Argument(help="A file, or a folder for pairs.jsonl or .parquet.")],
    kind: Annotated[
        Format, typer.Option("--format", help="TRL's rows as jsonl or parquet; ShareGPT's.")
    ] = Format.jsonl,
    rounds: Annotated[
        list[int] | None, typer.Option("--round", min=0, help="Only this round; repeatable.")
    ] = None,
) -> None:
    """Write a run's pairs in TRL's conversational preference format, or in ShareGPT's."""
    from prefloop.data.export import export_pairs
    from prefloop.run_folder import read_run

    by_round, left_out = read_run(run_folder).pairs(rounds), 0

    def finished() -> Iterator[Pair]:
        """TRL adds an end of turn to every answer, which would be wrong for a cut-off one."""
        nonlocal left_out
        count = 0
        for pair in chain.from_iterable(pairs for _, pairs in by_round):
            count += not pair.unfinished
            left_out += bool(pair.unfinished)
            if not pair.unfinished:
                yield pair
        if left_out and not count:
            raise DataError(
                f"every pair of {run_folder} has a cut-off answer; begin a run with a higher "
                "method.sampling.max_new_tokens"
            )

    exported = export_pairs(finished(), out, kind.value)
    typer.echo(
        f"{counted(exported.pairs, 'pair')} in {exported.path}"
        + (f"; {counted(left_out, 'cut-off one')} left out" * bool(left_out))
    )


@app.command()
def merge(
    run_folder: RunArgument,
    out: Annotated[Path, typer.Argument(help="The model's folder; must not exist.")],
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that comes with the run's model."),
    ] = False,
    gguf: Annotated[
        Literal["f16", "q8_0"] | None,
        typer.Option("--gguf", help="Write a file for llama.cpp and Ollama too."),
    ] = None,
) -> None:
    """Write a run's policy as one plain model, its adapter merged in."""
    from prefloop.run.publish import merge_policy

    merged = merge_policy(run_folder, out, trust_remote_code=trust_remote_code, gguf=gguf)
    typer.echo(f"merged model in {merged}")


app.command()(push)


# Recipes, and what they name.


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    dump: Annotated[
        bool, typer.Option("--dump", help="Print the recipe with every value.")
    ] = False,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Tokens, FLOPs, hours, memory, disk; of a finished run's folder, beside what it took.",
        ),
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option("--gpus", help="With --estimate: for 8xH100, not for this machine's CPU."),
    ] = None,
    model_config: ModelConfigOption = None,
    prompt_tokens: PromptTokensOption = None,
) -> None:
    """Look for what would stop a run, without loading a model."""
    from prefloop.recipe import load_recipe
    from prefloop.recipe.check import check_recipe

    told = {"--model-config": model_config, "--prompt-tokens": prompt_tokens}
    _only_to_estimate({"--gpus": gpus, **told}, estimate=estimate)
    if estimate and (Path(recipe) / "recipe.yaml").is_file():
        given = [option for option, value in {**told, "--set": overrides}.items() if value]
        if given or dump:
            raise RecipeError(
                f"{recipe} is a run, and its recipe, model and prompts are as it was played; leave out "
                + " and ".join([*given, *["--dump"] * dump])
            )
        _estimate_beside(Path(recipe), gpus)
        return
    loaded = load_recipe(recipe, overrides or ())
    notes = check_recipe(loaded)
    # Only a model that was looked at, or is to be, is worth torch's import.
    if loaded.model.dtype == "auto" and (estimate or "torch" in sys.modules):
        notes.append(_dtype_of_auto(loaded, on_gpus=gpus is not None))
    if dump:
        typer.echo(loaded.dump(), nl=False)
    for text in notes:
        if Verbosity.level != "quiet":
            typer.echo(f"note: {text}", err=dump)
    if estimate:
        from prefloop.run import estimate as estimating

        rates = estimating.rates_for(loaded, gpus)
        told_all = estimating.Told(model_config, prompt_tokens, "cpu" if gpus is None else "cuda")
        found = estimating.estimate(loaded, rates, told=told_all)
        typer.echo("\n".join(found.lines()), err=dump)
    if not dump:
        typer.echo(f"{loaded.name}: ok")


def _dtype_of_auto(recipe: Recipe, *, on_gpus: bool) -> str:
    """What `model.dtype: auto` would be in a run that began on this machine, or on GPUs, as far as it is known without the model."""
    from prefloop.models.dtype import choose_dtype, device_type
    from prefloop.recipe import against_bfloat16

    if on_gpus:
        return choose_dtype(recipe.model, "cuda").in_words("there")
    device = device_type(recipe.model.device)
    return choose_dtype(recipe.model, device, against_bfloat16(recipe)).in_words()


def _only_to_estimate(options: Mapping[str, object], *, estimate: bool) -> None:
    for option, value in options.items():
        if value is not None and not estimate:
            raise RecipeError(f"{option} is for an estimate; add --estimate, or leave it out")


def _estimate_beside(run_folder: Path, gpus: str | None) -> None:
    from prefloop.run.estimate import rates_for
    from prefloop.run.estimate_beside import beside

    for line in beside(run_folder, lambda recipe: rates_for(recipe, gpus)):
        typer.echo(line)


@app.command("ls")
def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, name to line.")] = False,
) -> None:
    """List methods, judges, engines, measures, recipes, reward recipes or embedded models, with a line on each."""
    listing = {
        Kind.methods: _methods,
        Kind.judges: _judges,
        Kind.engines: _engines,
        Kind.measures: _measures,
        Kind.recipes: _recipes,
        Kind.reward_recipes: _reward_recipes,
        Kind.models: _models,
    }[kind]()
    if as_json:
        typer.echo(json.dumps(listing, indent=2, ensure_ascii=False))
        return
    width = max(map(len, listing), default=0)
    for name, line in listing.items():
        typer.echo(f"{name:{width}}  {line}".rstrip())


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option("--out", help="Write to this file.")] = None,
) -> None:
    """JSON schema of recipes, for editors: every option of every method and judge."""
    from prefloop.recipe.schema import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False)
    if out is None:
        typer.echo(text)
    else:
        out.write_text(f"{text}\n", encoding="utf-8")


# Measuring and comparing.

app.command()(evaluate)
app.command()(compare)
app.command()(annotate)
app.add_typer(judge_app, name="judge")
app.add_typer(reward_app, name="reward")


def _methods() -> dict[str, str]:
    import prefloop.methods as package

    return _plugins(package, package.Method, "method")


def _judges() -> dict[str, str]:
    import prefloop.judges as package

    return _plugins(package, package.Judge, "judge")


def _engines() -> dict[str, str]:
    import prefloop.generate.engines as package
    from prefloop.generate.engine import EngineOptions

    return _plugins(package, EngineOptions, "engine")


def _plugins(package: ModuleType, base: type, kind: str) -> dict[str, str]:
    from prefloop.config import find_plugin, plugin_names

    return {
        name: _first_line(find_plugin(package, name, base, kind)) for name in plugin_names(package)
    }


def _measures() -> dict[str, str]:
    from prefloop.evaluate.suites import find_measure, measure_names

    return {name: _first_line(find_measure(name)) for name in measure_names()}


def _recipes() -> dict[str, str]:
    from prefloop.recipe import shipped_recipes

    return _first_comments(shipped_recipes())


def _reward_recipes() -> dict[str, str]:
    from prefloop.recipe.reward import shipped_reward_recipes

    return _first_comments(shipped_reward_recipes())


def _first_comments(recipes: Mapping[str, Path]) -> dict[str, str]:
    lines = {}
    for name, path in sorted(recipes.items()):
        first = path.read_text(encoding="utf-8-sig").partition("\n")[0]
        lines[name] = first.lstrip("# ") if first.startswith("#") else ""
    return lines


def _models() -> dict[str, str]:
    from prefloop.models.sources import EMBEDDED

    return {f"embedded:{name}": model.about for name, model in EMBEDDED.items()}


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]
