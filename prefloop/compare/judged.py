"""The held-out answers of finished cells, scored by further judges that took no part in the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefloop.evaluate.answers import ANSWER, answer_measures, prompt_values
from prefloop.evaluate.cache import cached_records, digest
from prefloop.generate.templates import PromptSet
from prefloop.judges import Judge, OpenJudge, score_responses
from prefloop.models.sources import quiet
from prefloop.records import Candidates

COLUMNS = ("score", "win_rate", "win_rate_low", "win_rate_high")
"""Measures of a further judge NAME, each with "_by_NAME" after it."""
_CHUNK = 64


class FurtherJudges:
    """A comparison's further judges, opened when first needed; verdicts are kept in its folder."""

    def __init__(self, judges: Mapping[str, Judge], folder: Path) -> None:
        self._judges = judges
        self._folder = folder
        self._open: dict[str, OpenJudge] = {}

    def measures(
        self, answers: Sequence[Candidates], start: Sequence[Candidates], *, seed: int
    ) -> tuple[dict[str, float | None], dict[str, dict[str, float]]]:
        """Measures such as "win_rate_by_NAME", and each prompt's value of those that are means over prompts.

        `start` holds the initial policy's answers to the same prompts. Raises JudgeError.
        """
        means: dict[str, float | None] = {}
        by_prompt: dict[str, dict[str, float]] = {}
        for name in self._judges:
            judged, before = self._judged(name, answers), self._judged(name, start)
            found = answer_measures(judged, before, seed=seed)
            means |= {f"{m}_by_{name}": found[m] for m in COLUMNS if m in found}
            values = prompt_values(judged, before)
            by_prompt |= {f"{m}_by_{name}": values[m] for m in COLUMNS if m in values}
        return means, by_prompt

    def _judged(self, name: str, groups: Sequence[Candidates]) -> list[Candidates]:
        """The groups with this judge's score in place of their own; without one where it has no verdict."""

        def work(part: Sequence[Candidates], number: int) -> list[Candidates]:
            if name not in self._open:
                with quiet():
                    self._open[name] = self._judges[name].open(None, PromptSet("compact"))
            verdicts = score_responses(
                self._open[name],
                [group.prompt for group in part],
                [[group.responses[ANSWER]] for group in part],
            )
            return [
                group.model_copy(update={"scores": {ANSWER: v[0]} if isinstance(v, tuple) else {}})
                for group, v in zip(part, verdicts, strict=True)
            ]

        texts = [(g.prompt.messages, g.prompt.target, g.responses[ANSWER].text) for g in groups]
        folder = self._folder / "judged" / digest(name, self._judges[name], texts)
        return cached_records(folder, groups, Candidates, work, chunk=_CHUNK)
