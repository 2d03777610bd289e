"""Training a reward model: it learns, goes on where it was killed, and the judge reads what was trained."""

from __future__ import annotations

import fcntl
import json
import math
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from prefloop.data.preferences import read_preferences
from prefloop.errors import DataError, ModelError, RecipeError, RunFolderError, TrainingError
from prefloop.evaluate.judge_check import score_pairs
from prefloop.generate.templates import PromptSet
from prefloop.judges.reward_model import RewardModel
from prefloop.models.embedding import Embedder
from prefloop.models.reward import Encoded, RewardEncoder, features
from prefloop.recipe.reward import RewardRecipe, load_reward_recipe, shipped_reward_recipes
from prefloop.records import Message, Prompt
from prefloop.run.loop import run
from prefloop.run.reward import load_pairs, train_reward
from prefloop.run_folder import read_run
from prefloop.train import checkpoint
from prefloop.train import reward_trainer as reward
from prefloop.train.losses import bradley_terry
from prefloop.train.options import RewardModelOptions, RewardTrainOptions
from prefloop.train.reward_trainer import fit_head
from tests.run.test_loop import recipe as tiny_run

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, "which", "way", "good", "bad", "very", *(f"w{n}" for n in range(20))]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small BERT with random weights and words for tokens."""
    folder = tmp_path_factory.mktemp("encoder")
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(
            BertConfig(
                vocab_size=len(WORDS),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=48,
                max_position_embeddings=32,
            )
        ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """120 pairs in which the answer with "good" is the better one, whatever its length."""
    file = tmp_path_factory.mktemp("data") / "easy.jsonl"
    rows = [
        {
            "prompt": f"which way w{n % 20} w{n // 20}",
            "chosen": f"w{n % 7} good" + " very" * (n % 3),
            "rejected": f"w{n % 7} bad" + " very" * (n % 2),
        }
        for n in range(120)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def recipe(source: str, data: str, **train: Any) -> RewardRecipe:
    return RewardRecipe(
        name="tiny",
        model={"source": source, "device": "cpu", "tuning": "full"},
        data={"train": [data]},
        train={"lr": 3e-3, "epochs": 6, "max_length": 24, "save_every": 4, **train},
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_it_learns_what_the_data_say_and_the_judge_loads_it(encoder_folder, pairs_file, tmp_path):
    report = train_reward(recipe(encoder_folder, pairs_file), tmp_path / "r")
    held_out = read_preferences(str(tmp_path / "r/held_out.jsonl")).pairs
    measured = report["held_out"]["easy"]
    assert measured["pairs"] == len(held_out) > 10
    assert measured["agreement"]["value"] > 0.95
    assert measured["calibration"]["log_loss"] < 0.3
    assert report["training"]["first_loss"] > 0.5 > report["training"]["last_loss"]
    judge = RewardModel(model=str(tmp_path / "r"), device="cpu").open(None, PromptSet("compact"))
    rows = score_pairs(judge, held_out)
    assert sum(row.scores[0] > row.scores[1] for row in rows) > 0.95 * len(rows)
    assert not list((tmp_path / "r/training").glob("checkpoint*"))


def test_no_held_out_prompt_is_trained_on(pairs_file):
    train, held_out, _ = load_pairs(recipe("x/y", pairs_file))
    assert len(train) + len(held_out) == 120
    assert not {pair.key for pair in train} & {pair.key for pair in held_out}


def test_a_killed_training_goes_on_to_the_same_weights(
    encoder_folder, pairs_file, tmp_path, monkeypatch
):
    wanted = recipe(encoder_folder, pairs_file, epochs=2)
    train_reward(wanted, tmp_path / "whole")
    save = checkpoint.save_checkpoint

    def killed(*args: Any, **position: Any) -> None:
        save(*args, **position)
        if position["step"] == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train_reward(wanted, tmp_path / "killed")
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    torch.manual_seed(99)  # another process begins with another random state
    train_reward(wanted, tmp_path / "killed")
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [
        (tmp_path / name / "training/metrics.jsonl").read_text() for name in ("whole", "killed")
    ]
    assert logs[0] == logs[1]


def test_a_finished_folder_is_not_trained_again(encoder_folder, pairs_file, tmp_path, monkeypatch):
    wanted = recipe(encoder_folder, pairs_file, epochs=1)
    first = train_reward(wanted, tmp_path / "r")
    monkeypatch.setattr(reward, "load_base", None)  # would fail if it were called
    said: list[str] = []
    assert train_reward(wanted, tmp_path / "r", said.append) == json.loads(json.dumps(first))
    assert "already" in said[0]
    # Killed between the model and the report: only the measuring is done again.
    (tmp_path / "r/report.json").unlink()
    again = train_reward(wanted, tmp_path / "r")
    assert json.loads(json.dumps(again["held_out"])) == json.loads(json.dumps(first["held_out"]))


def test_another_recipe_is_refused_in_the_same_folder(encoder_folder, pairs_file, tmp_path):
    train_reward(recipe(encoder_folder, pairs_file, epochs=1), tmp_path / "r")
    with pytest.raises(RunFolderError, match=r"train\.epochs was 1, now 2.*--out"):
        train_reward(recipe(encoder_folder, pairs_file, epochs=2), tmp_path / "r")


def test_two_processes_do_not_train_in_one_folder(encoder_folder, pairs_file, tmp_path):
    wanted = head_recipe(encoder_folder, pairs_file)
    train_reward(wanted, tmp_path / "r")
    with (tmp_path / "r/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match="in use by another training"):
            train_reward(wanted, tmp_path / "r")


def test_a_run_of_ial_is_judged_by_a_trained_head(
    encoder_folder, pairs_file, model_folder, tmp_path
):
    train_reward(head_recipe(encoder_folder, pairs_file), tmp_path / "r")
    loop_recipe = tiny_run(
        model_folder,
        "ial",
        judge={"name": "reward_model", "model": str(tmp_path / "r")},
        loop={"rounds": 1},
        evaluate={"introspection": False},
    )
    run(loop_recipe, tmp_path / "run", Console(file=StringIO()))
    (result,) = (row for row in read_run(tmp_path / "run").results() if row.round == 0)
    assert math.isfinite(result.measures["score"])
    head = RewardModel(model=str(tmp_path / "r")).open(None, PromptSet("compact"))
    (_, pairs) = next(iter(read_run(tmp_path / "run").pairs(None)))
    pair = next(pairs)
    (scores,) = head.score([Prompt(id="p", messages=pair.prompt)], [(pair.chosen, pair.rejected)])
    assert scores == pytest.approx((pair.scores["chosen"], pair.scores["rejected"]), abs=1e-5)
    assert scores[0] >= scores[1]


def test_a_folder_with_something_else_is_left_alone(encoder_folder, pairs_file, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RunFolderError, match="holds something else"):
        train_reward(recipe(encoder_folder, pairs_file), tmp_path)


def test_a_causal_model_is_adapted_and_its_adapter_merged(
    model_folder, pairs_file, tmp_path, tokenizer
):
    wanted = RewardRecipe(
        name="lora",
        model={"source": str(model_folder), "tuning": "lora", "device": "cpu"},
        data={"train": [pairs_file], "holdout": 0.5},
        train={"lr": 5e-3, "max_length": 64, "save_every": 0},
    )
    train_reward(wanted, tmp_path / "r")
    names = weights(tmp_path / "r").keys()
    assert not [name for name in names if "lora" in name or "modules_to_save" in name]
    assert "score.weight" in names
    judge = RewardModel(model=str(tmp_path / "r"), device="cpu")
    held_out = read_preferences(str(tmp_path / "r/held_out.jsonl")).pairs
    rows = score_pairs(judge.open(None, PromptSet("compact")), held_out)
    assert len({row.scores for row in rows}) > 10


def test_frozen_layers_stay_as_they_were(encoder_folder, pairs_file, tmp_path):
    wanted = recipe(encoder_folder, pairs_file, epochs=1)
    frozen = wanted.model_copy(
        update={"model": wanted.model.model_copy(update={"freeze_layers": 1})}
    )
    train_reward(frozen, tmp_path / "r")
    before, after = load_file(Path(encoder_folder) / "model.safetensors"), weights(tmp_path / "r")
    same = {name for name in before if torch.equal(before[name], after[f"bert.{name}"])}
    assert "embeddings.word_embeddings.weight" in same
    assert "encoder.layer.0.attention.self.query.weight" in same
    assert "encoder.layer.1.attention.self.query.weight" not in same


def test_more_frozen_layers_than_there_are_is_an_error(encoder_folder):
    with pytest.raises(ModelError, match=r"freeze_layers is 3 and it has 2 layers"):
        reward.load_base(
            RewardModelOptions(source=encoder_folder, tuning="full", freeze_layers=3), 0
        )


def test_the_head_depends_on_the_seed_alone(encoder_folder):
    options = RewardModelOptions(source=encoder_folder, device="cpu", tuning="full")
    torch.manual_seed(1)
    first = reward.load_base(options, 7).model.classifier.weight
    torch.manual_seed(2)
    assert torch.equal(first, reward.load_base(options, 7).model.classifier.weight)
    assert not torch.equal(first, reward.load_base(options, 8).model.classifier.weight)


def test_a_loss_that_is_not_finite_stops_the_training(encoder_folder, tmp_path):
    base = reward.load_base(
        RewardModelOptions(source=encoder_folder, device="cpu", tuning="full"), 0
    )
    torch.nn.init.constant_(base.model.classifier.weight, float("nan"))
    row = Encoded([2, 5, 3, 6, 3], [0, 0, 0, 1, 1])
    with pytest.raises(TrainingError, match="p1 is not finite"):
        reward.train_reward_model(
            base.model, [reward.EncodedPair("p1", row, row)], RewardTrainOptions(), tmp_path, 0
        )


def test_every_pair_comes_once_an_epoch_and_batches_hold_like_lengths():
    lengths = [n % 50 + 1 for n in range(400)]
    steps = reward.batches(lengths, RewardTrainOptions(batch_size=10, micro_batch_size=10), 0)
    assert sorted(index for step in steps for index in step) == list(range(400))
    spreads = [max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in steps]
    assert sum(spreads) / len(spreads) < 10
    two = reward.batches(lengths, RewardTrainOptions(epochs=2), 0)
    assert two[: len(two) // 2] != two[len(two) // 2 :]


def test_micro_batches_change_no_gradient(encoder_folder, pairs_file, tmp_path):
    """Dropout would differ, so it is off. Adam makes rounding errors of the bias visible: its true gradient is 0."""
    logs = []
    for size in (16, 4):
        wanted = recipe(encoder_folder, pairs_file, epochs=1, micro_batch_size=size)
        still = wanted.model_copy(
            update={"model": wanted.model.model_copy(update={"dropout": 0.0})}
        )
        train_reward(still, tmp_path / str(size))
        lines = (tmp_path / str(size) / "training/metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for one, four in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(four["loss"], abs=2e-3)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=0.05)
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], abs=1e-6)
    assert logs[0][0]["grad_norm"] == pytest.approx(logs[1][0]["grad_norm"], rel=1e-5)


def test_the_loss_is_bradley_terrys():
    """-log sigmoid(1 - 0.5) = 0.474077, -log sigmoid(0) = 0.693147; centering adds 0.1 (2 + 1)^2 and 0.1 (2 x 3)^2."""
    chosen, rejected = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 3.0])
    margin = torch.tensor([0.5, 0.0])
    plain = bradley_terry(chosen, rejected, margin, centering=0.0)
    assert plain.tolist() == pytest.approx([0.474077, 0.693147], abs=1e-6)
    centred = bradley_terry(chosen, rejected, margin, centering=0.1)
    assert (centred - plain).tolist() == pytest.approx([0.9, 3.6], abs=1e-6)


def encoder(folder: str, window: int, *, cut: bool) -> RewardEncoder:
    return RewardEncoder(AutoTokenizer.from_pretrained(folder), True, window, cut)


def words(encoded: Encoded | None) -> str:
    assert encoded is not None
    return " ".join(WORDS[n] for n in encoded.ids)


def test_a_long_question_loses_its_beginning_then_a_long_answer_its_end(encoder_folder):
    question = (Message(role="user", content="w0 w1 w2 w3 w4 w5 w6 w7"),)
    assert encoder(encoder_folder, 8, cut=False).encode(question, "good") is None
    short = encoder(encoder_folder, 8, cut=True).encode(question, "good")
    assert words(short) == "[CLS] w4 w5 w6 w7 [SEP] good [SEP]"
    assert short.types == [0] * 6 + [1] * 2
    long = encoder(encoder_folder, 11, cut=True).encode(question, "w8 w9 w10 w11 w12 w13 w14 w15")
    assert words(long) == "[CLS] w6 w7 [SEP] w8 w9 w10 w11 w12 w13 [SEP]"
    fits = encoder(encoder_folder, 16, cut=True).encode(question, "good")
    assert words(fits) == "[CLS] w0 w1 w2 w3 w4 w5 w6 w7 [SEP] good [SEP]"


def test_what_is_cut_fits_however_many_tokens_a_tokenizer_adds_and_a_cut_word_needs(
    encoder_folder, monkeypatch
):
    """RoBERTa has four special tokens about a pair; a word's rest may be spelt in more tokens than it was."""
    question = (Message(role="user", content="w0 w1 w2 w3 w4 w5 w6 w7"),)
    made = encoder(encoder_folder, 10, cut=True)
    made.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    found = made.encode(question, "w8 w9 w10 w11 w12 w13")
    assert words(found) == "[CLS] w7 [SEP] [SEP] w8 w9 w10 w11 w12 [SEP]"
    usual = RewardEncoder._cut
    monkeypatch.setattr(
        RewardEncoder, "_cut", lambda *args: ["very " + text for text in usual(*args)]
    )
    found = made.encode(question, "w8 w9 w10 w11 w12 w13")
    assert words(found) == "[CLS] very w7 [SEP] [SEP] very w8 w9 w10 [SEP]"


