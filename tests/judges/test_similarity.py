from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from prefloop import judges as rank
from prefloop.config import find_plugin
from prefloop.errors import ModelError
from prefloop.generate.templates import PromptSet
from prefloop.judges import NoVerdict, Verdict
from prefloop.judges.similarity import Similarity
from prefloop.records import Message, Prompt


def _prompt(target: str | None) -> Prompt:
    return Prompt(id="p", messages=(Message(role="user", content="Where?"),), target=target)


def _scores(target: str | None, *answers: str, word_order: int = 0) -> Verdict:
    judge = Similarity(word_order=word_order).open(None, PromptSet("compact"))
    return judge.score([_prompt(target)], [answers])[0]


def test_the_target_itself_scores_100_and_a_disjoint_answer_0():
    assert _scores("in the north", "in the north", "XYZ") == pytest.approx((100.0, 0.0))


def test_chrf_follows_popovic_by_hand():
    """Target "ab", answer "a": only unigrams count. Precision 1/1, recall 1/2, beta 2:
    F = (1 + 4) * 1 * 0.5 / (4 * 1 + 0.5) = 5/9."""
    assert _scores("ab", "a") == pytest.approx((500 / 9,))


def test_word_order_2_tells_apart_what_characters_alone_cannot():
    """chrF drops spaces, so a space in the wrong place is seen by chrF++ only."""
    plain = _scores("in the north", "int henorth")
    assert isinstance(plain, tuple)
    assert plain[0] == pytest.approx(100.0)
    with_words = _scores("in the north", "int henorth", word_order=2)
    assert isinstance(with_words, tuple)
    assert with_words[0] < 100.0


def test_a_group_with_an_empty_response_has_no_verdict():
    assert _scores("in the north", "in the north", " \n") == NoVerdict("empty response")


@pytest.mark.parametrize("target", [None, "", "  "])
def test_without_a_target_there_is_no_verdict(target):
    assert _scores(target, "in the north") == NoVerdict("no target")


def test_verdicts_come_in_the_order_of_the_groups():
    judge = Similarity().open(None, PromptSet("compact"))
    verdicts = judge.score([_prompt("ab"), _prompt(None), _prompt("ab")], [["ab"], ["ab"], ["q"]])
    assert verdicts == [(100.0,), NoVerdict("no target"), (0.0,)]


def test_similarity_is_found_by_its_file_name_and_asks_for_targets():
    found = find_plugin(rank, "similarity", rank.Judge, "judge")
    assert found is Similarity
    assert Similarity().needs_target
    assert not Similarity().needs_policy


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights and a window of 16 tokens."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "in", "the", "north", "south", "no"]
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    core.enable_truncation(4)  # as MiniLM's own file has it; the judge must not cut
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def test_the_cosine_is_that_of_mean_pooled_vectors_whatever_the_padding(encoder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder)
    model = BertModel.from_pretrained(encoder).eval()

    def vector(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer(text, truncation=False)["input_ids"]])
        with torch.no_grad():
            return model(ids).last_hidden_state[0].mean(dim=0)

    target, answers = "in the north", ["in the north", "no", "the south no no no no no no"]
    judge = Similarity(model=str(encoder)).open(None, PromptSet("compact"))
    (verdict,) = judge.score([_prompt(target)], [answers])
    cosine = torch.nn.functional.cosine_similarity
    expected = [float(cosine(vector(target), vector(a), dim=0)) for a in answers]
    assert verdict == pytest.approx(expected, abs=1e-5)
    assert expected[0] == pytest.approx(1.0)


def test_cosines_too_have_no_verdict_on_what_they_cannot_read(encoder: Path) -> None:
    judge = Similarity(model=str(encoder)).open(None, PromptSet("compact"))
    verdicts = judge.score(
        [_prompt("in the north")] * 3 + [_prompt(None)],
        [["no"], ["no " * 15, "no"], ["no", " "], ["no"]],
    )
    assert isinstance(verdicts[0], tuple)
    assert verdicts[1:] == [
        NoVerdict("longer than the embedding model's window"),
        NoVerdict("empty response"),
        NoVerdict("no target"),
    ]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("embedded:minlm", "did you mean 'minilm'"),
        ("no/such/folder", "cannot be loaded"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(model: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        Similarity(model=model).open(None, PromptSet("compact"))


def test_word_order_with_an_embedding_model_is_refused() -> None:
    with pytest.raises(ValidationError, match="has no effect"):
        Similarity(model="embedded:minilm", word_order=2)


@pytest.mark.slow
def test_minilm_sees_meaning_where_chrf_sees_letters() -> None:
    judge = Similarity(model="embedded:minilm").open(None, PromptSet("compact"))
    (verdict,) = judge.score(
        [_prompt("A man is eating food")], [["Someone eats a meal", "A man is heating wood"]]
    )
    assert isinstance(verdict, tuple)
    assert verdict[0] == pytest.approx(0.75, abs=0.01)
    assert verdict[0] > verdict[1]


def test_a_negative_word_order_is_refused():
    with pytest.raises(ValidationError, match="word_order"):
        Similarity(word_order=-1)
