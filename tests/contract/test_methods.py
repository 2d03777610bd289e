"""What every method owes the loop. A new file in prefloop/methods is tested here without a line added."""

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import prefloop.methods
from prefloop.config import find_plugin, plugin_names
from prefloop.generate.engine import Engine
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.hf_engine import HFEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges.similarity import Similarity
from prefloop.methods import Actors, Method
from prefloop.models.chat import Chat
from prefloop.recipe import Recipe
from prefloop.records import Candidates, Pair, Prompt, Reject, Request, Response, Sampling
from prefloop.train.batches import encode_pairs
from prefloop.train.logprobs import group_logprobs
from prefloop.train.losses import GroupLogps, LossOutput
from prefloop.train.ppo import TokenLogps
from tests.conftest import labelled_prompts

METHODS = plugin_names(prefloop.methods)
PROMPTS = labelled_prompts(6)
B = 4
OF_DRAFTS = " of drafts"


def kind(name: str) -> type[Method]:
    return find_plugin(prefloop.methods, name.removesuffix(OF_DRAFTS), Method, "method")


# Where the pairs come from decides what a method asks for, so both ways are held to the contract.
DRAFTING = [name + OF_DRAFTS for name in METHODS if "pairs" in kind(name).model_fields]
every_method = pytest.mark.parametrize("name", [*METHODS, *DRAFTING])


def easy(name: str) -> Method:
    """The method with short answers and, where it has gates, with those off that babble cannot pass."""
    options: dict[str, Any] = {"pairs": "drafts"} if name.endswith(OF_DRAFTS) else {}
    for field, info in kind(name).model_fields.items():
        if isinstance(info.get_default(call_default_factory=True), Sampling):
            options[field] = {"max_new_tokens": 10}
    if "gates" in kind(name).model_fields:
        options["gates"] = {"cut_off": False, "max_edit_share": None, "max_length_ratio": None}
    return kind(name).model_validate(options)


class Counting(FakeEngine):
    """Knows how many answers it was asked for."""

    asked = 0

    def sample(self, requests: Sequence[Request], *rest: Any, **options: Any) -> list[Response]:
        self.asked += len(requests)
        return super().sample(requests, *rest, **options)


def generates(method: Method) -> bool:
    """Whether it trains on what an engine wrote; a method that learns from data alone does not."""
    engine = Counting()
    play(method, engine, PROMPTS)
    return engine.asked > 0


def play(
    method: Method, engine: Engine, prompts: list[Prompt], seed: int = 3
) -> tuple[list[Candidates], list[Pair], list[Reject]]:
    """One chunk of one round, each stage held to its promise."""
    judge = Similarity().open(None, PromptSet("compact"))
    # Neither engine has a past to compare with: another judge stands in for one that looks at it.
    actors = Actors(engine, judge, PromptSet(method.prompt_set), 2, seed, lambda other: judge)
    generated = list(method.generate(prompts, actors))
    groups, rejects = split(generated, Candidates)
    assert ids(generated) == [prompt.id for prompt in prompts], "one result a prompt, in order"
    judged = list(method.rank(groups, actors))
    assert ids(judged) == ids(groups), "one result a group, in order"
    ranked, more = split(judged, Candidates)
    rejects += more
    results = list(method.pair(ranked, round=2))
    assert ids(results) == ids(ranked)
    pairs, more = split(results, Pair)
    return ranked, pairs, rejects + more


def split(results: list[Any], wanted: type) -> tuple[list[Any], list[Reject]]:
    rejects = [result for result in results if isinstance(result, Reject)]
    assert all(isinstance(result, wanted | Reject) for result in results)
    assert all(reject.reason and reject.stage for reject in rejects)
    return [result for result in results if not isinstance(result, Reject)], rejects


def ids(results: list[Any]) -> list[str]:
    return [r.prompt.id if isinstance(r, Candidates) else r.prompt_id for r in results]


