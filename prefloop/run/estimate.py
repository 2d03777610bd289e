"""What a run will take, before it begins: tokens, operations, memory, disk, hours; and how right that was for a finished one.

Tokens are counted by playing the method on a few prompts with an engine that only counts. Operations are those
of docs/compare.md, 2 N a token and pass. Hours are operations over a rate: matrix products of this model's own
shapes, timed here, with what generation and training were seen to take beside them; or the peak of a named GPU, times a
share of it. A judge's own work is not in it.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from prefloop.data.prompts import Part, read_prompts
from prefloop.errors import DataError, RecipeError, counted
from prefloop.generate.cpu.products import is_multiplied
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.engines.hf import InProcess
from prefloop.generate.templates import PromptSet
from prefloop.methods import Actors
from prefloop.models.adapter import lora_config, matches
from prefloop.models.chat import Chat
from prefloop.models.sources import (
    ModelOptions,
    local_folder,
    quiet,
    reason,
    resolve_source,
    unpacked,
)
from prefloop.models.tokenizer import load_tokenizer
from prefloop.recipe import Recipe
from prefloop.recipe.check import on_the_hub
from prefloop.recipe.options import Budget
from prefloop.records import GENERATED, READ, Message, Prompt, Request, Response, Sampling
from prefloop.run.dtype import dtype_of
from prefloop.run.engine import Metered
from prefloop.run.gpus import GPUS

FILL = 0.6
"""Share of `max_new_tokens` that an answer is taken to fill where no finished run says better."""


class Cost(NamedTuple):
    """Seconds of an operation, as counted here, in those of an operation of bare products: so many in the run's dtype, and
    for all else, which no dtype makes faster, so many in float32. Fitted to a few runs (docs/estimate.md). The timed weights lie in a cache, a model's do not; and tokens are counted that are not computed:
    prompts that begin alike are read once, answers that share a beginning are trained on once."""

    products: float
    rest: float

    def rate(self, products: float, float32: float) -> float:
        """Operations a second, from those of bare products in the run's dtype and in float32."""
        return 1 / (self.products / products + self.rest / float32)


DECODES, READS, TRAINS = Cost(3.0, 2.0), Cost(0.4, 0.1), Cost(1.0, 0.85)
GPU_TRAINS, GPU_DECODES = 0.35, 0.5
"""On GPUs, of the peak of bfloat16 products, and of the memory's bandwidth while decoding: usual figures of other
programs, not measured with this one."""
_TIMED_WEIGHTS = 1_000_000_000
"""Models up to this size are timed before a run; larger ones by `check --estimate`, when asked."""
_MOMENT = 0.5
"""Seconds of timing before a run."""
_SAMPLE = 16
"""Prompts that the method is played on."""
_PROGRAM_MB = 700.0
"""Python, torch and transformers without a model."""
_OPTIMIZER_BYTES = {"adamw": 8, "rmsprop": 4}
"""Of an optimiser's state, for each trained weight."""


class Rates(NamedTuple):
    """Operations a second that are really had."""

    decode: float
    """While answers are drawn."""
    prefill: float
    """While prompts and given answers are read."""
    train: float
    where: str
    gpus: int = 0
    """How many the rates are those of; 0: this machine's CPU."""


class Told(NamedTuple):
    """What an estimate takes as given where model or data are not on this disk."""

    config: Path | None = None
    """The model's config.json; texts are then counted with the embedded model's tokenizer, unless the model's is here."""
    prompt_tokens: int | None = None
    """Of every prompt, in its template; no data are read."""
    device: str = "cpu"
    """On which the weights are to be, "cpu" or "cuda": what `model.dtype: auto` is depends on it."""


@dataclass(frozen=True)
class Shape:
    """A model by its numbers."""

    weights: int
    """All weights."""
    multiplying: int
    """Those that every token is multiplied by: N."""
    trained: int
    linears: Mapping[tuple[int, int], int]
    """How many linear layers there are of (out, in) features."""
    layers: int
    hidden: int
    key_values: int
    """Numbers that a token leaves in the cache."""
    bytes: int
    """Of a frozen weight."""
    dtype: str
    """In which products are computed: "float32" or "bfloat16"."""


