"""This process, on the model that is being trained: the default."""

from __future__ import annotations

from prefloop.generate.engine import EngineContext, EngineOptions


class InProcess(EngineOptions):
    """Generation in this process, on the model that is being trained; nothing is copied or converted."""

    def open(self, setting: EngineContext) -> None:
        """There is nothing to open."""
