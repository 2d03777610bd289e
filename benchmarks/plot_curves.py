"""A training measure by step, from a comparison's cells: each seed thin, their mean thick.

    python benchmarks/plot_curves.py runs/claims-gamma --variants spac gamma-5 --out curves.png
    python benchmarks/plot_curves.py runs/claims-gamma --measure penalty --json

Steps are counted over all rounds. Needs matplotlib (extra `plots`), but for --json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

from prefloop.run_folder import RunDir, read_metrics

Curves = dict[str, dict[str, list[float]]]


def curves(folder: Path, measure: str, variants: list[str] | None) -> Curves:
    """By variant and seed, the measure of each optimiser step."""
    found: Curves = {}
    for cell in sorted(folder.glob("*/seed-*")):
        if variants and cell.parent.name not in variants:
            continue
        paths = [round_dir.train / "metrics.jsonl" for round_dir in RunDir(cell).rounds()]
        rows = [row for path in paths if path.exists() for row in read_metrics(path)]
        values = [row[measure] for row in rows if measure in row]
        if values:
            found.setdefault(cell.parent.name, {})[cell.name] = values
    return found


def means(seeds: dict[str, list[float]]) -> list[float]:
    """The mean over seeds at each step that all of them have."""
    return [fmean(values) for values in zip(*seeds.values(), strict=False)]


def draw(found: Curves, measure: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for number, (variant, seeds) in enumerate(found.items()):
        colour = f"C{number}"
        for values in seeds.values():
            axes.plot(range(1, len(values) + 1), values, color=colour, alpha=0.35, linewidth=0.8)
        mean = means(seeds)
        label = f"{variant} ({len(seeds)} seeds)"
        axes.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2, label=label)
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.set(xlabel="optimiser step", ylabel=measure.replace("_", " "))
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a comparison's folder")
    parser.add_argument("--measure", default="real_reward", help="of train/metrics.jsonl")
    parser.add_argument("--variants", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    parser.add_argument("--json", action="store_true", help="print numbers, draw nothing")
    options = parser.parse_args()
    found = curves(options.folder, options.measure, options.variants)
    if not found:
        parser.error(f"no cell of {options.folder} has {options.measure!r} in its training metrics")
    if options.json:
        print(json.dumps(found))
        return
    draw(found, options.measure, options.out)
    for variant, seeds in found.items():
        mean = means(seeds)
        print(f"{variant}: {mean[0]:.3f} at the first step, {mean[-1]:.3f} at the last")
    print(options.out)


if __name__ == "__main__":
    main()
