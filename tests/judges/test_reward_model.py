import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from prefloop import judges as rank
from prefloop.config import find_plugin
from prefloop.errors import JudgeError
from prefloop.generate.templates import PromptSet
from prefloop.judges import NoVerdict
from prefloop.judges.reward_model import RewardModel, token_batches
from prefloop.records import Message, Prompt
from tests.conftest import byte_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<user>", "<assistant>", "<end>"]
PUNCTUATION = ["<", ">", "[", "]"]
WORDS = [*PUNCTUATION, "end", "where", "is", "it", "north", "south", "far", "very", "SEP"]
VOCAB = {word: number for number, word in enumerate(SPECIAL + WORDS)}
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{{ '<' + m.role + '> ' + m.content + ' <end> ' }}"
    "{% endfor %}"
)
GROUPS = [["north", "very far south it is"], ["far far far north"], ["south", "it", "very north"]]


def _save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    backend = Tokenizer(WordLevel(VOCAB, unk_token="[UNK]"))
    backend.pre_tokenizer = PreTokenizers(
        [WhitespaceSplit(), *(Split(mark, "isolated") for mark in PUNCTUATION)]
    )
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", VOCAB["[CLS]"]), ("[SEP]", VOCAB["[SEP]"])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        eos_token="<end>",
        extra_special_tokens=SPECIAL,
        chat_template=template,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)


def _llama_config(**changes: Any) -> LlamaConfig:
    options = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 48,
        "num_labels": 1,
        "bos_token_id": None,
        "eos_token_id": VOCAB["<end>"],
        "initializer_range": 0.5,
    }
    return LlamaConfig(**(options | changes))


def _llama(folder: Path, **changes: Any) -> str:
    torch.manual_seed(1)
    LlamaForSequenceClassification(_llama_config(**changes)).save_pretrained(folder)
    _save_tokenizer(folder)
    return str(folder)


def example(folder: Path) -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "eos_token_id": 1}
    torch.manual_seed(1)
    config = _llama_config(**options, pad_token_id=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder), "device": "cpu"}


def _bert(folder: Path) -> str:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    _save_tokenizer(folder, template=None)
    return str(folder)


def _decoder(folder: Path) -> str:
    return _llama(folder, pad_token_id=VOCAB["[PAD]"])


def _decoder_without_pad(folder: Path) -> str:
    return _llama(folder)


def _open(model: str, **options: Any) -> Any:
    return RewardModel(model=model, device="cpu", **options).open(None, PromptSet("compact"))


def _prompt(text: str = "where is it", **changes: Any) -> Prompt:
    return Prompt(id="p", messages=(Message(role="user", content=text),), **changes)


def _flat(verdicts: list[Any]) -> list[float]:
    return [score for verdict in verdicts for score in verdict]


def _ids(text: str) -> list[int]:
    return [VOCAB[word] for word in text.split()]


@pytest.mark.parametrize("build", [_decoder, _decoder_without_pad, _bert])
def test_scores_do_not_depend_on_the_batch(build, tmp_path):
    folder = build(tmp_path)
    prompts = [_prompt(), _prompt("is it far"), _prompt("where is it very very far north")]
    alone = _open(folder, batch_tokens=1).score(prompts, GROUPS)
    for budget in (25, 40, 16384):
        together = _open(folder, batch_tokens=budget).score(prompts, GROUPS)
        assert _flat(together) == pytest.approx(_flat(alone), abs=1e-5)
    reversed_groups = _open(folder).score(prompts[::-1], GROUPS[::-1])
    assert _flat(reversed_groups[::-1]) == pytest.approx(_flat(alone), abs=1e-5)
    assert len({round(score, 4) for score in _flat(alone)}) == 6


def test_a_decoder_scores_the_conversation_through_its_own_template(tmp_path):
    folder = _decoder_without_pad(tmp_path)
    ids = _ids("<user> where is it <end> <assistant> far north <end>")
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.item()
    verdicts = _open(folder).score([_prompt()], [["far north", "it"]])
    assert verdicts[0][0] == pytest.approx(expected, abs=1e-5)


def test_without_a_template_question_and_answer_are_a_plain_pair_and_it_is_said(tmp_path, caplog):
    folder = _bert(tmp_path)
    with caplog.at_level(logging.WARNING):
        judge = _open(folder)
    assert "has no chat template" in caplog.text
    ids = _ids("[CLS] where is it [SEP] far north [SEP]")
    types = [0] * 5 + [1] * 3
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits.item()
    assert judge.score([_prompt()], [["far north", "it"]])[0][0] == pytest.approx(
        expected, abs=1e-5
    )


def test_a_decoder_without_a_template_is_not_given_segment_ids(tmp_path):
    """GPT-2 would embed them as words."""
    folder = _decoder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    judge = _open(folder)
    seen: list[str] = []
    judge.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs), with_kwargs=True
    )
    judge.score([_prompt()], [["far north"]])
    assert seen == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("build", "token"), [(_decoder, "<end>"), (_decoder_without_pad, "<end>"), (_bert, "[SEP]")]
)
def test_an_answer_cannot_write_special_tokens(build, token, tmp_path):
    judge = _open(build(tmp_path))
    seen: list[torch.Tensor] = []
    judge.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    judge.score([_prompt()], [[f"north {token} south"]])
    assert (seen[0] == VOCAB[token]).sum() == 2
    assert (seen[0] == VOCAB[token.strip("<>[]")]).sum() == 1


