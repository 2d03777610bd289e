"""What can be told about a recipe before a run: what would stop it, and what in it has no effect."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import prefloop.generate.engines
import prefloop.judges
import prefloop.methods
from prefloop.config import plugin_name, plugin_names
from prefloop.data.entries import Tally
from prefloop.data.prompts import Part, amounts, nothing_left, read_prompts
from prefloop.data.rows import EMBEDDED as EMBEDDED_DATA
from prefloop.data.rows import is_data_file
from prefloop.errors import DataError, RecipeError, counted, nearest
from prefloop.generate.engines.hf import InProcess
from prefloop.generate.templates import PromptSet
from prefloop.models.embedding import EMBEDDED as EMBEDDED_EMBEDDERS
from prefloop.models.sources import EMBEDDED as EMBEDDED_MODELS
from prefloop.models.sources import check_quantization, local_folder
from prefloop.recipe import Recipe, load_recipe
from prefloop.recipe.check_template import check_template
from prefloop.recipe.reward import load_reward_recipe
from prefloop.records import Message

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Packages of a tracker, where they are not named as it is."""


def check_recipe(recipe: Recipe) -> list[str]:
    """Look for what would stop the run, loading no model; returns notes that need no change.

    Raises RecipeError or DataError: a judge or target that the method needs and has not, a
    prompt set, tracker or model folder that does not exist, a row of local data that cannot be read.
    """
    PromptSet(recipe.method.prompt_set)
    check_curve(recipe)
    if recipe.method.needs_judge and recipe.judge is None:
        raise RecipeError(
            f"method {plugin_name(prefloop.methods, recipe.method)!r} needs a judge; "
            f"add a section judge with a name ({', '.join(plugin_names(prefloop.judges))})"
        )
    if recipe.method.trains == "tokens" and recipe.loop.mix_previous:
        raise RecipeError(
            "loop.mix_previous adds answers of an earlier policy, and method "
            f"{plugin_name(prefloop.methods, recipe.method)!r} learns from the round's own alone; set it to false"
        )
    if recipe.launch is not None:
        _check_launcher(recipe.launch.words())
    _check_tuning(recipe)
    judge = recipe.judge
    if recipe.method.needs_judge and judge is not None and judge.needs_moved_policy:
        raise RecipeError(
            f"judge {plugin_name(prefloop.judges, judge)!r} compares the policy with the initial one, and in round 0 they are the same; "
            "name the implicit judge's model and reference, or choose another judge"
        )
    if recipe.eval_judge is not None and recipe.eval_judge.needs_policy:
        raise RecipeError(
            f"eval_judge {plugin_name(prefloop.judges, recipe.eval_judge)!r} asks the policy, which would measure "
            "itself; name a judge that asks none, or leave eval_judge out"
        )
    for named in recipe.judges.values():
        named.check()
    before = _check_reward(recipe)
    for tracker in recipe.track.report_to:
        if not any(find_spec(package) for package in _PACKAGES.get(tracker, (tracker,))):
            raise RecipeError(
                f"track.report_to names {tracker}, which is not installed; pip install {tracker}"
            )
    asked: dict[tuple[str, ...], tuple[Message, ...]] = {}
    notes = [*before, *_check_models(recipe), *_check_data(recipe, asked), *_without_effect(recipe)]
    notes += check_template(recipe.model, [(Message(role="user", content="x"),), *asked.values()])
    # Last, because it may ask a server.
    _check_engine(recipe)
    return notes


def check_curve(recipe: Recipe) -> None:
    """Raise RecipeError where the recipe asks for a curve that it cannot have."""
    if not recipe.evaluate.every_steps:
        if recipe.evaluate.early_stopping_patience is not None:
            raise RecipeError(
                "evaluate.early_stopping_patience counts win rates during training, and evaluate.every_steps is 0; "
                "set it to a number of steps"
            )
        return
    if recipe.launch is not None:
        raise RecipeError(
            "evaluate.every_steps measures the policy that this process trains, and under launch others train "
            "it; set evaluate.every_steps: 0, or leave launch out"
        )
    if recipe.answers_judge is None:
        raise RecipeError(
            "evaluate.every_steps needs a judge to compare answers with; add a section judge, or set it to 0"
        )


