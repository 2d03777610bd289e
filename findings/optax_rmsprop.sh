#!/usr/bin/env bash
# optax 0.2.8, jax 0.10.2, torch 2.13.0 (CPU), 2026-11-29.
#
# Guess, before it was run: RMSprop with the same learning rate, decay and eps=1e-8 is one optimiser in torch and in
# optax. It divides by the gradient's own size, so that a gradient that stays the same is a step of one learning rate,
# however small it is, down to 1e-8.
#
# What happens: torch adds eps to the root, optax (eps_in_sqrt=True, its default) to what is under the root. There 1e-8
# is a size of 1e-4, and gradients of language models are often smaller: at 1e-5 optax steps a tenth as far as torch,
# at 1e-6 a hundredth, and weights of small gradients hardly move. With eps_in_sqrt=False both step alike. A learning
# rate from a paper holds for the library that it was found in. (The defaults differ too: decay 0.9 there, 0.99 here.)
#
# Output seen:
#   gradient 1e-02: torch 1.00, optax 1.00, optax eps_in_sqrt=False 1.00
#   gradient 1e-04: torch 1.00, optax 0.71, optax eps_in_sqrt=False 1.00
#   gradient 1e-05: torch 1.00, optax 0.10, optax eps_in_sqrt=False 1.00
#   gradient 1e-06: torch 0.99, optax 0.01, optax eps_in_sqrt=False 0.99
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-compile --disable-pip-version-check optax==0.2.8 jax==0.10.2 torch==2.13.0
cat > "$work/try.py" <<'PY'
import jax
import optax
import torch

STEPS = 200


def by_torch(gradient):
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.RMSprop([weight], lr=1.0, alpha=0.9, eps=1e-8)
    for _ in range(STEPS):
        weight.grad = torch.full((1,), gradient, dtype=torch.float64)
        before = weight.item()
        optimizer.step()
    return before - weight.item()


def by_optax(gradient, **options):
    optimizer = optax.rmsprop(1.0, decay=0.9, eps=1e-8, **options)
    weight = jax.numpy.zeros(1)
    state = optimizer.init(weight)
    for _ in range(STEPS):
        update, state = optimizer.update(jax.numpy.full((1,), gradient), state)
    return -update.item()


jax.config.update("jax_enable_x64", True)
for gradient in (1e-2, 1e-4, 1e-5, 1e-6):
    steps = by_torch(gradient), by_optax(gradient), by_optax(gradient, eps_in_sqrt=False)
    print(f"gradient {gradient:.0e}: torch {steps[0]:.2f}, optax {steps[1]:.2f}, optax eps_in_sqrt=False {steps[2]:.2f}")
PY
"$work/env/bin/python" "$work/try.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
gradient 1e-02: torch 1.00, optax 1.00, optax eps_in_sqrt=False 1.00
gradient 1e-04: torch 1.00, optax 0.71, optax eps_in_sqrt=False 1.00
gradient 1e-05: torch 1.00, optax 0.10, optax eps_in_sqrt=False 1.00
gradient 1e-06: torch 0.99, optax 0.01, optax eps_in_sqrt=False 0.99
SEEN
