"""The console: what a terminal shows, what a file gets, and what a model's text cannot do."""

import io

import pytest
from rich.console import Console

from prefloop.records import Message, Pair, RoundResult
from prefloop.report.console import (
    duration,
    format_values,
    measure_names,
    show_pair,
    show_rounds,
    stage_line,
    visible_rounds,
)


def plain(show, thing, **options):
    console = Console(file=io.StringIO(), **{"width": 40, **options})
    show(thing, console)
    return console.file.getvalue()


def rounds(*measures):
    return [RoundResult(round=i, measures=m) for i, m in enumerate(measures, start=-1)]


def pair(**fields):
    given = {
        "prompt_id": "p1",
        "round": 0,
        "prompt": (
            Message(role="system", content="Be brief."),
            Message(role="user", content="Hi?"),
        ),
        "chosen": "It was green here.",
        "rejected": "It is red here.",
    }
    return Pair(**{**given, **fields})


def test_a_file_gets_the_table_as_plain_lines():
    text = plain(
        show_rounds,
        rounds({"kl": None, "win_rate": 0.5}, {"kl": 0.02, "win_rate": 0.625}, {"win_rate": 0.6}),
    )
    assert text == (
        "round     start      0      1  change\n"
        "win_rate  0.500  0.625  0.600  +0.100\n"
        "kl            -  0.020      -\n"
    )


def test_a_terminal_gets_arrows_for_the_step_before():
    results = rounds({"win_rate": 0.5}, {"win_rate": 0.625}, {"win_rate": 0.6}, {"win_rate": 0.6})
    text = plain(show_rounds, results, force_terminal=True, color_system=None, width=80)
    assert "0.500  0.625↑  0.600↓  0.600→  +0.100" in text


def test_a_file_never_gets_cut_lines_however_long_the_names():
    name = "a_measure_with_a_very_long_name_" * 4
    assert f"{name}  1.000" in plain(show_rounds, rounds({name: 1.0}))


def test_many_rounds_keep_the_start_and_the_latest():
    results = rounds(*({"kl": float(i)} for i in range(30)))
    shown = [None if result is None else result.round for result in visible_rounds(results)]
    assert shown == [-1, 0, None, 24, 25, 26, 27, 28]
    assert visible_rounds(results[:8]) == results[:8]
    text = plain(show_rounds, results)
    assert text.splitlines()[0].split() == "round start 0 ... 24 25 26 27 28 change".split()
    assert text.splitlines()[1].split() == "kl 0 1 ... 25 26 27 28 29 +29".split()


def test_measures_come_known_first_with_their_parts_then_by_name():
    names = ["zeta", "kl", "win_rate_low", "alpha", "win_rate", "score"]
    results = [RoundResult(round=0, measures=dict.fromkeys(names, 1.0))]
    assert measure_names(results) == ["score", "win_rate", "win_rate_low", "kl", "alpha", "zeta"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.5, None, 1.0], ["0.500", "-", "1.000"]),
        ([187.25, 3.0], ["187.2", "3.0"]),
        ([31.0, 2.0], ["31", "2"]),
        ([5e-7, 0.0], ["5.0e-07", "0.0e+00"]),
        ([0.0, 0.0], ["0.000", "0.000"]),
        ([float("nan"), 1.5], ["nan", "1.500"]),
        ([], []),
    ],
)
def test_a_row_has_as_many_digits_as_it_needs(values, shown):
    assert format_values(values) == shown


def test_a_pair_in_a_file_has_marks():
    text = plain(show_pair, pair(margin=1.5, origin={"chosen": "refined"}, scores={"chosen": 0.25}))
    assert text == (
        "pair 0000/p1  margin 1.5  chosen: refined  chosen scores 0.25\n"
        "system\nBe brief.\nuser\nHi?\n"
        "chosen\nIt {+was green+} here.\n"
        "rejected\nIt [-is red-] here.\n\n"
    )


def test_a_pair_on_a_terminal_has_colours_and_no_marks():
    text = plain(show_pair, pair(), force_terminal=True, color_system="standard")
    assert "\x1b[1;32mwas green\x1b[0m" in text
    assert "\x1b[1;31mis red\x1b[0m" in text
    assert "{+" not in text


def test_the_target_is_shown_where_there_is_one():
    assert "target\nGreen.\n" in plain(show_pair, pair(target="Green."))


@pytest.mark.parametrize("terminal", [True, False])
def test_model_text_is_neither_markup_nor_a_control_sequence(terminal):
    hostile = "[bold]x[/bold] [/] :smile: \x1b[2J\x07\x9b31m"
    text = plain(
        show_pair,
        pair(chosen=hostile, rejected="", prompt_id="\x1b[2J"),
        force_terminal=terminal,
        color_system=None,
        width=200,
    )
    assert "[bold]x[/bold] [/] :smile: ␛[2J␇\ufffd31m" in text
    assert "\x1b[2J" not in text


def test_a_file_never_gets_wrapped_answers():
    answer = "word " * 60 + "end"
    assert f"{{+{answer}+}}" in plain(show_pair, pair(chosen=answer, rejected=""))


def test_a_stage_is_one_line_with_counts_in_their_number():
    line = stage_line(0, "candidates", {"prompts": 32, "groups": 31, "rejects": 1}, 41.2)
    assert line == "round 0  candidates  32 prompts, 31 groups, 1 reject  41 s"
    assert stage_line(-1, "evaluate", {}, 3.0) == "start    evaluate    3.0 s"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (119.4, "119 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds, said):
    assert duration(seconds) == said
