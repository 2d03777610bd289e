"""A run's method applied to held-out prompts by any policy: IAL's R_i, identical rate and other measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from prefloop.errors import DataError
from prefloop.evaluate.cache import cached_records, digest, held_out_prompts
from prefloop.evaluate.measures import Better, Item, Measure, Outcome, Subject, Suite
from prefloop.evaluate.stats import Estimate, bootstrap_mean, wilson
from prefloop.generate.templates import PromptSet
from prefloop.methods import Actors, Method
from prefloop.recipe import load_recipe
from prefloop.records import Candidates, Prompt, derive_seed
from prefloop.run_folder import read_run


class Introspection(Measure):
    """The measures of the run's own method on held-out prompts, as in the loop: for IAL, R_i and the identical rate.

    IAL appendix C, Table 6, and appendix B.4.
    """

    suites: ClassVar[tuple[Suite, ...]] = ("quick",)
    better: ClassVar[Mapping[str, Better]] = {"identical_rate": "lower"}
    asks_judge: ClassVar[bool] = True

    of: str | None = None
    """Folder of the run whose method is played; null: the subject's own run."""
    held_out: str | None = None
    """Source of the prompts; null: those of --data, else the run's held-out prompts."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first `limit` prompts; null: all."""
    chunk: int = Field(default=32, ge=1)
    """Prompts played per cache file; a killed evaluation repeats at most one file."""

    def check(self) -> None:
        """DataError where there are no prompts."""
        held_out_prompts(self.held_out, self.limit)

    def lacks(self, subject: Subject) -> str | None:
        """A missing run, or a missing judge where the method needs one."""
        if self.of is None:
            return f"{subject.name} is no run's policy: name a run whose method is played in the option of"
        if self._method().needs_judge and subject.judge is None:
            return "the method needs a judge: name one with --judge"
        return super().lacks(subject)

    def run(self, subject: Subject) -> Outcome:
        """Generate and rank candidates, and compute the method's measures for each prompt and overall."""
        method = self._method()
        prompts = held_out_prompts(self.held_out, self.limit)
        if method.needs_target and not all(prompt.target for prompt in prompts):
            raise DataError(
                "introspection: the method compares with responses, and some prompts have none; name prompts "
                "that have"
            )
        prompt_set = PromptSet(method.prompt_set)

        def work(part: Sequence[Prompt], number: int) -> list[Candidates]:
            seed = derive_seed(subject.seed, "introspection", number)
            actors = Actors(subject.engine, subject.judge, prompt_set, 0, seed)
            groups = [g for g in method.generate(part, actors) if isinstance(g, Candidates)]
            return [g for g in method.rank(groups, actors) if isinstance(g, Candidates)]

        key = digest(prompts, method.model_dump_json(), self.chunk, subject.seed)
        groups = cached_records(subject.folder / key, prompts, Candidates, work, chunk=self.chunk)
        items = [
            Item(id=group.prompt.id, values=_values(method, [group]), texts=_texts(group))
            for group in groups
        ]
        values = _values(method, groups)
        estimates = {
            name: estimate
            for name, value in values.items()
            if (estimate := _estimate(name, value, items, subject.seed)) is not None
        }
        return Outcome(
            estimates=estimates,
            items=tuple(items),
            facts={
                "method": type(method).__name__,
                "prompts": len(prompts),
                "played": len(groups),
                "without_interval": sorted(values.keys() - estimates.keys()),
            },
        )

    def _method(self) -> Method:
        assert self.of is not None
        return load_recipe(str(read_run(Path(self.of)).path / "recipe.yaml")).method


def _values(method: Method, groups: Sequence[Candidates]) -> dict[str, float]:
    measures = method.measures(groups)
    return {name: value for name, value in measures.items() if value is not None}


def _texts(group: Candidates) -> dict[str, str]:
    return {name: response.text for name, response in group.responses.items()}


def _estimate(name: str, value: float, items: Sequence[Item], seed: int) -> Estimate | None:
    """The value with its interval; None where it is no mean over prompts, so that no interval is known."""
    per_prompt = [item.values[name] for item in items if name in item.values]
    if not per_prompt or not isclose(sum(per_prompt) / len(per_prompt), value, abs_tol=1e-9):
        return None
    if set(per_prompt) <= {0.0, 1.0}:
        return wilson(int(sum(per_prompt)), len(per_prompt))
    return bootstrap_mean(per_prompt, seed=seed)