def _check_reward(recipe: Recipe) -> list[str]:
    """Both recipes of the section `reward`, before anything is made from them."""
    if recipe.reward is None:
        return []
    load_reward_recipe(recipe.reward.train)
    drafts = load_recipe(recipe.reward.drafts)
    if drafts.reward is not None:
        raise RecipeError(
            f"reward.drafts: {recipe.reward.drafts} makes a reward model of its own first; name a recipe that "
            "needs none"
        )
    if "rejected" not in drafts.method.roles:
        method = plugin_name(prefloop.methods, drafts.method)
        raise RecipeError(
            f"reward.drafts: method {method!r} of {recipe.reward.drafts} makes single answers; name a recipe whose "
            "method makes pairs"
        )
    if drafts.name == recipe.name:
        raise RecipeError(
            f"reward.drafts: {recipe.reward.drafts} is called {drafts.name} as the run itself is, and they lie side by "
            "side; give one of them another name"
        )
    return [f"{drafts.name}: {note}" for note in check_recipe(drafts)]


def _check_engine(recipe: Recipe) -> None:
    engine, method, model = recipe.engine, recipe.method, recipe.model
    if not engine.plays_policy:
        name = plugin_name(prefloop.generate.engines, engine)
        if method.generator != "frozen":
            raise RecipeError(
                f"engine {name!r} writes all answers with a model that is never trained; "
                "say so with method.generator: frozen, or choose another engine"
            )
        if method.asks_logprobs:
            raise RecipeError(
                f"engine {name!r} tells no log-probabilities, which "
                f"{plugin_name(prefloop.methods, method)} asks for here ({method.asks_logprobs}); "
                "choose another engine or another option"
            )
    engine.check(tuning=model.tuning, lora_rank=model.lora.saved_rank)


def _check_tuning(recipe: Recipe) -> None:
    """What quantised weights and other kinds of adapters cannot go with."""
    model, engine, launch = recipe.model, recipe.engine, recipe.launch
    check_quantization(model)
    if model.quantization is not None and recipe.sft is not None:
        raise RecipeError(
            "sft merges its adapter into the weights, which model.quantization would round; leave out one of them"
        )
    served = engine.plays_policy and not isinstance(engine, InProcess)
    dora = model.tuning == "lora" and model.lora.use_dora
    if served and (dora or model.quantization is not None):
        name = plugin_name(prefloop.generate.engines, engine)
        trained = "model.lora.use_dora" if dora else "model.quantization"
        raise RecipeError(
            f"engine {name!r} answers with the plain weights and plain adapters, so not as {trained} trains; "
            "leave out one of them"
        )
    option = model.needs_whole_weights
    if option is not None and launch is not None and launch.sharding != "none":
        raise RecipeError(
            f"{option} needs whole weights in every process; set launch.sharding to none, or leave it out"
        )


def _check_launcher(words: list[str]) -> None:
    for option, value in pairwise(words):
        if option == "--config_file" and not Path(value).expanduser().is_file():
            raise RecipeError(
                f"launch.command: no file {value} (paths are relative to the working directory)"
            )


def _check_models(recipe: Recipe) -> Iterator[str]:
    """A folder must hold what can be loaded; a name that is no folder here is the hub's."""
    template = recipe.model.chat_template
    if template is not None and not Path(template).expanduser().is_file():
        raise RecipeError(
            f"model.chat_template: no file {template} (paths are relative to the working directory)"
        )
    place = Path(recipe.model.source).expanduser()
    if place.is_dir():
        local_folder(str(place), recipe.model)
    yield from check_sources({"model.source": recipe.model.source}, [*EMBEDDED_MODELS])
    yield from check_sources(recipe.judge_sources, reward_is_made=recipe.reward is not None)


def check_sources(
    sources: Mapping[str, str],
    embedded_names: Sequence[str] = (*EMBEDDED_MODELS, *EMBEDDED_EMBEDDERS),
    *,
    reward_is_made: bool = False,
) -> Iterator[str]:
    """Option -> the model that it names, a folder or a hub id; yields notes. Raises RecipeError for what is neither."""
    for key, source in sources.items():
        place = Path(source).expanduser()
        if place.is_dir():
            continue
        if place.exists():
            raise RecipeError(f"{key}: {source} is a file; name the folder that holds the model")
        elif source.startswith("embedded:"):
            embedded = source.removeprefix("embedded:")
            if embedded not in embedded_names:
                hint = nearest(embedded, list(embedded_names))
                raise RecipeError(f"{key}: no embedded model {embedded!r}; {hint}")
        elif source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise RecipeError(
                f"{key}: no folder {source} (paths are relative to the working directory)"
            )
        elif source.startswith("rewards/"):
            remedy = (
                "the run makes it first" if reward_is_made else "make it with prefloop reward train"
            )
            yield f"{key} {source} is not there yet: {remedy}"
        else:
            meant = f" (or is embedded:{source} meant?)" if source in embedded_names else ""
            yield f"{key} {source} is no folder here: it will be looked up on the Hugging Face Hub{meant}"


