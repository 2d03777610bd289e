"""Policies: a model and its tokenizer that can be trained, set back to their start, merged and saved."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefloop.errors import ModelError
from prefloop.models import lora_linear
from prefloop.models.adapter import (
    Share,
    adapted_weight,
    check_adapter,
    check_patterns,
    is_quantized,
    lora_config,
    part_apart,
    saved_pairs,
    set_lengths,
    share,
    size_of,
    sort_names,
    weight_with_adapter,
)
from prefloop.models.dtype import Choice, apart, choose_dtype
from prefloop.models.sources import (
    EMBEDDED,
    LoraOptions,
    ModelOptions,
    check_quantization,
    local_folder,
    quiet,
    reason,
    resolve_source,
)
from prefloop.models.split import Split, as_begun, save_split, saved_split, split_of
from prefloop.models.tokenizer import load_tokenizer
from prefloop.run_folder import give_usual_modes

log = logging.getLogger(__name__)

__all__ = [
    "EMBEDDED",
    "LoraOptions",
    "ModelOptions",
    "Policy",
    "auto_dtype",
    "resolve_source",
]


def auto_dtype(
    options: ModelOptions, device: torch.device, folder: Path, obstacle: str | None = None
) -> Choice:
    """The dtype of the frozen weights of the model in `folder`, and why; `obstacle` as in `choose_dtype`. Reads no weight."""
    choice = choose_dtype(options, device.type, obstacle)
    if options.dtype != "auto" or device.type != "cpu" or choice.dtype == "float32":
        return choice
    kind: Any = AutoModelForCausalLM
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=options.trust_remote_code, local_files_only=True
            )
            empty = kind.from_config(config, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, RuntimeError, ImportError, TypeError) as error:
        # What is wrong with a model is said by who loads it; code that comes with one may want weights here.
        return Choice(
            "float32", f"the model cannot be looked at without its weights: {reason(error)}"
        )
    part = part_apart(empty, options.lora)
    return choice if part is None else apart(part)


@dataclass
class Policy:
    """A model with its tokenizer. `model` is a PeftModel under LoRA, else a plain transformers model."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    options: ModelOptions
    _unmerged: list[tuple[nn.Parameter, torch.Tensor]] = field(default_factory=list, repr=False)
    """Inside `merged`: the adapted weights and what they hold outside it."""
    split: Split = field(default_factory=dict, repr=False)
    """What the adapter began with, where that is a part of the weights; see models/split.py."""

    @classmethod
    def load(
        cls,
        options: ModelOptions,
        adapter: Path | None = None,
        trainable: bool = True,
        *,
        seed: int = 0,
        on_cpu: bool = False,
    ) -> Policy:
        """The initial policy, or the one that `save` wrote to the folder `adapter`; in eval mode.

        A fresh adapter's weights depend on `seed` alone, and the global random state is left as it was.
        `on_cpu` leaves the weights there, for a model that no device could hold whole.
        Raises ModelError.
        """
        device = _device(options.device)
        start = resolve_source(options.source)
        base = folder = local_folder(start, options)
        if adapter is not None and options.tuning == "full":
            base = _policy_folder(adapter, "config.json", options)
        # One generator, on the CPU, so that every device starts from the same adapter.
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            plain = _base_model(base, options, device)
            # PEFT writes this into the adapter's config; a hub id stays one.
            plain.name_or_path = start
            tokenizer = load_tokenizer(folder, options)
            _check_vocabulary(plain, tokenizer, options)
            model: PreTrainedModel | PeftModel = plain
            split: Split = {}
            if options.tuning == "lora":
                model, split = _with_adapter(plain, options, adapter, trainable)
            if options.gradient_checkpointing and trainable:
                enable: Callable[[dict[str, bool]], None] = plain.gradient_checkpointing_enable
                enable({"use_reentrant": False})
        if not trainable:
            model.requires_grad_(False)
        model.eval()
        nn.Module.to(model, "cpu" if on_cpu else device)
        if isinstance(model, PeftModel):
            lora_linear.fuse(model)
        return cls(model, tokenizer, options, split=split)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def intended_device(self) -> torch.device:
        """Where the recipe wants the weights to be trained."""
        return _device(self.options.device)

    @property
    def multiplying_weights(self) -> int:
        """Weights that every token is multiplied by: no adapter's, and an embedding's only where it is the head too."""
        model: Any = self.model
        if isinstance(self.model, PeftModel):
            model = self.model.get_base_model()
        sizes = {
            id(weight): size_of(weight)
            for name, weight in model.named_parameters()
            if "lora_" not in name and "modules_to_save" not in name
        }
        head = model.get_output_embeddings()
        table = model.get_input_embeddings().weight
        if head is not None and head.weight is not table:
            sizes.pop(id(table), None)
        return sum(sizes.values())

    def share(self) -> Share | None:
        """How much of the model the adapter reaches; None without an adapter."""
        return share(self.model) if isinstance(self.model, PeftModel) else None

    @contextlib.contextmanager
    def at_start(self) -> Iterator[None]:
        """Inside, the model is the initial policy: π_ref of AROP.

        LoRA switches the adapter off, or puts the one in place that it began as. Full fine-tuning loads the initial weights again and exchanges
        them for the trained ones, so it needs memory for a second copy, and weights that are not
        sharded over processes; optimisers keep their hold on the same parameters. Take no optimiser
        step inside.
        """
        if self._unmerged:
            # The adapter is off already, and PEFT would switch it on at the end.
            with self._initial_weights():
                yield
            return
        if isinstance(self.model, PeftModel):
            with as_begun(self.model, self.split) if self.split else self._without_adapter():
                yield
            return
        folder = local_folder(resolve_source(self.options.source), self.options)
        with quiet():
            initial = _base_model(folder, self.options, self.device)
        nn.Module.to(initial, self.device)
        _exchange(self.model, initial)
        try:
            yield
        finally:
            _exchange(self.model, initial)

    @contextlib.contextmanager
    def _without_adapter(self) -> Iterator[None]:
        assert isinstance(self.model, PeftModel)
        wanted = [weight.requires_grad for weight in self.model.parameters()]
        try:
            with self.model.disable_adapter():
                yield
        finally:
            # PEFT makes the adapter trainable as it switches it on again, whether it was or not.
            for weight, flag in zip(self.model.parameters(), wanted, strict=True):
                weight.requires_grad_(flag)

    @contextlib.contextmanager
    def _initial_weights(self) -> Iterator[None]:
        """Inside `merged`: the weights of the initial policy, the adapter that it may need added in."""
        assert isinstance(self.model, PeftModel)
        merged = [(weight, weight.data) for weight, _ in self._unmerged]
        try:
            for weight, data in self._unmerged:
                weight.data = data
            if self.split:
                with as_begun(self.model, self.split):
                    for weight, data in self._adapted():
                        weight.data = data
            yield
        finally:
            for weight, data in merged:
                weight.data = data

    def _adapted(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Each weight that the adapter changes, with what it is under the adapter."""
        assert isinstance(self.model, PeftModel)
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                with torch.no_grad():
                    added = weight_with_adapter(layer, self.model.active_adapter)
                yield adapted_weight(layer), added
            elif isinstance(layer, ModulesToSaveWrapper):
                for weight, trained in saved_pairs(layer):
                    yield weight, trained.data

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the same policy computes faster: LoRA is added into copies of the weights it adapts.

        Generation takes about half the time, and memory for those copies. The weights themselves are
        put back as they were, bit for bit. Take no optimiser step inside.

        Into quantised weights nothing can be added, and bfloat16 would round most of a young adapter away:
        there it stays beside them.
        """
        if (
            not isinstance(self.model, PeftModel)
            or is_quantized(self.model.get_base_model())
            or all(
                lora_linear.is_joined(m) for m in self.model.modules() if isinstance(m, LoraLayer)
            )
        ):
            yield
            return
        kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        try:
            for weight, added in self._adapted():
                kept.append((weight, weight.data))
                weight.data = added
            # The merged weights are the policy; its adapter must not be added a second time.
            with self._without_adapter():
                self._unmerged = kept
                yield
        finally:
            self._unmerged = []
            for weight, data in kept:
                weight.data = data

    def save(self, folder: Path) -> None:
        """Write adapter or model, and tokenizer, as PEFT and transformers read them; safetensors only.

        The folder appears, or is replaced, when it is whole.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            with quiet():
                if isinstance(self.model, PeftModel):
                    # "auto" would ask the hub whether the vocabulary grew; ours never does.
                    self.model.save_pretrained(str(part), save_embedding_layers=False)
                    (part / "README.md").unlink(missing_ok=True)
                    if self.split:
                        save_split(part, self.split, self.options.lora)
                else:
                    self.model.save_pretrained(part)
                self.tokenizer.save_pretrained(part)
            _sort_targets(part / "adapter_config.json")
            give_usual_modes(part)
            if folder.exists():
                shutil.rmtree(folder)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def merge(self) -> PreTrainedModel:
        """The plain model with the adapter added into its weights, in their dtype.

        Under LoRA this uses the policy up: its base weights are changed in place. Under full
        fine-tuning it is the model itself.
        """
        if not isinstance(self.model, PeftModel):
            return self.model
        if is_quantized(self.model.get_base_model()):
            raise ModelError(
                f"the adapter of {self.options.source} was trained beside quantised weights, which would be rounded "
                "once more with it inside; load it with peft over the model in the same quantisation"
            )
        try:
            merged = self.model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ModelError(
                f"the adapter of {self.options.source} cannot be merged ({reason(error)}); "
                "take an earlier round's policy"
            ) from error
        assert isinstance(merged, PreTrainedModel)
        return merged


def _sort_targets(config: Path) -> None:
    """PEFT keeps the adapted modules as a set, and writes them in another order in each process."""
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        if isinstance(values["target_modules"], list):
            values["target_modules"].sort()
        config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            # Under `accelerate launch` every process has a device of its own.
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f'model.device {name!r} cannot be used here ({reason(error)}); "auto" chooses'
        ) from error
    return device


def _base_model(folder: Path, options: ModelOptions, device: torch.device) -> PreTrainedModel:
    check_quantization(options)
    dtype = getattr(torch, auto_dtype(options, device, folder).dtype)
    bits: dict[str, Any] = {}
    if options.quantization is not None:
        bits = {
            "quantization_config": options.quantization.for_transformers(dtype),
            "device_map": {"": device},
        }
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=options.trust_remote_code, local_files_only=True
        )
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{type(config).__name__} is an encoder-decoder's")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=options.attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in words
            trust_remote_code=options.trust_remote_code,
            local_files_only=True,
            **bits,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        remedy = (
            "set model.trust_remote_code to true if you trust it"
            if "trust_remote_code" in str(error)
            else "set model.source to one that can"
        )
        raise ModelError(
            f"{folder} cannot be loaded as a causal language model: {reason(error)}; {remedy}"
        ) from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{folder} lacks {len(missing)} of the weights of a causal language model "
            f"({missing[0]} ...); set model.source to a complete one"
        )
    if mismatched := sorted(key for key, *_ in info["mismatched_keys"]):
        raise ModelError(
            f"{folder} has {len(mismatched)} weights of another shape than its config.json says "
            f"({mismatched[0]} ...); set model.source to one whose files belong together"
        )
    return model


def _with_adapter(
    model: PreTrainedModel, options: ModelOptions, adapter: Path | None, trainable: bool
) -> tuple[PeftModel, Split]:
    _check_precision(model, options)
    split: Split = {}
    if adapter is None:
        adapted = _new_adapter(model, options, trainable)
        set_lengths(adapted)
        split = split_of(adapted, options.lora) if options.lora.splits else {}
    elif options.lora.splits:
        folder = _adapter_folder(adapter, options)
        plain = {"lora": options.lora.model_copy(update={"init_lora_weights": True})}
        adapted = _new_adapter(model, options.model_copy(update=plain), trainable)
        with _fitting(adapter, options):
            split = saved_split(adapted, folder)
    else:
        adapted = _saved_adapter(model, options, adapter, trainable)
    check_adapter(adapted)
    sort_names(adapted.peft_config[adapted.active_adapter])
    return adapted, split


def _check_precision(model: PreTrainedModel, options: ModelOptions) -> None:
    dtype = str(model.dtype).removeprefix("torch.")
    if options.lora.modules_to_save and model.dtype != torch.float32:
        raise ModelError(
            "model.lora.modules_to_save trains whole modules, whose updates would round to nothing in "
            f"{dtype}; set model.dtype to float32"
        )
    if options.lora.splits and model.dtype != torch.float32:
        raise ModelError(
            f"model.lora.init_lora_weights {options.lora.init_lora_weights} takes a part out of the weights, and "
            f"what is left would be rounded to {dtype}; set model.dtype to float32"
        )


def _new_adapter(model: PreTrainedModel, options: ModelOptions, trainable: bool) -> PeftModel:
    try:
        with _quiet_peft():
            config = lora_config(
                model,
                options.lora,
                task_type="CAUSAL_LM",
                revision=options.revision,
                inference_mode=not trainable,
            )
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"model.lora.target_modules {options.lora.target_modules!r} does not fit "
            f"{options.source}: {reason(error)}"
        ) from error
    assert isinstance(adapted, PeftModel)
    check_patterns(adapted, options.lora)
    return adapted


def _saved_adapter(
    model: PreTrainedModel, options: ModelOptions, adapter: Path, trainable: bool
) -> PeftModel:
    folder = _adapter_folder(adapter, options)
    with _fitting(adapter, options), _quiet_peft():
        return PeftModel.from_pretrained(
            model,
            str(folder),
            is_trainable=trainable,
            torch_device="cpu",
            local_files_only=True,
        )


@contextlib.contextmanager
def _fitting(adapter: Path, options: ModelOptions) -> Iterator[None]:
    """An adapter that is damaged or another model's, in words."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"the adapter in {adapter} does not fit {options.source}: {reason(error)}; "
            "load it with the model that it was trained on"
        ) from error


