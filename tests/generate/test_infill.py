"""Infill flaws: one word exchanged for one the policy finds less likely, and nothing else touched."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prefloop.generate.infill
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.hf_engine import HFEngine
from prefloop.generate.infill import _FUNCTION_WORDS, Infill, infill_flaws
from prefloop.records import Finish, Message, Request, Response, Sampling, Scored

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
ASK = Request(messages=(Message(role="user", content="Tell me something."),))
SENTENCE = "Seven red boats went under the stone bridge on Monday."


class ScriptedEngine(FakeEngine):
    """A word with the space before it is a token of log-prob -1; the alternatives are the same everywhere."""

    def __init__(
        self,
        alternatives: dict[str, float],
        continuation: str = " and so on",
        finish: Finish = "stop",
    ) -> None:
        super().__init__()
        self.alternatives = alternatives
        self.continuation = Response(text=continuation, finish=finish)
        self.prefixes: list[str] = []

    def sample(self, requests: Sequence[Request], *_: Any, **__: Any) -> list[Response]:
        self.prefixes += [request.prefix for request in requests]
        return [self.continuation for _ in requests]

    def score(
        self, requests: Any, answers: Sequence[Response], *, top: int = 0, at: Any = None
    ) -> list[Scored]:
        return [self._tokens(answer.text) for answer in answers]

    def _tokens(self, answer: str) -> Scored:
        found = [match.span() for match in re.finditer(r" ?[^\s.,]+|\s|[.,]", answer)]
        offsets = (*found, (len(answer), len(answer)))
        return Scored(
            token_ids=tuple(range(len(offsets))),
            offsets=offsets,
            logprobs=(-1.0,) * len(offsets),
            top_texts=(tuple(self.alternatives),) * len(offsets),
            top_logprobs=(tuple(self.alternatives.values()),) * len(offsets),
        )


def said(texts: list[str]) -> list[Response]:
    return [Response(text=text) for text in texts]


def infill(answer: str, engine: Any, seed: int = 0) -> Infill | None:
    return infill_flaws(engine, [ASK], said([answer]), Sampling(), seed=seed)[0]


def assert_one_word_differs(answer: str, flaw: Infill) -> None:
    start, end = flaw.start, flaw.start + len(flaw.original)
    assert (start, end) in [match.span() for match in WORD.finditer(answer)]
    assert flaw.text == answer[:start] + flaw.replacement + answer[end:]
    assert answer[start:end] == flaw.original
    assert WORD.fullmatch(flaw.replacement)
    assert flaw.replacement.lower() != flaw.original.lower()
    assert flaw.replacement.isdigit() == flaw.original.isdigit()
    assert flaw.replacement[0].isupper() == flaw.original[0].isupper()
    assert not {flaw.original.lower(), flaw.replacement.lower()} & _FUNCTION_WORDS


KINDS = ["red", "Blue", "the", "It", "17", "x_y", "don't", "é", "—", ",", "\n", "  ", "3rd"]


@given(
    words=st.lists(st.sampled_from(KINDS) | st.text(max_size=6), max_size=12),
    continuation=st.sampled_from(["", " on", "th", "7", "er, or", "’s", "_x"]),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_whatever_the_text_at_most_one_word_changes(
    words: list[str], continuation: str, seed: int
) -> None:
    answer = " ".join(words)
    tokens = [" hill", " Hill", " 4", "low", "Low", "5", " the", " wi", " -", "", " 9x"]
    scripted = ScriptedEngine(dict.fromkeys(tokens, -2.0), continuation)
    for engine in (FakeEngine(), scripted):
        flaw = infill(answer, engine, seed)
        if flaw is not None:
            assert_one_word_differs(answer, flaw)


def test_the_seed_decides_which_word() -> None:
    flaws = [infill(SENTENCE, FakeEngine(), seed) for seed in range(20)]
    assert flaws == [infill(SENTENCE, FakeEngine(), seed) for seed in range(20)]
    assert len({flaw.start for flaw in flaws if flaw is not None}) > 2


def test_the_replacement_was_less_likely_than_the_original() -> None:
    """-1 is the original's: -0.5 is likelier, -1 as likely, -8 is noise; -2 remains."""
    engine = ScriptedEngine({" north": -0.5, " east": -1.0, " west": -2.0, " up": -8.0})
    for seed in range(8):
        flaw = infill("go south", engine, seed)
        assert flaw is not None
        assert flaw.text == "go west"


