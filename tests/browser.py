"""The one Chromium that all tests of a page share: how it is found, and how it starts without a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OFFLINE = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
_REASON = "no browser: install playwright (make setup) and Chromium, on the PATH or named by PREFLOOP_CHROMIUM"


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser, as playwright gives it; the test is skipped where there is none."""
    path = os.environ.get("PREFLOOP_CHROMIUM") or next(
        filter(None, map(shutil.which, _NAMES)), None
    )
    if path is None or find_spec("playwright") is None:
        pytest.skip(_REASON)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=path, args=list(_OFFLINE))
        yield browser
        browser.close()


def expect(place: Any) -> Any:
    """Playwright's `expect`, imported only where there is a browser."""
    from playwright.sync_api import expect

    return expect(place)
