"""Runs a program such that neither it nor its child processes outlive the process that started the supervisor.

    python -m prefloop.generate.supervisor COMMAND ...

The program runs in its own process group. When standard input closes (also because the parent was killed), or
on SIGTERM, the program gets SIGTERM; after a grace period, and whenever it ends by itself, the rest of its group
is killed. Prints only the group's id; the program's output goes to standard error. Exits with the program's
code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE = 15.0
"""Seconds between SIGTERM and SIGKILL."""


def main(command: list[str]) -> int:
    """Run the command to its end; returns its exit code, negative where a signal ended it."""
    program = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
    )
    print(program.pid, flush=True)  # noqa: T201

    def end(*_: object) -> None:
        program.terminate()
        killer = threading.Timer(GRACE, kill, [program.pid])
        killer.daemon = True
        killer.start()

    def wait_for_parent() -> None:
        os.read(0, 1)
        end()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=wait_for_parent, daemon=True).start()
    code = program.wait()
    kill(program.pid)
    return code


def kill(group: int) -> None:
    """Send SIGKILL to a process group, if it still exists."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code if code >= 0 else 128 - code)