def test_an_over_long_answer_has_no_verdict_and_leaves_the_other_groups_alone(tmp_path):
    judge = _open(_decoder(tmp_path), max_length=10)
    fits, long, also = judge.score(
        [_prompt()] * 3, [["very far"], ["north", "very very far north"], ["it"]]
    )
    assert long == NoVerdict("longer than the reward model's window")
    assert len(fits) == 1
    assert also == pytest.approx(judge.score([_prompt()], [["it"]])[0], abs=1e-5)


def test_the_models_own_window_holds_even_if_max_length_is_larger(tmp_path):
    judge = _open(_decoder(tmp_path), max_length=1000)
    frame = len("<user> where is it <end> <assistant> <end>".split())
    assert isinstance(judge.score([_prompt()], [["far " * (48 - frame)]])[0], tuple)
    assert judge.score([_prompt()], [["far " * (49 - frame)]]) == [
        NoVerdict("longer than the reward model's window")
    ]


def test_an_empty_answer_has_no_verdict(tmp_path):
    judge = _open(_decoder(tmp_path))
    assert judge.score([_prompt()], [["north", " "]]) == [NoVerdict("empty response")]


def test_a_conversation_that_the_template_refuses_has_no_verdict(tmp_path):
    judge = _open(_decoder(tmp_path))
    turns = (Message(role="system", content="be far"), Message(role="user", content="where"))
    assert judge.score([Prompt(id="p", messages=turns)], [["north"]]) == [
        NoVerdict("the reward model's chat template refuses the conversation")
    ]


def test_a_score_that_is_not_finite_is_no_verdict(tmp_path):
    judge = _open(_decoder(tmp_path))
    torch.nn.init.constant_(judge.model.score.weight, float("inf"))
    assert judge.score([_prompt()], [["north"]]) == [NoVerdict("score is not finite")]


def test_more_than_one_label_is_an_error_that_names_the_number(tmp_path):
    with pytest.raises(JudgeError, match=r"num_labels = 3.*num_labels = 1"):
        _open(_llama(tmp_path, num_labels=3))


def test_a_language_model_without_a_score_head_is_an_error_not_random_scores(tmp_path):
    LlamaForCausalLM(_llama_config()).save_pretrained(tmp_path)
    _save_tokenizer(tmp_path)
    with pytest.raises(JudgeError, match=r"lacks trained weights for score\.weight"):
        _open(str(tmp_path))


def test_a_missing_folder_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(JudgeError, match=r"nowhere' cannot be loaded.*name a folder or Hub id"):
        _open(str(tmp_path / "nowhere"))


def test_a_missing_tokenizer_is_an_error_with_a_remedy(tmp_path):
    LlamaForSequenceClassification(_llama_config()).save_pretrained(tmp_path)
    with pytest.raises(JudgeError, match=r"AutoTokenizer .*name a folder or Hub id"):
        _open(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path):
    folder = _decoder(tmp_path)
    model = LlamaForSequenceClassification.from_pretrained(folder)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(JudgeError, match="safetensors"):
        _open(folder)


def test_damaged_weights_are_an_error_with_a_remedy(tmp_path):
    folder = _decoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(JudgeError, match="cannot be loaded"):
        _open(folder)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder = _decoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    assert isinstance(_open(folder).model, LlamaForSequenceClassification)


def test_an_impossible_device_is_an_error_with_a_remedy(tmp_path):
    judge = RewardModel(model=_decoder(tmp_path), device="toaster")
    with pytest.raises(JudgeError, match=r"device 'toaster'.*choose another judge.device"):
        judge.open(None, PromptSet("compact"))


def test_auto_dtype_is_float32_on_the_cpu_and_a_named_one_is_kept(tmp_path):
    folder = _decoder(tmp_path)
    LlamaForSequenceClassification.from_pretrained(folder, dtype="bfloat16").save_pretrained(folder)
    assert _open(folder).model.dtype == torch.float32
    assert _open(folder, dtype="bfloat16").model.dtype == torch.bfloat16


def test_answers_that_leave_no_token_for_padding_are_an_error_with_a_remedy(tmp_path):
    """No short answer can use up a whole vocabulary, so a vocabulary of none stands for one used up."""
    judge = _open(_decoder_without_pad(tmp_path))
    judge.model.config.vocab_size = 0
    with pytest.raises(JudgeError, match="set pad_token_id"):
        judge.score([_prompt()], [["north"]])


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_token_batches_hold_every_row_once_within_the_budget(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_token_batches_start_with_the_longest_row():
    assert token_batches([2, 9, 3, 3], 9) == [[1], [2, 3, 0]]


def test_reward_model_is_found_by_its_file_name():
    assert find_plugin(rank, "reward_model", rank.Judge, "judge") is RewardModel
