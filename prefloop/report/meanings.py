"""What the report calls each measure, and what it says about it in a line; docs/metrics.md has the definitions."""

from __future__ import annotations

from typing import NamedTuple


class Meaning(NamedTuple):
    """A measure's name on the page, and one sentence for somebody who meets it for the first time."""

    title: str
    note: str


ROUND_MEASURES: dict[str, Meaning] = {
    "score": Meaning("Judge's score", "Mean over held-out answers, in the judge's own units."),
    "win_rate": Meaning(
        "Win rate over the start",
        "Share of held-out prompts whose answer scores above the initial policy's; ties count half. "
        "Bars: 95 % over prompts.",
    ),
    "R_i": Meaning(
        "R_i: rewrites that are better",
        "Share of held-out prompts whose rewrite the judge puts above the draft.",
    ),
    "identical_rate": Meaning(
        "Identical rate", "Share of prompts where improving the answer changed nothing."
    ),
    "flaw_edit_share": Meaning(
        "How much a flaw changes",
        "Word edit distance from refined to flawed answer. A subtle flaw is small, and not 0.",
    ),
    "kl": Meaning(
        "Divergence from the start (KL)",
        "Nats a token between the policy and the initial one. A leap says: stop and read answers.",
    ),
    "distinct_2": Meaning(
        "Variety (distinct-2)",
        "Different word pairs over all word pairs. Falls when answers become alike.",
    ),
    "mean_length": Meaning(
        "Length of an answer", "Tokens, end-of-turn included. A win rate may be nothing but length."
    ),
    "stop_rate": Meaning(
        "Stop rate", "Share of answers that end by themselves, not at the length limit."
    ),
    "score_rewrite": Meaning("Judge's score of rewrites", "Mean over the held-out prompts."),
}

STEP_MEASURES: dict[str, Meaning] = {
    "win_rate": Meaning(
        "Win rate during training", "Over the start, on held-out prompts. Bars: 95 % over prompts."
    ),
    "loss": Meaning("Loss", "At a round's start its value is known and checked."),
    "margin": Meaning(
        "Margin", "r(target) minus the mean of r(chosen) and r(rejected), nats an answer."
    ),
    "reward_margin": Meaning(
        "Reward margin R", "β (r(chosen) − r(rejected)): what the loss pushes above M."
    ),
    "real_reward": Meaning(
        "Real Reward",
        "Implicit reward of the answer that is taught. Below 0 it has become less likely.",
    ),
    "rewards": Meaning(
        "Reward of each response",
        "Both fall together when the policy forgets answers instead of telling them apart.",
    ),
    "accuracy": Meaning("Accuracy", "Share of pairs in the right order of implicit reward."),
    "over_margin": Meaning("Over the margin", "Share of pairs with R above M."),
    "penalty": Meaning(
        "Penalty P", "How far the answer that is taught fell below the reference, nats."
    ),
    "M": Meaning("Margin M", "Mean of what R must exceed, by step."),
    "lr": Meaning("Learning rate", ""),
    "grad_norm": Meaning("Gradient norm", "Before clipping."),
}


def step_meaning(name: str) -> Meaning:
    """What a training metric means; a method's own metric is called by its name."""
    return STEP_MEASURES.get(name, Meaning(name, "The method's own measure of training."))


def round_meaning(name: str) -> Meaning:
    """What a round's measure means; an unknown one is called by its name."""
    return ROUND_MEASURES.get(name, Meaning(name, ""))