def _adapter_folder(adapter: Path, options: ModelOptions) -> Path:
    folder = _policy_folder(adapter, "adapter_config.json", options)
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ModelError(f"{adapter} has no adapter_model.safetensors; train its round again")
    return folder


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without PEFT's warnings of tied weights and of unused patterns, which are refused in words."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        # It knows modules only, and says it of patterns for parameters too.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")
        yield


def _policy_folder(folder: Path, marker: str, options: ModelOptions) -> Path:
    if not (folder / marker).is_file():
        raise ModelError(
            f"{folder} has no {marker}, so it is no policy saved under model.tuning: {options.tuning}"
        )
    return folder


def _check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ModelOptions
) -> None:
    """Raise ModelError where a token that texts or the template give has no row in the embedding.

    Special tokens beyond it that no template uses do no harm: Gemma 3's text models have one for images.
    """
    table: Any = model.get_input_embeddings()
    rows = int(table.weight.shape[0])
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    special = set(tokenizer.all_special_tokens)
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    template = str(tokenizer.chat_template)
    named = {tokenizer.eos_token, tokenizer.bos_token}
    for token, number in sorted(beyond.items(), key=lambda item: item[1]):
        if token not in special or token in named or token in template:
            raise ModelError(
                f"the tokenizer of {options.source} has {len(tokenizer)} tokens and the model's embedding "
                f"{rows} rows: {token!r} is token {number} and has none; save the model once more after "
                "model.resize_token_embeddings(len(tokenizer))"
            )
    log.warning(
        "%d special tokens of %s have no row in the model's embedding (%s ...); none is used",
        len(beyond),
        options.source,
        min(beyond, key=lambda token: beyond[token]),
    )


def _exchange(model: nn.Module, other: nn.Module) -> None:
    """Exchange two equal models' weights without copying them."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    for mine, theirs in pairs:
        mine.data, theirs.data = theirs.data, mine.data
