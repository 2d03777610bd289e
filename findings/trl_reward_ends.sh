#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, torch 2.13.0 (CPU), datasets 5.2.0, accelerate 1.15.0, 2026-11-29.
#
# Guess, before it was run: RewardTrainer puts the end of sequence behind both answers of a pair because the score is
# read there; so a reward model can learn to prefer an answer that ends over the same one that was cut off.
#
# What happens with a tokenizer without a padding token, as many are: the end of sequence becomes the padding token,
# of the model too, and the head scores the last token that is not padding: the one before the end, which a causal
# model scores without knowing that an end follows. An answer with its end and the same one without are one and the
# same: the margin is 0 and stays 0, the loss is log 2, the gradient nothing. Nothing is said. With a padding token of
# its own the same pair is learnt in a few steps.
#
# Output seen:
#   texts become: {'chosen': 'the answer is forty two <eos>', 'rejected': 'the answer is forty two and <eos>'}
#   padding token None : pads with <eos>; ended against not ended: margin is 0 True, loss is log 2 True, accuracy 0.0
#   padding token <pad>: pads with <pad>; ended against not ended: margin is 0 False, loss is log 2 False, accuracy 1.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-compile --disable-pip-version-check trl==1.16.0 transformers==5.23.0 torch==2.13.0 datasets==5.2.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import tempfile
from contextlib import redirect_stdout
from io import StringIO

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

words = "<pad> <eos> the answer is forty two and".split()
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="the"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def trainer(rows, into, pad=None, **options):
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token=pad)
    config = LlamaConfig(
        vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=1,
    )
    arguments = RewardConfig(
        into, per_device_train_batch_size=1, max_steps=30, learning_rate=0.01, report_to="none", save_strategy="no",
        logging_steps=30, disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False, **options,
    )
    return RewardTrainer(
        LlamaForSequenceClassification(config), arguments, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def text(trained):
    row = trained.train_dataset[0]
    return {key: " ".join(words[i] for i in row[f"{key}_ids"]) for key in ("chosen", "rejected")}


plain = [{"prompt": "the answer is", "chosen": " forty two", "rejected": " forty two and"}]
ended = [{"chosen_ids": [2, 3, 4, 5, 6, 1], "rejected_ids": [2, 3, 4, 5, 6]}]
with tempfile.TemporaryDirectory() as into:
    print("texts become:", text(trainer(plain, into)))
    for pad in (None, "<pad>"):
        made = trainer(ended, into, pad)
        with redirect_stdout(StringIO()):
            made.train()
        log = next(entry for entry in made.state.log_history if "margin" in entry)
        print(
            f"padding token {pad!s:<5}: pads with {made.processing_class.pad_token}; ended against not ended: "
            f"margin is 0 {log['margin'] == 0}, loss is log 2 {log['loss'] > 0.693}, accuracy {log['accuracy']}"
        )
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
texts become: {'chosen': 'the answer is forty two <eos>', 'rejected': 'the answer is forty two and <eos>'}
padding token None : pads with <eos>; ended against not ended: margin is 0 True, loss is log 2 True, accuracy 0.0
padding token <pad>: pads with <pad>; ended against not ended: margin is 0 False, loss is log 2 False, accuracy 1.0
SEEN
