"""Claim: the in-process engine samples several times faster than transformers' `generate`, near the linears' limit.

The same prompts go through transformers' `generate` (in the best of a few batch sizes and dtypes), this
engine and, where a Python with vLLM is named, vLLM; with stop tokens ignored and with stop tokens. Each
runs in a process of its own, one after the other, so that its peak memory is its own. The limit is the
time that the model's matrix products alone take, in the engine's own dtype, measured in the same run, at the
same rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

_TEMPERATURE, _TOP_P = 0.7, 0.95
ENGINES = ("generate", "prefloop", "vllm")
STOPPING = ("ignored", "stops")
DTYPES = ("float32", "bfloat16")
_PREFILL_ROWS = 512
_VLLM_ROWS = 64
_LIMITS = ("decode_seconds", "prefill_seconds")


def prompts(count: int, shortest: int, longest: int, seed: int) -> list[str]:
    """Instructions of the embedded set, joined until a prompt has its length in tokens; lengths are even steps."""
    import random

    from transformers import AutoTokenizer

    from prefloop.data.rows import EMBEDDED, open_rows
    from prefloop.models.chat import Chat
    from prefloop.models.sources import quiet, resolve_source
    from prefloop.records import Message

    draw = random.Random(seed)
    texts = [str(row["prompt"]) for _, row in open_rows(EMBEDDED, "train", None, "train")[1]]
    with quiet():
        chat = Chat(AutoTokenizer.from_pretrained(resolve_source("embedded:smollm2-135m")))
    found = []
    for number in range(count):
        wanted = shortest + (longest - shortest) * number // max(count - 1, 1)
        text = draw.choice(texts)
        while len(chat.prompt_ids((Message(role="user", content=text),))) < wanted:
            text += " " + draw.choice(texts)
        found.append(text)
    draw.shuffle(found)
    return found


# Workers: each runs in its own process, prints one JSON object, and reads its job from a file.


def _timed(work: Callable[[], Sequence[int]]) -> dict[str, float]:
    start = time.perf_counter()
    lengths = work()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens": sum(lengths),
        "tokens_per_second": sum(lengths) / seconds,
    }


def _memory_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _load(job: Mapping[str, Any], dtype: str = "float32") -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prefloop.machine import keep_freed_memory
    from prefloop.models.sources import quiet

    keep_freed_memory()
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=getattr(torch, dtype))
        return model.eval(), AutoTokenizer.from_pretrained(job["folder"])


def run_prefloop(job: Mapping[str, Any]) -> dict[str, Any]:
    """This engine; stop tokens are ignored by giving it none."""
    from prefloop.generate.hf_engine import HFEngine
    from prefloop.records import Message, Request, Sampling

    model, tokenizer = _load(job, job["dtype"])
    engine = HFEngine(model, tokenizer, batch_size=job["slots"])
    stops = engine.chat.stop_ids
    asked = [Request(messages=(Message(role="user", content=text),)) for text in job["prompts"]]
    sampling = Sampling(temperature=_TEMPERATURE, top_p=_TOP_P, max_new_tokens=job["new_tokens"])
    engine.sample(asked[:2], sampling.model_copy(update={"max_new_tokens": 2}), seed=0)
    found: dict[str, Any] = {}
    for name, ids in (("ignored", frozenset[int]()), ("stops", stops)):
        if name not in job["stopping"]:
            continue
        engine.chat.stop_ids = ids
        engine.release()
        found[name] = _timed(
            lambda: [len(r.token_ids) for r in engine.sample(asked, sampling, seed=1)]
        )
    return found | {"memory_gb": _memory_gb(), "rows": job["slots"], "dtype": job["dtype"]}


def _plain_generate(
    model: Any, rows: Sequence[list[int]], size: int, limit: int, stops: Sequence[int]
) -> list[int]:
    """Lengths of the answers of transformers' own loop; batches of neighbours, padded on the left."""
    import torch

    lengths = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(part):
            ids[n, -len(row) :], mask[n, -len(row) :] = torch.tensor(row), 1
        torch.manual_seed(start)
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=_TEMPERATURE, top_p=_TOP_P,
            top_k=0, max_new_tokens=limit, pad_token_id=0, eos_token_id=list(stops) or None,
        )  # fmt: skip
        for answer in out[:, ids.shape[1] :].tolist():
            ends = [n for n, token in enumerate(answer) if token in stops]
            lengths.append(ends[0] + 1 if ends else len(answer))
    return lengths