@dataclass(frozen=True)
class Work:
    """Tokens that a run draws, reads and trains on."""

    generated: int
    read: int
    trained: int
    reference: int
    measured_generated: int = 0
    """Of evaluation, which budgets leave out."""
    measured_read: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    work: Work
    flops: float
    """As `prefloop compare` counts: without evaluation."""
    seconds: dict[str, float]
    """generate, train, evaluate."""
    memory_mb: dict[str, float]
    """generate, train; of one process that holds all."""
    disk_mb: float
    where: str
    dtype: str
    gpus: int = 0

    def lines(self) -> list[str]:
        """For the console."""
        w, hours = self.work, sum(self.seconds.values()) / 3600
        stages = ", ".join(f"{name} {_duration(value)}" for name, value in self.seconds.items())
        memory = ", ".join(f"{name} {mb / 1000:.1f} GB" for name, mb in self.memory_mb.items())
        return [
            f"tokens   {w.generated:,} drawn, {w.read:,} read, {w.trained:,} trained, {w.reference:,} of the reference",
            f"         {w.measured_generated:,} drawn and {w.measured_read:,} read to measure",
            f"FLOPs    {self.flops:.2g} without measuring",
            f"hours    {hours:.2g} ({stages}), {self.where}",
            *([self._gpu_hours()] if self.gpus > 1 else []),
            f"memory   {memory}, products in {self.dtype}; disk {self.disk_mb / 1000:.2g} GB",
        ]

    def _gpu_hours(self) -> str:
        hours = {name: self.gpus * value / 3600 for name, value in self.seconds.items()}
        stages = ", ".join(f"{name} {_two_digits(value)}" for name, value in hours.items())
        return f"         {_two_digits(sum(hours.values()))} GPU-hours ({stages})"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.2g} h"


def _two_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def estimate(
    recipe: Recipe,
    rates: Callable[[Shape], Rates],
    work: Work | None = None,
    told: Told = Told(),  # noqa: B008 - immutable
) -> Estimate:
    """What the recipe will take at these rates; `work` where its tokens are known.

    Raises ModelError, DataError, and RecipeError where `told` is of no use.
    """
    shape = model_shape(recipe, told.config, told.device)
    known = rates(shape)
    if work is not None:
        return _at(recipe, shape, known, work)
    counts = _counts(recipe, told=told)
    for rounds in range(1, recipe.loop.rounds + 1):
        found = _at(recipe, shape, known, _work(recipe, counts, rounds))
        if recipe.loop.budget is not None and _spends(found, recipe.loop.budget):
            break
    return found


def first_line(recipe: Recipe) -> str | None:
    """What a run of the recipe will take, in one line, from a moment of timing; None where that cannot be told here.

    Hours are told of small models on a CPU alone: a GPU's rate is not known, and timing a large model's products takes long.
    """
    try:
        with quiet():
            weights = model_shape(recipe).weights
            timed = (
                isinstance(recipe.engine, InProcess)
                and not torch.cuda.is_available()
                and weights <= _TIMED_WEIGHTS
            )
            rates = rates_here(recipe, limit=_MOMENT) if timed else _no_rates
            found = estimate(recipe, rates)
    except Exception:  # noqa: BLE001 - a run does not end for want of an estimate: what is wrong is said where it is used
        return None
    work, hours = found.work, _duration(sum(found.seconds.values()))
    parts = [
        f"{work.generated + work.measured_generated:,} tokens drawn",
        f"{work.trained:,} trained",
        *([hours] if timed else []),
        f"{found.disk_mb / 1000:.2g} GB of disk",
    ]
    return f"up to about {', '.join(parts)}, if every prompt gives a pair"


def _no_rates(shape: Shape) -> Rates:
    return Rates(float("inf"), float("inf"), float("inf"), "")


def _spends(found: Estimate, budget: Budget) -> bool:
    """Whether a round that ends here is the last, by the budget."""
    spent = {
        "generated_tokens": found.work.generated,
        "trained_tokens": found.work.trained,
        "seconds": found.seconds["generate"] + found.seconds["train"],
        "flops": found.flops,
    }
    return any(spent[name] >= limit for name, limit in budget.limits.items())


def _at(recipe: Recipe, shape: Shape, known: Rates, work: Work) -> Estimate:
    n = 2.0 * shape.multiplying
    passes = 2 + (recipe.model.tuning == "full") + recipe.model.gradient_checkpointing
    training = n * (work.trained * passes + work.reference)
    seconds = {
        "generate": n * (work.generated / known.decode + work.read / known.prefill),
        "train": training / known.train,
        "evaluate": n
        * (work.measured_generated / known.decode + work.measured_read / known.prefill),
    }
    return Estimate(
        work,
        n * (work.generated + work.read) + training,
        seconds,
        memory(recipe, shape),
        disk(recipe, shape, work),
        known.where,
        shape.dtype,
        known.gpus,
    )


