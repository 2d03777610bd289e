"""Claim: a run that is killed anywhere and started again ends in the same bytes as an unbroken one.

Plays IAL and AROP unbroken, then once more while SIGKILL hits the whole process group again and again:
every stage of the loop in turn, at a seeded random moment within it. All records, measures, training
metrics and weights must be equal at the end, byte by byte, and no file may be left over.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

STAGES = ("candidates", "ranked", "pairs", "train", "policy", "answers", "introspection")
_POLL = 0.001
_TOKENS = 12
_SAMPLING = {"temperature": 0.7, "max_new_tokens": _TOKENS}
# Random weights write nothing that would pass a gate.
_OPEN = {
    "cut_off": False,
    "identical": False,
    "meta_talk": False,
    "max_edit_share": None,
    "max_length_ratio": None,
}
_METHODS: dict[str, dict[str, Any]] = {
    "ial": {
        "method": {"name": "ial", "sampling": _SAMPLING, "advice": _SAMPLING, "gates": _OPEN},
        "judge": {"name": "similarity"},
    },
    "arop": {"method": {"name": "arop", "sampling": _SAMPLING, "gates": _OPEN}},
}


class Place(NamedTuple):
    """Where on a run's way a kill is meant to hit."""

    round: int
    stage: str

    @property
    def time(self) -> tuple[int, int]:
        return self.round, STAGES.index(self.stage)