def run_generate(job: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' own loop in the best of a few batch sizes and dtypes, found by short trials."""
    rows = sorted(job["prompt_ids"], key=len)
    # Batches do not know how many follow, so some prompts of all lengths show its speed.
    rows = rows[:: max(1, len(rows) // job["generate_prompts"])]
    trials, models = [], {}
    for dtype, sizes in job["trials"].items():
        model, _ = models[dtype] = _load(job, dtype)
        model.generation_config.eos_token_id = None
        _plain_generate(model, rows[:2], 2, 2, ())
        for size in sizes:
            sample = rows[:: max(1, len(rows) // size)][:size]
            rate = _timed(partial(_plain_generate, model, sample, size, 8, ()))
            trials.append((rate["tokens_per_second"], size, dtype))
    _, size, dtype = max(trials)
    found: dict[str, Any] = {
        name: _timed(
            partial(_plain_generate, models[dtype][0], rows, size, job["new_tokens"], stops)
        )
        for name, stops in (("ignored", ()), ("stops", job["stop_ids"]))
        if name in job["stopping"]
    }
    return found | {
        "memory_gb": _memory_gb(), "rows": size, "dtype": dtype, "trials": trials,
        "prompt_tokens": sum(map(len, rows)),
    }  # fmt: skip


def run_limit(job: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds a row of all matrix products of one forward pass, at the engine's rows and at a prefill's.

    In the job's dtype, which an engine is to be compared with; each is taken in the faster of torch's plain
    product and oneDNN's with reordered weights.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    model, _ = _load(job, job["dtype"])
    head = model.get_output_embeddings()
    with torch.inference_mode():
        layers = [
            (layer is head, layer.weight, torch.ops.mkldnn._reorder_linear_weight(layer.weight))
            for layer in model.modules()
            if isinstance(layer, nn.Linear)
        ]

        def seconds(rows: int, with_head: bool) -> float:
            inputs = {w.shape[1]: w.new_empty(rows, w.shape[1]).normal_() for _, w, _ in layers}
            used = [layer for layer in layers if with_head or not layer[0]]

            def plain() -> None:
                for _, weight, _ in used:
                    functional.linear(inputs[weight.shape[1]], weight)

            def reordered() -> None:
                for _, weight, other in used:
                    torch.ops.mkldnn._linear_pointwise(
                        inputs[weight.shape[1]], other, None, "none", [], ""
                    )

            times = []
            for work in (plain, reordered):
                work()
                for _ in range(3):
                    start = time.perf_counter()
                    work()
                    times.append(time.perf_counter() - start)
            return min(times) / rows

        return {
            "dtype": str(layers[0][1].dtype).removeprefix("torch."),
            "decode_seconds": seconds(job["slots"], with_head=True),
            "prefill_seconds": seconds(_PREFILL_ROWS, with_head=False),
        }


def run_vllm(job: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's offline engine, compiled; runs under a Python of its own, without prefloop."""
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    model = LLM(
        job["folder"],
        dtype=job["dtype"],
        max_num_seqs=_VLLM_ROWS,
        max_model_len=1024,
        generation_config="vllm",
        seed=0,
    )
    construct = time.perf_counter() - start
    tokens = [{"prompt_token_ids": ids} for ids in job["prompt_ids"]]
    found: dict[str, Any] = {}

    def run(limit: int, stop: bool, tokens: list[Any]) -> list[int]:
        sampling = SamplingParams(
            temperature=_TEMPERATURE,
            top_p=_TOP_P,
            max_tokens=limit,
            ignore_eos=not stop,
            stop_token_ids=job["stop_ids"] if stop else None,
            logprobs=0,
        )
        outputs = model.generate(tokens, sampling, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    run(2, False, tokens[:2])
    for name, stop in (("ignored", False), ("stops", True)):
        if name not in job["stopping"]:
            continue
        model.reset_prefix_cache()
        found[name] = _timed(lambda stop=stop: run(job["new_tokens"], stop, tokens))
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return found | {
        "memory_gb": max(_memory_gb(), children), "rows": _VLLM_ROWS, "dtype": job["dtype"],
        "construct_seconds": construct,
    }  # fmt: skip


WORKERS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "prefloop": run_prefloop,
    "generate": run_generate,
    "limit": run_limit,
    "vllm": run_vllm,
}


def _in_process(python: str, worker: str, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
    if worker == "vllm":
        # Its worker process is a child of a child; in one process its memory can be read.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    command = [python, __file__, "--worker", worker, "--job", str(path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"the {worker} worker failed; its error stands above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(worker, json.dumps(found), file=sys.stderr)
    return found


def _shares(
    engine: dict[str, Any], limit: Mapping[str, float], prompt_tokens: int
) -> dict[str, float]:
    """Of the time that `engine` took: all matrix products' share, and those of the new tokens alone."""
    found = {}
    for name in {"ignored", "stops"} & engine.keys():
        new = engine[name]["tokens"] * limit["decode_seconds"]
        old = engine.get("prompt_tokens", prompt_tokens) * limit["prefill_seconds"]
        found[f"share_{name}"] = (new + old) / engine[name]["seconds"]
        found[f"share_{name}_decode_only"] = new / engine[name]["seconds"]
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All engines, one after the other."""
    from transformers import AutoTokenizer

    from prefloop.models.chat import Chat
    from prefloop.models.sources import quiet, resolve_source
    from prefloop.records import Message

    source = resolve_source("embedded:smollm2-135m")
    with quiet():
        chat = Chat(AutoTokenizer.from_pretrained(source))
    texts = prompts(options.prompts, 40, 350, options.seed)
    ids = [chat.prompt_ids((Message(role="user", content=text),)) for text in texts]
    job = {
        "folder": source,
        "prompts": texts,
        "prompt_ids": ids,
        "stop_ids": sorted(chat.stop_ids),
        "new_tokens": options.new_tokens,
        "slots": options.slots,
        "dtype": options.dtype,
        "stopping": options.stopping,
        "generate_prompts": options.generate_prompts,
        "trials": {"float32": options.generate_rows, "bfloat16": options.generate_rows[:1]}
        if len(options.generate_rows) > 1
        else {"float32": options.generate_rows},
    }
    here = sys.executable
    before = _limits(options, job, folder)
    found: dict[str, Any] = {}
    for name in options.engines:
        if name == "vllm":
            if options.vllm_python:
                for dtype in options.vllm_dtypes:
                    found[f"vllm {dtype}"] = _in_process(
                        options.vllm_python, "vllm", {**job, "dtype": dtype}, folder
                    )
        else:
            found[name] = _in_process(here, name, job, folder)
    # The machine may be busier at one end of the run; the limit is the better of both.
    after = _limits(options, job, folder)
    limits = {
        dtype: {key: min(before[dtype][key], after[dtype][key]) for key in _LIMITS}
        for dtype in before
    }
    prompt_tokens = sum(map(len, ids))
    for engine in found.values():
        engine |= _shares(engine, limits[engine["dtype"]], prompt_tokens)
    return {
        "engines": found,
        "limit_decode_tokens_per_second": {
            dtype: 1 / limit["decode_seconds"] for dtype, limit in limits.items()
        },
        "limit_prefill_tokens_per_second": {
            dtype: 1 / limit["prefill_seconds"] for dtype, limit in limits.items()
        },
        "prompts": len(ids),
        "prompt_tokens": prompt_tokens,
        "new_tokens": options.new_tokens,
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
    }


def _limits(
    options: argparse.Namespace, job: Mapping[str, Any], folder: Path
) -> dict[str, dict[str, Any]]:
    """The limit in every dtype that an engine may run in."""
    dtypes = {options.dtype}
    if "generate" in options.engines:
        dtypes |= set(job["trials"])
    if "vllm" in options.engines and options.vllm_python:
        dtypes |= set(options.vllm_dtypes)
    return {
        dtype: _in_process(sys.executable, "limit", {**job, "dtype": dtype}, folder)
        for dtype in sorted(dtypes)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=64, help="of 40 to 350 tokens")
    parser.add_argument("--new-tokens", type=int, default=128, help="limit of an answer")
    parser.add_argument(
        "--slots", type=int, default=64, help="rows that this engine decodes together"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument(
        "--engines", nargs="*", choices=ENGINES, default=list(ENGINES), help="which ones"
    )
    parser.add_argument(
        "--stopping",
        nargs="*",
        choices=STOPPING,
        default=list(STOPPING),
        help="stop tokens ignored, or not",
    )
    parser.add_argument(
        "--generate-rows",
        type=int,
        nargs="*",
        default=[16, 8, 32],
        help="batch sizes of generate: the best is found by short trials, the first one in bfloat16 too",
    )
    parser.add_argument(
        "--generate-prompts",
        type=int,
        default=64,
        help="how many of the prompts generate continues",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of this engine")
    parser.add_argument("--vllm-dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--vllm-python", help="a Python that has vLLM; without it vLLM is left out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](json.loads(options.job.read_text()))))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    if options.json:
        print(json.dumps(found))
        return
    print(f"{'':16}{'stop tokens':12}{'tok/s':>8}{'GB':>6}{'of the limit':>14}")
    for name, engine in found["engines"].items():
        for stopping in options.stopping:
            print(
                f"{name:16}{stopping:12}{engine[stopping]['tokens_per_second']:8.1f}"
                f"{engine['memory_gb']:6.1f}{engine[f'share_{stopping}']:14.0%}"
            )


if __name__ == "__main__":
    main()
