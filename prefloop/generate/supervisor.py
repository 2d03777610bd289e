"""Keeps a program on a leash: neither it nor anything that it started outlives whoever holds the other end.

    python -m prefloop.generate.supervisor COMMAND ...

The program runs in a process group of its own. When standard input closes, which also happens when the
holder is killed, or on SIGTERM, it is told to end; after a while, and whenever it ends by itself, all that
is left of its group is killed. Prints the group's number, and nothing else: all that the program says goes
to standard error. Exits as the program did.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE = 15.0
"""Seconds between the order to end and the end."""


def main(command: list[str]) -> int:
    """Run the command to its end; its exit code, negative where a signal ended it."""
    program = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
    )
    print(program.pid, flush=True)  # noqa: T201

    def end(*_: object) -> None:
        program.terminate()
        killer = threading.Timer(GRACE, kill, [program.pid])
        killer.daemon = True
        killer.start()

    def wait_for_holder() -> None:
        os.read(0, 1)
        end()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=wait_for_holder, daemon=True).start()
    code = program.wait()
    kill(program.pid)
    return code


def kill(group: int) -> None:
    """SIGKILL to all that is left of a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code if code >= 0 else 128 - code)
