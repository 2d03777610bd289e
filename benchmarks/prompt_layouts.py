"""Claim: prompts that begin alike are computed once, and the second answer is as good as without.

    python benchmarks/prompt_layouts.py --json
    python benchmarks/prompt_layouts.py --method arop --prompts 48 --layouts single:compact --json

Plays the generation of IAL (draft, advice, rewrite) or AROP (two drafts, refinement, infilled flaw) with the embedded
model, in chunks of 64 as a run does; every layout with the same prompts and seeds, so with the same drafts. A layout is
`layout:prompt set`. Reported by layout: tokens of prompts that were fed and all that were, CPU seconds of the process by phase
(best with OMP_NUM_THREADS=1), and of the second answers three judges' scores, the share that each finds better than
the draft, that ended, and that repeat the draft; as differences to the first layout too, with a bootstrap
interval over prompts (the mean of the seeds is a prompt's value).
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any
from unittest import mock

from prefloop.data.prompts import DataOptions, load_data
from prefloop.data.text_distance import fold_whitespace
from prefloop.evaluate.stats import bootstrap_mean
from prefloop.generate import decode, scoring
from prefloop.generate.hf_engine import HFEngine, open_engine
from prefloop.generate.templates import PromptSet
from prefloop.judges import NoVerdict
from prefloop.judges.similarity import Similarity
from prefloop.judges.target_checks import TargetChecks
from prefloop.methods import Actors, Method
from prefloop.methods.arop import AROP
from prefloop.methods.ial import IAL
from prefloop.records import Candidates, Prompt, Response, Sampling, Scored, derive_seed

CHUNK = 64
SECOND = {"ial": "rewrite", "arop": "refined"}
LAYOUTS = ["single:compact", "turns:compact", "single:shared"]
JUDGES = {
    "chrF": Similarity(),
    "checks": TargetChecks(),
    "cosine": Similarity(model="embedded:minilm"),
}


class Phases:
    """An engine that notes the CPU seconds and tokens of each phase."""

    def __init__(self, engine: HFEngine) -> None:
        self.engine = engine
        self.phase = ""
        self.seconds: Counter[str] = Counter()
        self.prompts: Counter[str] = Counter()
        """Tokens fed in segments: of prompts and scored answers, not the answers' own draws."""
        self.tokens: Counter[str] = Counter()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self.phase, start = phase, time.process_time()
        yield
        self.seconds[phase] += time.process_time() - start

    def sample(self, *given: Any, label: str, **options: Any) -> list[Response]:
        with self._timed(label):
            return self.engine.sample(*given, label=label, **options)

    def score(self, *given: Any, **options: Any) -> list[Scored]:
        with self._timed("infill: scores"):
            return self.engine.score(*given, **options)

    def fed(self, model: Any, ids: list[int], ends: list[int], step: Any) -> Any:
        """In place of `decode.feed`: counts and feeds."""
        self.prompts[self.phase] += sum(segment.length for segment in step.segments)
        self.tokens[self.phase] += len(ids)
        return feed(model, ids, ends, step)


feed = decode.feed


def method_of(name: str, layout: str, prompt_set: str, new_tokens: int) -> Method:
    """The method with the quickstart's sampling."""
    sampling = Sampling(temperature=0.7, max_new_tokens=new_tokens)
    if name == "arop":
        return AROP(layout=layout, prompt_set=prompt_set, sampling=sampling, flaw="infill")
    advice = sampling.model_copy(update={"max_new_tokens": 40})
    return IAL(layout=layout, prompt_set=prompt_set, sampling=sampling, advice=advice)


def play(
    method: Method, prompts: Sequence[Prompt], engine: HFEngine, seed: int
) -> tuple[Phases, list[Candidates]]:
    """All phases for all prompts, with slots that are empty at first."""
    engine.release()
    # The first call puts weights in order, which is no phase's time.
    engine.continue_tokens([[1, 2, 3]], Sampling(max_new_tokens=1), seed=0)
    phases, groups = Phases(engine), []
    with (
        mock.patch.object(decode, "feed", phases.fed),
        mock.patch.object(scoring, "feed", phases.fed),
    ):
        for start in range(0, len(prompts), CHUNK):
            actors = Actors(
                policy=phases,  # type: ignore[arg-type]
                judge=None,
                prompts=PromptSet(method.prompt_set),
                round=0,
                seed=derive_seed(seed, start),
            )
            groups += list(method.generate(prompts[start : start + CHUNK], actors))
    return phases, [group for group in groups if isinstance(group, Candidates)]


