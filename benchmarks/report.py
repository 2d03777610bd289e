"""The report of a large run: how long it takes to write, how big it is, how soon it is seen, how it scrolls.

    python benchmarks/report.py --pairs 20000 --json

Makes the folder of a run that was never played, with AROP's five texts a prompt, of words drawn at random; writes its
report in a process of its own; and opens that in a headless Chromium, where playwright and one are installed.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prefloop.records import (
    Candidates,
    Message,
    Pair,
    Prompt,
    Reject,
    Response,
    RoundResult,
    write_jsonl,
)
from prefloop.run_folder import RunDir, open_run

ROUNDS = 4
WORDS = 90  # an answer of about 120 tokens
REJECTED = 0.1
RECIPE = "name: large\nmethod: {name: arop}\nmodel: {source: none}\nloop: {rounds: 4}\n"
SCROLL = """async (seconds) => {
  const list = document.getElementById('list'), gaps = [];
  let last = performance.now();
  const end = last + 1000 * seconds, most = list.scrollHeight;
  while (last < end) {
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    gaps.push(now - last);
    last = now;
    list.scrollTop = most * (1 - (end - now) / (1000 * seconds));
  }
  gaps.sort((a, b) => a - b);
  const at = (share) => gaps[Math.min(gaps.length - 1, Math.floor(share * gaps.length))];
  return { frames: gaps.length, ms_median: at(0.5), ms_95: at(0.95), ms_worst: at(1) };
}"""
SEARCH = """() => {
  const field = document.getElementById('search');
  field.value = 'river ';
  const before = performance.now();
  document.dispatchEvent(new Event('runs'));
  return performance.now() - before;
}"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--pairs", type=int, default=20_000)
    options.add_argument("--in-page", type=int, default=1000, help="prefloop report --pairs")
    options.add_argument("--keep", type=Path, help="leave run and page here, in a new folder")
    options.add_argument("--json", action="store_true")
    options.add_argument("--write", nargs=2, metavar=("RUN", "PAGE"), help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.write:
        write(Path(asked.write[0]), Path(asked.write[1]), asked.in_page)
        return
    if asked.keep and asked.keep.exists():
        options.error(f"{asked.keep} is there already; name a new folder with --keep")
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="prefloop-report-"))
    folder.mkdir(parents=True, exist_ok=True)
    make(folder / "run", asked.pairs)
    command = [sys.executable, __file__, "--in-page", str(asked.in_page)]
    page = folder / "report.html"
    done = subprocess.run(
        [*command, "--write", str(folder / "run"), str(page)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = {"pairs": asked.pairs, **json.loads(done.stdout)}
    found["browser"] = browse(page, found["chains"])
    if not asked.keep:
        shutil.rmtree(folder)
    print(json.dumps(found, indent=None if asked.json else 1))


def make(path: Path, pairs: int) -> None:
    """The folder of a run of so many pairs, and a tenth as many rejects."""
    draw = random.Random(0)
    vocabulary = [word_of(draw) for _ in range(4000)]
    vocabulary[0] = "river"
    with open_run(path, RECIPE) as run:
        run.event("begin")
        for number in range(ROUNDS):
            make_round(run, number, pairs // ROUNDS, vocabulary, draw)
        run.event("end")


def word_of(draw: random.Random) -> str:
    return "".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8)))