def group_logps(method: Method, equal: bool = False) -> GroupLogps:
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return -30 * torch.rand(B, generator=generator)

    policy = {role: draw().requires_grad_() for role in method.roles}
    return GroupLogps(
        policy=policy,
        reference={r: p.detach().clone() if equal else draw() for r, p in policy.items()},
        lengths={role: torch.arange(1, B + 1).float() for role in method.roles},
        margin_B=torch.linspace(0, 2, B),
    )


def token_logps() -> TokenLogps:
    """The same for methods that learn from tokens: answers of 1 to B of them."""
    generator = torch.Generator().manual_seed(0)
    names = ("policy", "values", "old_policy", "old_values", "reference", "advantages", "returns")
    drawn = {f"{name}_BT": -torch.rand(B, B, generator=generator) for name in names}
    for name in ("policy_BT", "values_BT"):
        drawn[name].requires_grad_()
    mask_BT = torch.arange(B) <= torch.arange(B)[:, None]
    return TokenLogps(**drawn, mask_BT=mask_BT, scores_B=torch.ones(B), mean_length=(B + 1) / 2)


def loss_of(method: Method, progress: float) -> tuple[LossOutput, list[torch.Tensor]]:
    """The loss of drawn numbers, and those that the policy moves."""
    if method.trains == "tokens":
        tokens = token_logps()
        return method.token_loss(tokens, progress), [tokens.policy_BT, tokens.values_BT]  # type: ignore[attr-defined]
    given = group_logps(method)
    return method.loss(given, progress), [given.policy[role] for role in method.roles]


def test_there_are_methods() -> None:
    assert {"arop", "ial", "sft", "dpo", "spin"} <= set(METHODS)
    assert "dpo of drafts" in DRAFTING
    assert not generates(easy("dpo"))
    assert generates(easy("dpo of drafts"))


# What it says about itself.


@every_method
def test_it_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    first_line = (kind(name).__doc__ or "").strip().partition("\n")[0]
    assert first_line.endswith("."), "the class docstring's first line is what `ls methods` shows"
    assert "Source:" in (sys.modules[kind(name).__module__].__doc__ or "")


@every_method
def test_every_option_says_what_it_does(name: str) -> None:
    fields = kind(name).model_fields
    assert [field for field, info in fields.items() if not info.description] == []


@every_method
def test_its_defaults_make_a_recipe_that_survives_its_dump(name: str) -> None:
    method = {"name": name.removesuffix(OF_DRAFTS)}
    if name.endswith(OF_DRAFTS):
        method["pairs"] = "drafts"
    values: dict[str, Any] = {"name": "run", "method": method}
    if easy(name).needs_judge:
        values["judge"] = {"name": "similarity"}
    recipe = Recipe.model_validate(values)
    assert type(recipe.method) is kind(name)
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe


@every_method
def test_its_options_survive_json(name: str) -> None:
    for method in (kind(name)(), easy(name)):
        assert kind(name).model_validate_json(method.model_dump_json(), strict=True) == method


@every_method
def test_its_roles_are_parts_of_a_pair(name: str) -> None:
    roles = kind(name).roles
    assert len(set(roles)) == len(roles) >= 1
    assert set(roles) <= Pair.model_fields.keys()
    assert easy(name).needs_target or "target" not in roles
    # PPO compares tokens with the reference's; a loss of groups compares answers with each other.
    compared = easy(name).needs_reference and kind(name).trains == "groups"
    assert len(roles) > 1 or not compared, "a lone answer is compared with nothing"


# What it makes.


@every_method
def test_one_chunk_gives_pairs_and_nothing_is_lost(name: str) -> None:
    ranked, pairs, rejects = play(easy(name), FakeEngine(), PROMPTS)
    assert sorted(ids([*pairs, *rejects])) == [prompt.id for prompt in PROMPTS]
    assert pairs, f"only rejects: {rejects}"
    prompts = {prompt.id: prompt for prompt in PROMPTS}
    for pair in pairs:
        assert pair.round == 2
        assert pair.prompt == prompts[pair.prompt_id].messages
        assert pair.chosen != pair.rejected
        assert pair.rejected or "rejected" not in easy(name).roles
        assert pair.margin >= 0
        for role in easy(name).roles:
            assert getattr(pair, role)
        assert Pair.model_validate_json(pair.model_dump_json()) == pair
    measures = easy(name).measures(ranked)
    assert all(value is None or isinstance(value, float) for value in measures.values())


