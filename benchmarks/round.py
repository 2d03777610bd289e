"""Claim: a round of IAL takes less time than the usual script pipelines, in the same dtype.

One round, generation of all three phases, ranking and training, by prefloop and by scripts as one would write
them: transformers' `generate` in batches or vLLM's offline engine (compiled, prefixes cached) for draft, advice
and rewrite, the better answer by the same judge, TRL's DPOTrainer on the pairs. Equal prompts, token limits,
LoRA, batches and epochs. Each pipeline runs in a process of its own (vLLM in one more), one after the other; a
ratio is one of the same turn. prefloop's loss has three answers to an example, DPO's two. Not counted: imports,
loading and compiling models, prefloop's evaluation, and handing the trained weights back to vLLM, which a
next round would need.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

_SOURCE = "embedded:smollm2-135m"
_LR, _BATCH, _MICRO, _LORA_R, _LORA_ALPHA = 1e-4, 8, 4, 16, 32
DTYPES = ("float32", "bfloat16")
_TEMPERATURE = 0.7
_GENERATE_ROWS = 32
_VLLM_ROWS = 64
STAGES = ("generate", "rank", "train")
_FACTS = ("generated_tokens", "pairs", "memory_gb")

Write = Callable[[list[list[int]]], list[list[int]]]
"""Token ids of an answer to each prompt's token ids."""


def _memory_gb() -> float:
    """The largest process's peak: this one's, or that of a child which has ended."""
    sizes = [
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return max(sizes) / 2**20


# prefloop.


def run_prefloop(job: Mapping[str, Any]) -> dict[str, Any]:
    """The run as a user would start it, read from the manifests of its stages."""
    from rich.console import Console

    from prefloop.recipe import load_recipe
    from prefloop.run.loop import run

    recipe = Path(job["folder"]) / "round.yaml"
    limit = {"temperature": _TEMPERATURE, "max_new_tokens": job["new_tokens"]}
    values = {
        "model": {"source": _SOURCE, "dtype": job["dtype"]},
        "data": {"train": "embedded:instructions"},
        "method": {"name": "ial", "sampling": limit, "advice": limit, "gates": {"cut_off": False}},
        "judge": {"name": "similarity"},
        "generate": {"batch_size": job["slots"], "chunk_size": job["slots"]},
        "loop": {"rounds": 1, "prompts_per_round": job["prompts"]},
        "train": {
            "epochs": job["epochs"], "lr": _LR, "optimizer": "adamw",
            "batch_size": _BATCH, "micro_batch_size": _MICRO,
        },
        "evaluate": {"prompts": 1, "introspection": False},
        "guard": {"min_stop_rate": 0.0, "min_distinct2": 0.0, "max_reject_share": 1.0},
    }  # fmt: skip
    recipe.write_text(json.dumps(values))
    folder = Path(job["folder"]) / "run"
    run(load_recipe(str(recipe)), folder, Console(file=io.StringIO()))
    played = folder / "rounds" / "0000"
    seconds = {}
    for path in played.glob("*.done.json"):
        facts = json.loads(path.read_text())
        seconds[facts["stage"]] = float(facts["seconds"])
    rows = [json.loads(line) for line in (played / "candidates.jsonl").read_text().splitlines()]
    return {
        "prompt_records": [row["prompt"] for row in rows],
        "generate": seconds["candidates"],
        "rank": seconds["ranked"] + seconds["pairs"],
        "train": seconds["train"],
        "generated_tokens": sum(
            len(answer["token_ids"]) for row in rows for answer in row["responses"].values()
        ),
        "pairs": len((played / "pairs.jsonl").read_text().splitlines()),
    }


# The scripts: what they share, and their two ways to generate.


def run_script(job: Mapping[str, Any]) -> dict[str, Any]:
    """The usual way: generate, rank, DPOTrainer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOTrainer  # noqa: F401  (here, since imports are not counted)

    from prefloop.generate.templates import PromptSet
    from prefloop.judges.similarity import Similarity
    from prefloop.machine import keep_freed_memory
    from prefloop.models.sources import quiet, resolve_source
    from prefloop.records import Message, Prompt

    keep_freed_memory()
    torch.manual_seed(0)
    source = str(resolve_source(_SOURCE))
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source)
    prompts = [Prompt.model_validate(record) for record in job["prompt_records"]]
    job = {**job, "source": source, "end": tokenizer.eos_token_id}
    prompt_set = PromptSet("compact")
    judge = Similarity().open(None, prompt_set)
    clock = _Clock()
    tokens = 0
    with WRITERS[job["writer"]](job) as write:

        def answers(conversations: Sequence[Sequence[Message]]) -> list[str]:
            nonlocal tokens
            asked = [
                tokenizer.apply_chat_template(
                    [turn.model_dump() for turn in turns], add_generation_prompt=True
                )["input_ids"]
                for turns in conversations
            ]
            written = write(asked)
            tokens += sum(map(len, written))
            return [
                text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)
            ]

        with clock.stage("generate"):
            drafts, rewrites = _three_phases(prompts, prompt_set.render, answers)
    gc.collect()
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=job["train_dtype"], attn_implementation="eager"
        )
    with clock.stage("rank"):
        pairs = _ranked(judge, prompts, drafts, rewrites)
    with clock.stage("train"):
        _dpo_train(model, tokenizer, pairs, job)
    return {**clock.seconds, "generated_tokens": tokens, "pairs": len(pairs)}


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _three_phases(
    prompts: Sequence[Any], render: Callable[..., Any], answers: Callable[[list[Any]], list[str]]
) -> tuple[list[str], list[str]]:
    """Drafts and rewrites."""
    drafts = answers([p.messages for p in prompts])
    asks = [{"question": p.text, "answer": d} for p, d in zip(prompts, drafts, strict=True)]
    advice = answers([render("advisor", **ask) for ask in asks])
    rewrites = answers(
        [render("rewrite", **ask, suggestion=a) for ask, a in zip(asks, advice, strict=True)]
    )
    return drafts, rewrites


def _ranked(
    judge: Any, prompts: Sequence[Any], drafts: Sequence[str], rewrites: Sequence[str]
) -> list[dict[str, Any]]:
    """The pairs that the judge could rank, as TRL reads them."""
    answers = list(zip(drafts, rewrites, strict=True))
    pairs = []
    for prompt, two, verdict in zip(prompts, answers, judge.score(prompts, answers), strict=True):
        if not isinstance(verdict, tuple):  # no verdict: an empty answer
            continue
        better, worse = two if verdict[0] > verdict[1] else reversed(two)
        pairs.append(
            {
                "prompt": [turn.model_dump() for turn in prompt.messages],
                "chosen": [{"role": "assistant", "content": better}],
                "rejected": [{"role": "assistant", "content": worse}],
            }
        )
    return pairs


@contextmanager
def transformers_writer(job: Mapping[str, Any]) -> Iterator[Write]:
    """transformers' own loop, in batches padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    from prefloop.models.sources import quiet

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=job["dtype"]).eval()
    end = job["end"]

    def batch(prompts: list[list[int]], limit: int) -> list[list[int]]:
        ids = torch.full((len(prompts), max(map(len, prompts))), end)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, -len(prompt) :], mask[row, -len(prompt) :] = torch.tensor(prompt), 1
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=_TEMPERATURE, top_k=0,
            max_new_tokens=limit, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        written = out[:, ids.shape[1] :].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in written]

    def write(prompts: list[list[int]]) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(prompts), _GENERATE_ROWS):
            found += batch(prompts[start : start + _GENERATE_ROWS], job["new_tokens"])
        return found

    batch([[end] * 8], 2)
    yield write


