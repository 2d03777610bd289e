"""What the short names of measures mean: one registry of words for the console, the page, cards and trackers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from prefloop.evaluate.answers import ANSWER_MEASURES


class Meaning(NamedTuple):
    """A measure's title on the page, a phrase for whoever meets its short name, and a note on how to read it."""

    title: str
    words: str
    note: str = ""

    @property
    def heading(self) -> tuple[str, str]:
        """What stands above and below a chart: title and note."""
        return self.title, self.note


ROUND_MEASURES: dict[str, Meaning] = {
    "score": Meaning(
        "Judge's score",
        "mean of the judge's scores",
        "Mean over held-out answers, in the judge's own units.",
    ),
    "win_rate": Meaning(
        "Win rate over the start",
        "share of prompts answered better than by the initial policy, ties one half",
        "Share of held-out prompts whose answer scores above the initial policy's; ties count half. "
        "Bars: 95 % over prompts.",
    ),
    "R_i": Meaning(
        "R_i: rewrites that are better",
        "share of rewrites that the judge scores above their draft",
        "Share of held-out prompts whose rewrite the judge puts above the draft.",
    ),
    "identical_rate": Meaning(
        "Identical rate",
        "share of prompts where improving the answer changed nothing",
        "Share of prompts where improving the answer changed nothing.",
    ),
    "flaw_edit_share": Meaning(
        "How much a flaw changes",
        "share of words that planting a flaw changes",
        "Word edit distance from refined to flawed answer. A subtle flaw is small, and not 0.",
    ),
    "M": Meaning(
        "Margin M of flaws",
        "AROP's margin M on held-out prompts",
        "Mean on held-out prompts. Near 0 the policy no longer tells flaws.",
    ),
    "flaw_unseen": Meaning(
        "Flaws that are not seen",
        "share of flawed answers that the policy finds as likely",
        "Share of flawed answers that the policy finds as likely as the better ones.",
    ),
    "kl": Meaning(
        "Divergence from the start (KL)",
        "divergence from the initial policy, nats a token",
        "Nats a token between the policy and the initial one. A leap says: stop and read answers.",
    ),
    "distinct_2": Meaning(
        "Variety (distinct-2)",
        "different word pairs over all word pairs",
        "Different word pairs over all word pairs. Falls when answers become alike.",
    ),
    "mean_length": Meaning(
        "Length of an answer",
        "tokens an answer",
        "Tokens, end-of-turn included. A win rate may be nothing but length.",
    ),
    "stop_rate": Meaning(
        "Stop rate",
        "share of answers that end by themselves",
        "Share of answers that end by themselves, not at the length limit.",
    ),
    "no_verdict": Meaning(
        "No verdict",
        "share of answers that the judge could not score",
        "Share of answers that the judge could not score; they are in no score and no win rate.",
    ),
    "score_rewrite": Meaning(
        "Judge's score of rewrites",
        "mean of the judge's scores of the rewrites",
        "Mean over the held-out prompts.",
    ),
    "score_best": Meaning("Judge's score, best answer", "mean score of each prompt's best answer"),
    "score_mean": Meaning("Judge's score, mean answer", "mean score of all answers to a prompt"),
    "score_worst": Meaning(
        "Judge's score, worst answer", "mean score of each prompt's worst answer"
    ),
    "label_confidence": Meaning(
        "Confidence of labels", "mean probability that a pair's label is right"
    ),
}

