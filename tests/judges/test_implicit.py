"""The implicit reward: log-ratios of sums, the de-coupled policy, and the initial policy as reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from prefloop.errors import JudgeError
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.hf_engine import HFEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges import CachedJudge, NoVerdict, OpenJudge, implicit, score_responses
from prefloop.judges.implicit import Implicit, decoupled_ratio
from prefloop.models.policy import LoraOptions, ModelOptions, Policy
from prefloop.records import Message, Prompt, Response
from tests.conftest import byte_tokenizer, model_options, save_tiny_llama

PROMPT = Prompt(id="p", messages=(Message(role="user", content="Where?"),))
ANSWERS = ["in the north", "no", "nobody knows where"]


def example(folder: Path) -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    names = {"model": 1, "reference": 2}
    return {n: str(save_tiny_llama(folder / n, tokenizer, seed)) for n, seed in names.items()}


@pytest.fixture
def policy(model_folder: Path) -> Policy:
    """A LoRA policy that has moved away from its start."""
    options = ModelOptions(
        source=str(model_folder), lora=LoraOptions(r=4), device="cpu", dtype="float32"
    )
    loaded = Policy.load(options)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return loaded


def initial_of(policy: Policy, engine: HFEngine) -> Any:
    @contextmanager
    def initial() -> Iterator[HFEngine]:
        with policy.at_start():
            yield engine

    return initial


def open_on(policy: Policy, **options: Any) -> OpenJudge:
    engine = HFEngine(policy.model, policy.tokenizer)
    return Implicit(**options).open(engine, PromptSet("compact"), initial_of(policy, engine))


def log_softmax(policy: Policy, answer: str) -> tuple[torch.Tensor, list[int]]:
    """(T, V) of the answer's tokens, by a plain forward pass."""
    chat = HFEngine(policy.model, policy.tokenizer).chat
    prompt, ids = chat.prompt_ids(PROMPT.messages), chat.completion_ids(PROMPT.messages, answer)
    with torch.no_grad():
        logits = policy.model(torch.tensor([prompt + ids])).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1), ids


def ratio_by_hand(policy: Policy, answer: str, amount: float = 0.0) -> float:
    now, ids = log_softmax(policy, answer)
    with policy.at_start():
        before, _ = log_softmax(policy, answer)
    away = (now + amount * (now - before)).softmax(-1).log()
    return sum(float(away[t, i] - before[t, i]) for t, i in enumerate(ids))


def test_the_score_is_beta_times_the_log_ratio_summed_over_the_answer(policy: Policy) -> None:
    (verdict,) = open_on(policy, beta=0.5).score([PROMPT], [ANSWERS])
    assert verdict == pytest.approx([0.5 * ratio_by_hand(policy, a) for a in ANSWERS], abs=1e-4)
    assert isinstance(verdict, tuple)
    assert len(set(verdict)) == 3


def test_what_the_policy_sampled_is_judged_token_by_token(policy: Policy) -> None:
    """The tokens of a longer text, cut off: neither the text's own tokens nor an end are scored."""
    chat = HFEngine(policy.model, policy.tokenizer).chat
    ids = tuple(chat.text_ids(" no way"))
    answer = Response(text="no way", token_ids=ids, finish="length")
    judge = open_on(policy, beta=1.0)
    [(found,)] = score_responses(judge, [PROMPT], [[answer]])  # type: ignore[misc]
    by_hand = {text: ratio_by_hand(policy, text) for text in ("no way", " no way")}
    end = ratio_by_hand(policy, " no way") - found
    assert found not in (pytest.approx(value, abs=1e-4) for value in by_hand.values())
    whole = answer.model_copy(update={"token_ids": (*ids, chat.end_id), "finish": "stop"})
    [(ended,)] = score_responses(CachedJudge(judge), [PROMPT], [[whole]])  # type: ignore[misc]
    assert ended == pytest.approx(by_hand[" no way"], abs=1e-4)
    assert ended - found == pytest.approx(end, abs=1e-4)
    detector = open_on(policy, beta=1.0, decoupled=0.7)
    [(decoupled,)] = score_responses(detector, [PROMPT], [[whole]])  # type: ignore[misc]
    assert decoupled == pytest.approx(ratio_by_hand(policy, " no way", 0.7), abs=1e-3)


