"""Two sides' answers in files, and a server in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefloop.annotate.items import AnnotationPlan, Comparison, read_comparison
from prefloop.annotate.server import AnnotationServer
from prefloop.annotate.service import AnnotationService
from prefloop.annotate.votes import VoteFile

Answers = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with six prompts answered in a.jsonl and b.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_answers(6)
    return tmp_path


def write_answers(count: int, odd: dict[int, tuple[str, str]] | None = None) -> None:
    """Files a.jsonl and b.jsonl; `odd` says what stands in some rows instead."""
    for place, name in enumerate("ab"):
        rows = [
            {"prompt": f"question {n}", "answer": (odd or {}).get(n, (f"a{n}", f"b{n}"))[place]}
            for n in range(count)
        ]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def comparison(folder: Path) -> Comparison:
    return read_comparison("a.jsonl", "b.jsonl")


@pytest.fixture
def service(comparison: Comparison, folder: Path) -> Iterator[AnnotationService]:
    plan = AnnotationPlan()
    service = AnnotationService(
        comparison, plan, VoteFile(folder / "votes.jsonl", comparison, plan)
    )
    yield service
    service.close()


@pytest.fixture
def server(service: AnnotationService) -> Iterator[AnnotationServer]:
    """A server in this process, on a free port."""
    with AnnotationServer(service) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Command:
    """`prefloop annotate a.jsonl b.jsonl` in a process of its own."""

    def __init__(self, *options: str) -> None:
        words = ["annotate", "a.jsonl", "b.jsonl", "--port", "0", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prefloop", *words],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert self.process.stdout is not None
        self.first = []
        for line in self.process.stdout:
            self.first.append(line)
            if line.startswith("open "):
                self.link = line.split()[1]
                return
        raise AssertionError("".join(self.first))

    def end(self, sent: signal.Signals) -> tuple[int, str]:
        """Exit code, and what was printed after the link."""
        self.process.send_signal(sent)
        out, _ = self.process.communicate(timeout=30)
        return self.process.returncode, out


@pytest.fixture
def command(folder: Path) -> Iterator[Callable[..., Command]]:
    """Starts commands, and ends those that are left."""
    started: list[Command] = []

    def start(*options: str) -> Command:
        started.append(Command(*options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()