class Run(NamedTuple):
    """One recipe played into one folder."""

    recipe: str
    overrides: tuple[str, ...]
    folder: Path

    def command(self) -> list[str]:
        sets = [part for override in self.overrides for part in ("--set", override)]
        words = ["-m", "prefloop", "run", self.recipe, *sets, "--out", str(self.folder)]
        return [sys.executable, *words]

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """A process group of its own, of which nothing is alive at the end."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def finish(self) -> None:
        with self.started() as process:
            if process.wait():
                tail = self.log.read_text(errors="replace")[-2000:]
                raise SystemExit(f"{' '.join(self.command())} failed:\n{tail}")

    def rounds(self) -> Iterator[tuple[int, Path]]:
        yield -1, self.folder / "rounds" / "start"
        for path in sorted((self.folder / "rounds").glob("[0-9]*")):
            yield int(path.name), path

    def begun(self) -> int:
        """How often the loop was entered; a process spends seconds on imports before it does."""
        path = self.folder / "events.jsonl"
        return path.read_bytes().count(b'"event": "begin"') if path.exists() else 0

    def half_saved(self) -> set[Path]:
        """Policies that are being written, or were when a process was killed."""
        return set((self.folder / "rounds").glob("*/.policy*"))

    def place(self, stale: set[Path]) -> Place | None:
        """The stage in progress; `stale` are half-saved policies of earlier processes."""
        fresh = self.half_saved() - stale
        for number, path in self.rounds():
            for stage in STAGES:
                noted = (path / f"{stage}.progress.json").exists()
                if noted and not (path / f"{stage}.done.json").exists():
                    return Place(number, stage)
            training = (path / "pairs.done.json").exists()
            if training and not (path / "train.done.json").exists():
                saving = any(part.parent == path for part in fresh)
                return Place(number, "policy" if saving else "train")
        return None


def places(rounds: int) -> list[Place]:
    """Every stage of every round; the start is measured, not trained."""
    found = [Place(-1, stage) for stage in ("answers", "introspection")]
    return found + [Place(number, stage) for number in range(rounds) for stage in STAGES]


def plan(
    names: Sequence[str], kills: int, rounds: int, draw: random.Random
) -> dict[str, list[Place]]:
    """Where to kill each run, in the order of time: all stages once before any stage twice."""
    chosen: dict[str, list[Place]] = {name: [] for name in names}
    for number in range(kills):
        stage = STAGES[number % len(STAGES)]
        at_stage = [place for place in places(rounds) if place.stage == stage]
        name = names[number % len(names)]
        unused = [place for place in at_stage if place not in chosen[name]]
        chosen[name].append(draw.choice(unused or at_stage))
    return {name: sorted(found, key=lambda place: place.time) for name, found in chosen.items()}


def kill_within(run: Run, target: Place, seconds: float, draw: random.Random) -> str | None:
    """Start the run and kill it in the target stage; what it was really in, None if it had finished."""
    stale, begun, delay = run.half_saved(), run.begun(), draw.uniform(0, seconds)
    since, entered = None, False
    with run.started() as process:
        while process.poll() is None:
            entered = entered or run.begun() > begun
            place = run.place(stale) if entered else None
            if place is not None and place.time >= target.time:
                since = since or time.perf_counter()
                # A stage that was quicker than its delay must not get away.
                if place != target or time.perf_counter() - since >= delay:
                    break
            time.sleep(_POLL if entered else 20 * _POLL)
    if process.returncode == -signal.SIGKILL:
        place = run.place(stale)
        return place.stage if place else "between stages"
    return None


def durations(folder: Path) -> dict[Place, float]:
    """Seconds of each stage of the unbroken run; saving a policy is too short to be listed."""
    found = {}
    for path in folder.glob("rounds/*/*.done.json"):
        number = -1 if path.parent.name == "start" else int(path.parent.name)
        facts = json.loads(path.read_text())
        found[Place(number, facts["stage"])] = float(facts["seconds"])
    return found


def different(first: Path, second: Path) -> list[str]:
    """Files that only one of two runs has, and records, metrics and weights that are not equal."""
    mine, others = (
        {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
        for run in (first, second)
    )
    found = mine ^ others
    for path in mine & others:
        compared = path.suffix in (".jsonl", ".safetensors") and path.name != "events.jsonl"
        if compared and (first / path).read_bytes() != (second / path).read_bytes():
            found.add(path)
    return sorted(map(str, found))


def tiny_model(folder: Path) -> None:
    """A two-layer Llama with random weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipes(folder: Path, model: str) -> dict[str, str]:
    """Recipes of both methods with small chunks and frequent checkpoints, so that much can be hit."""
    written = {}
    for name, sections in _METHODS.items():
        values = {
            "model": {"source": model, "device": "cpu"},
            "generate": {"chunk_size": 2},
            "loop": {"rounds": 2, "prompts_per_round": 12},
            "train": {
                "epochs": 2,
                "lr": 1e-4,
                "batch_size": 2,
                "micro_batch_size": 1,
                "save_every": 1,
            },
            "evaluate": {"prompts": 8},
            "guard": {"min_stop_rate": 0.0},
            **sections,
        }
        path = folder / f"{name}.yaml"
        # JSON is YAML.
        path.write_text(json.dumps(values))
        written[name] = str(path)
    return written


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs; the numbers that the script prints."""
    source = {"tiny": str(folder / "model"), "embedded": "embedded:smollm2-135m"}.get(
        options.model, options.model
    )
    if options.model == "tiny":
        tiny_model(folder / "model")
    if options.recipe:
        known, overrides = {Path(options.recipe).stem: options.recipe}, (f"model.source={source}",)
    else:
        known, overrides = recipes(folder, source), ()
    draw = random.Random(options.seed)
    unbroken = {name: Run(at, overrides, folder / f"{name}-unbroken") for name, at in known.items()}
    for run in unbroken.values():
        run.finish()
    rounds = min(sum(number >= 0 for number, _ in run.rounds()) for run in unbroken.values())
    stages: Counter[str] = Counter()
    runs = {}
    for name, targets in plan(list(known), options.kills, rounds, draw).items():
        seconds = durations(unbroken[name].folder)
        killed = unbroken[name]._replace(folder=folder / f"{name}-killed")
        hits = [kill_within(killed, target, seconds.get(target, 0.0), draw) for target in targets]
        killed.finish()
        stages.update(hit for hit in hits if hit)
        files = sum(path.is_file() for path in unbroken[name].folder.rglob("*"))
        wrong = different(unbroken[name].folder, killed.folder)
        runs[name] = {"kills": sum(map(bool, hits)), "files": files, "different": wrong}
    return {
        "kills": stages.total(),
        "identical": not any(run["different"] for run in runs.values()),
        "stages": dict(stages),
        "runs": runs,
        "model": options.model,
        "seed": options.seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=14, help="kills over all runs together")
    parser.add_argument("--model", default="tiny", help="tiny, embedded, or a model's folder")
    parser.add_argument("--recipe", help="a recipe of yours instead of the two built in")
    parser.add_argument("--seed", type=int, default=0, help="of places and moments of the kills")
    parser.add_argument(
        "--keep", type=Path, help="a new folder for the runs, not removed at the end"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.keep:
            options.keep.mkdir(parents=True)
        found = measure(options, options.keep or Path(folder))
    if options.json:
        print(json.dumps(found))
    else:
        for stage, count in found["stages"].items():
            print(f"{stage:16}{count:3} kills")
        for name, run in found["runs"].items():
            print(f"{name:16}{run['files']:3} files, {len(run['different'])} different")
    sys.exit(0 if found["identical"] else 1)


if __name__ == "__main__":
    main()
