"""AROP: who is asked what, how a critique leaves the answer, every margin by hand, and the loss."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.methods import Actors
from prefloop.methods._gates import Gates
from prefloop.methods.arop import AROP, Margin
from prefloop.records import (
    Candidates,
    Message,
    Pair,
    Prompt,
    Reject,
    Request,
    Response,
    Sampling,
    Scored,
)
from prefloop.train import losses
from prefloop.train.losses import GroupLogps

PROMPTS = [
    Prompt(id=f"p{n}", messages=(Message(role="user", content=f"Question {n}?"),)) for n in range(4)
]


class Recorder(FakeEngine):
    """Keeps what it was asked: label and the requests' last turns."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, list[str]]] = []

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = ""
    ) -> list[Response]:
        self.asked.append((label, [r.messages[-1].content for r in requests]))
        return super().sample(requests, sampling, seed=seed, label=label)


class Rater(FakeEngine):
    """Scores each answer by a table of mean log-probs; rates severity by rows in order of asking."""

    def __init__(
        self,
        confidences: dict[str, float] | None = None,
        rows: list[tuple[float, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.confidences = confidences or {}
        self.rows = rows or []
        self.asked: list[str] = []

    def score(
        self, requests: Any, answers: Sequence[Response], *, top: int = 0, at: Any = None
    ) -> list[Scored]:
        return [
            Scored(token_ids=(1, 0), offsets=((0, 1), (1, 1)), logprobs=(2 * mean, 0.0))
            for mean in (self.confidences[answer.text] for answer in answers)
        ]

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        assert tuple(options) == ("1", "2", "3", "4", "5")
        self.asked += [request.messages[-1].content for request in requests]
        return [self.rows.pop(0) for _ in requests]


def actors(engine: Any = None, prompts: str = "compact", seed: int = 7) -> Actors:
    return Actors(engine or FakeEngine(), None, PromptSet(prompts), 0, seed)


def group(refined: str, flawed: str, ratings: dict[str, float] | None = None) -> Candidates:
    texts = {"draft_a": "draft", "draft_b": "other", "refined": refined, "flawed": flawed}
    return Candidates(
        prompt=PROMPTS[0],
        responses={name: Response(text=text) for name, text in texts.items()},
        ratings=ratings or {},
    )


def fixed(m: float = 0.0, **options: Any) -> AROP:
    return AROP(margin=Margin(kind="fixed", m=m), **options)


def only(method: AROP, candidates: Candidates) -> Pair | Reject:
    [result] = method.pair([candidates], round=3)
    return result


# Generation.


def test_refining_sees_both_drafts_and_the_flaw_sees_the_refined_answer() -> None:
    engine = Recorder()
    found = list(AROP().generate(PROMPTS, actors(engine)))
    labels, texts = zip(*engine.asked, strict=True)
    assert labels == ("draft_a", "draft_b", "refined", "flawed")
    assert texts[0] == texts[1] == [prompt.text for prompt in PROMPTS]
    for n, candidates in enumerate(found):
        assert isinstance(candidates, Candidates)
        assert list(candidates.responses) == ["draft_a", "draft_b", "refined", "flawed"]
        made = {name: response.text for name, response in candidates.responses.items()}
        assert made["draft_a"] != made["draft_b"]
        for shown in (PROMPTS[n].text, made["draft_a"], made["draft_b"]):
            assert shown in texts[2][n]
        assert made["refined"] in texts[3][n]


@pytest.mark.parametrize("refine", [True, False])
def test_in_turns_refinement_and_flaw_go_on_with_the_conversation(refine: bool) -> None:
    conversations: dict[str, list[Request]] = {}

    class Listener(FakeEngine):
        def sample(
            self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = ""
        ) -> list[Response]:
            conversations[label] = list(requests)
            return super().sample(requests, sampling, seed=seed, label=label)

    found = list(AROP(layout="turns", refine=refine).generate(PROMPTS, actors(Listener())))
    for n, candidates in enumerate(found):
        assert isinstance(candidates, Candidates)
        said = candidates.responses
        before = PROMPTS[n].messages
        if refine:
            asked = conversations["refined"][n].messages
            assert asked[:1] == before
            assert asked[1] == Message(role="assistant", content=said["draft_a"].text)
            assert said["draft_b"].text in asked[2].content
            before = asked
        flaw = conversations["flawed"][n].messages
        assert flaw[: len(before)] == before
        assert flaw[len(before)] == Message(role="assistant", content=said["refined"].text)
        assert len(flaw) == len(before) + 2


def test_without_refining_draft_a_is_the_answer() -> None:
    engine = Recorder()
    found = list(AROP(refine=False).generate(PROMPTS, actors(engine)))
    assert "refined" not in [label for label, _ in engine.asked]
    for candidates in found:
        assert isinstance(candidates, Candidates)
        assert candidates.responses["refined"] == candidates.responses["draft_a"]
    [pair] = fixed(refine=False, gates=Gates(identical=False)).pair([found[0]], round=0)
    assert isinstance(pair, Pair)
    assert pair.origin == {"chosen": "draft_a", "rejected": "flawed"}


def critic(reply: str) -> FakeEngine:
    """Gives `reply` to whoever is asked for a critique, "Fine." to all others."""

    def answer(request: Request, seed: int) -> str:
        return reply if "Candidate A:" in request.messages[-1].content else "Fine."

    return FakeEngine(answer)


def test_the_papers_critique_is_kept_beside_the_answer() -> None:
    """The last "Final answer:" counts: the critique may speak of it before."""
    reply = "I write Final answer: later.\nA is wrong.\nFinal answer:\n  B is right.\n"
    [found] = AROP(prompt_set="paper").generate(PROMPTS[:1], actors(critic(reply), "paper"))
    assert isinstance(found, Candidates)
    assert found.responses["refined"].text == "B is right."
    # Part of what was sampled is no sample: it is encoded as the text that it is.
    assert found.responses["refined"].token_ids == ()
    assert found.responses["critique"].text == "I write Final answer: later.\nA is wrong."


def test_a_critique_without_final_answer_leaves_no_answer_and_no_pair() -> None:
    method = fixed(prompt_set="paper")
    [found] = method.generate(PROMPTS[:1], actors(critic("A is wrong, B is right."), "paper"))
    assert isinstance(found, Candidates)
    assert found.responses["refined"].text == ""
    assert found.responses["critique"].text == "A is wrong, B is right."
    reject = only(method, found)
    assert isinstance(reject, Reject)
    assert (reject.stage, reject.reason) == ("pair", "empty answer")


def test_a_draft_that_says_final_answer_does_not_ask_the_compact_set_for_one() -> None:
    def answer(request: Request, seed: int) -> str:
        return "43" if "Do the task again" in request.messages[-1].content else "Final answer: 44"

    [found] = AROP().generate(PROMPTS[:1], actors(FakeEngine(answer)))
    assert isinstance(found, Candidates)
    assert found.responses["refined"].text == "43"
    assert "critique" not in found.responses


def test_infill_changes_one_word_and_keeps_how_the_answer_ended() -> None:
    class CutOff(FakeEngine):
        def sample(self, *args: Any, **kwargs: Any) -> list[Response]:
            label = kwargs["label"]
            found = super().sample(*args, **kwargs)
            cut = {"finish": "length" if label == "refined" else "stop"}
            return [response.model_copy(update=cut) for response in found]

    found = list(AROP(flaw="infill").generate(PROMPTS, actors(CutOff())))
    groups = [g for g in found if isinstance(g, Candidates)]
    assert groups
    for candidates in groups:
        refined = candidates.responses["refined"].text.split()
        flawed = candidates.responses["flawed"].text.split()
        assert sum(a != b for a, b in zip(refined, flawed, strict=True)) == 1
        assert candidates.responses["flawed"].finish == "length"


def test_an_answer_without_a_word_to_flaw_is_rejected_with_the_answer() -> None:
    engine = FakeEngine(lambda request, seed: "of the")
    [reject] = AROP(flaw="infill").generate(PROMPTS[:1], actors(engine))
    assert reject == Reject(
        prompt_id="p0", stage="generate", reason="no word to flaw", detail="of the"
    )


@pytest.mark.parametrize("flaw", ["prompt", "infill"])
def test_a_chunk_depends_on_its_seed_and_on_nothing_played_before(flaw: Any) -> None:
    method, engine = AROP(flaw=flaw), FakeEngine()
    first = list(method.generate(PROMPTS[:2], actors(engine, seed=1)))
    after = list(method.generate(PROMPTS[2:], actors(engine, seed=2)))
    assert after == list(AROP(flaw=flaw).generate(PROMPTS[2:], actors(seed=2)))
    assert first == list(AROP(flaw=flaw).generate(PROMPTS[:2], actors(seed=1)))
    assert first != list(AROP(flaw=flaw).generate(PROMPTS[:2], actors(seed=2)))


# Margins: what is measured, and what M it makes.


def margin_of(margin: Margin, candidates: Candidates, engine: Any = None) -> float:
    method = AROP(margin=margin, gates=Gates())
    [ranked] = method.rank([candidates], actors(engine))
    assert isinstance(ranked, Candidates)
    pair = only(method, ranked)
    assert isinstance(pair, Pair)
    return pair.margin


def test_a_fixed_margin_is_m() -> None:
    assert margin_of(Margin(kind="fixed", m=0.75), group("a b", "a c")) == 0.75


@pytest.mark.parametrize(
    ("refined", "flawed", "expected"),
    [(-0.5, -0.75, 0.5), (-0.5, -3.0, 2.0), (-0.5, -0.25, 0.0), (-0.5, -0.5, 0.0)],
    ids=["inside", "clipped above", "clipped below", "equal"],
)
def test_a_confidence_margin_is_m_times_the_clipped_gap(
    refined: float, flawed: float, expected: float
) -> None:
    """m = 2: 2 * clip(-0.5 + 0.75) = 0.5; gaps of 2.5 and -0.25 are clipped to 1 and 0."""
    engine = Rater(confidences={"a b": refined, "a c": flawed})
    found = margin_of(Margin(kind="confidence", m=2.0), group("a b", "a c"), engine)
    assert found == pytest.approx(expected)


def test_an_edit_margin_is_m_times_the_share_of_words_that_differ() -> None:
    """One of four words: 2 * 1/4."""
    candidates = group("it floats on water", "it sinks on water")
    assert margin_of(Margin(kind="edit", m=2.0), candidates) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("row", "rating"),
    [((1, 0, 0, 0, 0), 1.0), ((0, 0, 0, 0, 1), 5.0), ((0.1, 0.2, 0.4, 0.2, 0.1), 3.0)],
)
def test_a_severity_margin_is_linear_in_the_expected_rating(
    row: tuple[float, ...], rating: float
) -> None:
    """m_min + (m_max - m_min) * (E - 1) / 4, with 0.5 and 2.5."""
    margin = Margin(kind="severity", m_min=0.5, m_max=2.5)
    engine = Rater(rows=[row])
    found = margin_of(margin, group("a b", "a c"), engine)
    assert found == pytest.approx(0.5 + 2.0 * (rating - 1) / 4)
    [asked] = engine.asked
    assert all(shown in asked for shown in ("Question 0?", "a b", "a c"))


def test_a_flaw_that_the_model_would_not_rate_makes_no_pair() -> None:
    """With 0.3 % of the mass on the ratings; with 3 % their shares count."""
    rows = [(0.0, 0.0, 0.0, 0.0, mass) for mass in (0.003, 0.03)]
    method = AROP(margin=Margin(kind="severity"))
    groups = [group("a b", "a c"), group("a b", "a d")]
    [none, rated] = method.rank(groups, actors(Rater(rows=rows)))
    assert isinstance(none, Reject)
    assert (none.stage, none.reason, none.detail) == (
        "rank",
        "no severity",
        "would not say a rating",
    )
    assert isinstance(rated, Candidates)
    assert rated.ratings == {"severity": 5.0}


def test_an_axes_margin_is_the_weighted_sum_and_keeps_every_rating() -> None:
    """Ratings 5 and 2 make 2 and 0.5 of m_max = 2; weights 0.25 and 0.75: 0.5 + 0.375."""
    margin = Margin(kind="axes", m_max=2.0, axes={"honesty": 0.25, "tone": 0.75})
    engine = Rater(rows=[(0, 0, 0, 0, 1), (0, 1, 0, 0, 0)])
    method = AROP(margin=margin)
    [ranked] = method.rank([group("a b", "a c")], actors(engine))
    assert ranked.ratings == {"severity_honesty": 5.0, "severity_tone": 2.0}  # type: ignore[union-attr]
    assert "honesty" in engine.asked[0]
    assert "tone" in engine.asked[1]
    pair = only(method, ranked)  # type: ignore[arg-type]
    assert isinstance(pair, Pair)
    assert pair.margin == pytest.approx(0.875)
    assert pair.ratings == ranked.ratings


def test_ratings_stay_with_their_group() -> None:
    engine = Rater(confidences={"a": -1.0, "b": -2.0, "c": -3.0, "d": -5.0})
    ranked = list(AROP().rank([group("a", "b"), group("c", "d")], actors(engine)))
    assert [r.ratings for r in ranked if isinstance(r, Candidates)] == [
        {"confidence_refined": -1.0, "confidence_flawed": -2.0},
        {"confidence_refined": -3.0, "confidence_flawed": -5.0},
    ]


def test_what_would_make_a_margin_negative_is_refused() -> None:
    for options in ({"m": -1}, {"m_min": -1}, {"m_max": -1}, {"axes": {"tone": -0.1}}):
        with pytest.raises(ValidationError):
            Margin.model_validate(options)


# Pairs.


def test_the_refined_answer_is_chosen_over_its_flawed_copy() -> None:
    pair = only(fixed(), group("It floats on water.", "It sinks on water."))
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.rejected) == ("It floats on water.", "It sinks on water.")
    assert pair.origin == {"chosen": "refined", "rejected": "flawed"}
    assert (pair.id, pair.prompt, pair.target) == ("0003/p0", PROMPTS[0].messages, None)


@pytest.mark.parametrize(
    ("refined", "flawed", "reason"),
    [
        ("It floats.", "", "empty answer"),
        ("It floats.", "It  floats.", "identical"),
        ("It floats.", "Here is the flawed version: it sinks.", "meta talk"),
        ("It floats on water.", "All of this is different.", "edit share"),
        ("It floats.", "It floats, and this goes on and on.", "length ratio"),
    ],
)
def test_a_flaw_that_is_none_is_rejected_with_both_texts(
    refined: str, flawed: str, reason: str
) -> None:
    reject = only(fixed(), group(refined, flawed))
    assert isinstance(reject, Reject)
    assert (reject.prompt_id, reject.stage, reject.reason) == ("p0", "pair", reason)
    assert repr(refined) in reject.detail
    assert repr(flawed) in reject.detail


def test_a_pair_keeps_the_tokens_that_were_sampled_and_an_infilled_flaw_has_none() -> None:
    candidates = group("It floats on water.", "It sinks on water.")
    refined = candidates.responses["refined"].model_copy(update={"token_ids": (5, 6, 0)})
    sampled = {**candidates.responses, "refined": refined}
    pair = only(fixed(), candidates.model_copy(update={"responses": sampled}))
    assert pair.token_ids == {"chosen": (5, 6, 0)}  # type: ignore[union-attr]
    [made] = [
        g
        for g in AROP(flaw="infill", margin=Margin(kind="fixed")).generate(PROMPTS[:1], actors())
        if isinstance(g, Candidates)
    ]
    found = only(fixed(flaw="infill"), made)
    assert found.token_ids == {"chosen": made.responses["refined"].token_ids}  # type: ignore[union-attr]


def test_an_infilled_pair_of_a_thinking_policy_differs_in_its_word_alone() -> None:
    class Thinks(FakeEngine):
        def sample(self, *args: Any, **kwargs: Any) -> list[Response]:
            found = super().sample(*args, **kwargs)
            return [response.model_copy(update={"reasoning": "hm"}) for response in found]

    groups = AROP(flaw="infill", margin=Margin(kind="fixed")).generate(PROMPTS, actors(Thinks()))
    made = [g for g in groups if isinstance(g, Candidates)]
    assert made
    for candidates in made:
        assert candidates.responses["draft_a"].token_ids
        assert only(fixed(flaw="infill"), candidates).token_ids == {}  # type: ignore[union-attr]


def test_a_pair_says_which_of_its_answers_were_cut_off() -> None:
    whole = group("It floats on water.", "It sinks on water.")
    cut = whole.responses["flawed"].model_copy(update={"finish": "length"})
    candidates = whole.model_copy(update={"responses": {**whole.responses, "flawed": cut}})
    assert only(fixed(), candidates).reason == "cut off"  # type: ignore[union-attr]
    taken = fixed(gates=Gates(cut_off=False))
    assert only(taken, candidates).unfinished == ("rejected",)  # type: ignore[union-attr]
    assert only(taken, whole).unfinished == ()  # type: ignore[union-attr]


def test_an_option_of_the_gates_leaves_the_others_as_the_method_has_them() -> None:
    gates = AROP.model_validate({"gates": {"cut_off": False}}).gates
    assert gates == Gates(cut_off=False, max_edit_share=0.5, max_length_ratio=2.0)


# Loss.


def logps(margins: list[float], equal: bool = False) -> GroupLogps:
    generator = torch.Generator().manual_seed(0)
    count = len(margins)

    def draw() -> dict[str, torch.Tensor]:
        return {
            role: 40 * torch.randn(count, generator=generator, dtype=torch.float64)
            for role in AROP.roles
        }

    policy = draw()
    return GroupLogps(
        policy=policy,
        reference=policy if equal else draw(),
        lengths={role: torch.ones(count) for role in AROP.roles},
        margin_B=torch.tensor(margins, dtype=torch.float64),
    )


def test_the_loss_is_arops_on_chosen_and_rejected() -> None:
    given = logps([0.0, 0.5, 2.0])
    expected = losses.arop(given.ratio("chosen"), given.ratio("rejected"), given.margin_B, beta=0.3)
    torch.testing.assert_close(AROP(beta=0.3).loss(given, 0.0).loss_B, expected)


def test_loss_at_start_is_the_loss_at_equal_policies() -> None:
    margins = [0.0, 0.5, 2.0]
    pairs = [
        Pair(
            prompt_id="p",
            round=0,
            prompt=PROMPTS[0].messages,
            chosen="a",
            rejected="b",
            margin=margin,
        )
        for margin in margins
    ]
    known = AROP().loss_at_start(pairs)
    assert known == pytest.approx(sum(math.log(1 + math.exp(m)) for m in margins) / 3)
    found = AROP().loss(logps(margins, equal=True), 0.0).loss_B.mean().item()
    assert found == pytest.approx(known)
    assert AROP().loss_at_start([pairs[0].model_copy(update={"margin": 1000.0})]) == 1000.0


def test_metrics_count_by_the_reward_gap_and_carry_no_gradient() -> None:
    """Gaps of 10 and -10 nats make R = 1 and -1; over a margin of 0.5 is the first only."""
    policy = {
        "chosen": torch.tensor([5.0, -5.0], requires_grad=True),
        "rejected": torch.tensor([-5.0, 5.0], requires_grad=True),
    }
    given = GroupLogps(
        policy=policy,
        reference={role: torch.zeros(2) for role in policy},
        lengths={role: torch.ones(2) for role in policy},
        margin_B=torch.tensor([0.5, 0.5]),
    )
    output = AROP().loss(given, 0.0)
    found = {name: value.tolist() for name, value in output.metrics.items()}
    assert found["reward_margin"] == pytest.approx([1.0, -1.0])
    assert found["accuracy"] == found["over_margin"] == [1.0, 0.0]
    assert found["real_reward"] == found["reward_chosen"] == [0.5, -0.5]
    assert output.loss_B.requires_grad
    assert not any(value.requires_grad for value in output.metrics.values())


# Measures.


def test_measures_are_counted_by_hand() -> None:
    """One of two refined answers is its draft but for spaces; the flaws touch 1/4 and 1/2."""
    ranked = [group("it floats on water", "it sinks on water"), group(" draft\n", "draft it")]
    by_hand = {"identical_rate": 1 / 2, "flaw_edit_share": (1 / 4 + 1 / 2) / 2}
    assert fixed().measures(ranked) == by_hand
    assert AROP(margin=Margin(kind="edit", m=2.0)).measures(ranked) == {**by_hand, "M": 3 / 4}
    assert AROP().measures([]) == {}


def test_a_flaw_that_the_policy_finds_no_less_likely_is_not_seen() -> None:
    """Gaps of confidence of 0.5, 0 and -1: M is their mean after clipping, and two of three go unseen."""
    ranked = [
        group("a b", "a c", {"confidence_refined": -1.0, "confidence_flawed": -1.0 - gap})
        for gap in (0.5, 0.0, -1.0)
    ]
    measures = AROP(margin=Margin(m=3.0)).measures(ranked)
    assert measures["M"] == pytest.approx(0.5)
    assert measures["flaw_unseen"] == pytest.approx(2 / 3)