@pytest.mark.parametrize(
    ("answer", "alternatives", "expected"),
    [
        ("room 17", [" big", " 18"], {"room 18"}),
        ("no Dane", [" swede", " Swede"], {"no Swede"}),
        ("see the cat of it", [" the", " dog"], {"see the dog of it"}),
        ("go walks", [" wal", "runs", " runs"], {"go runs", "runs walks"}),
    ],
)
def test_a_word_is_replaced_by_one_of_its_kind(
    answer: str, alternatives: list[str], expected: set[str]
) -> None:
    """Digits for digits, a capital for a capital, no function word; the first word has no space."""
    engine = ScriptedEngine(dict.fromkeys(alternatives, -2.0))
    flaws = [infill(answer, engine, seed) for seed in range(12)]
    assert {flaw.text for flaw in flaws if flaw is not None} == expected


def test_a_token_that_would_lengthen_the_word_before_replaces_nothing() -> None:
    """After "The", "se" makes "These"; only a token with the space stands where " cat" stood."""
    assert infill("The cat", ScriptedEngine({"se": -2.0})) is None
    flaw = infill("The cat", ScriptedEngine({"se": -2.0, " dog": -2.0}))
    assert flaw is not None
    assert flaw.text == "The dog"


def test_a_word_of_several_tokens_is_finished_by_the_policy() -> None:
    engine = ScriptedEngine({" hed": -2.0}, continuation="gehog, which")
    flaw = infill("the cat, the", engine)
    assert flaw is not None
    assert flaw.text == "the hedgehog, the"
    assert engine.prefixes == ["the hed"]


@pytest.mark.parametrize(
    ("begins", "continuation", "finish"),
    [
        pytest.param(" wi", "th", "stop", id="a function word after all"),
        pytest.param(" hed", "gehog", "length", id="cut off inside the word"),
    ],
)
def test_a_word_that_does_not_end_well_is_no_flaw(
    begins: str, continuation: str, finish: Finish
) -> None:
    assert infill("the cat", ScriptedEngine({begins: -2.0}, continuation, finish)) is None


def test_digits_stay_digits_when_the_word_is_finished() -> None:
    assert infill("the 17", ScriptedEngine({" 4": -2.0}, continuation="th")) is None


def test_a_word_that_the_limit_did_not_cut_is_taken() -> None:
    flaw = infill("the cat", ScriptedEngine({" hed": -2.0}, "gehog and so", "length"))
    assert flaw is not None
    assert flaw.text == "the hedgehog"


def test_where_one_word_fails_the_next_is_tried() -> None:
    """17 takes 4 as its first token, which comes out as "4th"; the other word's turn comes."""
    engine = ScriptedEngine({" 4": -2.0, " ox": -2.0}, continuation="th")
    for seed in range(8):
        flaw = infill("the 17 cows", engine, seed)
        assert flaw is not None
        assert flaw.text == "the 17 oxth"


@pytest.mark.parametrize("answer", ["", " . ,", "the of it", "17 18"])
def test_nothing_that_fits_gives_none(answer: str) -> None:
    assert infill(answer, ScriptedEngine({" west": -2.0})) is None


def test_every_answer_gets_its_own_flaw_in_order() -> None:
    engine = ScriptedEngine({" west": -2.0})
    answers = ["go south", "the of", "look north"]
    flaws = infill_flaws(engine, [ASK] * 3, said(answers), Sampling(), seed=0)
    texts = [flaw.text if flaw else None for flaw in flaws]
    assert texts == ["go west", None, "look west"]


