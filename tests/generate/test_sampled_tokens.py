"""What the policy sampled stays what it was, whatever its tokenizer would make of the text."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast

from prefloop.generate.completion import offsets
from prefloop.generate.hf_engine import HFEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges import NoVerdict
from prefloop.judges.self_judge import SelfJudge
from prefloop.models.chat import Chat
from prefloop.records import Message, Prompt, Request, Response, Sampling
from tests.conftest import CHAT_TEMPLATE

# Zephyr's shape: nothing but a line's end before the answer.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ASKED = (Message(role="user", content="Where?"),)
ASK = Request(messages=ASKED)


def sentencepiece(legacy: bool) -> Any:
    """Llama's tokenizer with few words: each once with the space before it, once without."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    merges: list[tuple[str, str]] = []
    for character in [*string.printable[:94], "\n", "▁"]:
        vocab.setdefault(character, len(vocab))
    for word in ["Paris", "is", "▁Paris", "▁is", "▁A", "▁B"]:
        whole = word[0]
        for character in word[1:]:
            if (whole, character) not in merges:
                merges.append((whole, character))
            whole += character
            vocab.setdefault(whole, len(vocab))
    merges += [("▁", "Paris"), ("▁", "is")]
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy)
    tokenizer.chat_template = ZEPHYR
    return tokenizer


def bigram(vocabulary: int, follows: dict[int, int], default: int, weight: float) -> Any:
    """A Llama whose next token depends on the last one alone: `follows`, else `default`."""
    size = (vocabulary + 7) // 8 * 8
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary, size))
        model.lm_head.weight.zero_()
        for token in range(vocabulary):
            model.lm_head.weight[follows.get(token, default), token] = weight
    return model


