"""Claim: a round of IAL is several times faster than the usual script pipeline.

One round, generation of all three phases and training, by prefloop and by a script as one would write
it: transformers `generate` in batches for draft, advice and rewrite, the better answer by the same
judge, TRL's DPOTrainer on the pairs. Equal prompts, token limits, LoRA, batches and epochs; float32; each
in a process of its own. prefloop's loss has three answers to an example, DPO's two. Loading the
model is not counted, and of prefloop's run what evaluation takes is not.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_SOURCE = "embedded:smollm2-135m"
_LR, _BATCH, _MICRO, _LORA_R, _LORA_ALPHA = 1e-4, 8, 4, 16, 32
_GENERATE_ROWS = 16


def _memory_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_prefloop(job: Mapping[str, Any]) -> dict[str, Any]:
    """The run as a user would start it, read from the manifests of its stages."""
    from rich.console import Console

    from prefloop.recipe import load_recipe
    from prefloop.run.loop import run

    recipe = Path(job["folder"]) / "round.yaml"
    limit = {"temperature": 0.7, "max_new_tokens": job["new_tokens"]}
    values = {
        "model": {"source": _SOURCE, "dtype": "float32"},
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
    stages = {}
    for path in (folder / "rounds" / "0000").glob("*.done.json"):
        facts = json.loads(path.read_text())
        stages[facts["stage"]] = float(facts["seconds"])
    rows = [
        json.loads(line)
        for line in (folder / "rounds" / "0000" / "candidates.jsonl").read_text().splitlines()
    ]
    tokens = sum(len(r["token_ids"]) for row in rows for r in row["responses"].values())
    return {
        "prompt_records": [row["prompt"] for row in rows],
        "generate_seconds": stages["candidates"],
        "generated_tokens": tokens,
        "train_seconds": stages["train"],
        "seconds": sum(stages[name] for name in ("candidates", "ranked", "pairs", "train")),
        "pairs": len((folder / "rounds" / "0000" / "pairs.jsonl").read_text().splitlines()),
        "memory_gb": _memory_gb(),
    }


def run_script(job: Mapping[str, Any]) -> dict[str, Any]:
    """The usual way, in one function: generate, rank, DPOTrainer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prefloop.generate.templates import PromptSet
    from prefloop.judges.similarity import Similarity
    from prefloop.machine import keep_freed_memory
    from prefloop.models.sources import quiet, resolve_source
    from prefloop.records import Message, Prompt

    keep_freed_memory()
    torch.manual_seed(0)
    with quiet():
        source = resolve_source(_SOURCE)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    render = PromptSet("compact").render
    tokens = 0

    def answers(conversations: list[tuple[Message, ...]]) -> list[str]:
        nonlocal tokens
        texts = [
            tokenizer.apply_chat_template(
                [m.model_dump() for m in turns], tokenize=False, add_generation_prompt=True
            )
            for turns in conversations
        ]
        found: list[str] = []
        for start in range(0, len(texts), _GENERATE_ROWS):
            batch = tokenizer(
                texts[start : start + _GENERATE_ROWS],
                padding=True,
                add_special_tokens=False,
                return_tensors="pt",
            )
            out = model.generate(
                **batch, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=job["new_tokens"]
            )
            new = out[:, batch["input_ids"].shape[1] :]
            tokens += int((new != tokenizer.pad_token_id).sum())
            found += tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in found]

    prompts = [Prompt.model_validate(p) for p in job["prompt_records"]]
    start = time.perf_counter()
    drafts = answers([p.messages for p in prompts])
    advice = answers(
        [render("advisor", question=p.text, answer=d) for p, d in zip(prompts, drafts, strict=True)]
    )
    rewrites = answers(
        [
            render("rewrite", question=p.text, answer=d, suggestion=a)
            for p, d, a in zip(prompts, drafts, advice, strict=True)
        ]
    )
    judge = Similarity().open(None, PromptSet("compact"))
    verdicts: Any = judge.score(prompts, list(zip(drafts, rewrites, strict=True)))
    rows = []
    for prompt, draft, rewrite, (first, second) in zip(
        prompts, drafts, rewrites, verdicts, strict=True
    ):
        better, worse = (draft, rewrite) if first > second else (rewrite, draft)
        rows.append(
            {
                "prompt": [m.model_dump() for m in prompt.messages],
                "chosen": [{"role": "assistant", "content": better}],
                "rejected": [{"role": "assistant", "content": worse}],
            }
        )
    generated = time.perf_counter()
    _dpo_train(model, tokenizer, rows, job)
    end = time.perf_counter()
    return {
        "generate_seconds": generated - start,
        "generated_tokens": tokens,
        "train_seconds": end - generated,
        "seconds": end - start,
        "pairs": len(rows),
        "memory_gb": _memory_gb(),
    }


def _dpo_train(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], job: Mapping[str, Any]
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
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=_LORA_R, lora_alpha=_LORA_ALPHA, target_modules="all-linear"),
    )
    trainer.train()


WORKERS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "prefloop": run_prefloop,
    "script": run_script,
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """prefloop first, then the script on the prompts that prefloop drew."""
    found: dict[str, Any] = {}
    prompts: list[Any] = []
    for name in WORKERS:
        with tempfile.TemporaryDirectory() as folder:
            job = {
                "folder": folder,
                "prompts": options.prompts,
                "prompt_records": prompts,
                "new_tokens": options.new_tokens,
                "epochs": options.epochs,
                "slots": options.slots,
            }
            path = Path(folder) / "job.json"
            path.write_text(json.dumps(job))
            command = [sys.executable, __file__, "--worker", name, "--job", str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                sys.exit(f"the {name} pipeline failed; its error stands above")
            found[name] = json.loads(done.stdout.splitlines()[-1])
            prompts = found[name].pop("prompt_records", prompts)
    for key in ("generate_seconds", "train_seconds", "seconds"):
        found[f"times_{key.removesuffix('_seconds')}"] = (
            found["script"][key] / found["prefloop"][key]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=32, help="of the embedded set")
    parser.add_argument("--new-tokens", type=int, default=64, help="limit of each answer")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the pairs")
    parser.add_argument("--slots", type=int, default=64, help="rows that prefloop decodes together")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](json.loads(options.job.read_text()))))
        return
    found = measure(options)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:16}{json.dumps(value)}")


if __name__ == "__main__":
    main()