STEP_MEASURES: dict[str, Meaning] = {
    "win_rate": Meaning(
        "Win rate during training",
        "share of prompts answered better than by the initial policy",
        "Over the start, on held-out prompts. Bars: 95 % over prompts.",
    ),
    "loss": Meaning("Loss", "the loss", "At a round's start its value is known and checked."),
    "margin": Meaning(
        "Margin",
        "log-ratio of the target minus the mean of both answers', nats",
        "r(target) minus the mean of r(chosen) and r(rejected), nats an answer.",
    ),
    "reward_margin": Meaning(
        "Reward margin R",
        "R, the implicit reward of the chosen answer minus the rejected one's",
        "β (r(chosen) − r(rejected)): what the loss pushes above M.",
    ),
    "real_reward": Meaning(
        "Real Reward",
        "implicit reward of the answer that is taught",
        "Implicit reward of the answer that is taught. Below 0 it has become less likely.",
    ),
    "rewards": Meaning(
        "Reward of each response",
        "implicit reward of each response",
        "Both fall together when the policy forgets answers instead of telling them apart.",
    ),
    "reward_chosen": Meaning("Reward, chosen", "implicit reward of the chosen answer"),
    "reward_rejected": Meaning("Reward, rejected", "implicit reward of the rejected answer"),
    "reward_sample": Meaning("Reward, own answer", "implicit reward of the policy's own answer"),
    "accuracy": Meaning(
        "Accuracy",
        "share of examples in the right order of implicit reward",
        "Share of pairs in the right order of implicit reward.",
    ),
    "over_margin": Meaning(
        "Over the margin",
        "share of pairs with the reward margin R above M",
        "Share of pairs with R above M.",
    ),
    "penalty": Meaning(
        "Penalty P",
        "how far the answer that is taught fell below the reference, nats",
        "How far the answer that is taught fell below the reference, nats.",
    ),
    "M": Meaning(
        "Margin M",
        "M, what the reward margin R must exceed, mean",
        "Mean of what R must exceed, by step.",
    ),
    "smoothed": Meaning("Smoothed labels", "share of pairs whose label is smoothed"),
    "gap": Meaning("Gap", "log-ratio of the chosen answer minus the rejected one's, nats a token"),
    "target_logprob": Meaning("Log-prob of targets", "mean log-prob of the target, nats a token"),
    "policy_loss": Meaning("Policy loss", "the clipped loss of the policy"),
    "value_loss": Meaning("Value loss", "the clipped loss of the values"),
    "reward": Meaning("Reward", "mean of the judge's scores, penalties taken off"),
    "kl_reference": Meaning(
        "KL to the reference", "divergence from the initial policy, nats a token"
    ),
    "approx_kl": Meaning(
        "KL within the round", "how far the round's steps have gone, nats a token"
    ),
    "clip_fraction": Meaning("Clip fraction", "share of tokens whose ratio is beyond the clip"),
    "entropy": Meaning("Entropy", "estimate of the entropy, nats a token"),
    "explained_variance": Meaning(
        "Explained variance", "how much of the rewards' variance the values explain"
    ),
    "kl_coef": Meaning("KL coefficient", "weight of the divergence in the reward"),
    "lr": Meaning("Learning rate", "the learning rate"),
    "grad_norm": Meaning(
        "Gradient norm", "norm of the gradient before clipping", "Before clipping."
    ),
}

_TRAIN = "train_"
# Steps have these, rounds do not: a round's training measures leave them out.
_OF_STEPS_ALONE = frozenset({"win_rate", "rewards", "lr"})


def measure_names(sets: Iterable[str] = ()) -> list[str]:
    """The measures that a round of prefloop's own methods may have; `sets` are evaluation sets measured apart."""
    of_training = [f"{_TRAIN}{name}" for name in STEP_MEASURES if name not in _OF_STEPS_ALONE]
    of_sets = [f"{name}_on_{title}" for title in sets for name in ANSWER_MEASURES]
    return list(dict.fromkeys([*ROUND_MEASURES, *ANSWER_MEASURES, *of_training, *of_sets]))


OF_METHODS = frozenset(ROUND_MEASURES) - {*ANSWER_MEASURES, "no_verdict"}
"""Measures of rounds that a method reports of itself, played on the held-out prompts."""


def step_meaning(name: str) -> Meaning:
    """Title and explanation of a training metric; a method's own metric has its name as title."""
    return STEP_MEASURES.get(name, Meaning(name, "", "The method's own measure of training."))


def round_meaning(name: str) -> Meaning:
    """Title and explanation of a round's measure, those of training included; an unknown one has its name as title."""
    if name.startswith(_TRAIN):
        return STEP_MEASURES.get(name.removeprefix(_TRAIN), Meaning(name, ""))
    return ROUND_MEASURES.get(name, Meaning(name, ""))


def legend(names: Iterable[str]) -> list[str]:
    """A line "name: its words" for each measure whose words are known, in the order given."""
    words = [(name, round_meaning(name).words) for name in names]
    return [f"{name}: {meaning}" for name, meaning in words if meaning]
