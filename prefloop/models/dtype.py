"""What `model.dtype: auto` stands for, and why (docs/decisions/0023). Cheap to import: torch is asked inside."""

from __future__ import annotations

from typing import Literal, NamedTuple

from prefloop.machine import multiplies_bfloat16_fast
from prefloop.models.sources import ModelOptions


class Choice(NamedTuple):
    """A dtype of the frozen weights, and what decided."""

    dtype: Literal["float32", "bfloat16"]
    why: str

    def in_words(self, place: str = "here") -> str:
        """For the console."""
        return f"model.dtype auto is {self.dtype} {place}: {self.why}"


def choose_dtype(options: ModelOptions, device: str, obstacle: str | None = None) -> Choice:
    """The dtype on a device ("cpu", "cuda" ...), as far as options alone can tell: layers.apart asks the model.

    Full fine-tuning needs float32 master weights: at preference-tuning learning rates most bfloat16 updates round to
    nothing. On a CPU bfloat16 is for adapters that are joined with their layers in one product; `obstacle` says what
    in the rest of a recipe speaks against that.
    """
    if options.dtype != "auto":
        return Choice(options.dtype, "the recipe says so")
    if options.tuning == "full":
        return Choice("float32", "in bfloat16 small updates of all weights would round to nothing")
    if device == "cuda":
        return Choice("bfloat16", "as for every adapter on CUDA")
    if device != "cpu":
        return Choice("float32", f"bfloat16 was not tried on {device}")
    if not multiplies_bfloat16_fast():
        return Choice("float32", "this CPU has no instructions for products of bfloat16")
    if (option := _option_apart(options)) is not None:
        return apart(option)
    if obstacle is not None:
        return Choice("float32", obstacle)
    return Choice(
        "bfloat16", "this CPU multiplies it fast, and the adapter is in its layers' products"
    )


def apart(part: str) -> Choice:
    """The choice on a CPU where an option or a layer keeps the adapter out of its layer's product."""
    return Choice(
        "float32",
        f"{part} keeps an adapter out of its layer's product, and bfloat16 would round it away",
    )


def device_type(name: str) -> str:
    """The kind of device that `model.device` names here."""
    import torch

    if name != "auto":
        return name.partition(":")[0]
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _option_apart(options: ModelOptions) -> str | None:
    """The option under which lora_linear leaves the addition to PEFT, or which needs float32 by itself."""
    lora = options.lora
    if options.quantization is not None:
        return "model.quantization"
    found = {
        "dropout": lora.dropout > 0,
        "use_dora": lora.use_dora,
        "init_lora_weights": lora.splits,
        "modules_to_save": bool(lora.modules_to_save),
        "target_parameters": bool(lora.target_parameters),
    }
    return next((f"model.lora.{name}" for name, given in found.items() if given), None)
