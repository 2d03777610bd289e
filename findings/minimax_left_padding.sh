#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (CPU), 2026-11-29.
#
# Guess, before it was run: generate() continues a prompt that is padded on the left as it continues the prompt alone,
# in every decoder but RWKV, which has no mask; MiniMax masks its padding, in linear layers too.
#
# What happens: in MiniMax as it is published, whose first layer is a linear one, the first token is right and all
# others are not. The cache says how long it is by its first layer, and a linear one keeps no keys: the length is 0,
# the mask of the next token is made for a cache that is empty, and its attention layers read the padding. Without the
# cache, or with an attention layer first, as in the default configuration, all is right. Nothing is said.
#
# Output seen:
#   linear_attention first, cache    : length 0, steps the same: True False False False False False
#   linear_attention first, no cache : steps the same: True True True True True True
#   full_attention first, cache      : length 5, steps the same: True True True True True True
#   full_attention first, no cache   : steps the same: True True True True True True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-compile --disable-pip-version-check transformers==5.23.0 torch==2.13.0
cat > "$work/try.py" <<'PY'
import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM


def compared(layers):
    torch.manual_seed(0)
    config = MiniMaxConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, block_size=8, num_local_experts=2, layer_types=layers, pad_token_id=0,
        bos_token_id=1, eos_token_id=None,
    )
    model = MiniMaxForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(3)
    prompt = torch.randint(3, 64, (1, 5))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], 1)
    length = model(prompt, use_cache=True).past_key_values.get_seq_length()
    for cache in (True, False):
        options = dict(
            max_new_tokens=6, do_sample=False, use_cache=cache, output_scores=True, return_dict_in_generate=True
        )
        found = model.generate(padded, attention_mask=(padded > 0).long(), **options).scores
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options).scores
        same = [torch.allclose(one, other, atol=1e-3) for one, other in zip(found, expected)]
        label = f"{layers[0]} first, {'cache' if cache else 'no cache'}"
        print(f"{label:<33}:{f' length {length},' if cache else ''} steps the same:", *same)


with torch.no_grad():
    compared(["linear_attention", "full_attention"])
    compared(["full_attention", "linear_attention"])
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
linear_attention first, cache    : length 0, steps the same: True False False False False False
linear_attention first, no cache : steps the same: True True True True True True
full_attention first, cache      : length 5, steps the same: True True True True True True
full_attention first, no cache   : steps the same: True True True True True True
SEEN
