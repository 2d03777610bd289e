"""The chain of a prompt: nothing that was written for it is lost, each text knows what it was made from."""

import gc
from pathlib import Path

from prefloop.records import (
    Candidates,
    Message,
    Pair,
    Prompt,
    Reject,
    Response,
    write_jsonl,
)
from prefloop.report.chain import held_out_chains, pair_chain, round_chains
from prefloop.run_folder import open_run, read_run
from tests.report.conftest import group, make_run, plain_text, write_round


def test_an_arop_pair_is_told_in_the_order_in_which_it_was_written(made_run: Path) -> None:
    first = next(round_chains(read_run(made_run).round(0), {}))
    steps = {step.name: step for step in first.steps}
    assert [*steps] == ["draft_a", "draft_b", "critique", "refined", "flawed"]
    assert steps["refined"].base == "draft_a"
    assert steps["refined"].roles == ("chosen",)
    assert steps["flawed"].base == "refined"
    assert steps["flawed"].roles == ("rejected",)
    assert (first.id, first.margin) == ("0000/p0", 0.25)
    assert first.gap == steps["refined"].score - 0.5  # type: ignore[operator]
    assert first.ratings["severity_honesty"] == 2.0


def test_an_ial_triple_has_its_target_and_the_answer_it_was_ranked_by() -> None:
    texts = {"draft": "one", "advice": "say more", "rewrite": "one and more"}
    asked = (Message(role="user", content="Count."),)
    candidates = Candidates(
        prompt=Prompt(id="a", messages=asked, target="three"),
        responses={
            name: Response(text=text, finish="length" if name == "draft" else "stop")
            for name, text in texts.items()
        },
    )
    pair = Pair(
        prompt_id="a",
        round=1,
        prompt=asked,
        chosen="one and more",
        rejected="one",
        target="three",
        origin={"chosen": "rewrite", "rejected": "draft"},
        unfinished=("rejected",),
        scores={"chosen": 2.0, "rejected": 3.5},
    )
    chain = pair_chain(pair, candidates)
    assert [(step.name, step.roles, step.base) for step in chain.steps] == [
        ("draft", ("rejected",), ""),
        ("advice", (), ""),
        ("rewrite", ("chosen",), "draft"),
        ("target", ("target",), ""),
    ]
    assert [step.unfinished for step in chain.steps] == [True, False, False, False]
    assert chain.gap == -1.5


def test_a_pair_whose_groups_are_gone_still_shows_both_answers() -> None:
    asked = (Message(role="user", content="Count."),)
    pair = Pair(prompt_id="a", round=0, prompt=asked, chosen="yes", rejected="no")
    steps = pair_chain(pair, None).steps
    assert [(s.name, s.text, s.base) for s in steps] == [
        ("chosen", "yes", ""),
        ("rejected", "no", "chosen"),
    ]


def test_an_empty_answer_stays_a_text_for_the_page() -> None:
    asked = (Message(role="user", content="Count."),)
    origin = {"chosen": "chosen", "rejected": "rejected"}
    pair = Pair(prompt_id="a", round=0, prompt=asked, chosen="", rejected="no", origin=origin)
    steps = pair_chain(pair, None).to_json()["steps"]
    assert [step["text"] for step in steps] == ["", "no"]


def test_a_method_of_single_answers_shows_one_and_a_third_answer_is_shown_too() -> None:
    asked = (Message(role="user", content="Count."),)
    alone = Pair(prompt_id="a", round=0, prompt=asked, chosen="yes", rejected="")
    assert [step.name for step in pair_chain(alone, None).steps] == ["chosen"]
    three = Pair(prompt_id="a", round=0, prompt=asked, chosen="yes", rejected="no", sample="well")
    assert [step.roles for step in pair_chain(three, None).steps] == [
        ("chosen",),
        ("rejected",),
        ("sample",),
    ]


def test_an_answer_that_a_method_changed_after_sampling_is_a_step_of_its_own() -> None:
    found = group("p0", 0, plain_text)
    pair = Pair(
        prompt_id="p0",
        round=0,
        prompt=found.prompt.messages,
        chosen="shortened",
        rejected=found.responses["flawed"].text,
        origin={"chosen": "refined", "rejected": "flawed"},
    )
    roles = {step.name: step.roles for step in pair_chain(pair, found).steps}
    assert roles["refined"] == ()
    assert roles["chosen"] == ("chosen",)


def test_a_reject_comes_with_its_reason_and_all_that_was_written(made_run: Path) -> None:
    chains = list(round_chains(read_run(made_run).round(1), {}))
    assert [chain.kind for chain in chains] == ["pair", "pair", "pair", "reject"]
    last = chains[-1]
    assert (last.id, last.stage, last.reason) == ("0001/p3", "pair", "cut off")
    assert last.steps[3].text == plain_text("p3", 1, "refined")


def test_pairs_that_left_the_order_of_their_groups_find_them(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "name: run\n") as run:
        round_dir = run.round(0)
        write_round(round_dir, ["a", "b", "c"], plain_text)
        write_jsonl(round_dir.path / "pairs.jsonl", reversed(round_dir.records("pairs", Pair)))
        round_dir.finish("pairs")
        chains = list(round_chains(round_dir, {}))
    assert [chain.id for chain in chains] == ["0000/c", "0000/b", "0000/a"]
    assert all(len(chain.steps) == 5 for chain in chains)


def test_a_held_out_prompt_shows_how_its_answer_changed(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    first, _ = held_out_chains(run)
    assert [step.name for step in first.steps] == ["start", "after round 0", "after round 1"]
    assert [step.base for step in first.steps] == ["", "start", "after round 0"]
    assert first.gap == 2.0


def test_of_a_rounds_groups_hardly_any_is_held(tmp_path: Path) -> None:
    """Half of the prompts give pairs, a quarter is rejected in ranking, a quarter in pairing."""
    names = [f"p{n}" for n in range(80)]
    with open_run(tmp_path / "run", "name: run\n") as run:
        round_dir = run.round(0)
        write_round(round_dir, names, plain_text)
        for stage, kept in (("ranked", lambda n: n % 4 != 1), ("pairs", lambda n: n % 2 == 0)):
            kind = Candidates if stage == "ranked" else Pair
            records = round_dir.records(stage, kind)
            write_jsonl(
                round_dir.path / f"{stage}.jsonl", [r for n, r in enumerate(records) if kept(n)]
            )
        rejects = [
            Reject(prompt_id=names[n], stage=stage, reason="no")
            for stage, first in (("rank", 1), ("pair", 3))
            for n in range(first, 80, 4)
        ]
        write_jsonl(round_dir.path / "rejects.jsonl", rejects)
        for stage in ("ranked", "pairs"):
            round_dir.finish(stage)
        most, found = 0, []
        # What is there already is not looked at eighty times; one more shows that what is new is seen.
        gc.freeze()
        one_more = group("more", 0, plain_text)
        for chain in round_chains(round_dir, {}):
            found.append((chain.kind, len(chain.steps)))
            most = max(most, sum(type(one) is Candidates for one in gc.get_objects()))
        gc.unfreeze()
        del one_more
    assert found == [("pair", 5)] * 40 + [("reject", 5)] * 40
    assert 0 < most < 8
