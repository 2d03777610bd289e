#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), 2026-11-29.
#
# Guess, before it was run: add_weighted_adapter with one adapter and the weight 1 gives that adapter again under
# another name: exactly with "cat" and "svd", which the documentation calls precise, and here with "linear" too. So
# with rsLoRA as with LoRA.
#
# What happens with rsLoRA (use_rslora=True): the sum is made to be used with the scaling 1, and its configuration says
# so by lora_alpha = r. But it is a copy of the first adapter's in all else, use_rslora among it, and there the scaling
# is lora_alpha over the square root of r: the sum is sqrt(r) times too strong, twice at rank 4 and four times at 16,
# in all three kinds, and nothing is said. Before it is used, each layer's `scaling` of it must be set to 1.
#
# Output seen:
#   r=4  LoRA  : cat x 1.00, svd x 1.00, linear x 1.00
#   r=16 LoRA  : cat x 1.00, svd x 1.00, linear x 1.00
#   r=4  rsLoRA: cat x 2.00, svd x 2.00, linear x 2.00
#   r=16 rsLoRA: cat x 4.00, svd x 4.00, linear x 4.00
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
kinds = ("cat", "svd", "linear")


def combined(rank, rslora):
    torch.manual_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=8, use_rslora=rslora, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name="one").eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    change = layer.get_delta_weight("one")
    words = []
    for kind in kinds:
        model.add_weighted_adapter(["one"], [1.0], kind, combination_type=kind)
        other = layer.get_delta_weight(kind)
        times = ((other * change).sum() / (change * change).sum()).item()
        assert torch.allclose(other, times * change, atol=1e-4), "not a multiple"
        words.append(f"{kind} x {times:.2f}")
    print(f"r={rank:<2} {'rsLoRA' if rslora else 'LoRA':<6}: {', '.join(words)}")


for rslora in (False, True):
    for rank in (4, 16):
        combined(rank, rslora)
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
r=4  LoRA  : cat x 1.00, svd x 1.00, linear x 1.00
r=16 LoRA  : cat x 1.00, svd x 1.00, linear x 1.00
r=4  rsLoRA: cat x 2.00, svd x 2.00, linear x 2.00
r=16 rsLoRA: cat x 4.00, svd x 4.00, linear x 4.00
SEEN
