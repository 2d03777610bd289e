"""`prefloop judge check` and `prefloop reward train`: check judges against human choices, train reward models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prefloop.cli.switches import Group, Verbosity, results_console

judge_app = typer.Typer(help="Judges beside people's choices.", no_args_is_help=True, cls=Group)
reward_app = typer.Typer(
    help="Reward models from people's choices.", no_args_is_help=True, cls=Group
)

JSON = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]


@judge_app.command("check")
def judge_check(
    judges: Annotated[
        list[str],
        typer.Argument(
            metavar="JUDGE...",
            help='A judge\'s name, "{name: reward_model, model: FOLDER}", or a YAML file with a section judge.',
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="FILE", help="Labelled pairs; repeatable."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of every JUDGE; repeatable."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy", metavar="MODEL", help="The model that judges such as self_judge ask."
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            metavar="FILE",
            help="Prompts with responses to compare with; matched by prompt.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, help="Pairs of each data set, drawn at random, always the same."
        ),
    ] = None,
    both_orders: Annotated[
        bool, typer.Option("--both-orders", help="Ask twice, for position bias.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Compare judges with people's choices, with chance, and with "the longer answer"."""
    from prefloop.evaluate.judge_check import check_judges, load_pairs, parse_judge, with_targets
    from prefloop.report.judges import show_judges

    judges_by_label = dict(parse_judge(text, overrides or ()) for text in judges)
    pairs = load_pairs(data, limit, seed=0)
    if targets is not None:
        pairs = with_targets(pairs, targets)
    report = check_judges(judges_by_label, pairs, policy=policy, both_orders=both_orders)
    if as_json:
        typer.echo(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        show_judges(report, results_console())


@reward_app.command("train")
def reward_train(
    recipe: Annotated[str, typer.Argument(help="A reward recipe, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override, such as train.lr=1e-5; repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The model's folder.  [default: rewards/NAME]")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Train a reward model on labelled pairs and measure it; the same command goes on where it stopped."""
    from prefloop.data.preferences import read_preferences
    from prefloop.evaluate.judge_check import baselines
    from prefloop.recipe.reward import FOLDER, load_reward_recipe
    from prefloop.report.judges import show_calibration, show_judges
    from prefloop.run.reward import HELD_OUT, train_reward

    loaded = load_reward_recipe(recipe, overrides or ())
    folder = out or FOLDER / loaded.name
    report = train_reward(
        loaded,
        folder,
        lambda line: None if Verbosity.level == "quiet" else typer.echo(line, err=as_json),
    )
    if as_json:
        typer.echo(json.dumps(report, indent=1, ensure_ascii=False))
        return
    console = results_console()
    held_out = read_preferences(str(folder / HELD_OUT)).pairs
    console.print()
    show_judges({**baselines(held_out), "reward model": report["held_out"]}, console)
    show_calibration(report["held_out"], console)
    typer.echo(f"\nreward model  {folder}    judge: {{name: reward_model, model: {folder}}}")
