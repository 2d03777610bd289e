#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0 (CPU with avx512_bf16; on others nothing is packed), numpy 2.4.6, 2026-11-29.
#
# Guess, before it was run: a frozen Linear4bit lets gradients through to what lies below it, or refuses; what was
# computed with it before, say one evaluation, changes nothing, and train() takes eval() back.
#
# What happens: the first forward pass in eval mode with an input that needs no gradient repacks the weight for a fast
# kernel, for good. From then on no gradient passes the layer, in eval mode and after train() alike. The output is right
# and says requires_grad=True, backward() runs, and parameters below get zeros where another path reaches them, else
# None. bitsandbytes says nothing; torch warns that the kernel has no autograd ("may lead to silently incorrect
# behavior"). Evaluate first, then train an adapter below such layers, and it does not learn.
#
# Output seen:
#   train                : output right True, requires_grad True, gradient below True
#   eval                 : output right True, requires_grad True, gradient below True
#   eval, one no_grad    : output right True, requires_grad True, gradient below False
#   the same, then train : output right True, requires_grad True, gradient below False
#   who warned: torch
set -euo pipefail
grep -q avx512_bf16 /proc/cpuinfo || { echo "this CPU has no avx512_bf16, so there is nothing to see" >&2; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-compile --disable-pip-version-check bitsandbytes==0.50.2 torch==2.13.0 numpy==2.4.6
cat > "$work/try.py" <<'PY'
import warnings

import torch
from bitsandbytes.nn import Linear4bit

torch.manual_seed(0)
plain = torch.nn.Linear(256, 128, bias=False)
heard = set()


def layer():
    frozen = Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    frozen.load_state_dict(plain.state_dict())
    return frozen.to("cpu")


def tried(label, frozen):
    below = torch.nn.Linear(256, 256)
    hidden = below(torch.randn(8, 256))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        out = frozen(hidden)
        needs = out.requires_grad
        out.pow(2).sum().backward()
    heard.update("torch" if "autograd kernel" in str(one.message) else str(one.message) for one in warned)
    wanted = plain(hidden)
    right = bool((out - wanted).std() < 0.15 * wanted.std())  # four bits
    gradient = below.weight.grad is not None and bool(below.weight.grad.any())
    print(f"{label:<21}: output right {right}, requires_grad {needs}, gradient below {gradient}")


tried("train", layer().train())
tried("eval", layer().eval())
packed = layer().eval()
with torch.no_grad():
    packed(torch.randn(8, 256))
tried("eval, one no_grad", packed)
tried("the same, then train", packed.train())
print("who warned:", *sorted(heard))
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
train                : output right True, requires_grad True, gradient below True
eval                 : output right True, requires_grad True, gradient below True
eval, one no_grad    : output right True, requires_grad True, gradient below False
the same, then train : output right True, requires_grad True, gradient below False
who warned: torch
SEEN
