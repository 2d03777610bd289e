"""Measuring computes nothing that is known: answers that were drawn, log-probs that sampling told."""

from collections import Counter

import pytest

from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.hf_engine import HFEngine
from prefloop.records import Candidates, Message, Request, Response, Sampling
from prefloop.run.held_out import KnownAnswers
from prefloop.run_folder import read_run
from tests.run.test_loop import METHODS, play, recipe

SAMPLING = Sampling(temperature=0.7, max_new_tokens=12)


def asked(text: str, prefix: str = "") -> Request:
    return Request(messages=(Message(role="user", content=text),), prefix=prefix)


def test_a_known_answer_is_given_once_and_the_rest_is_sampled() -> None:
    known = [(asked("a").messages, Response(text=name)) for name in ("first", "second")]
    engine = KnownAnswers(FakeEngine(lambda request, seed: "new"), SAMPLING, known)
    asks = [asked("a"), asked("b"), asked("a", prefix="The"), asked("a"), asked("a")]
    texts = [answer.text for answer in engine.sample(asks, SAMPLING, seed=1)]
    assert texts == ["first", "new", "new", "second", "new"]


def test_answers_drawn_otherwise_are_not_taken() -> None:
    known = [(asked("a").messages, Response(text="first"))]
    engine = KnownAnswers(FakeEngine(lambda request, seed: "new"), SAMPLING, known)
    greedy = SAMPLING.model_copy(update={"temperature": 0.0})
    assert engine.sample([asked("a")], greedy, seed=1)[0].text == "new"
    assert engine.sample([asked("a")], SAMPLING, seed=1)[0].text == "first"


def test_the_method_is_played_on_the_answers_that_were_measured(model_folder, tmp_path):
    """IAL's draft of a held-out prompt is its answer; AROP's first draft is, and its second another."""
    small = {"rounds": 1, "prompts_per_round": 4}
    for name, draft in (("ial", "draft"), ("arop", "draft_a")):
        play(recipe(model_folder, name, loop=small, evaluate={"prompts": 3}), tmp_path / name)
        for round_dir in (read_run(tmp_path / name).start, read_run(tmp_path / name).round(0)):
            answers = round_dir.records("answers", Candidates)
            played = round_dir.records("introspection", Candidates)
            known = {group.prompt.id: group.responses["answer"] for group in answers}
            assert played
            for group in played:
                assert group.responses[draft] == known[group.prompt.id]
                assert group.responses.get("draft_b") != known[group.prompt.id]


def test_log_probs_that_sampling_told_are_not_computed_again(model_folder, tmp_path, monkeypatch):
    """The start's divergence from itself is 0 without a pass; a round's takes one, under the initial policy."""
    passes, score = Counter[str](), HFEngine.score
    where = ["start"]

    def counting(self, requests, answers, **options):
        found = score(self, requests, answers, **options)
        passes[where[0]] += 1
        if where[0] == "0000":
            initial.extend(one.mean_logprob for one in found)
        return found

    initial: list[float] = []
    monkeypatch.setattr(HFEngine, "score", counting)
    small = {"rounds": 1, "prompts_per_round": 4}
    evaluate = {"prompts": 3, "introspection": False}
    values = recipe(model_folder, "ial", loop=small, evaluate=evaluate)
    import prefloop.run.loop as loop

    evaluated = loop._Loop._answer_held_out

    def named(self, round_dir):
        where[0] = round_dir.path.name
        evaluated(self, round_dir)
        where[0] = "elsewhere"

    monkeypatch.setattr(loop._Loop, "_answer_held_out", named)
    outcome = play(values, tmp_path / "run")
    assert (passes["start"], passes["0000"]) == (0, 1)
    assert outcome.results[0].measures["kl"] == 0.0
    answers = read_run(tmp_path / "run").round(0).records("answers", Candidates)
    assert [group.ratings["logprob_initial"] for group in answers] == initial
    assert outcome.results[1].measures["kl"] != 0.0


def test_in_half_precision_both_policies_are_scored_after_a_round(
    model_folder, tmp_path, monkeypatch
):
    """There a log-prob depends on the shape of the step, and a decoding step has another than a pass."""
    scored, score = [], HFEngine.score

    def counting(self, requests, answers, **options):
        scored.append(len(answers))
        return score(self, requests, answers, **options)

    monkeypatch.setattr(HFEngine, "score", counting)
    values = recipe(
        model_folder,
        "ial",
        model={"dtype": "bfloat16"},
        loop={"rounds": 1, "prompts_per_round": 4},
        evaluate={"prompts": 3, "introspection": False},
    )
    outcome = play(values, tmp_path / "run")
    assert outcome.results[0].measures["kl"] == 0.0
    # A round's answers under both policies; the start's differ from nothing.
    assert scored.count(3) == 2


def test_what_sampling_told_is_what_scoring_would_say(model_folder, tmp_path):
    """A text that stops answers makes sampled log-probs those of more tokens, so there they are computed."""
    from prefloop.run.session import Session

    small = {"rounds": 1, "prompts_per_round": 4}
    evaluate = {"prompts": 3, "introspection": False}
    values = recipe(model_folder, "ial", loop=small, evaluate=evaluate)
    play(values, tmp_path / "run")
    run = read_run(tmp_path / "run")
    round_dir = run.round(0)
    answers = round_dir.records("answers", Candidates)
    session = Session(values, run)
    engine = session.engine_after(round_dir)
    asks = [Request(messages=group.prompt.messages) for group in answers]
    with session.policy_after(round_dir).merged():
        scored = engine.score(asks, [group.responses["answer"] for group in answers])
    said = [group.ratings["logprob"] for group in answers]
    assert said == pytest.approx([one.mean_logprob for one in scored], abs=1e-5)
    stops = {**METHODS["ial"]["method"], "sampling": {"stop": ["e"], "max_new_tokens": 12}}
    play(
        recipe(model_folder, "ial", loop=small, evaluate=evaluate, method=stops), tmp_path / "stop"
    )
    for group in read_run(tmp_path / "stop").start.records("answers", Candidates):
        assert group.ratings["logprob"] == group.ratings["logprob_initial"]
