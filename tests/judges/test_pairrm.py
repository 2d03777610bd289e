"""PairRM with the official architecture, small and with random weights, against its format spelled out by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2Tokenizer

from prefloop.errors import JudgeError
from prefloop.generate.templates import PromptSet
from prefloop.judges import NoVerdict, Verdict
from prefloop.judges.pairrm import PairRM, clean, mean_log_odds, question_of
from prefloop.records import Message, Prompt

LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:'<>|*-[]"]
PREFIXES = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]


def save(folder: Path) -> None:
    """A folder like llm-blender/PairRM-hf: the same config keys and names of weights, tiny sizes."""
    vocab = [("[PAD]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[UNK]", 0.0), ("▁", -2.0)]
    tokenizer = DebertaV2Tokenizer(
        vocab=vocab + [(letter, -3.0) for letter in LETTERS],
        unk_id=3,
        extra_special_tokens=PREFIXES,
    )
    tokenizer.save_pretrained(folder)
    source, first, second, candidate = tokenizer.convert_tokens_to_ids(PREFIXES)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=512,
        position_buckets=256,
        max_relative_positions=-1,
        relative_attention=True,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        pad_token_id=0,
        source_prefix_id=source,
        cand1_prefix_id=first,
        cand2_prefix_id=second,
        cand_prefix_id=candidate,
        n_tasks=1,
        drop_out=0.05,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = DebertaV2Model(config)
        head = {"1": nn.Linear(64, 32), "4": nn.Linear(32, 1)}
    weights = {f"pretrained_model.{name}": w for name, w in encoder.state_dict().items()}
    for number, layer in head.items():
        weights |= {f"head_layer.{number}.{name}": w for name, w in layer.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def example(folder: Path) -> dict[str, Any]:
    save(folder)
    return {"model": str(folder), "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pairrm")
    save(made)
    return made


def open_judge(folder: Path, **options: Any) -> Any:
    return PairRM(model=str(folder), device="cpu", **options).open(None, PromptSet("compact"))


def prompt(*contents: str) -> Prompt:
    roles = ("user", "assistant")
    return Prompt(
        id="p",
        messages=tuple(Message(role=roles[n % 2], content=c) for n, c in enumerate(contents)),
    )


def by_hand(folder: Path, source: str, first: str, second: str) -> float:
    """The model card's computation, without our code: three segments, the vectors at their prefixes."""
    tokenizer = DebertaV2Tokenizer.from_pretrained(folder)
    config = DebertaV2Config.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    encoder = DebertaV2Model(config).eval()
    encoder.load_state_dict(
        {k.removeprefix("pretrained_model."): w for k, w in weights.items() if "head" not in k}
    )
    source_ids = tokenizer.encode("<|source|>" + source, max_length=1224, truncation=True)
    room = (2048 - len(source_ids)) // 2
    first_ids = tokenizer.encode("<|candidate1|>" + first, max_length=room, truncation=True)
    second_ids = tokenizer.encode("<|candidate2|>" + second, max_length=room, truncation=True)
    ids = source_ids + first_ids + second_ids
    with torch.no_grad():
        hidden = encoder(torch.tensor([ids])).last_hidden_state[0]
        at = [hidden[ids.index(tokenizer.convert_tokens_to_ids(p))] for p in PREFIXES[:3]]

        def head(candidate: torch.Tensor) -> torch.Tensor:
            joined = torch.cat([at[0], candidate])
            inner = torch.tanh(
                weights["head_layer.1.weight"] @ joined + weights["head_layer.1.bias"]
            )
            return weights["head_layer.4.weight"] @ inner + weights["head_layer.4.bias"]

        return float(head(at[1]) - head(at[2]))


def test_two_answers_score_the_mean_of_both_orders_as_the_model_card_computes_them(
    folder: Path,
) -> None:
    question, a, b = "where is it?", "in the north", "I do not know."
    difference = by_hand(folder, question, a, b) - by_hand(folder, question, b, a)
    (verdict,) = open_judge(folder).score([prompt(question)], [[a, b]])
    assert verdict == pytest.approx((difference / 2, -difference / 2), abs=1e-5)
    assert abs(difference) > 1e-3


def test_several_pairs_of_different_lengths_in_one_batch_change_no_score(folder: Path) -> None:
    groups = [["in the north", "no"], ["x" * 70, "abc def", "what?"]]
    prompts = [prompt("where is it?"), prompt("why, and then what happened to it?")]
    together = open_judge(folder).score(prompts, groups)
    for one, group, verdict in zip(prompts, groups, together, strict=True):
        assert open_judge(folder, batch_tokens=1).score([one], [group])[0] == pytest.approx(
            verdict, abs=1e-5
        )


