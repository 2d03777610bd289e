"""The base class of methods. One file per method; the file's name is the method's name; no list to edit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from prefloop.config import Options
from prefloop.generate.engine import Engine
from prefloop.generate.templates import PromptSet
from prefloop.judges import Judge, NoVerdict, OpenJudge, score_responses
from prefloop.records import Candidates, Message, Pair, Prompt, Reject, Request, Response, Sampling

if TYPE_CHECKING:
    from prefloop.train.losses import GroupLogps, LossOutput

Reference = Literal["initial", "round_start"]
Generator = Literal["current", "frozen"]
Layout = Literal["single", "turns"]
Trains = Literal["groups", "tokens"]
Pairing = Callable[[Sequence[Candidates]], Iterator[Pair | Reject]]
"""Training examples from one chunk of ranked groups."""


@dataclass(frozen=True)
class Actors:
    """The models and prompts that a method may use in one chunk of one round."""

    policy: Engine
    """The generating policy: the current one, or the initial one where the method says `frozen`."""
    judge: OpenJudge | None
    prompts: PromptSet
    round: int
    seed: int
    """Seed of this chunk; methods derive one seed per phase from it."""
    beside_initial: Callable[[Judge], OpenJudge] | None = None
    """Opens a judge that compares the current policy with the initial one, both in this process."""


def unfinished(roles: Mapping[str, Response]) -> tuple[str, ...]:
    """The roles whose response was cut off by the length limit."""
    return tuple(role for role, response in roles.items() if response.finish == "length")


def sampled_tokens(roles: Mapping[str, Response]) -> dict[str, tuple[int, ...]]:
    """The tokens of the roles whose response the policy sampled."""
    return {role: response.token_ids for role, response in roles.items() if response.token_ids}


def further(asked: Request, answer: str, turn: Sequence[Message]) -> Request:
    """The conversation of `asked`, continued with its answer and then `turn`."""
    said = Message(role="assistant", content=answer)
    return Request(messages=(*asked.messages, said, *turn))


def scored(
    groups: Sequence[Candidates], judge: OpenJudge | None, names: Sequence[str] = ()
) -> Iterator[Candidates | Reject]:
    """The groups with the judge's scores of the responses `names` (all, where none is named)."""
    assert judge is not None, "a method that ranks by the judge declares needs_judge"
    names_of = [tuple(names or group.responses) for group in groups]
    verdicts = score_responses(
        judge,
        [group.prompt for group in groups],
        [
            [group.responses[name] for name in asked]
            for group, asked in zip(groups, names_of, strict=True)
        ],
    )
    for group, asked, verdict in zip(groups, names_of, verdicts, strict=True):
        if isinstance(verdict, NoVerdict):
            yield unranked(group, "no verdict", verdict)
        else:
            scores = dict(zip(asked, verdict, strict=True))
            yield group.model_copy(update={"scores": scores})


def unranked(group: Candidates, reason: str, verdict: NoVerdict) -> Reject:
    """The reject of a group without a verdict."""
    return Reject(prompt_id=group.prompt.id, stage="rank", reason=reason, detail=verdict.reason)


def pair_of(group: Candidates, chosen: str, rejected: str, round: int) -> Pair:
    """The pair of two named responses of a group."""
    names = {"chosen": chosen, "rejected": rejected}
    responses = {role: group.responses[name] for role, name in names.items()}
    return Pair(
        prompt_id=group.prompt.id,
        round=round,
        prompt=group.prompt.messages,
        chosen=responses["chosen"].text,
        rejected=responses["rejected"].text,
        target=group.prompt.target,
        origin=names,
        unfinished=unfinished(responses),
        token_ids=sampled_tokens(responses),
        scores={role: group.scores[name] for role, name in names.items() if name in group.scores},
    )


class Method(Options):
    """A method: its fields are its options, its class attributes and properties declare what it needs."""

    roles: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    """Roles of the responses whose log-probs the loss takes, in order."""
    trains: ClassVar[Trains] = "groups"
    """The loss's input: groups of answers with summed log-probs (`loss`), or the tokens of the round's own answers (prefloop.train.ppo.TokenMethod)."""
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The paper's schedule, as defaults of the recipe's sections `loop`, `train` and `evaluate`."""

    reference: Reference = "initial"
    """The reference policy of the loss: the initial policy, or the policy at the round's start."""
    generator: Generator = "current"
    """Which policy generates: the current one, or the initial one for the whole run."""
    prompt_set: str = "compact"
    """Prompt templates: "compact" for small models, "shared" (the same, but IAL's rewrites cost less), "paper" in full, or your own folder."""
    sampling: Sampling = Field(default_factory=Sampling)
    """How answers are drawn, in generation and, unless `evaluate.sampling` says otherwise, in evaluation."""

    @model_validator(mode="before")
    @classmethod
    def _parts_keep_the_methods_defaults(cls, values: Any) -> Any:
        """A partial section keeps the method's other defaults: `gates: {cut_off: false}` changes one gate only."""
        if not isinstance(values, Mapping):
            return values
        parts = {
            name: {**field.default.model_dump(mode="json"), **values[name]}
            for name, field in cls.model_fields.items()
            if isinstance(field.default, BaseModel) and isinstance(values.get(name), Mapping)
        }
        return {**values, **parts}

    # A method overrides these by a property, or, where no option decides, by a ClassVar.

    @property
    def needs_target(self) -> bool:
        """Whether every prompt must have a target response."""
        return False

    @property
    def needs_pairs(self) -> bool:
        """Whether every prompt must have a labelled pair of answers."""
        return False

    @property
    def needs_judge(self) -> bool:
        """Whether `rank` uses the recipe's judge."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether the loss uses the reference's log-probs; if not, they are not computed."""
        return True

    def in_round(self, round: int) -> Method:
        """The method with this round's values of options that change by round, for its loss."""
        return self

    @property
    def asks_logprobs(self) -> str | None:
        """The option for which it needs log-probs of the generating model; None where it needs none."""
        return None

    def generate(self, prompts: Sequence[Prompt], actors: Actors) -> Iterator[Candidates | Reject]:
        """Generate all responses to one chunk of prompts."""
        raise NotImplementedError

    def rank(self, groups: Sequence[Candidates], actors: Actors) -> Iterator[Candidates | Reject]:
        """The groups with the judge's scores and the method's ratings."""
        raise NotImplementedError

    def pair(self, ranked: Iterable[Candidates], round: int) -> Iterator[Pair | Reject]:
        """Training pairs from ranked groups, after the gates."""
        raise NotImplementedError

    def pairing(self, ranked: Iterable[Candidates], round: int) -> Pairing:
        """How one chunk after the other of a round's ranked groups is paired: by `pair`.

        For methods whose pairs depend on the whole round: `ranked` are all of its groups, to be read here or not
        at all. Called again where a stage is resumed, with the same groups.
        """
        return lambda groups: self.pair(groups, round)

    def loss(self, logps: GroupLogps, progress: float) -> LossOutput:
        """Per-example loss of B groups; pure. `progress` in [0, 1] is the position in the round."""
        raise NotImplementedError

    def loss_at_start(self, pairs: Sequence[Pair]) -> float | None:
        """The mean loss where policy equals reference, for the trainer's first check; None where it is not known."""
        return None

    def measures(self, ranked: Sequence[Candidates]) -> dict[str, float | None]:
        """The method's own measures of one round, from the ranked groups."""
        return {}