@contextmanager
def vllm_writer(job: Mapping[str, Any]) -> Iterator[Write]:
    """vLLM in a process of its own Python, which has ended, and freed its memory, before the training."""
    path = Path(job["folder"]) / "vllm.json"
    path.write_text(json.dumps(job))
    command = [job["vllm_python"], __file__, "--worker", "vllm", "--job", str(path)]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # In one process it is faster, and its memory can be read.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        asks, answers = server.stdin, server.stdout

        def write(prompts: list[list[int]]) -> list[list[int]]:
            print(json.dumps(prompts), file=asks, flush=True)
            found: list[list[int]] = json.loads(answers.readline())
            return found

        write([[job["end"]] * 8])  # returns when the model is loaded
        yield write
        asks.close()


def serve_vllm(job: Mapping[str, Any]) -> None:
    """vLLM's side, without prefloop: a line of prompts in, a line of answers out."""
    # What vLLM and its libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    model = LLM(
        job["source"], dtype=job["dtype"], max_num_seqs=_VLLM_ROWS, max_model_len=1024,
        enable_prefix_caching=True, generation_config="vllm", seed=0,
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=_TEMPERATURE, max_tokens=job["new_tokens"], stop_token_ids=[job["end"]]
    )
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": ids} for ids in json.loads(line)]
        outputs = model.generate(prompts, sampling, use_tqdm=False)
        print(json.dumps([list(o.outputs[0].token_ids) for o in outputs]), file=answers, flush=True)


WRITERS = {"transformers": transformers_writer, "vllm": vllm_writer}


