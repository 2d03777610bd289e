"""The leaderboard's ten local files, small, with made-up questions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lm_eval

WORDS = (
    "the old grey owl sees two small birds near a cold river and sings about them at night".split()
)


def subjects() -> list[str]:
    """MMLU's 57, by the harness's own files."""
    folder = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    return sorted(path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml"))


def write(folder: Path, seed: int = 0) -> Path:
    """All ten files; the same seed writes the same."""
    draw = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    def choice(**more: Any) -> dict[str, Any]:
        choices = [text(1, 5) for _ in range(4)]
        return {"question": text(4, 9) + "?", "choices": choices, "gold": draw.randrange(4), **more}

    def ending(whole: bool) -> dict[str, Any]:
        ctx_a, ctx_b = text(5, 9) + ".", text(1, 3)
        split = {} if whole else {"ctx_a": ctx_a, "ctx_b": ctx_b}
        endings = [text(2, 6) + " [step] ." for _ in range(4)]
        return {"activity": text(1, 2), "ctx": f"{ctx_a} {ctx_b}", "endings": endings,
                "gold": draw.randrange(4), **split}  # fmt: skip

    def blank() -> dict[str, Any]:
        return {"sentence": f"{text(3, 5)} _ {text(2, 6)}.", "option1": text(1, 1),
                "option2": text(1, 2), "answer": draw.choice("12")}  # fmt: skip

    def truth() -> dict[str, Any]:
        answers = {f"{text(2, 6)} {n}": int(n < 2) for n in range(5)}
        return {"question": text(3, 7) + "?", "mc1": answers, "mc2": answers}

    def sum_up(number: int) -> dict[str, Any]:
        return {"question": text(5, 9) + "?", "answer": f"{text(2, 5)}\n#### {number}"}

    files = {
        "arc_challenge_trainval": [choice() for _ in range(30)],
        "arc_challenge_test": [choice() for _ in range(4)],
        "hellaswag_val": [ending(n % 2 == 0) for n in range(26)],
        "mmlu_dev": [choice(subject=s) for s in subjects() for _ in range(5)],
        "mmlu_test": [choice(subject=s) for s in subjects() for _ in range(2)],
        "truthfulqa_mc": [truth() for _ in range(3)],
        "winogrande_train": [blank() for _ in range(9)],
        "winogrande_val": [blank() for _ in range(7)],
        "gsm8k_train": [sum_up(n) for n in range(8)],
        "gsm8k_test": [sum_up(n) for n in range(2)],
    }
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        lines = [json.dumps({"id": f"{name}-{n}", **row}) for n, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