# The model.


def model_shape(recipe: Recipe, config_file: Path | None = None, device: str = "cpu") -> Shape:
    """The model's numbers, for a `Told.device`, from its config or the one given: no weight is read. Raises ModelError, RecipeError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = recipe.model
    if config_file is None:
        place = local_folder(resolve_source(options.source), options, weights=False)
    with quiet(), torch.device("meta"):
        if config_file is not None:
            config = _config(config_file)
        else:
            config = AutoConfig.from_pretrained(
                place, trust_remote_code=options.trust_remote_code, local_files_only=True
            )
        kind: Any = AutoModelForCausalLM
        model: Any = kind.from_config(config, trust_remote_code=options.trust_remote_code)
    text = config.get_text_config()
    linears: Counter[tuple[int, int]] = Counter()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            linears[(module.out_features, module.in_features)] += 1
    total = sum(weight.numel() for weight in model.parameters())
    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    bits = options.quantization
    dtype = dtype_of(model, recipe, device)
    return Shape(
        weights=total,
        multiplying=total - (table.numel() if head is not None and head.weight is not table else 0),
        trained=_trained(model, recipe),
        linears=linears,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        key_values=2 * text.num_hidden_layers * heads * width,
        bytes=1 if bits is not None else getattr(torch, dtype).itemsize,
        dtype=dtype,
    )


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    if not path.is_file():
        raise RecipeError(f"--model-config: no file {path}; name a model's config.json")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"--model-config: {path} is no config of a model that transformers knows ({reason(error)}); name a "
            "model's config.json"
        ) from error


def _trained(model: Any, recipe: Recipe) -> int:
    if recipe.model.tuning == "full":
        return sum(weight.numel() for weight in model.parameters())
    config = lora_config(model, recipe.model.lora)
    rank, count = recipe.model.lora.r, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and matches(name, config.target_modules):
            count += rank * (module.in_features + module.out_features)
    return count


# Tokens.


class _Counting(FakeEngine):
    """Answers of a fixed share of the longest."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self._fill = fill

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """As FakeEngine, as long as asked for."""
        length = max(1, round(self._fill * sampling.max_new_tokens))
        found = super().sample(requests, sampling, seed=seed, label=label)
        words = ["word"] * (length - 2)
        return [
            answer.model_copy(
                update={"text": " ".join([answer.text, *words]), "token_ids": tuple(range(length))}
            )
            for answer in found
        ]


class _Counts(NamedTuple):
    """Tokens a prompt, and of supervised training before the first round."""

    asked: float
    answer: float
    drawn: float
    read: float
    sft: int
    held_out: int
    """Prompts that are measured."""


def count_work(recipe: Recipe, fill: float = FILL) -> Work:
    """Tokens of all rounds, whatever a budget says, by playing the method on a few prompts of local data without a model."""
    return _work(recipe, _counts(recipe, fill), recipe.loop.rounds)


def _counts(recipe: Recipe, fill: float = FILL, told: Told = Told()) -> _Counts:  # noqa: B008 - immutable
    chat = _chat(recipe, told)
    if told.prompt_tokens is not None:
        prompts = [_prompt_of(told.prompt_tokens, chat)]
    else:
        prompts = list(islice(_prompts(recipe), _SAMPLE))
    if not prompts:
        raise DataError(
            "data.train has no prompt that this run can use, so nothing can be estimated"
        )
    asked = sum(len(chat.prompt_ids(prompt.messages)) for prompt in prompts) / len(prompts)
    counts: Counter[str] = Counter()
    engine = Metered(_Counting(fill), chat, counts)
    actors = Actors(engine, None, PromptSet(recipe.method.prompt_set), 0, recipe.seed)
    list(recipe.method.generate(prompts, actors))
    answer = fill * recipe.method.sampling.max_new_tokens
    sft = 0
    if recipe.sft is not None:
        if told.prompt_tokens is not None:
            raise RecipeError(
                "sft trains on every row of data.train, and --prompt-tokens does not tell how many there are; leave "
                "it out, or take sft out of the recipe"
            )
        targets = [len(chat.text_ids(p.target)) + 1 for p in prompts if p.target]
        target = sum(targets) / len(targets) if targets else answer
        sft = round(sum(1 for _ in _prompts(recipe)) * (asked + target) * recipe.sft.epochs)
    drawn, read = counts[GENERATED] / len(prompts), counts[READ] / len(prompts)
    return _Counts(asked, answer, drawn, read, sft, _held_out(recipe))


