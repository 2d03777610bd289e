#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (CPU), 2026-11-29.
#
# Guess, before it was run: position_ids that begin again at 0, without an attention mask, keep packed sequences apart,
# as transformers' masks find packing by them (find_packed_sequence_indices), in gpt-oss as in Llama: the logits of the
# second sequence are those it has alone.
#
# What happens in gpt-oss (eager attention): the model makes its causal and its sliding masks without handing on the
# positions. The second sequence reads the first one, and nothing is said; its logits are others than alone. With a
# mask of four dimensions that keeps the sequences apart they are the same again.
#
# Output seen:
#   Llama eager    : second as alone True, with a mask too True
#   Llama sdpa     : second as alone True, with a mask too True
#   gpt-oss full   : second as alone False, with a mask too True
#   gpt-oss sliding: second as alone False, with a mask too True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-compile --disable-pip-version-check transformers==5.23.0 torch==2.13.0
cat > "$work/try.py" <<'PY'
import torch
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

first, second = torch.arange(1, 9)[None], torch.arange(20, 32)[None]
packed = torch.cat([first, second], dim=1)
positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
sizes = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)
keep_apart = torch.zeros(1, 1, 20, 20).masked_fill(
    ~torch.block_diag(torch.ones(8, 8), torch.ones(12, 12)).tril().bool(), torch.finfo(torch.float32).min
)


def show(label, model):
    model.eval()
    with torch.no_grad():
        alone = model(second, use_cache=False).logits[0]
        result = {
            "second as alone": model(packed, position_ids=positions, use_cache=False),
            "with a mask too": model(packed, position_ids=positions, attention_mask=keep_apart, use_cache=False),
        }
        begun = model(packed[:, :8], use_cache=False).logits[0]
    words = []
    for name, output in result.items():
        apart = bool((output.logits[0, 8:] - alone).abs().max() < 1e-4)
        assert torch.allclose(output.logits[0, :8], begun, atol=1e-4), "the first is another"
        words.append(f"{name} {apart}")
    print(f"{label:<15}: {', '.join(words)}")


for attention in ("eager", "sdpa"):
    torch.manual_seed(0)
    show(f"Llama {attention}", LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=attention, initializer_range=0.2)))
for layers in ("full", "sliding"):
    torch.manual_seed(0)
    config = GptOssConfig(
        **sizes, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, initializer_range=0.2,
        layer_types=[f"{layers}_attention"] * 2, attn_implementation="eager",
    )
    show(f"gpt-oss {layers}", GptOssForCausalLM(config))
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
Llama eager    : second as alone True, with a mask too True
Llama sdpa     : second as alone True, with a mask too True
gpt-oss full   : second as alone False, with a mask too True
gpt-oss sliding: second as alone False, with a mask too True
SEEN
