"""Answers without a model, to see a recipe's loop turn in seconds; for tests and measurements."""

from __future__ import annotations

from prefloop.generate.engines import EngineOptions, Probe, Setting, Weights
from prefloop.generate.engines._fake_engine import FakeEngine


class Fake(EngineOptions):
    """Babble made from the prompt and the seed: for trying out a loop, not for learning anything."""

    def open(self, setting: Setting) -> _OpenFake:
        """Needs nothing."""
        return _OpenFake()


class _OpenFake(FakeEngine):
    def serve(self, weights: Weights, probe: Probe) -> None:
        """Its answers are nobody's."""

    def rest(self) -> None:
        """It has nothing to give back."""

    def close(self) -> None:
        """It has started nothing."""