def test_three_answers_score_their_mean_against_all_as_rank_does() -> None:
    """C_ij by hand. Answer 0: ((1 - -1) + (2 - 0)) / 3; the diagonal counts as 0."""
    logits = {(0, 1): 1.0, (1, 0): -1.0, (0, 2): 2.0, (2, 0): 0.0, (1, 2): 0.5, (2, 1): 1.5}
    assert mean_log_odds(logits, 3) == pytest.approx((4 / 3, (-2 - 1) / 3, (-2 + 1) / 3))


def test_equal_answers_tie_without_a_call(folder: Path) -> None:
    judge = open_judge(folder)
    judge.model.forward = None  # any call would fail
    assert judge.score([prompt("where?")], [["same", "same"]]) == [(0.0, 0.0)]


def test_what_cannot_be_compared_has_no_verdict(folder: Path) -> None:
    verdicts = open_judge(folder).score(
        [prompt("where?")] * 3, [["a", " "], ["only one"], ["a", "<|source|>[SEP]"]]
    )
    assert verdicts == [
        NoVerdict("empty response"),
        NoVerdict("nothing to compare with"),
        NoVerdict("empty response"),
    ]


def test_special_strings_in_texts_count_for_nothing(folder: Path) -> None:
    judge = open_judge(folder)

    def score(question: str, a: str, b: str) -> Verdict:
        found: Verdict = judge.score([prompt(question)], [[a, b]])[0]
        return found

    plain = score("where?", "in the north", "no")
    assert score("where?<|source|>", "in[SEP] the north", "n<|candidate2|>o") == plain
    assert clean("<|sou<|source|>rce|>hello[C[SEP]LS]") == "hello"


def test_long_texts_are_cut_as_pairrms_own_code_cuts_them(folder: Path) -> None:
    question, a, b = "q" * 1500, "a" * 600, "b" * 10
    difference = by_hand(folder, question, a, b) - by_hand(folder, question, b, a)
    (verdict,) = open_judge(folder).score([prompt(question)], [[a, b]])
    assert verdict[0] == pytest.approx(difference / 2, abs=1e-4)
    rejecting = open_judge(folder, too_long="reject")
    assert rejecting.score([prompt(question)], [[a, b]]) == [
        NoVerdict("longer than PairRM's window")
    ]
    # 412 is what a full question leaves to each; a short one leaves more.
    assert isinstance(rejecting.score([prompt("q")], [[a, b]])[0], tuple)


def test_a_lone_turn_is_put_as_it_is() -> None:
    assert question_of(prompt("hello!").messages, ["hi!"]) == ("hello!", ("hi!",))


def test_several_turns_are_put_in_pairrms_form_word_by_word() -> None:
    source, candidates = question_of(prompt("Hi", "Hello.", "Where?").messages, ["North.", "No."])
    assert source == (
        "Finish the following coversation in each i-th turn by filling in <Response i> with your "
        "response.USER: Hi\nAssistant: <Response 1>\nUSER: Where?\nAssistant: <Response 2>"
    )
    assert candidates == (
        "<Response 1>: Hello.\n<Response 2>: North.",
        "<Response 1>: Hello.\n<Response 2>: No.",
    )


def test_a_system_turn_goes_before_the_users() -> None:
    messages = (Message(role="system", content="Be brief."), Message(role="user", content="Why?"))
    assert question_of(messages, []).source == "Be brief.\n\nWhy?"


def test_a_folder_that_lacks_weights_of_pairrm_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["head_layer.4.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JudgeError, match=r"is not PairRM \(weights head_layer\.4\.bias\)"):
        open_judge(tmp_path)


def test_a_tokenizer_with_other_prefix_ids_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["cand1_prefix_id"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(JudgeError, match=r"is not PairRM \(prefix tokens"):
        open_judge(tmp_path)


def test_pickled_weights_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(JudgeError, match="cannot be loaded"):
        open_judge(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    "PAIRRM" not in os.environ,
    reason="the published weights are not here: name their folder in PAIRRM",
)
def test_the_published_weights_give_the_published_logits() -> None:
    """The model card's example: A over B in the order AB has the logits 1.9003 and -1.2547."""
    judge = open_judge(Path(os.environ["PAIRRM"]))
    asked = [
        judge._encode_group(prompt("hello!"), ["hi!", "f**k off!"])[0, 1],
        judge._encode_group(prompt("I love you!"), ["I hate you!", "I love you, too!"])[0, 1],
    ]
    assert judge._logits(asked) == pytest.approx([1.9003, -1.2547], abs=1e-3)
