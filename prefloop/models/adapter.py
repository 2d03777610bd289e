"""Which weights of a model get a LoRA adapter: PEFT's configuration, worked out for the model at hand.

"all-linear" means: every matrix that the text part multiplies by, a mixture's stacked experts too, but for
the output layer and for what an adapter cannot change exactly.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefloop.errors import ModelError
from prefloop.models.sources import LoraOptions

ALL_LINEAR = "all-linear"


class Share(NamedTuple):
    """How much of a model an adapter reaches."""

    weights: int
    """Weights of the base model; a tied one counts once."""
    under_adapter: int
    """Those of them that the adapter changes."""
    trained: int
    """Weights that are trained: the adapter's own, and whole copies of modules to save."""
    modules: tuple[str, ...]
    """Kinds of modules that are reached, by the last part of their names: "q_proj", "experts.down_proj"."""

    def in_words(self) -> str:
        """For the console."""
        return (
            f"adapter on {self.under_adapter / self.weights:.0%} of {self.weights:,} parameters "
            f"({', '.join(self.modules)}); {self.trained:,} weights are trained"
        )


def lora_config(model: PreTrainedModel, lora: LoraOptions, **more: Any) -> LoraConfig:
    """PEFT's configuration of a new adapter for this model. Raises ModelError where names match nothing."""
    excluded = lora.exclude_modules
    if lora.target_modules == ALL_LINEAR:
        modules: str | list[str] = [
            name for name in _linear_names(model) if not matches(name, excluded)
        ]
        parameters = lora.target_parameters
        if parameters is None:
            parameters = [
                name
                for name in _expert_names(model)
                if not matches(name.rpartition(".")[0], excluded)
            ]
            parameters = _shortened(parameters, _parameter_names(model))
        excluded = None
    else:
        modules, parameters = lora.target_modules, list(lora.target_parameters or ())
    _check_parameters(model, parameters, lora)
    return _unseized(
        model,
        LoraConfig(
            target_modules=modules,
            target_parameters=sorted(parameters) or None,
            exclude_modules=excluded,
            **lora.for_peft(),
            **more,
        ),
    )


def matches(name: str, wanted: str | Collection[str] | None) -> bool:
    """Whether a module's name is meant, as PEFT reads it: a pattern for the whole name, or a list of endings."""
    if not wanted:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted)


def part_apart(model: PreTrainedModel, lora: LoraOptions) -> str | None:
    """The first module or parameter under a new adapter that lora_linear cannot join with it; None where there is none."""
    config = lora_config(model, lora)
    if config.target_parameters:
        return str(config.target_parameters[0])
    return next(
        (
            name
            for name, module in model.named_modules()
            if matches(name, config.target_modules)
            and not matches(name, config.exclude_modules)
            and type(module) is not nn.Linear
        ),
        None,
    )


def check_adapter(model: PeftModel) -> None:
    """Refuse an adapter on a weight that two modules share: only one of them would be changed by training,
    both by merging. Raises ModelError."""
    shared = _shared(model.get_base_model())
    names = [
        name
        for name, module in model.get_base_model().named_modules()
        for weight in _weights_of(module)
        if id(weight) in shared
    ]
    if names:
        raise ModelError(
            f"model.lora reaches {_plain_name(names[0])}, whose weight is also another module's (tied "
            "embeddings): the merged model would not be the trained one; leave it out, or set "
            "model.tuning to full"
        )


def check_patterns(model: PeftModel, lora: LoraOptions) -> None:
    """Refuse a key of `rank_pattern` or `alpha_pattern` that decides for no layer: PEFT would go on without it."""
    names = [
        _layer_name(name, module)
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    ]
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = list(getattr(lora, option))
        # As PEFT's get_pattern_key reads them: of several keys for a layer the first one counts.
        matching = {name: [key for key in patterns if _is_meant(key, name)] for name in names}
        used = {keys[0] for keys in matching.values() if keys}
        for key in patterns:
            if key in used:
                continue
            if earlier := next((keys[0] for keys in matching.values() if key in keys), None):
                raise ModelError(
                    f"model.lora.{option} {key!r} has no effect, as {earlier!r} comes before it and matches the "
                    "same layers; put it first, or leave it out"
                )
            raise ModelError(
                f"model.lora.{option} {key!r} matches no layer of the adapter; its layers have names such as "
                f"{' and '.join(names[:: max(1, len(names) - 1)][:2])}, of which a key is the ending or a pattern"
            )