def _dpo_train(
    model: Any, tokenizer: Any, pairs: list[dict[str, Any]], job: Mapping[str, Any]
) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(Path(job["folder"]) / "trl"),
        learning_rate=_LR,
        per_device_train_batch_size=_MICRO,
        gradient_accumulation_steps=_BATCH // _MICRO,
        num_train_epochs=job["epochs"],
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=_LORA_R, lora_alpha=_LORA_ALPHA, target_modules="all-linear"),
    )
    trainer.train()


# Measuring.


def pipelines(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What sets each pipeline apart, by name."""
    found: dict[str, dict[str, Any]] = {
        f"prefloop {dtype}": {"worker": "prefloop", "dtype": dtype} for dtype in options.dtype
    }
    script = {
        "worker": "script",
        "dtype": options.generate_dtype,
        "train_dtype": options.trl_dtype,
        "vllm_python": options.vllm_python,
    }
    found["transformers + TRL"] = script | {"writer": "transformers"}
    if options.vllm_python:
        found["vLLM + TRL"] = script | {"writer": "vllm"}
    return found


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every pipeline once; the scripts get the prompts that prefloop drew."""
    found: dict[str, dict[str, Any]] = {}
    prompts: list[Any] = []
    for name, own in pipelines(options).items():
        with tempfile.TemporaryDirectory() as folder:
            job = {
                "folder": folder,
                "prompts": options.prompts,
                "prompt_records": prompts,
                "new_tokens": options.new_tokens,
                "epochs": options.epochs,
                "slots": options.slots,
                **own,
            }
            path = Path(folder) / "job.json"
            path.write_text(json.dumps(job))
            command = [sys.executable, __file__, "--worker", own["worker"], "--job", str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                sys.exit(f"the pipeline {name} failed; its error stands above")
            found[name] = json.loads(done.stdout.splitlines()[-1])
            prompts = found[name].pop("prompt_records", prompts)
            print(name, json.dumps(found[name]), file=sys.stderr)
    return found


def summary(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Of turns of all pipelines: medians, each stage's share, and how many times as long the others took.

    A ratio is one of the same turn: median, least and most.
    """
    seconds = {
        name: [{stage: run[name][stage] for stage in STAGES} for run in runs] for name in runs[0]
    }
    for stages in (stages for turns in seconds.values() for stages in turns):
        stages["round"] = sum(stages.values())
    found: dict[str, Any] = {"pipelines": {}, "times": {}}
    for name, turns in seconds.items():
        found["pipelines"][name] = {
            "seconds": {part: median(turn[part] for turn in turns) for part in turns[0]},
            "share": {
                part: median(turn[part] / turn["round"] for turn in turns) for part in STAGES
            },
            **{key: median(run[name][key] for run in runs) for key in _FACTS},
        }
    ours = [name for name in seconds if name.startswith("prefloop")]
    for name, other in product(ours, [name for name in seconds if name not in ours]):
        both = list(zip(seconds[other], seconds[name], strict=True))
        found["times"][f"{other} over {name}"] = {
            part: _range([theirs[part] / own[part] for theirs, own in both])
            for part in ("round", "generate", "train")
        }
    return found


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


WORKERS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "prefloop": run_prefloop,
    "script": run_script,
}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=32, help="of the embedded set")
    parser.add_argument("--new-tokens", type=int, default=64, help="limit of each answer")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the pairs")
    parser.add_argument("--repeats", type=int, default=3, help="turns of all pipelines")
    parser.add_argument("--slots", type=int, default=64, help="rows that prefloop decodes together")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        help="prefloop's; a pipeline each",
    )
    parser.add_argument(
        "--generate-dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of the peers' generation; this was the faster",
    )
    parser.add_argument(
        "--trl-dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of the peers' training; this was the faster",
    )
    parser.add_argument("--vllm-python", help="a Python that has vLLM; without it vLLM is left out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=[*WORKERS, "vllm"], help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    if options.worker:
        job = json.loads(options.job.read_text())
        if options.worker == "vllm":
            serve_vllm(job)
        else:
            print(json.dumps(WORKERS[options.worker](job) | {"memory_gb": _memory_gb()}))
        return
    runs = [measure(options) for _ in range(options.repeats)]
    found = summary(runs)
    if options.json:
        print(json.dumps(found | {"runs": runs}))
        return
    print(f"{'':22}{'s':>8}" + "".join(f"{stage:>10}" for stage in STAGES) + f"{'GB':>6}")
    for name, pipeline in found["pipelines"].items():
        shares = "".join(f"{pipeline['share'][stage]:10.0%}" for stage in STAGES)
        print(f"{name:22}{pipeline['seconds']['round']:8.1f}{shares}{pipeline['memory_gb']:6.1f}")
    for name, times in found["times"].items():
        whole = times["round"]
        print(f"{name}: {whole['median']:.2f} ({whole['least']:.2f} to {whole['most']:.2f})")


if __name__ == "__main__":
    main()