def test_on_a_real_model_the_replacement_is_less_likely(model: Any, tokenizer: Any) -> None:
    """Same text before it, so the two log-probs are of the same position."""
    engine = HFEngine(model, tokenizer)
    answers = [f"{SENTENCE} Café {n} was open by {n * 7} — don't ask." * 3 for n in range(4)]
    found = infill_flaws(engine, [ASK] * 4, said(answers), Sampling(), seed=0)
    flaws = [(a, flaw) for a, flaw in zip(answers, found, strict=True) if flaw is not None]
    assert flaws
    for answer, flaw in flaws:
        assert_one_word_differs(answer, flaw)
        before, after = engine.score([ASK, ASK], said([answer, flaw.text]))
        place = len(answer[: flaw.start].encode())  # a token is a byte
        assert after.logprobs[place] < before.logprobs[place]


def test_sampling_ends_with_the_word_and_gives_the_same_flaws(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random numbers are each answer's own, so tokens that nobody reads change nothing."""
    answers = [f"{SENTENCE} Café {n} was open, I hear. " * 2 for n in range(6)]
    sampled: list[int] = []

    class Counting(HFEngine):
        def sample(self, *given: Any, **options: Any) -> list[Response]:
            found = super().sample(*given, **options)
            sampled.append(sum(len(one.token_ids) for one in found))
            return found

    def flaws() -> tuple[list[Infill | None], int]:
        sampled.clear()
        engine = Counting(model, tokenizer)
        return infill_flaws(engine, [ASK] * 6, said(answers), Sampling(), seed=3), sum(sampled)

    # The tiny model's tokens are bytes, which seldom end a word; each of these may.
    ends = tuple(chr(code) for code in range(128) if not chr(code).isalnum())
    monkeypatch.setattr(prefloop.generate.infill, "_WORD_ENDS", ends)
    few, few_tokens = flaws()
    monkeypatch.setattr(prefloop.generate.infill, "_WORD_ENDS", ())
    many, many_tokens = flaws()
    assert few == many
    assert few_tokens < many_tokens


def test_only_words_that_may_be_replaced_are_scored_and_the_flaws_are_the_same(
    model: Any, tokenizer: Any
) -> None:
    answers = [f"{SENTENCE} It is the café {n} — open, I hear.\n 17 °C. " * 2 for n in range(6)]
    asked: list[Any] = []

    class Whole(HFEngine):
        def score(self, *given: Any, at: Any = None, **options: Any) -> list[Scored]:
            asked.extend(at)
            return super().score(*given, **options)

    def flaws(engine: HFEngine) -> list[Infill | None]:
        return infill_flaws(engine, [ASK] * 6, said(answers), Sampling(), seed=3)

    found = flaws(HFEngine(model, tokenizer))
    assert any(found)
    assert found == flaws(Whole(model, tokenizer))
    words = [
        [m.group() for m in WORD.finditer(text) if m.start() in at]
        for text, at in zip(answers, asked, strict=True)
    ]
    once = "Seven red boats went under stone bridge Monday café 0 open hear 17 C".split()
    assert words[0] == once * 2


def sentencepiece_like(words: list[str]) -> PreTrainedTokenizerFast:
    """Words with their space as one token, and a decoder that drops the first token's space."""
    pieces = ["<unk>", "<end>", "x", *words, *(f"▁{word}" for word in [*words, "x"])]
    core = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    return tokenizer


def test_alternatives_keep_their_space_where_the_decoder_drops_it() -> None:
    words = ["go", "south", "west"]
    tokenizer = sentencepiece_like(words)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
    )
    engine = HFEngine(LlamaForCausalLM(config).eval(), tokenizer)
    ask = Request(messages=(Message(role="user", content="go"),))
    scored = engine.score([ask], said(["go south"]), top=len(tokenizer))[0]
    assert {*words, *(f" {word}" for word in words)} <= set(scored.top_texts[1])