def share(model: PeftModel) -> Share:
    """What the adapter reaches."""
    reached: dict[int, int] = {}
    kinds: set[str] = set()
    for name, module in model.get_base_model().named_modules():
        for weight in _weights_of(module):
            reached[id(weight)] = size_of(weight)
            kinds.add(_kind(name, module))
    own = ("lora_", "modules_to_save")
    base = {id(w): size_of(w) for n, w in model.named_parameters() if not any(o in n for o in own)}
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return Share(sum(base.values()), sum(reached.values()), trained, tuple(sorted(kinds)))


def size_of(weight: torch.Tensor) -> int:
    """Weights that a parameter holds: more than it has numbers where they are packed or lie elsewhere."""
    packed = getattr(weight, "quant_state", None)
    if packed is not None:
        return int(packed.shape.numel())
    return int(getattr(weight, "ds_numel", weight.numel()))


def is_quantized(model: nn.Module) -> bool:
    """Whether weights are held in fewer bits, so that nothing can be added into them."""
    return bool(getattr(model, "is_quantized", False))


def adapted_weight(layer: LoraLayer) -> nn.Parameter:
    """The base model's weight that a LoRA layer adds to."""
    untyped: Any = layer
    if isinstance(layer, ParamWrapper):
        return untyped.get_param()  # type: ignore[no-any-return]
    return untyped.get_base_layer().weight  # type: ignore[no-any-return]


def weight_with_adapter(layer: LoraLayer, adapter: str) -> torch.Tensor:
    """What `adapted_weight` becomes once the adapter is added into it, in the weight's dtype."""
    untyped: Any = layer
    weight = adapted_weight(layer)
    if adapter not in untyped.lora_variant:
        delta: torch.Tensor = untyped.get_delta_weight(adapter)
        return (weight.data.float() + delta).to(weight.dtype)
    merged: torch.Tensor = untyped.lora_variant[adapter].merge_safe(layer, adapter, weight.data)
    # Kept by PEFT for taking the adapter out again, which is not how we do that.
    untyped._cache_pop(f"{adapter}-weight_norm")
    return merged


def set_lengths(model: PeftModel) -> None:
    """Let a fresh DoRA adapter change nothing: PEFT measures the weights' rows in the weights' own dtype, and
    training compares with their length in float32."""
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        for name, lengths in layer.lora_magnitude_vector.items():
            with torch.no_grad():
                weight = adapted_weight(module).data.float()
                found = lengths.get_weight_norm(weight, torch.zeros(()), layer.scaling[name])
                lengths.weight.data = found


def saved_pairs(wrapper: ModulesToSaveWrapper) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Each weight of a module to save, with its trained copy."""
    copies = wrapper.modules_to_save[wrapper.active_adapters[0]]
    yield from zip(wrapper.original_module.parameters(), copies.parameters(), strict=True)


def sort_names(config: PeftConfig) -> None:
    """Names in a fixed order: PEFT keeps sets, which two processes write in different orders."""
    for field in ("target_modules", "target_parameters", "modules_to_save", "exclude_modules"):
        names = getattr(config, field, None)
        if names is not None and not isinstance(names, str):
            setattr(config, field, sorted(names))


def _weights_of(module: nn.Module) -> list[nn.Parameter]:
    if isinstance(module, ModulesToSaveWrapper):
        return [weight for weight, _ in saved_pairs(module)]
    return [adapted_weight(module)] if isinstance(module, LoraLayer) else []


def _plain_name(name: str) -> str:
    return name.replace(".base_layer", "")


def _layer_name(name: str, module: LoraLayer) -> str:
    """The name by which PEFT looks a layer up in patterns: of a parameter's wrapper the parameter's."""
    name = _plain_name(name)
    return f"{name}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name


def _is_meant(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _kind(name: str, module: nn.Module) -> str:
    name = _plain_name(name)
    if isinstance(module, ParamWrapper):
        name = _layer_name(name, module).removesuffix(".weight")
        owner, _, leaf = name.rpartition(".")
        return f"{owner.rpartition('.')[2]}.{leaf}" if "expert" in owner else leaf
    return name.rpartition(".")[2]


def _text_part(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The prefix of the text part's names and the part: of a checkpoint with images or sound, its decoder."""
    if model.config.get_text_config() is model.config:
        return "", model
    whole: Any = model
    decoder: nn.Module = whole.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    return f"{name}." if name else "", decoder


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Plain linear layers of the text part that an adapter beside them can change."""
    prefix, part = _text_part(model)
    whole: Any = model
    head, shared = whole.get_output_embeddings(), _shared(model)
    return [
        prefix + name
        for name, module in part.named_modules()
        if _is_plain_linear(module)
        and module is not head
        and id(module.weight) not in shared
        and not _is_read(part, name)
    ]


def _is_plain_linear(module: nn.Module) -> bool:
    """A linear layer that gives the product and nothing else: not a router that gives a tuple."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    quantized = type(module).__module__.startswith("bitsandbytes.")
    if quantized or type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight_OI, bias_O = module.weight, module.bias
    with torch.no_grad():
        x_I = torch.linspace(-1, 1, weight_OI.shape[-1], dtype=weight_OI.dtype)
        try:
            found_O, expected_O = module(x_I[None]), linear(x_I[None], weight_OI, bias_O)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False
    return isinstance(found_O, torch.Tensor) and torch.allclose(
        found_O, expected_O, rtol=1e-2, atol=1e-4
    )


