#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, torch 2.13.0 (CPU), datasets 5.2.0, accelerate 1.15.0, 2026-11-29.
#
# Guess, before it was run: SFTTrainer turns conversations of from/value into ChatML, as its progress bar says; so rows
# of ShareGPT, whose speakers are "human" and "gpt", are trained as the same turns of user and assistant are.
#
# What happens: the keys are renamed, the speakers are not: the roles are "human" and "gpt". Templates that know no such
# role leave the turns out, and the row that is trained is the template's system turn (Qwen2.5), or its begin of text
# (Phi-3), the same for every row; others write the role as it stands (Llama 3), and what is trained is an answer of
# "gpt", which no generation prompt asks for. Nothing is said. Renamed before, all is well.
#
# Output seen:
#   qwen2_5, user/assistant: '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n'
#   qwen2_5, human/gpt     : '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n'
#   phi3, user/assistant   : '<|user|>\nHow?<|end|>\n<|assistant|>\nSo.<|end|>\n<eos>'
#   phi3, human/gpt        : '<eos>'
#   llama3, user/assistant : '<bos><|start_header_id|>user<|end_header_id|>\n\nHow?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>'
#   llama3, human/gpt      : '<bos><|start_header_id|>human<|end_header_id|>\n\nHow?<|eot_id|><|start_header_id|>gpt<|end_header_id|>\n\nSo.<|eot_id|>'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-compile --disable-pip-version-check trl==1.16.0 transformers==5.23.0 torch==2.13.0 datasets==5.2.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import tempfile
from pathlib import Path

import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
core.decoder = decoders.ByteLevel()
templates = Path(trl.__file__).parent / "chat_templates"


def trained(template, user, assistant):
    """What SFTTrainer makes of a row, in words."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (templates / f"{template}.jinja").read_text()
    row = {"conversations": [{"from": user, "value": "How?"}, {"from": assistant, "value": "So."}]}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    with tempfile.TemporaryDirectory() as into:
        arguments = SFTConfig(into, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False)
        trainer = SFTTrainer(
            model, args=arguments, train_dataset=Dataset.from_list([row]), processing_class=tokenizer
        )
    made = trainer.train_dataset[0]
    assert made["labels"] == made["input_ids"], "not all is trained"
    return tokenizer.decode(made["input_ids"])


for template in ("qwen2_5", "phi3", "llama3"):
    for speakers in (("user", "assistant"), ("human", "gpt")):
        print(f"{f'{template}, {speakers[0]}/{speakers[1]}':<23}: {trained(template, *speakers)!r}")
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
qwen2_5, user/assistant: '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n'
qwen2_5, human/gpt     : '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n'
phi3, user/assistant   : '<|user|>\nHow?<|end|>\n<|assistant|>\nSo.<|end|>\n<eos>'
phi3, human/gpt        : '<eos>'
llama3, user/assistant : '<bos><|start_header_id|>user<|end_header_id|>\n\nHow?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>'
llama3, human/gpt      : '<bos><|start_header_id|>human<|end_header_id|>\n\nHow?<|eot_id|><|start_header_id|>gpt<|end_header_id|>\n\nSo.<|eot_id|>'
SEEN
