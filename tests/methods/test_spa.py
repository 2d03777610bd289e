"""SPA: the seed round, labels by the implicit reward, and which of them are smoothed by how much."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.hf_engine import HFEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges import Judge, NoVerdict, OpenJudge, Verdict
from prefloop.judges.implicit import Implicit
from prefloop.methods import Actors
from prefloop.methods.dpo import DPO
from prefloop.methods.spa import SPA, confidence, least
from prefloop.models.chat import Chat
from prefloop.records import Candidates, Pair, Prompt, Reject, Response
from prefloop.train.losses import GroupLogps
from tests.conftest import labelled_prompts, tiny_llama

PROMPTS = labelled_prompts(10)


class Fixed:
    """Verdicts by the number at the end of a prompt's id."""

    def __init__(self, verdicts: dict[int, Verdict], otherwise: Verdict) -> None:
        self.verdicts, self.otherwise = verdicts, otherwise

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        return [self.verdicts.get(int(prompt.id[1:]), self.otherwise) for prompt in prompts]


def actors(
    round: int, labels: Fixed | None = None, detector: Fixed | None = None, seen: Any = None
) -> Actors:
    def beside_initial(judge: Judge) -> OpenJudge:
        assert isinstance(judge, Implicit)
        if seen is not None:
            seen.append((judge.beta, judge.decoupled))
        found = detector if judge.decoupled else labels
        assert found is not None
        return found

    return Actors(FakeEngine(), None, PromptSet("compact"), round, 7, beside_initial)


def play(method: SPA, given: Actors, prompts: Sequence[Prompt] = PROMPTS) -> list[Pair | Reject]:
    groups = [g for g in method.generate(prompts, given) if isinstance(g, Candidates)]
    ranked = list(method.rank(groups, given))
    rejects = [g for g in ranked if isinstance(g, Reject)]
    kept = [g for g in ranked if isinstance(g, Candidates)]
    return [*rejects, *method.pair(kept, given.round)]


# Rounds.


def test_round_0_trains_on_the_seeds_labels_without_smoothing() -> None:
    pairs = play(SPA(), actors(0))
    assert len(pairs) == 10
    for number, pair in enumerate(pairs):
        assert isinstance(pair, Pair)
        assert (pair.chosen, pair.rejected) == (f"good {number}", f"bad {number}")
        assert (pair.smoothing, pair.ratings) == (0.0, {})


def test_later_rounds_label_two_drafts_by_the_implicit_reward() -> None:
    """The seed's labels are not looked at again; the first draft has the higher reward for 0 only."""
    pairs = play(SPA(), actors(1, Fixed({0: (2.0, 1.0)}, (0.5, 0.75)), Fixed({}, (0.0, 1.0))))
    for number, pair in enumerate(pairs):
        assert isinstance(pair, Pair)
        better = 0 if number == 0 else 1
        assert pair.origin == {"chosen": f"draft_{better}", "rejected": f"draft_{1 - better}"}
        assert pair.chosen not in (f"good {number}", f"bad {number}")


def test_the_least_confident_tenth_is_smoothed_and_its_confidence_kept() -> None:
    """The detector contradicts the label of 7, so this is the one of ten that is doubted."""
    labels = Fixed({}, (1.0, 0.0))
    pairs = play(SPA(), actors(1, labels, Fixed({7: (0.0, 2.0)}, (2.0, 0.0))))
    found = {p.prompt_id: (p.smoothing, p.ratings["confidence"]) for p in pairs}  # type: ignore[union-attr]
    sure = 1 / (1 + math.exp(-2.0))
    assert found.pop("p7") == (0.1, pytest.approx(1 - sure))
    assert list(found.values()) == [(0.0, pytest.approx(sure))] * 9


def test_the_tenth_is_of_the_round_however_it_is_chunked() -> None:
    """Of chunks of three nothing would be smoothed, of chunks of five one each."""
    labels, detector = Fixed({}, (1.0, 0.0)), Fixed({6: (0.0, 1.0), 7: (0.0, 2.0)}, (2.0, 0.0))
    given = actors(1, labels, detector)
    ranked = list(SPA().rank(list(SPA().generate(PROMPTS, given)), given))  # type: ignore[arg-type]
    whole = list(SPA().pair(ranked, 1))  # type: ignore[arg-type]
    for size in (1, 3, 5):
        pairing = SPA().pairing(iter(ranked), 1)  # type: ignore[arg-type]
        chunks = [ranked[n : n + size] for n in range(0, 10, size)]
        assert [pair for chunk in chunks for pair in pairing(chunk)] == whole  # type: ignore[arg-type]
    assert [p.prompt_id for p in whole if isinstance(p, Pair) and p.smoothing] == ["p7"]


def test_the_detector_is_less_extrapolated_in_each_round() -> None:
    seen: list[tuple[float, float]] = []
    for round in (1, 2, 3, 4):
        fixed = Fixed({}, (1.0, 0.0))
        play(SPA(beta=0.2), actors(round, fixed, fixed, seen))
    assert seen[1::2] == [(0.2, 0.5), (0.2, 0.25), (0.2, 0.125), (0.2, 0.125)]
    assert set(seen[::2]) == {(0.2, 0.0)}