def _is_read(model: nn.Module, name: str) -> bool:
    """Whether the module around it reads its weight instead of calling it, as Mamba's do: an adapter is passed by."""
    owner, _, leaf = name.rpartition(".")
    pattern = rf"self\.{re.escape(leaf)}\.weight\b(?!\.(dtype|device|shape|requires_grad))"
    kind: Any = type(model.get_submodule(owner))
    return re.search(pattern, _working_code(kind)) is not None


@lru_cache
def _working_code(kind: Any) -> str:
    """A class's source without its methods that set weights up; empty where there is none to read."""
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
    parts = re.split(r"(?m)^    def (?=\w)", code)
    setup = ("__init__", "init_", "_init", "reset_parameters")
    return "".join(part for part in parts if not part.startswith(setup))


def _expert_names(model: PreTrainedModel) -> list[str]:
    """Matrices of a mixture's experts that are stacked in one tensor, (experts, rows, columns)."""
    prefix, part = _text_part(model)
    return [
        f"{prefix}{name}.{leaf}"
        for name, module in part.named_modules()
        if "expert" in type(module).__name__.lower()
        for leaf, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3
    ]


def _shared(model: nn.Module) -> set[int]:
    """Ids of weights that belong to more than one module."""
    owned = Counter(
        id(weight) for module in model.modules() for weight in module._parameters.values()
    )
    return {key for key, count in owned.items() if count > 1 and key != id(None)}


def _parameter_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _check_parameters(model: nn.Module, parameters: Sequence[str], lora: LoraOptions) -> None:
    names = _parameter_names(model)
    for wanted in parameters:
        if not any(matches(name, [wanted]) for name in names):
            raise ModelError(
                f"model.lora.target_parameters {wanted!r} is no parameter of the model; "
                "name it as named_parameters() does, or its ending after a dot"
            )
    unlike = {
        "dropout": (lora.dropout, "0"),
        "use_dora": (lora.use_dora, "false"),
        "init_lora_weights": (lora.splits, "true"),
    }
    for option, (is_set, plain) in unlike.items():
        if parameters and is_set:
            raise ModelError(
                f"model.lora.{option} cannot be applied to parameters of experts ({parameters[0]}); set it "
                f"to {plain}, or model.lora.target_parameters to [] to leave the experts without an adapter"
            )


def _shortened(names: Sequence[str], every: Sequence[str]) -> list[str]:
    """The names without the layers' numbers, where that means the same parameters."""
    endings = sorted({re.sub(r"^.*\.\d+\.", "", name) for name in names})
    same = {name for name in every if matches(name, endings)} == set(names)
    return endings if same else list(names)


def _unseized(model: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """With linear layers as parameters where PEFT would take their names for a mixture's experts.

    For mixtures whose experts transformers has stacked since an older checkpoint format, PEFT reads
    "gate_proj" as the experts' part, also where a shared expert or a first dense layer has a module of
    that name, which would go without an adapter. By its weight's name it is reached.
    """
    modules = config.target_modules
    names = [name for name, module in model.named_modules() if _is_plain_linear(module)]
    linear = [
        name
        for name in names
        if matches(name, modules) and not matches(name, config.exclude_modules)
    ]
    kept = _converted(model, config, linear)
    seized = [name for name in linear if not matches(name, kept)]
    if not seized:
        return config
    if isinstance(modules, str) or set(modules or ()) == set(linear):
        # Whole names: the rest of the conversion would forget which layers a pattern means.
        config.target_modules = sorted(set(linear) - set(seized))
    parameters = _shortened([f"{name}.weight" for name in seized], _parameter_names(model))
    config.target_parameters = sorted({*(config.target_parameters or ()), *parameters})
    return config


def _converted(model: PreTrainedModel, config: LoraConfig, names: list[str]) -> set[str]:
    """What PEFT leaves of target modules with these names."""
    trial = copy.copy(config)
    trial.target_modules = list(names)
    trial.rank_pattern, trial.alpha_pattern = {}, {}
    if not names:
        return set()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert_peft_config_for_transformers(trial, model=model, conversions=None)
    except ValueError:
        # "gate_proj without up_proj": said by PEFT when the adapter is made.
        return set(names)
    return set(trial.target_modules or ())