def zephyr(legacy: bool = True) -> HFEngine:
    """A policy that surely says "Paris is", with tokens that its tokenizer would not choose."""
    tokenizer = sentencepiece(legacy)
    names = ["\n", "Paris", "▁is", "</s>", "▁Paris"]
    line, paris, is_, end, spaced = tokenizer.convert_tokens_to_ids(names)
    follows = {line: paris, paris: is_, spaced: is_, is_: end}
    return HFEngine(bigram(len(tokenizer), follows, end, 6.0), tokenizer)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_text_is_encoded_as_the_whole_conversation_has_it(legacy: bool) -> None:
    """A space of its own before the answer is what encoding it alone would make of it."""
    tokenizer = sentencepiece(legacy)
    chat = Chat(tokenizer)
    turns = [{"role": "user", "content": "Where?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    turns.append({"role": "assistant", "content": "Paris is"})
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    assert chat.prompt_ids(ASKED) == prompt
    assert whole[: len(prompt)] == prompt
    completion = chat.completion_ids(ASKED, "Paris is")
    assert completion == whole[len(prompt) :][: len(completion)]
    assert tokenizer.convert_ids_to_tokens(completion) == ["Paris", "▁is", "</s>"]
    options = chat.option_ids(ASKED, ["A", "B"])
    assert tokenizer.convert_ids_to_tokens(options) == ["A", "B"]


@pytest.mark.parametrize("legacy", [True, False])
def test_the_policys_own_sample_is_scored_at_its_log_prob(legacy: bool) -> None:
    engine = zephyr(legacy)
    sampling = Sampling(temperature=1.0, max_new_tokens=8)
    (sample,) = engine.sample([ASK], sampling, seed=0)
    assert sample.text == "Paris is"
    (scored,) = engine.score([ASK], [sample])
    assert scored.token_ids == sample.token_ids
    assert scored.mean_logprob == pytest.approx(sample.mean_logprob, abs=1e-5)
    assert scored.offsets == ((0, 5), (5, 8), (8, 8))
    assert min(scored.logprobs) > -1.0


def test_tokens_that_the_tokenizer_would_not_choose_are_kept(model: Any, tokenizer: Any) -> None:
    """An answer that begins with white space: its text lacks it, its tokens do not."""
    engine = HFEngine(model, tokenizer)
    ids = tuple(engine.chat.text_ids(" \nyes ")) + engine.chat.end_ids
    answer = Response(text="yes", token_ids=ids)
    (scored,) = engine.score([ASK], [answer])
    assert scored.token_ids == ids
    assert scored.offsets == ((0, 0), (0, 0), (0, 1), (1, 2), (2, 3), (3, 3), (3, 3))


def test_an_answer_that_was_cut_off_has_no_end_token(model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer)
    texts = [Response(text="So", finish=finish) for finish in ("stop", "length")]
    whole, cut = engine.score([ASK, ASK], texts, top=2)
    assert whole.token_ids == cut.token_ids + engine.chat.end_ids
    assert whole.logprobs[:2] == cut.logprobs
    assert len(cut.top_texts) == len(cut.offsets) == 2
    (nothing,) = engine.score([ASK], [Response(text="", finish="length")])
    assert (nothing.token_ids, nothing.mean_logprob) == ((), 0.0)


def test_sampled_answers_keep_tokens_that_score_as_they_were_drawn(
    model: Any, tokenizer: Any
) -> None:
    """Random bytes are rarely what their text would be encoded to."""
    engine = HFEngine(model, tokenizer)
    asks = [Request(messages=(Message(role="user", content=f"Q{n}"),)) for n in range(12)]
    found = engine.sample(asks, Sampling(temperature=1.0, max_new_tokens=10), seed=1)
    own = [engine.chat.completion_ids(ASKED, r.text, ended=r.finish == "stop") for r in found]
    assert any(list(r.token_ids) != ids for r, ids in zip(found, own, strict=True))
    for response, scored in zip(found, engine.score(asks, found), strict=True):
        assert scored.token_ids == response.token_ids
        assert scored.mean_logprob == pytest.approx(response.mean_logprob, abs=1e-4)
        assert all(0 <= a <= b <= len(response.text) for a, b in scored.offsets)


def test_spans_of_characters_of_several_tokens_rise_to_the_texts_end(tokenizer: Any) -> None:
    """Each byte is a token; parts of a character are decoded as others."""
    chat = Chat(tokenizer)
    ids = [*chat.text_ids(" 🙂é!"), chat.end_id]
    found = offsets(chat, ids, "🙂é!")
    assert found == [(0, 0), (0, 1), *[(1, 1)] * 3, (1, 2), (2, 2), (2, 3), (3, 3)]
    # A byte that begins no character is one of its own.
    broken = [ids[0], ids[2], *ids[5:]]
    assert offsets(chat, broken, chat.decode(broken).strip())[-3:] == [(2, 2), (2, 3), (3, 3)]


def test_an_answer_that_a_stop_text_ended_is_what_came_before_and_then_ends(
    model: Any, tokenizer: Any
) -> None:
    engine = HFEngine(model, tokenizer)
    free = Sampling(temperature=1.0, max_new_tokens=24)
    (whole,) = engine.sample([ASK], free, seed=0)
    stop = whole.text[5:7]
    (cut,) = engine.sample([ASK], free.model_copy(update={"stop": (stop,)}), seed=0)
    count = len(cut.token_ids) - 1
    assert cut.finish == "stop"
    assert cut.token_ids == whole.token_ids[:count] + engine.chat.end_ids
    assert stop not in engine.chat.decode(cut.token_ids)


def test_a_stop_text_inside_a_token_leaves_the_tokens_of_the_text() -> None:
    engine = zephyr()
    sampling = Sampling(temperature=0, max_new_tokens=8, stop=("ris",))
    (cut,) = engine.sample([ASK], sampling, seed=0)
    assert cut.text == "Pa"
    assert list(cut.token_ids) == engine.chat.completion_ids(ASKED, "Pa")


# Ratings.


def thinker() -> HFEngine:
    """A policy that begins every answer with <think>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>", "<think>"]
    core.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    think = tokenizer.convert_tokens_to_ids("<think>")
    return HFEngine(bigram(len(tokenizer), {}, think, 1.0), tokenizer)


def test_a_model_that_would_say_no_rating_has_no_verdict() -> None:
    engine, prompt = thinker(), Prompt(id="a", messages=ASKED)
    (row,) = engine.choose([ASK], list("12345"))
    assert sum(row) < 1e-5
    groups = [("hello",), ("go away",)]
    judge = SelfJudge().open(engine, PromptSet("compact"))
    assert judge.score([prompt] * 2, groups) == [NoVerdict("would not say a rating")] * 2
    lenient = SelfJudge(min_mass=0.0).open(engine, PromptSet("compact"))
    assert lenient.score([prompt] * 2, groups) == [pytest.approx((3.0,))] * 2


@pytest.mark.parametrize("mode", ["pointwise", "pairwise"])
def test_sentencepiece_models_can_be_judges(mode: Any) -> None:
    """Encoded alone, every option begins with the same space."""
    engine, prompt = zephyr(), Prompt(id="a", messages=ASKED)
    judge = SelfJudge(mode=mode, min_mass=0.0).open(engine, PromptSet("compact"))
    (verdict,) = judge.score([prompt], [("Paris", "is")])
    assert verdict == pytest.approx((3.0, 3.0) if mode == "pointwise" else (0.5, 0.5))