def make_round(
    run: RunDir, number: int, pairs: int, vocabulary: list[str], draw: random.Random
) -> None:
    round_dir = run.round(number)
    groups, made, rejects = [], [], []
    for n in range(round(pairs * (1 + REJECTED))):
        group = group_of(f"prompt-{n:06d}", vocabulary, draw)
        groups.append(group)
        if n % 11 == 10:
            why = ("cut off", "identical", "flaw too large")[n % 3]
            rejects.append(Reject(prompt_id=group.prompt.id, stage="pair", reason=why))
            continue
        made.append(
            Pair(
                prompt_id=group.prompt.id,
                round=number,
                prompt=group.prompt.messages,
                chosen=group.responses["refined"].text,
                rejected=group.responses["flawed"].text,
                margin=draw.random(),
                origin={"chosen": "refined", "rejected": "flawed"},
            )
        )
    for stage, records in (("candidates", groups), ("ranked", groups), ("pairs", made)):
        write_jsonl(round_dir.path / f"{stage}.jsonl", records)
        round_dir.finish(stage, records=len(records), seconds=10.0)
    write_jsonl(round_dir.path / "rejects.jsonl", rejects)
    write_jsonl(
        round_dir.path / "result.jsonl",
        [RoundResult(round=number, measures={"score": draw.random(), "kl": 0.1 * number})],
    )
    round_dir.finish("result", seconds=1.0)
    round_dir.train.mkdir()
    steps = [
        {"step": n, "loss": 1 / (1 + n), "lr": 1e-4, "tokens": 9000} for n in range(len(made) // 32)
    ]
    (round_dir.train / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    round_dir.finish("train", tokens=9000 * len(steps), seconds=60.0)


def group_of(name: str, vocabulary: list[str], draw: random.Random) -> Candidates:
    """Two drafts that share words, a critique, and a refined answer with one word exchanged."""
    draft = draw.choices(vocabulary, k=WORDS)
    other = [word if draw.random() < 0.5 else draw.choice(vocabulary) for word in draft]
    refined = [word if draw.random() < 0.8 else draw.choice(vocabulary) for word in draft]
    flawed = list(refined)
    flawed[draw.randrange(WORDS)] = draw.choice(vocabulary)
    critique = draw.choices(vocabulary, k=WORDS // 2)
    texts = {
        "draft_a": draft,
        "draft_b": other,
        "refined": refined,
        "critique": critique,
        "flawed": flawed,
    }
    question = " ".join(draw.choices(vocabulary, k=25))
    return Candidates(
        prompt=Prompt(id=name, messages=(Message(role="user", content=f"{question}?"),)),
        responses={
            key: Response(
                text=f"{' '.join(words)}.",
                token_ids=tuple(draw.randrange(49152) for _ in range(120)),
                mean_logprob=-1.2,
            )
            for key, words in texts.items()
        },
    )


def write(run: Path, page: Path, limit: int) -> None:
    """Write the report; print what it took."""
    from prefloop.report.html import write_report

    start = time.perf_counter()
    written = write_report([run], page, limit=limit)
    beside = written.beside.stat().st_size if written.beside else 0
    figures = {
        "chains": written.total,
        "chains_in_page": written.shown,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "page_mb": round(page.stat().st_size / 1e6, 2),
        "beside_mb": round(beside / 1e6, 2),
    }
    print(json.dumps(figures))


def browse(page: Path, chains: int) -> dict[str, Any] | None:
    """First paint, list, scrolling and search in a browser; None where there is none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        return None
    if chromium is None:
        return None
    with sync_playwright() as engine:
        browser = engine.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        tab.goto(f"file://{page.resolve()}")
        # Not by a script in the page: its policy refuses to evaluate one.
        counter = expect(tab.locator("#count"))
        counter.to_contain_text(" of ", timeout=60_000)
        found = {
            "first_paint_ms": tab.evaluate(
                "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            ),
            "list_ready_ms": tab.evaluate("performance.now()"),
            "in_page": {"scroll": tab.evaluate(SCROLL, 5), "search_ms": tab.evaluate(SEARCH)},
        }
        beside = page.with_name("report.pairs.jsonl.gz")
        if beside.exists():
            start = time.perf_counter()
            tab.set_input_files("#open-all", beside)
            counter.to_contain_text(f"of {chains:,}", timeout=120_000)
            found["opened_all_s"] = round(time.perf_counter() - start, 2)
            tab.evaluate("document.getElementById('filters').reset()")
            tab.wait_for_timeout(300)
            found["all"] = {"scroll": tab.evaluate(SCROLL, 5), "search_ms": tab.evaluate(SEARCH)}
        browser.close()
    return found


if __name__ == "__main__":
    main()
