#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), 2026-11-29.
#
# Guess, before it was run: a fresh DoRA adapter changes nothing. LoRA's B is 0, the magnitude of each row is the
# weight's own norm, and the row is scaled by magnitude over norm, which is 1; so it begins as the base does, to the
# bit, as a fresh LoRA does.
#
# What happens over a bfloat16 base: get_peft_model measures the norms in bfloat16 and then makes the adapter float32
# (autocast_adapter_dtype, its default). The magnitudes stay rounded to bfloat16, and the forward pass divides them by
# norms in float32: each row is scaled by up to 1/256 more or less before any training, and nothing is said. With the
# adapter off (as for a reference policy) the logits are the base's, so a KL term does not begin at 0; merging the
# untrained adapter changes weights. Without the cast, and in float32, it begins as the base.
#
# Output seen:
#   LoRA, bfloat16        : begins as the base True , off True, merged True
#   DoRA, float32         : begins as the base True , off True, merged True
#   DoRA, bfloat16        : begins as the base False, off True, merged False
#   DoRA, bfloat16, uncast: begins as the base True , off True, merged True
#   magnitudes are the norms rounded to bfloat16: True; off by more than 0.2% in a row: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-compile --disable-pip-version-check peft==0.21.2 transformers==5.23.0 torch==2.13.0
cat > "$work/try.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.arange(20)[None]
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)


def logits(model):
    with torch.no_grad():
        return model(ids).logits


def first(model):
    return model.model.layers[0].self_attn.q_proj


def begins(label, dtype, dora, cast=True):
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).to(dtype).eval()
    before, weight = logits(base), first(base).weight.detach().clone()
    lora = LoraConfig(r=4, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora, autocast_adapter_dtype=cast).eval()
    fresh = torch.equal(logits(model), before)
    with model.disable_adapter():
        off = torch.equal(logits(model), before)
    magnitude = first(model.base_model.model).lora_magnitude_vector["default"].weight.detach() if dora else None
    merged = torch.equal(first(model.merge_and_unload()).weight, weight)
    print(f"{label:<22}: begins as the base {fresh!s:<5}, off {off}, merged {merged}")
    return magnitude, weight.float().norm(dim=1)


begins("LoRA, bfloat16", torch.bfloat16, dora=False)
begins("DoRA, float32", torch.float32, dora=True)
magnitude, norm = begins("DoRA, bfloat16", torch.bfloat16, dora=True)
begins("DoRA, bfloat16, uncast", torch.bfloat16, dora=True, cast=False)
rounded = torch.equal(magnitude.float(), norm.bfloat16().float())
apart = bool((magnitude / norm - 1).abs().max() > 0.002)
print(f"magnitudes are the norms rounded to bfloat16: {rounded}; off by more than 0.2% in a row: {apart}")
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
LoRA, bfloat16        : begins as the base True , off True, merged True
DoRA, float32         : begins as the base True , off True, merged True
DoRA, bfloat16        : begins as the base False, off True, merged False
DoRA, bfloat16, uncast: begins as the base True , off True, merged True
magnitudes are the norms rounded to bfloat16: True; off by more than 0.2% in a row: True
SEEN