def test_the_tokenizers_limit_holds_in_training_as_in_judging(encoder_folder, pairs_file, tmp_path):
    """RoBERTa's is two below its positions, and a text of as many tokens as positions is an IndexError."""
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder, model_max_length=9)
    tokenizer.save_pretrained(tmp_path / "encoder")
    wanted = recipe(str(tmp_path / "encoder"), pairs_file, epochs=1)
    train_reward(wanted, tmp_path / "r")
    noted = json.loads((tmp_path / "r/config.json").read_text())["prefloop_reward"]
    assert noted == {"max_length": 9}


def test_a_trained_model_judges_with_the_window_it_was_trained_with(
    encoder_folder, pairs_file, tmp_path
):
    train_reward(recipe(encoder_folder, pairs_file, epochs=1, max_length=12), tmp_path / "r")
    open_judge: Any = RewardModel(model=str(tmp_path / "r"), device="cpu").open(
        None, PromptSet("compact")
    )
    assert (open_judge.encoder.window, open_judge.encoder.cut) == (12, True)
    other: Any = RewardModel(
        model=str(tmp_path / "r"), device="cpu", max_length=20, too_long="reject"
    ).open(None, PromptSet("compact"))
    assert (other.encoder.window, other.encoder.cut) == (20, False)


def test_any_other_classifier_is_still_never_cut(encoder_folder, tmp_path):
    BertForSequenceClassification.from_pretrained(encoder_folder, num_labels=1).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(encoder_folder).save_pretrained(tmp_path)
    judge: Any = RewardModel(model=str(tmp_path), device="cpu").open(None, PromptSet("compact"))
    assert not judge.encoder.cut


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {lr: 1}\n", "data is missing"),
        ("data: {train: [x.jsonl]}\ntrain: {epoch: 1}\n", r"unknown key 'epoch'.*did you mean"),
        ("data: {train: []}\n", r"data\.train"),
        (
            "data: {train: [x]}\ntrain: {batch_size: 6, micro_batch_size: 4}\n",
            r"train\.micro_batch_size \(4\) must divide",
        ),
        (
            "data: {train: [x]}\nmodel: {tuning: lora, freeze_layers: 2}\n",
            "have an effect under tuning: full only",
        ),
    ],
)
def test_a_wrong_recipe_is_one_sentence(text, says, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=says):
        load_reward_recipe(str(file))


