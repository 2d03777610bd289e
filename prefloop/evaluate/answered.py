"""What a model has answered so far, on disk: a killed evaluation goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefloop.errors import RunFolderError


class Answered:
    """Answers by a hash of what was asked, one JSON line each; whoever opens it sees to it that the model is the same."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        whole, _, torn = text.rpartition("\n")
        if torn:  # the process was killed while it wrote
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                key, answer = json.loads(line)
            except ValueError as error:
                raise RunFolderError(
                    f"{path}:{number} is damaged; delete {path} to ask everything again"
                ) from error
            self._known[key] = answer

    @staticmethod
    def key(*asked: Any) -> str:
        """Of a question made of JSON values."""
        return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep answers by key; they are on disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in answers.items())
        self._known |= answers