def test_a_label_or_a_confidence_that_is_not_there_is_a_reject() -> None:
    moved = Fixed({}, (1.0, 0.0))
    [*rest] = play(SPA(), actors(1, Fixed({}, NoVerdict("unmoved")), moved), PROMPTS[:1])
    assert [(r.stage, r.reason) for r in rest] == [("rank", "no verdict")]  # type: ignore[union-attr]
    [*rest] = play(SPA(), actors(1, moved, Fixed({}, NoVerdict("nan"))), PROMPTS[:1])
    assert [(r.stage, r.reason) for r in rest] == [("rank", "no confidence")]  # type: ignore[union-attr]


def test_a_frozen_generator_is_refused() -> None:
    with pytest.raises(ValidationError, match="labels what the policy itself has written"):
        SPA(generator="frozen")


# Confidence.


def test_confidence_is_sigma_of_the_detectors_gap_seen_from_the_label() -> None:
    assert confidence((1.0, 0.0), (3.0, 1.0)) == pytest.approx(1 / (1 + math.exp(-2)))
    assert confidence((0.0, 1.0), (3.0, 1.0)) == pytest.approx(1 / (1 + math.exp(2)))
    assert confidence((0.0, 1.0), (-1e6, 1e6)) == 1.0


@pytest.mark.parametrize(
    ("per_cent", "expected"), [(0, 0), (4, 0), (5, 1), (10, 1), (26, 3), (100, 10)]
)
def test_k_per_cent_of_the_pairs_to_the_nearest_whole_number(
    per_cent: float, expected: int
) -> None:
    scores = {f"p{n}": abs(n - 4.2) for n in range(10)}
    found = least(scores, per_cent)
    assert found == ["p4", "p5", "p3", "p6", "p2", "p7", "p1", "p8", "p0", "p9"][:expected]


def test_decoupled_confidence_against_a_slow_reference(tokenizer: Any) -> None:
    """Token by token from both models' own softmaxes: pi~ = softmax((1 + a) log pi - a log pi_0)."""
    policy, start = tiny_llama(len(tokenizer), seed=1), tiny_llama(len(tokenizer), seed=2)
    for model in (policy, start):
        with torch.no_grad():
            model.lm_head.weight *= 30
    engine, initial = HFEngine(policy, tokenizer), HFEngine(start, tokenizer)

    @contextmanager
    def before() -> Iterator[HFEngine]:
        yield initial

    opened: Callable[[], AbstractContextManager[Any]] = before
    given = Actors(
        engine,
        None,
        PromptSet("compact"),
        2,
        7,
        lambda judge: judge.open(engine, PromptSet("compact"), opened),
    )
    texts = ("ab", "xyz")
    group = Candidates(
        prompt=PROMPTS[0],
        responses={f"draft_{n}": Response(text=text) for n, text in enumerate(texts)},
    )
    [ranked] = SPA(beta=0.3).rank([group], given)
    assert isinstance(ranked, Candidates)

    def slow(text: str, amount: float) -> float:
        chat = Chat(tokenizer)
        prompt, answer = (
            chat.prompt_ids(PROMPTS[0].messages),
            chat.completion_ids(PROMPTS[0].messages, text),
        )
        total = 0.0
        for place, token in enumerate(answer):
            ids = torch.tensor([prompt + answer[:place]])
            with torch.no_grad():
                now, old = (
                    m(input_ids=ids).logits[0, -1].double().softmax(-1) for m in (policy, start)
                )
            weights = now ** (1 + amount) / old**amount
            total += math.log(weights[token] / weights.sum() / old[token])
        return total

    labels = [0.3 * slow(text, 0.0) for text in texts]
    assert list(ranked.scores.values()) == pytest.approx(labels, rel=1e-3)
    detected = [0.3 * slow(text, 0.25) for text in texts]
    better = 0 if labels[0] > labels[1] else 1
    expected = 1 / (1 + math.exp(detected[1 - better] - detected[better]))
    assert 0.001 < expected < 0.999, "trivial example"
    assert ranked.ratings["confidence"] == pytest.approx(expected, rel=1e-3)
    plain = 1 / (1 + math.exp(labels[1 - better] - labels[better]))
    assert abs(plain - expected) > 1e-3, "the extrapolation makes no difference here"


# Loss.


def test_smoothing_by_hand() -> None:
    """r = 3 and -2, beta 0.1, so R = 0.5; alpha is 0 for the first pair and 0.1 for the second."""
    roles = SPA.roles
    given = GroupLogps(
        policy={"chosen": torch.tensor([-7.0, -7.0]), "rejected": torch.tensor([-12.0, -12.0])},
        reference=dict.fromkeys(roles, torch.tensor([-10.0, -10.0])),
        lengths=dict.fromkeys(roles, torch.ones(2)),
        margin_B=torch.zeros(2),
        smoothing_B=torch.tensor([0.0, 0.1]),
    )
    output = SPA().loss(given, 0.0)
    right, wrong = math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.5))
    assert output.loss_B.tolist() == pytest.approx([right, 0.9 * right + 0.1 * wrong])
    assert output.metrics["smoothed"].tolist() == [0.0, 1.0]


def test_without_smoothing_its_loss_is_dpos() -> None:
    roles = SPA.roles
    generator = torch.Generator().manual_seed(0)
    draw = [{r: -30 * torch.rand(5, generator=generator) for r in roles} for _ in range(2)]
    given = GroupLogps(draw[0], draw[1], dict.fromkeys(roles, torch.ones(5)), torch.zeros(5))
    assert torch.equal(SPA().loss(given, 0.0).loss_B, DPO().loss(given, 0.0).loss_B)