def values_of(groups: Sequence[Candidates], first: str, second: str) -> dict[str, dict[str, float]]:
    """Measure -> prompt's id -> value of its second answer; an empty answer scores 0."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    pairs = [(g.responses[first], g.responses[second]) for g in groups]
    asked = [group.prompt for group in groups]
    for name, judge in JUDGES.items():
        texts = [tuple(answer.text or " " for answer in pair) for pair in pairs]
        verdicts = judge.open(None, PromptSet("compact")).score(asked, texts)
        for prompt, verdict in zip(asked, verdicts, strict=True):
            draft, answer = (0.0, 0.0) if isinstance(verdict, NoVerdict) else verdict
            found[f"{name} of the draft"][prompt.id] = draft
            found[name][prompt.id] = answer
            found[f"better by {name}"][prompt.id] = float(answer > draft)
    for prompt, (draft, answer) in zip(asked, pairs, strict=True):
        same = fold_whitespace(draft.text) == fold_whitespace(answer.text)
        found["ended"][prompt.id] = float(answer.finish == "stop")
        found["identical"][prompt.id] = float(same)
    return found


def means_of(played: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The mean of the seeds; a prompt that one of them rejected (no word to flaw) is left out."""
    kept = [
        id for id in played[0]["ended"] if all(id in by_measure["ended"] for by_measure in played)
    ]
    return {
        name: {id: fmean(by_measure[name][id] for by_measure in played) for id in kept}
        for name in played[0]
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Layouts take turns within each seed."""
    data = load_data(
        DataOptions(train=options.data, limit=options.prompts),
        needs_target=True,
        seed=0,
        count_tokens=None,
    )
    prompts = list(data.train)
    engine = open_engine("embedded:smollm2-135m")
    engine.batch_size = CHUNK
    played: dict[str, list[dict[str, dict[str, float]]]] = defaultdict(list)
    costs: dict[str, list[dict[str, dict[str, float]]]] = defaultdict(list)
    for seed in options.seeds:
        for layout in options.layouts:
            method = method_of(options.method, *layout.split(":", 1), options.new_tokens)
            phases, groups = play(method, prompts, engine, seed)
            played[layout].append(values_of(groups, method.answer, SECOND[options.method]))
            parts = ("prompts", "tokens", "seconds")
            costs[layout].append({part: dict(getattr(phases, part)) for part in parts})
    means = {layout: means_of(found) for layout, found in played.items()}
    base = means[options.layouts[0]]
    return {
        layout: {
            "costs": costs[layout],
            **{
                part: fmean(sum(cost[part].values()) for cost in costs[layout])
                for part in ("prompts", "tokens", "seconds")
            },
            "quality": {name: fmean(values.values()) for name, values in by_measure.items()},
            "difference": {
                name: interval([values[id] - base[name][id] for id in values if id in base[name]])
                for name, values in by_measure.items()
            },
        }
        for layout, by_measure in means.items()
    }


def interval(differences: Sequence[float]) -> list[float]:
    """Mean, low and high."""
    found = bootstrap_mean(differences, seed=0)
    assert found is not None
    return [found.value, found.low, found.high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", choices=list(SECOND), default="ial")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, help="layout:prompt set")
    parser.add_argument("--data", default="embedded:instructions", help="rows with targets")
    parser.add_argument("--prompts", type=int, default=200, help="the first so many of them")
    parser.add_argument("--new-tokens", type=int, default=64, help="limit of each answer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the draws")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = measure(options)
    if options.json:
        print(json.dumps(found))
        return
    for layout, facts in found.items():
        print(
            f"{layout}: {facts['prompts']:.0f} tokens of prompts, {facts['tokens']:.0f} in all, {facts['seconds']:.1f} s"
        )
        for name, value in facts["quality"].items():
            print(
                f"    {name:22}{value:8.3f}   {' '.join(f'{v:+.3f}' for v in facts['difference'][name])}"
            )


if __name__ == "__main__":
    main()
