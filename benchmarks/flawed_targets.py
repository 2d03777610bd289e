"""Pairs of a target and its copy with one infilled flaw, for ACS: what AROP teaches, on answers that it never made.

    python benchmarks/flawed_targets.py embedded:smollm2-135m prompts.jsonl flawed.jsonl --limit 200
    prefloop evaluate runs/arop --measures acs.yaml        # measures: [{name: preferences, data: flawed.jsonl}]

The model that plants the flaws is the start model, so that every run is measured on the same pairs.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

from prefloop.data.prompts import DataOptions, read_prompts
from prefloop.generate.hf_engine import open_engine
from prefloop.generate.infill import infill_flaws
from prefloop.records import Request, Response, Sampling


def flawed_targets(model: str, source: str, *, limit: int, seed: int) -> list[dict[str, str]]:
    """Rows of prompt, chosen (the target) and rejected; prompts with no word to flaw are left out."""
    prompts = [p for p in read_prompts(source, DataOptions(), part="eval") if p.target]
    prompts = list(islice(prompts, limit))
    targets = [Response(text=prompt.target or "") for prompt in prompts]
    requests = [Request(messages=prompt.messages) for prompt in prompts]
    flaws = infill_flaws(open_engine(model), requests, targets, Sampling(), seed=seed)
    return [
        {"prompt": prompt.text, "chosen": target.text, "rejected": flaw.text}
        for prompt, target, flaw in zip(prompts, targets, flaws, strict=True)
        if flaw is not None
    ]


def main() -> None:
    """Write the pairs, and say how many there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = flawed_targets(options.model, options.prompts, limit=options.limit, seed=options.seed)
    options.out.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    print(f"{len(rows)} of {options.limit} targets flawed, in {options.out}")


if __name__ == "__main__":
    main()