@every_method
def test_the_seed_alone_decides_the_pairs(name: str) -> None:
    first = play(easy(name), FakeEngine(), PROMPTS, seed=3)
    assert first == play(easy(name), FakeEngine(), PROMPTS, seed=3)
    other = play(easy(name), FakeEngine(), PROMPTS, seed=4)
    assert (first != other) is generates(easy(name))


@every_method
def test_an_empty_chunk_gives_nothing(name: str) -> None:
    assert play(easy(name), FakeEngine(), []) == ([], [], [])
    assert set(easy(name).measures([]).values()) <= {None}


@every_method
def test_empty_answers_become_rejects_not_pairs(name: str) -> None:
    engine = FakeEngine(lambda request, seed: "")
    _, pairs, rejects = play(easy(name), engine, PROMPTS[:2])
    lost = 2 if generates(easy(name)) else 0
    assert (len(pairs), len(rejects)) == (2 - lost, lost)


# What it learns from.


@every_method
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_its_loss_is_finite_per_example_and_moves_the_policy_only(
    name: str, progress: float
) -> None:
    output, policy = loss_of(kind(name)(), progress)
    assert output.loss_B.shape == (B,)
    output.loss_B.sum().backward()
    moved = [logps.grad for logps in policy]
    assert all(g is None or bool(g.isfinite().all()) for g in moved)
    assert any(g is not None and bool(g.any()) for g in moved)
    for values_B in output.metrics.values():
        assert values_B.shape == (B,)
        assert bool(values_B.isfinite().all())
        assert not values_B.requires_grad


@every_method
def test_its_loss_at_the_start_is_what_it_says(name: str) -> None:
    method, given = kind(name)(), group_logps(kind(name)(), equal=True)
    if method.trains == "tokens":
        return  # Its trainer knows the first loss of whatever token method it is given.
    pairs = [
        Pair(
            prompt_id=f"p{n}",
            round=0,
            prompt=PROMPTS[n].messages,
            chosen="a",
            rejected="b",
            target="c",
            margin=margin,
        )
        for n, margin in enumerate(given.margin_B.tolist())
    ]
    known = method.loss_at_start(pairs)
    if known is not None:
        assert method.loss(given, 0.0).loss_B.mean().item() == pytest.approx(known, rel=1e-5)


# All of it, on a model.


@every_method
def test_a_round_on_a_real_model_ends_in_a_gradient(name: str, model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 20  # random weights would hardly ever stop
    method, engine = easy(name), HFEngine(model, tokenizer)
    played = play(method, engine, PROMPTS)
    assert played == play(method, engine, PROMPTS)
    _, pairs, rejects = played
    assert pairs, f"only rejects: {rejects}"
    examples = list(encode_pairs(Chat(tokenizer), pairs, method.roles, None))
    if method.trains == "tokens":
        return  # tests/train/test_ppo_trainer.py goes on from here.
    tokens = group_logprobs(model, [e.group for e in examples], packing=True, token_budget=1024)
    policy = {
        role: torch.stack([completions[place].sum() for completions in tokens])
        for place, role in enumerate(method.roles)
    }
    given = GroupLogps(
        policy=policy,
        reference={role: logp_B.detach() for role, logp_B in policy.items()},
        lengths={role: torch.ones(len(pairs)) for role in method.roles},
        margin_B=torch.tensor([pair.margin for pair in pairs]),
    )
    loss = method.loss(given, 0.0).loss_B.mean()
    known = method.loss_at_start(pairs)
    assert known is None or loss.item() == pytest.approx(known, rel=1e-4)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert any(bool(g.any()) for g in gradients)