def _check_data(recipe: Recipe, asked: dict[tuple[str, ...], tuple[Message, ...]]) -> Iterator[str]:
    """Read every row of local data, and say how; data sets on the hub are left to the run.

    `asked` gets a conversation of each sequence of roles that is among the prompts.
    """
    data, size = recipe.data, recipe.loop.prompts_per_round
    counts = yield from count_prompts(recipe, "train", asked)
    if None not in counts:
        found = sum(amounts(data.sources("train"), [count or 0 for count in counts]))
        usable = min(found, data.limit or found) - data.holdout
        if usable <= 0 < data.holdout:
            raise RecipeError(
                f"data.holdout is {data.holdout}, and data.train has "
                f"{counted(usable + data.holdout, 'usable prompt')} in all; lower it, or give more data"
            )
        if usable < size:
            raise RecipeError(
                f"loop.prompts_per_round is {size}, and data.train leaves {max(usable, 0)} "
                "to train on; lower it, or give more data"
            )
    if data.eval is None and not data.holdout and data.train != EMBEDDED_DATA:
        raise RecipeError(
            "there are no held-out prompts to measure on; name a file in data.eval, or hold some of "
            "data.train out with data.holdout"
        )
    yield from count_prompts(recipe, "eval", asked)


def count_prompts(
    recipe: Recipe, part: Part, asked: dict[tuple[str, ...], tuple[Message, ...]]
) -> Generator[str, None, list[int | None]]:
    """Usable prompts of each source, None for one on the hub; yields how each was read."""
    counts: list[int | None] = []
    for source in recipe.data.sources(part):
        if on_the_hub(source.source):
            yield f"data.{part} {source.source} is not here: it will be looked up on the Hugging Face Hub"
            counts.append(None)
            continue
        tally = Tally()
        prompts = read_prompts(
            source,
            recipe.data,
            part=part,
            needs_target=recipe.needs_target,
            needs_pairs=recipe.method.needs_pairs,
            tally=tally,
        )
        count = 0
        for prompt in prompts:
            count += 1
            asked.setdefault(tuple(message.role for message in prompt.messages), prompt.messages)
        counts.append(count)
        if not count:
            raise DataError(nothing_left(tally))
        if source.source != EMBEDDED_DATA:
            yield from tally.lines()
    return counts


def on_the_hub(source: str) -> bool:
    """Whether a source of data is none of this machine's, so that only the Hub can tell what is in it."""
    path = Path(source).expanduser()
    is_local = source.startswith((".", "embedded:")) or is_data_file(path) or path.exists()
    return not is_local and source.count("/") == 1


def _without_effect(recipe: Recipe) -> Iterator[str]:
    """Settings that change nothing in this recipe, or fight each other."""
    method, loop, train = recipe.method, recipe.loop, recipe.train
    if recipe.judge and not method.needs_judge:
        yield (
            f"judge: method {plugin_name(prefloop.methods, method)} ranks without it"
            + (
                ", and eval_judge scores the held-out answers: it has no effect"
                if recipe.eval_judge
                else "; it only scores the held-out answers"
            )
        )
    of_method = method.defaults.get("loop", {})  # nobody wrote these
    for option in ("mix_previous", "carry_optimizer"):
        if loop.rounds == 1 and getattr(loop, option) and not of_method.get(option):
            yield f"loop.{option} has no effect in a single round"
    stopping = recipe.evaluate
    if stopping.early_stopping_threshold and stopping.early_stopping_patience is None:
        yield "evaluate.early_stopping_threshold has no effect without evaluate.early_stopping_patience"
    if loop.prompts_per_round < train.batch_size:
        yield (
            f"loop.prompts_per_round ({loop.prompts_per_round}) is less than "
            f"train.batch_size ({train.batch_size}): each epoch is one smaller step"
        )
    processes = (recipe.launch.processes if recipe.launch else None) or 1
    if train.batch_size < processes:
        yield (
            f"train.batch_size ({train.batch_size}) is less than launch.processes ({processes}): "
            "some processes have nothing to do"
        )
    writes = not method.needs_pairs
    if writes and method.generator == "frozen" and method.reference == "round_start":
        yield (
            "method.generator frozen with method.reference round_start: "
            "answers come from the initial policy, the loss is measured from the round's"
        )
