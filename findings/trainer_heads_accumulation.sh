#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (CPU), accelerate 1.15.0, datasets 5.2.0, 2026-11-29.
#
# Guess, before it was run: a step over 8 rows is the same step as one batch of 8 and as 4 batches of 2 with
# gradient_accumulation_steps=4: one loss, one gradient, one update (rows of equal length, one label a row).
#
# What happens with a head for scores or classes (LlamaForSequenceClassification): Trainer leaves the division by the
# accumulation steps to every model whose forward takes **kwargs and whose labels it can count, for such a model is
# to divide its sum by num_items_in_batch. This one takes **kwargs, but its loss is the mean over a batch as ever. So
# nobody divides: the logged loss and the gradient are 4 times too large. SGD steps 4 times too far; with AdamW the
# gradient is clipped (max_grad_norm=1) 4 times too early, and runs with other accumulation cannot be compared.
# The same model as a language model is right, and so is a head with `accepts_loss_kwargs = False`
# (transformers issue 47688).
#
# Output seen:
#   next tokens    : 4 x 2 against 1 x 8: loss x 1.00, gradient x 1.00, step x 1.00
#   a score        : 4 x 2 against 1 x 8: loss x 4.00, gradient x 4.00, step x 4.00
#   a class of 4   : 4 x 2 against 1 x 8: loss x 4.00, gradient x 4.00, step x 4.00
#   any of 4 labels: 4 x 2 against 1 x 8: loss x 4.00, gradient x 4.00, step x 4.00
#   a score, told  : 4 x 2 against 1 x 8: loss x 1.00, gradient x 1.00, step x 1.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-compile --disable-pip-version-check transformers==5.23.0 torch==2.13.0 accelerate==1.15.0 datasets==5.2.0
cat > "$work/try.py" <<'PY'
import tempfile
from contextlib import redirect_stdout
from io import StringIO

import torch
from datasets import Dataset
from transformers import (
    LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments, default_data_collator,
)

torch.manual_seed(0)
ids = torch.randint(1, 64, (8, 12))


def step(kind, rows, batch, into):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1 if "score" in kind else 4, pad_token_id=0,
    )
    model = (LlamaForCausalLM if kind == "next tokens" else LlamaForSequenceClassification)(config)
    if kind == "a score, told":
        model.accepts_loss_kwargs = False
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    arguments = TrainingArguments(
        into, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, max_steps=1, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=1e9, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict(rows), data_collator=default_data_collator)
    with redirect_stdout(StringIO()):
        trainer.train()
    first = trainer.state.log_history[0]
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return first["loss"], first["grad_norm"], (after - before).norm().item()


labels = {
    "next tokens": ids,
    "a score": torch.randn(8),
    "a class of 4": torch.arange(8) % 4,
    "any of 4 labels": torch.randint(0, 2, (8, 4)).float(),
    "a score, told": torch.randn(8),
}
with tempfile.TemporaryDirectory() as into:
    for kind, label in labels.items():
        rows = {"input_ids": ids.tolist(), "labels": label.tolist()}
        whole, parts = step(kind, rows, 8, into), step(kind, rows, 2, into)
        loss, norm, moved = (part / one for part, one in zip(parts, whole))
        print(f"{kind:<15}: 4 x 2 against 1 x 8: loss x {loss:.2f}, gradient x {norm:.2f}, step x {moved:.2f}")
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
next tokens    : 4 x 2 against 1 x 8: loss x 1.00, gradient x 1.00, step x 1.00
a score        : 4 x 2 against 1 x 8: loss x 4.00, gradient x 4.00, step x 4.00
a class of 4   : 4 x 2 against 1 x 8: loss x 4.00, gradient x 4.00, step x 4.00
any of 4 labels: 4 x 2 against 1 x 8: loss x 4.00, gradient x 4.00, step x 4.00
a score, told  : 4 x 2 against 1 x 8: loss x 1.00, gradient x 1.00, step x 1.00
SEEN
