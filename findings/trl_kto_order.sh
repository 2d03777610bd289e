#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, torch 2.13.0 (CPU), datasets 5.2.0, accelerate 1.15.0, 2026-11-29.
#
# Guess, before it was run: KTOTrainer takes a dataset of pairs (prompt, chosen, rejected) and unpairs it itself, so
# its batches hold good and bad answers about half and half.
#
# What happens: each thousand pairs become a thousand good answers and then a thousand bad ones, and nothing mixes them
# again: the loss needs its rows in order ("sequential"), as the answers for its KL term are taken from the same batch
# beforehand, and any other order is refused. So with 32 rows a batch the policy sees good answers alone for 31 steps,
# then bad ones alone for as many, in every epoch; the KL term of a batch is measured with one kind only, and
# rewards/margins is never logged. Nothing is said, and shuffling the pairs first changes nothing. Rows that were
# unpaired and shuffled before the trainer gets them are trained as they stand.
#
# Output seen:
#   1200 pairs become: 1000 good, 1000 bad, 200 good, 200 bad
#   pairs, batches of 4: good good good good | good good good good | bad bad bad bad | bad bad bad bad
#   pairs: margins are logged False
#   random order: refused True
#   unpaired and mixed before, batches of 4: good bad good bad | good bad good bad | good bad good bad | good bad good bad
#   unpaired and mixed before: margins are logged True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-compile --disable-pip-version-check trl==1.16.0 transformers==5.23.0 torch==2.13.0 datasets==5.2.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from itertools import groupby

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import KTOConfig, KTOTrainer
from trl.data_utils import unpair_preference_dataset

words = "<pad> <eos> question good bad".split() + [str(i) for i in range(8)]
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
torch.manual_seed(0)
policy = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1,
    )
)


class Watched(KTOTrainer):
    def compute_loss(self, model, inputs, **arguments):
        if model.training:
            self.__dict__.setdefault("batches", []).append(inputs["label"].tolist())
        return super().compute_loss(model, inputs, **arguments)


def kinds(labels):
    return ["good" if label else "bad" for label in labels]


def trained(rows, **options):
    with tempfile.TemporaryDirectory() as into, redirect_stdout(StringIO()):
        policy.save_pretrained(into)
        arguments = KTOConfig(
            into, per_device_train_batch_size=4, num_train_epochs=1, logging_steps=1, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False, **options,
        )
        trainer = Watched(
            LlamaForCausalLM.from_pretrained(into), args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    return trainer


def show(label, trainer):
    print(f"{label}, batches of 4:", " | ".join(" ".join(kinds(batch)) for batch in trainer.batches))
    print(f"{label}: margins are logged", any("rewards/margins" in entry for entry in trainer.state.log_history))


def pairs(count):
    return [{"prompt": f"question {i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(count)]


labels = unpair_preference_dataset(Dataset.from_list(pairs(1200)))["label"]
print("1200 pairs become:", ", ".join(f"{len(list(run))} {kind}" for kind, run in groupby(kinds(labels))))
show("pairs", trained(pairs(8)))
try:
    trained(pairs(8), train_sampling_strategy="random")
    print("random order: refused False")
except ValueError as error:
    print("random order: refused", "sequential" in str(error))
mixed = [
    {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
    for pair in pairs(8)
    for key in ("chosen", "rejected")
]
show("unpaired and mixed before", trained(mixed))
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
1200 pairs become: 1000 good, 1000 bad, 200 good, 200 bad
pairs, batches of 4: good good good good | good good good good | bad bad bad bad | bad bad bad bad
pairs: margins are logged False
random order: refused True
unpaired and mixed before, batches of 4: good bad good bad | good bad good bad | good bad good bad | good bad good bad
unpaired and mixed before: margins are logged True
SEEN