def test_a_cached_judge_of_tokens_tells_the_same_text_in_other_tokens_apart(policy: Policy) -> None:
    chat = HFEngine(policy.model, policy.tokenizer).chat
    judge = CachedJudge(open_on(policy))
    kinds = [Response(text="no"), Response(text="no", token_ids=(*chat.text_ids(" no"), 1))]
    first, second = score_responses(judge, [PROMPT] * 2, [[kind] for kind in kinds])
    assert first != second


def test_inside_merged_weights_the_reference_is_still_the_initial_policy(policy: Policy) -> None:
    (plain,) = open_on(policy).score([PROMPT], [ANSWERS])
    judge = open_on(policy)
    with policy.merged():
        (merged,) = judge.score([PROMPT], [ANSWERS])
        (again,) = judge.score([PROMPT], [ANSWERS])
    assert merged == pytest.approx(plain, abs=1e-4)
    assert again == merged
    assert open_on(policy).score([PROMPT], [ANSWERS]) == [plain]


@pytest.mark.parametrize("at_once", [2, 16])
def test_the_decoupled_policy_is_a_softmax_away_from_the_reference(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(implicit, "_AT_ONCE", at_once)
    (verdict,) = open_on(policy, beta=1.0, decoupled=0.7).score([PROMPT], [ANSWERS])
    expected = [ratio_by_hand(policy, a, 0.7) for a in ANSWERS]
    assert verdict == pytest.approx(expected, abs=1e-3)
    (plain,) = open_on(policy, beta=1.0).score([PROMPT], [ANSWERS])
    assert isinstance(plain, tuple)
    # Without the softmax it would only be the plain one, larger.
    assert verdict != pytest.approx([1.7 * score for score in plain], abs=0.05)


def test_the_decoupled_ratio_by_hand() -> None:
    """Two words, pi (.8, .2), pi_ref (.5, .5), a = 1: pi~ goes as .8^2/.5 to .2^2/.5, so pi~(first) = 16/17."""
    now, before = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert decoupled_ratio(now, before, [0], 1.0) == pytest.approx(math.log(16 / 17 / 0.5))
    assert decoupled_ratio(now, before, [1], 0.0) == pytest.approx(math.log(0.2 / 0.5))


def test_a_policy_that_has_not_moved_has_no_verdict(model_folder: Path) -> None:
    policy = Policy.load(model_options(model_folder))
    assert open_on(policy).score([PROMPT], [ANSWERS]) == [
        NoVerdict("the policy has not moved from its reference")
    ]


def test_an_empty_answer_has_no_verdict_and_leaves_the_other_groups_alone(policy: Policy) -> None:
    verdicts = open_on(policy).score([PROMPT] * 2, [["", "x"], ANSWERS])
    assert verdicts[0] == NoVerdict("empty response")
    assert verdicts[1] == open_on(policy).score([PROMPT], [ANSWERS])[0]


def test_two_other_models_can_be_compared(
    model_folder: Path, policy: Policy, tmp_path: Path
) -> None:
    (expected,) = open_on(policy).score([PROMPT], [ANSWERS])
    policy.merge().save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    judge = Implicit(model=str(tmp_path), reference=str(model_folder))
    assert not judge.needs_policy
    opened = judge.open(None, PromptSet("compact"))
    assert opened.score([PROMPT], [ANSWERS])[0] == pytest.approx(expected, abs=1e-4)
    # Another model's tokens are nothing to them: they read the texts.
    foreign = [[Response(text=text, token_ids=(5, 6)) for text in ANSWERS]]
    assert score_responses(opened, [PROMPT], foreign)[0] == pytest.approx(expected, abs=1e-4)


def test_what_it_cannot_do_is_an_error() -> None:
    with pytest.raises(JudgeError, match=r"name judge\.model and judge\.reference"):
        Implicit().open(FakeEngine(), PromptSet("compact"))
    with pytest.raises(ValidationError, match="belong together"):
        Implicit(model="owner/one")

    @contextmanager
    def initial() -> Iterator[FakeEngine]:
        yield FakeEngine()

    judge = Implicit(decoupled=0.5).open(FakeEngine(), PromptSet("compact"), initial)
    with pytest.raises(JudgeError, match="needs the whole vocabulary's log-probs"):
        judge.score([PROMPT], [ANSWERS])


def test_the_same_answers_to_two_prompts_are_not_mixed_up(policy: Policy) -> None:
    other = Prompt(id="q", messages=(Message(role="user", content="Why is it so far away?"),))
    both = open_on(policy).score([PROMPT, other], [ANSWERS, ANSWERS])
    assert both[1] == pytest.approx(open_on(policy).score([other], [ANSWERS])[0], abs=1e-5)
    assert both[0] != both[1]
