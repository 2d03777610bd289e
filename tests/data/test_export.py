"""Exported pairs: read by datasets, trained on by TRL, whole or not there."""

import pytest

from prefloop.data.export import as_row, export_pairs
from prefloop.errors import DataError, RunFolderError
from prefloop.records import Message, Pair

PAIRS = [
    Pair(
        prompt_id=f"p{i}",
        round=i,
        prompt=(
            Message(role="system", content="s"),
            Message(role="user", content="Größe?\n\u2028"),
        ),
        chosen=f"good {i}",
        rejected=f"bad {i}",
        target="best" if i else None,
        margin=i / 2,
        scores={"chosen": 1.0},
        token_ids={"chosen": (7, 8, 9)},
    )
    for i in range(3)
]


def load(path, format, cache):
    from datasets import load_dataset

    kind = {"jsonl": "json"}.get(format, format)
    return load_dataset(kind, data_files=str(path), split="train", cache_dir=str(cache))


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_datasets_loads_what_was_exported(tmp_path, format):
    path, count = export_pairs(PAIRS, tmp_path / "out", format)
    assert path == tmp_path / "out" / f"pairs.{format}"
    assert count == 3
    assert list(load(path, format, tmp_path / "cache")) == [as_row(pair) for pair in PAIRS]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_row_is_conversational(tmp_path):
    assert as_row(PAIRS[1]) == {
        "prompt": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "Größe?\n\u2028"},
        ],
        "chosen": [{"role": "assistant", "content": "good 1"}],
        "rejected": [{"role": "assistant", "content": "bad 1"}],
        "target": "best",
        "margin": 0.5,
        "round": 1,
        "prompt_id": "p1",
        "chosen_token_ids": [7, 8, 9],
        "rejected_token_ids": None,
    }


def test_sharegpt_rows_name_speakers_and_values(tmp_path):
    path, count = export_pairs(PAIRS, tmp_path, "sharegpt")
    assert (path, count) == (tmp_path / "pairs.jsonl", 3)
    row = list(load(path, "jsonl", tmp_path / "cache"))[1]
    assert row == {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "Größe?\n\u2028"},
        ],
        "chosen": {"from": "gpt", "value": "good 1"},
        "rejected": {"from": "gpt", "value": "bad 1"},
        "target": "best",
        "margin": 0.5,
        "round": 1,
        "prompt_id": "p1",
    }


def test_a_parquet_column_without_any_target_keeps_its_type(tmp_path):
    path, _ = export_pairs(PAIRS[:1], tmp_path / "a.parquet", "parquet")
    assert load(path, "parquet", tmp_path / "cache").features["target"].dtype == "string"


def test_parquet_holds_more_pairs_than_one_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr("prefloop.data.export._ROWS_PER_GROUP", 2)
    path, count = export_pairs(iter(PAIRS), tmp_path / "a.parquet", "parquet")
    assert count == 3
    assert load(path, "parquet", tmp_path / "cache")["prompt_id"][:] == ["p0", "p1", "p2"]


def test_an_existing_folder_may_have_a_dot_in_its_name(tmp_path):
    (tmp_path / "v1.2").mkdir()
    assert export_pairs(PAIRS, tmp_path / "v1.2").path == tmp_path / "v1.2" / "pairs.jsonl"


def test_a_name_that_fits_another_format_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"does not end in \.jsonl"):
        export_pairs(PAIRS, tmp_path / "a.parquet", "jsonl")


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_no_pairs_are_an_error_and_leave_the_old_file(tmp_path, format):
    path, _ = export_pairs(PAIRS, tmp_path, format)
    before = path.read_bytes()
    with pytest.raises(DataError, match="no pairs to export"):
        export_pairs([], tmp_path, format)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_source_that_breaks_leaves_nothing_behind_and_keeps_its_error(tmp_path, format):
    def damaged():
        yield PAIRS[0]
        raise RunFolderError("pairs.jsonl:2 is not a Pair record")

    with pytest.raises(RunFolderError, match=r"^pairs\.jsonl:2 is not"):
        export_pairs(damaged(), tmp_path, format)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match=r"cannot write .*file/sub/pairs\.jsonl \("):
        export_pairs(PAIRS, tmp_path / "file" / "sub")


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls what transformers renames
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_trl_trains_one_step_on_what_was_exported(tmp_path, format):
    import trl  # of the dev extra; takes seconds

    path, _ = export_pairs(PAIRS, tmp_path / "out", format)
    trainer = trl.DPOTrainer(
        model=tiny_llama(tmp_path / "model"),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=1,
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
        train_dataset=load(path, format, tmp_path / "cache"),
        processing_class=word_tokenizer(),
    )
    result = trainer.train()
    # At the start the policy is its own reference: the DPO loss is log 2.
    assert result.training_loss == pytest.approx(0.6931, abs=1e-3)
    first = trainer.train_dataset[0]
    assert len(first["prompt_ids"]) > 0
    assert first["chosen_ids"] != first["rejected_ids"]


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<end>", "s", "Größe", "?", "good", "bad", "0", "1", "2"]
    words += ["system", "user", "assistant", ":"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <end> ' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    return tokenizer


def tiny_llama(folder):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        vocab_size=16, bos_token_id=None, eos_token_id=2, pad_token_id=1, **shape, **heads
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
