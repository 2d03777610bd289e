"""A live bar with tokens per second and time left; silent when nobody watches."""

from __future__ import annotations

import time
from types import TracebackType
from typing import ClassVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """Progress of one job. Shows nothing when standard error is no terminal, or inside another bar."""

    _shown: ClassVar[int] = 0

    def __init__(self, label: str, total: int | None, unit: str = "tok") -> None:
        """`total` counts items (answers, steps), if known; `unit` names what `advance` is told besides."""
        console = Console(stderr=True)
        self._unit = unit
        self._amount = 0
        self._start = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}{task.fields[of]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        of = "" if total is None else f"/{total}"
        self._task = self._progress.add_task(label, total=total, speed="", of=of)

    def advance(self, items: int = 0, amount: int = 0) -> None:
        """`items` more are done, at the cost of `amount` units."""
        self._amount += amount
        speed = self._amount / max(time.perf_counter() - self._start, 1e-9)
        self._progress.update(
            self._task, advance=items, speed=f"{speed:,.0f} {self._unit}/s" if self._amount else ""
        )

    def at(self, items: int) -> None:
        """So many items are done in all, by whoever does them."""
        self._progress.update(self._task, completed=items)

    def __enter__(self) -> Bar:
        if not Bar._shown:
            self._progress.start()
        Bar._shown += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        Bar._shown -= 1
        if not Bar._shown:
            self._progress.stop()
