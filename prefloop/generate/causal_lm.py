"""A causal language model as an engine, for judges that ask another model than the policy.

Judges may import neither generation nor training; this is the door through which they get both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine


def open_engine(source: str) -> Engine:
    """Load a folder, Hub id or "embedded:NAME" for asking only. Raises ModelError."""
    import torch

    from prefloop.generate.hf_engine import HFEngine
    from prefloop.models.policy import Policy
    from prefloop.models.sources import ModelOptions

    # "full" means without an adapter; nothing trains here, so a GPU needs no float32.
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    options = ModelOptions(source=source, tuning="full", dtype=dtype)
    policy = Policy.load(options, trainable=False)
    return HFEngine(policy.model, policy.tokenizer)