def test_a_recipe_takes_overrides_and_its_dump_loads_as_itself(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: {train: [x.jsonl]}\n")
    loaded = load_reward_recipe(
        str(file), ["train.lr=1e-4", "model.tuning=full", "model.freeze_layers=2"]
    )
    assert (loaded.name, loaded.train.lr, loaded.model.freeze_layers) == ("mine", 1e-4, 2)
    (tmp_path / "dumped.yaml").write_text(loaded.dump())
    assert load_reward_recipe(str(tmp_path / "dumped.yaml")) == loaded


def head_recipe(source: str, data: str, **train: Any) -> RewardRecipe:
    return RewardRecipe(
        name="head",
        model={"source": source},
        data={"train": [data]},
        train={"l2": 0.01, "max_length": 16, **train},
    )


def test_a_head_over_embeddings_learns_and_the_judge_loads_it(encoder_folder, pairs_file, tmp_path):
    report = train_reward(head_recipe(encoder_folder, pairs_file), tmp_path / "r")
    assert report["held_out"]["easy"]["agreement"]["value"] > 0.9
    assert report["training"]["first_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert report["training"]["last_loss"] < 0.5
    judge = RewardModel(model=str(tmp_path / "r")).open(None, PromptSet("compact"))
    held_out = read_preferences(str(tmp_path / "r/held_out.jsonl")).pairs
    rows = score_pairs(judge, held_out)
    assert sum(row.scores[0] > row.scores[1] for row in rows) > 0.9 * len(rows)
    prompts = [pair.prompt for pair in held_out[:2]]
    verdicts = judge.score(prompts, [["w1 good", " "], ["w1 good", "w1 " * 60]])
    assert verdicts[0].reason == "empty response"
    assert len(verdicts[1]) == 2  # longer than the window, and read up to it


def test_a_heads_fit_is_the_minimum(encoder_folder):
    """One feature: mean of softplus(-w) and softplus(w/2), plus 0.1 w^2, has its minimum where the slope is 0."""
    chosen = torch.tensor([[1.0], [-0.5]]).numpy()
    rejected = torch.zeros(2, 1).numpy()
    weights, _ = fit_head(chosen, rejected, torch.zeros(2).numpy(), l2=0.1)
    w = torch.tensor(float(weights[0]), dtype=torch.float64, requires_grad=True)
    softplus = torch.nn.functional.softplus
    ((softplus(-w) + softplus(w / 2)) / 2 + 0.1 * w**2).backward()
    assert abs(w.grad) < 1e-4


def test_a_heads_features_are_what_they_are_called(encoder_folder):
    embedder = Embedder(encoder_folder)
    question, answer = (Message(role="user", content="which way"),), "good w1"
    x, y = (torch.tensor(v) for v in embedder.embed(["which way", "good w1"]))
    (row,) = features(embedder, [question], [answer], 16)
    size = len(x)
    assert row[:size] == pytest.approx((y * size**0.5).tolist(), abs=1e-5)
    assert row[size : 2 * size] == pytest.approx((x * y * size / 3).tolist(), abs=1e-5)
    distance = ((x - y).abs() * size**0.5 / 1.2).tolist()
    assert row[2 * size : 3 * size] == pytest.approx(distance, abs=1e-5)
    assert row[-2] == pytest.approx(3 * float(x @ y), abs=1e-5)
    assert row[-1] == pytest.approx(math.log(8) / 1.5, abs=1e-5)


def test_embeddings_of_cut_texts_are_those_of_their_ends(encoder_folder):
    embedder = Embedder(encoder_folder)
    first, last = embedder.embed(["w0 w1"]), embedder.embed(["w2 w3"])
    long = ["w0 w1 w2 w3"]
    assert embedder.embed(long, cut=4)[0] == pytest.approx(first[0], abs=1e-6)
    assert embedder.embed(long, cut=-4)[0] == pytest.approx(last[0], abs=1e-6)
    assert embedder.embed(long, cut=6) == embedder.embed(long)


def test_a_damaged_head_is_one_sentence(encoder_folder, pairs_file, tmp_path):
    train_reward(head_recipe(encoder_folder, pairs_file), tmp_path / "r")
    (tmp_path / "r/model.safetensors").write_bytes(b"x")
    with pytest.raises(RunFolderError, match=r"model\.safetensors is 1 byte long"):
        RewardModel(model=str(tmp_path / "r")).open(None, PromptSet("compact"))
    (tmp_path / "r/report.json").unlink()  # of a head that nobody vouches for
    with pytest.raises(ModelError, match="damaged"):
        RewardModel(model=str(tmp_path / "r")).open(None, PromptSet("compact"))


@pytest.mark.parametrize("name", sorted(shipped_reward_recipes()))
def test_shipped_reward_recipes_load_and_say_what_they_are(name):
    path = shipped_reward_recipes()[name]
    first = path.read_text().partition("\n")[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    assert load_reward_recipe(name).name == name


def test_too_few_pairs_are_an_error_with_numbers(tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(DataError, match="1 pair gives"):
        load_pairs(recipe("x/y", str(file)))


def test_a_base_that_is_not_there_is_one_sentence():
    with pytest.raises(ModelError, match="does not exist"):
        reward.load_base(RewardModelOptions(source="./nowhere", tuning="full"), 0)


def test_pairs_that_are_equal_after_the_cut_are_left_out_and_counted(
    encoder_folder: str, pairs_file: str, tmp_path: Path
) -> None:
    long = " ".join(["very"] * 30)
    equal = {"prompt": "which", "chosen": f"{long} good", "rejected": f"{long} bad"}
    rows = "".join(
        json.dumps({**equal, "prompt": f"which w{n % 20} w{n // 20}"}) + "\n" for n in range(40)
    )
    (tmp_path / "pairs.jsonl").write_text(Path(pairs_file).read_text() + rows)
    made = recipe(encoder_folder, str(tmp_path / "pairs.jsonl"), epochs=1)
    train, _, _ = load_pairs(made)
    cut = sum(pair.chosen.startswith("very very") for pair in train)
    facts = train_reward(made, tmp_path / "reward")["training"]
    assert facts["equal_after_cut"] == cut > 10
    assert facts["pairs"] == len(train) - cut


def test_a_recipe_all_of_whose_pairs_are_equal_after_the_cut_is_refused(
    encoder_folder: str, tmp_path: Path
) -> None:
    long = " ".join(["very"] * 30)
    rows = [
        {"prompt": f"which w{n}", "chosen": f"{long} good", "rejected": f"{long} bad"}
        for n in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recipe(encoder_folder, str(tmp_path / "pairs.jsonl"), epochs=1)
    with pytest.raises(
        DataError, match=r"are equal in the first 24 tokens; raise train\.max_length"
    ):
        train_reward(made, tmp_path / "reward")