def _chat(recipe: Recipe, told: Told) -> Chat:
    options = recipe.model
    if told.config is not None and unpacked(options.source) is None:
        options = ModelOptions()
    folder = local_folder(resolve_source(options.source), options, weights=False)
    return Chat(load_tokenizer(folder, options), template_kwargs=options.chat_template_kwargs)


def _prompt_of(tokens: int, chat: Chat) -> Prompt:
    """A prompt of so many tokens, its template's included; of one word where that is more."""

    def prompt(words: int) -> Prompt:
        text = " ".join(["word"] * words)
        return Prompt(id="told", messages=(Message(role="user", content=text),), target=text)

    one, two = (len(chat.prompt_ids(prompt(words).messages)) for words in (1, 2))
    return prompt(max(1, 1 + (tokens - one) // (two - one)))


def _work(recipe: Recipe, counts: _Counts, rounds: int) -> Work:
    asked, answer, drawn, read, sft, held_out = counts
    loop = recipe.loop
    played = rounds * loop.prompts_per_round
    # Under mix_previous each round but the last one's pairs are trained on twice.
    pairs = played + (loop.mix_previous * (rounds - 1) * loop.prompts_per_round)
    pair = asked + len(recipe.method.roles) * answer
    later = held_out * (rounds if recipe.evaluate.every_round else 1)
    measured = held_out + later
    own = recipe.evaluate.introspection
    return Work(
        generated=round(played * drawn),
        read=round(played * read),
        trained=sft + round(pairs * pair * recipe.train.epochs),
        reference=round(pairs * pair) if recipe.method.needs_reference else 0,
        measured_generated=round(measured * (answer + own * drawn)),
        # Sampling tells the policy's own log-probs; the initial one reads what later policies answer.
        measured_read=round(measured * (asked + own * read) + later * (asked + answer)),
    )


def _held_out(recipe: Recipe) -> int:
    """`evaluate.prompts`, or the prompts that there are where local data hold fewer."""
    data, most = recipe.data, recipe.evaluate.prompts
    if data.eval is None:
        return min(most, data.holdout or most)
    if any(on_the_hub(source.source) for source in data.sources("eval")):
        return most
    return sum(1 for _ in islice(_prompts(recipe, "eval"), most))


def _prompts(recipe: Recipe, part: Part = "train") -> Iterator[Prompt]:
    for source in recipe.data.sources(part):
        yield from read_prompts(
            source,
            recipe.data,
            part=part,
            needs_target=recipe.needs_target,
            needs_pairs=recipe.method.needs_pairs,
        )


# Rates.


def rates_for(recipe: Recipe, gpus: str | None) -> Callable[[Shape], Rates]:
    """Rates of the named GPUs, or of this machine where none are named. Raises RecipeError."""
    return rates_here(recipe) if gpus is None else rates_of(gpus, recipe)


def rates_here(recipe: Recipe, limit: float = 20.0) -> Callable[[Shape], Rates]:
    """Time products of the model's own shapes on this machine's CPU for `limit` seconds at most; the rates are those of
    a machine that does nothing else."""

    def measure(shape: Shape) -> Rates:
        own, threads = getattr(torch, shape.dtype), torch.get_num_threads()
        dtypes = [own] if own == torch.float32 else [own, torch.float32]
        moment = min(0.5, 0.8 * limit / max(1, 2 * len(dtypes) * len(shape.linears)))

        def timed(rows: int) -> tuple[float, float]:
            found = [threads * _product_rate(shape, rows, dtype, moment) for dtype in dtypes]
            return found[0], found[-1]

        few = timed(min(recipe.generate.batch_size, recipe.loop.prompts_per_round))
        many = timed(1024)
        return Rates(
            DECODES.rate(*few),
            READS.rate(*many),
            TRAINS.rate(*many),
            f"this machine with nothing else to do, {counted(threads, 'thread')}",
        )

    return measure


def _product_rate(shape: Shape, rows: int, dtype: torch.dtype, seconds: float) -> float:
    """Operations a second of one thread over all linear layers, each as often as the model has it, `seconds` for each kind.

    The thread's own time counts, not the clock's: what others do here at this moment is left out.
    """
    threads, operations, total = torch.get_num_threads(), 0.0, 0.0
    torch.set_num_threads(1)
    try:
        for (out, inner), count in shape.linears.items():
            product = _product(
                torch.ones(rows, inner, dtype=dtype), torch.ones(out, inner, dtype=dtype)
            )
            product()
            best, end = float("inf"), time.perf_counter() + seconds
            while best == float("inf") or time.perf_counter() < end:
                begin = time.thread_time()
                product()
                best = min(best, time.thread_time() - begin)
            total += count * max(best, 1e-9)
            operations += count * 2.0 * rows * out * inner
    finally:
        torch.set_num_threads(threads)
    return operations / total


def _product(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    """The product as generation computes it: with weights in oneDNN's order where it multiplies them."""
    if not is_multiplied(weight.dtype):
        return lambda: nn.functional.linear(x, weight)
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, ordered, None, "none", [], "")


def rates_of(gpus: str, recipe: Recipe) -> Callable[[Shape], Rates]:
    """Rates of named GPUs, such as 8xH100. Raises RecipeError for one that is not in the table."""
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?([A-Za-z0-9]+)", gpus.strip())
    known = {name.lower(): name for name in GPUS}
    if found is None or found[2].lower() not in known or found[1] == "0":
        raise RecipeError(
            f"--gpus {gpus!r} is not known; write 8xH100, with one of {', '.join(GPUS)}"
        )
    name, count = known[found[2].lower()], int(found[1] or 1)
    gpu = GPUS[name]

    def rates(shape: Shape) -> Rates:
        peak = gpu.tflops * 1e12 * count
        # A step of decoding reads all weights once, in two bytes each, for a batch of answers.
        steps = GPU_DECODES * gpu.bandwidth * 1e9 / (2.0 * shape.multiplying)
        decode = min(
            GPU_TRAINS * peak, count * steps * recipe.generate.batch_size * 2.0 * shape.multiplying
        )
        where = f"{count} x {name}, {GPU_TRAINS:.0%} of its peak, decoding at {GPU_DECODES:.0%} of its bandwidth"
        return Rates(decode, GPU_TRAINS * peak, GPU_TRAINS * peak, where, count)

    return rates


# Memory and disk.


def memory(recipe: Recipe, shape: Shape) -> dict[str, float]:
    """Peak MB of one process: weights, and what generation (merged copies, cache) or training (gradients, optimiser,
    activations) adds."""
    sampling, train = recipe.method.sampling, recipe.train
    weights = shape.weights * shape.bytes + 4.0 * shape.trained
    full = recipe.model.tuning == "full"
    copies = 0 if full or recipe.model.quantization else shape.multiplying * shape.bytes
    if not full and recipe.model.quantization is None and shape.bytes == 4:
        copies *= 2  # and once more in the order that products on CPUs read
    slots = recipe.generate.batch_size * (recipe.data.max_prompt_tokens + sampling.max_new_tokens)
    cache = slots * shape.key_values * shape.bytes
    states = _OPTIMIZER_BYTES[train.optimizer] + 4
    # About 16 numbers of the hidden size are kept for a token and layer; one where they are computed again.
    kept = shape.layers * (1 if recipe.model.gradient_checkpointing else 16)
    activations = train.token_budget * shape.hidden * kept * max(2, shape.bytes)
    generate, training = weights + copies + cache, weights + states * shape.trained + activations
    return {
        "generate": _PROGRAM_MB + generate / 1e6,
        "train": _PROGRAM_MB + training / 1e6,
    }


def disk(recipe: Recipe, shape: Shape, work: Work) -> float:
    """MB of all rounds' policies and carried optimisers, the recommended policy once more, and texts with their tokens."""
    rounds = recipe.loop.rounds
    kept = rounds if recipe.train.keep_last is None else min(rounds, recipe.train.keep_last)
    states = _OPTIMIZER_BYTES[recipe.train.optimizer] * recipe.loop.carry_optimizer
    policies = ((kept + 1) * 4.0 + kept * states) * shape.trained
    records = 60.0 * (work.generated + work.measured_generated)
    return (policies + records) / 1e6
