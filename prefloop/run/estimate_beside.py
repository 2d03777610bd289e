"""A finished run's estimate beside what it took: how right `prefloop check --estimate` was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prefloop.errors import RunFolderError
from prefloop.recipe import Recipe, dtype_of_run, load_recipe
from prefloop.run.cost import Spent, spent
from prefloop.run.estimate import Rates, Shape, Work, estimate
from prefloop.run_folder import read_run


def measured_work(spent: Spent, expected: Work, reference: int) -> Work:
    """The tokens that a finished run spent; those of measuring are not in its manifests and stay estimated."""
    return Work(
        spent.generated_tokens,
        spent.read_tokens,
        spent.trained_tokens,
        reference,
        expected.measured_generated,
        expected.measured_read,
    )


def beside(folder: Path, rates: Callable[[Recipe], Callable[[Shape], Rates]]) -> list[str]:
    """A finished run's own recipe estimated, beside what its manifests say. Raises RunFolderError."""
    run = read_run(folder)
    if run.published.read() is None:
        raise RunFolderError(
            f"{folder} has not ended, and a part is no measure of the whole; {run.to_finish()}"
        )
    recipe = load_recipe(str(folder / "recipe.yaml"))
    # As it was played, which may be otherwise than this machine would.
    model = recipe.model.model_copy(update={"dtype": dtype_of_run(recipe, run) or "auto"})
    recipe = recipe.model_copy(update={"model": model})
    found, trained = spent(run, recipe), [r.manifest("train") or {} for r in run.rounds()]
    at = rates(recipe)
    guess = estimate(recipe, at)
    reference = sum(int(manifest.get("reference_tokens", 0)) for manifest in trained)
    known = estimate(recipe, at, measured_work(found, guess.work, reference))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    rows = [
        ("tokens drawn", guess.work.generated, known.work.generated, found.generated_tokens),
        ("tokens read", guess.work.read, known.work.read, found.read_tokens),
        ("tokens trained", guess.work.trained, known.work.trained, found.trained_tokens),
        ("FLOPs", guess.flops, known.flops, found.flops),
        *(
            (f"seconds, {name}", guess.seconds[name], known.seconds[name], found.seconds_by_stage.get(name, 0.0))
            for name in ("generate", "train", "evaluate")
        ),
        ("peak MB", max(guess.memory_mb.values()), max(known.memory_mb.values()), found.peak_memory_mb),
        ("disk MB", guess.disk_mb, known.disk_mb, size),
    ]  # fmt: skip
    lines = [f"{'':18}{'estimated':>12}{'tokens known':>14}{'measured':>12}"]
    return lines + [f"{name:18}{a:>12.4g}{b:>14.4g}{c:>12.4g}" for name, a, b, c in rows]
