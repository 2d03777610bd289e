#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (CPU), accelerate 1.15.0, 2026-11-29.
#
# Guess, before it was run: label_smoothing_factor=x is the loss of next tokens with a share x on all others; with a
# tiny x it is the loss without, for every language model that transformers trains.
#
# What happens: the smoothed loss is shifted by one token only for classes that stand in the table of causal models.
# Gemma 3's ...ForConditionalGeneration stands there; Mistral 3's, Qwen2.5-VL's, Qwen3.5's and Llava's do not, nor does
# a subclass of one's own: each token is compared with itself, and the model learns to repeat what it has just read.
# The loss falls as nicely as ever, texts alone or with images, and nothing is said.
#
# Output seen:
#   LlamaForCausalLM                  : smoothed by 1e-6, the first loss is the same True , after 4 it writes 5
#   a subclass of LlamaForCausalLM    : smoothed by 1e-6, the first loss is the same False, after 4 it writes 4
#   Gemma3ForConditionalGeneration    : smoothed by 1e-6, the first loss is the same True , after 4 it writes 5
#   Mistral3ForConditionalGeneration  : smoothed by 1e-6, the first loss is the same False, after 4 it writes 4
#   Qwen2_5_VLForConditionalGeneration: smoothed by 1e-6, the first loss is the same False, after 4 it writes 4
#   LlavaForConditionalGeneration     : smoothed by 1e-6, the first loss is the same False, after 4 it writes 4
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-compile --disable-pip-version-check transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import tempfile
from contextlib import redirect_stdout
from io import StringIO

import torch
import transformers as hf

text = dict(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
eyes = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
qwen = {**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}


class Mine(hf.LlamaForCausalLM):
    pass


cases = {
    "LlamaForCausalLM": (hf.LlamaForCausalLM, hf.LlamaConfig(**text)),
    "a subclass of LlamaForCausalLM": (Mine, hf.LlamaConfig(**text)),
    "Gemma3ForConditionalGeneration": (
        hf.Gemma3ForConditionalGeneration,
        hf.Gemma3Config(text_config=hf.Gemma3TextConfig(**text), vision_config=hf.SiglipVisionConfig(**eyes)),
    ),
    "Mistral3ForConditionalGeneration": (
        hf.Mistral3ForConditionalGeneration,
        hf.Mistral3Config(text_config=hf.MistralConfig(**text), vision_config=hf.PixtralVisionConfig(**eyes)),
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLConfig(
            text_config=qwen,
            vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32),
        ),
    ),
    "LlavaForConditionalGeneration": (
        hf.LlavaForConditionalGeneration,
        hf.LlavaConfig(text_config=hf.LlamaConfig(**text), vision_config=hf.CLIPVisionConfig(**eyes)),
    ),
}
ids = [3, 4, 5, 6, 7, 8, 9, 10]
rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}] * 2


def trained(kind, config, smoothing):
    torch.manual_seed(0)
    model = kind(config)
    with tempfile.TemporaryDirectory() as into, redirect_stdout(StringIO()):
        arguments = hf.TrainingArguments(
            into, per_device_train_batch_size=2, max_steps=60, learning_rate=0.01, label_smoothing_factor=smoothing,
            logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        )
        trainer = hf.Trainer(model, args=arguments, train_dataset=rows)
        trainer.train()
    answer = model.eval()(input_ids=torch.tensor([ids[:2]])).logits[0, -1].argmax().item()
    return trainer.state.log_history[0]["loss"], answer


for name, (kind, config) in cases.items():
    plain, _ = trained(kind, config, 0.0)
    smoothed, answer = trained(kind, config, 1e-6)
    same = abs(smoothed - plain) < 1e-3
    print(f"{name:<34}: smoothed by 1e-6, the first loss is the same {same!s:<5}, after 4 it writes {answer}")
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
LlamaForCausalLM                  : smoothed by 1e-6, the first loss is the same True , after 4 it writes 5
a subclass of LlamaForCausalLM    : smoothed by 1e-6, the first loss is the same False, after 4 it writes 4
Gemma3ForConditionalGeneration    : smoothed by 1e-6, the first loss is the same True , after 4 it writes 5
Mistral3ForConditionalGeneration  : smoothed by 1e-6, the first loss is the same False, after 4 it writes 4
Qwen2_5_VLForConditionalGeneration: smoothed by 1e-6, the first loss is the same False, after 4 it writes 4
LlavaForConditionalGeneration     : smoothed by 1e-6, the first loss is the same False, after 4 it writes 4
SEEN
