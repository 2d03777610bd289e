"""Engines by name: what the recipe says of them, and what is found before a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import prefloop.generate.engines
from prefloop.config import find_plugin, plugin_names
from prefloop.errors import ApiError, GenerationError, RecipeError
from prefloop.generate.engine import EngineContext, EngineOptions, Weights
from prefloop.generate.engines.fake import Fake
from prefloop.generate.engines.openai import OpenAI
from prefloop.models.chat import Chat
from prefloop.recipe import Recipe
from prefloop.recipe.check import check_recipe
from prefloop.records import Message, Request, Sampling
from tests.fake_chat_server import completion, serve

STAND_IN = Path(__file__).parents[1] / "stand_in"
AROP: dict[str, Any] = {"name": "arop", "margin": {"kind": "fixed"}, "generator": "frozen"}


def recipe(engine: dict[str, Any], **sections: Any) -> Recipe:
    return Recipe.model_validate({"name": "a", "method": AROP, "engine": engine, **sections})


def requests(*texts: str) -> list[Request]:
    return [Request(messages=(Message(role="user", content=text),)) for text in texts]


def test_engines_are_found_by_file_name():
    package = prefloop.generate.engines
    assert plugin_names(package) == ["fake", "hf", "openai", "vllm"]
    for name in plugin_names(package):
        kind = find_plugin(package, name, EngineOptions, "engine")
        assert kind.__doc__


def test_the_recipe_names_its_engine_and_dumps_it_back():
    made = recipe({"name": "vllm", "tensor_parallel": 2})
    assert made.model_dump(mode="json")["engine"]["name"] == "vllm"
    assert Recipe.model_validate(made.model_dump(mode="json")) == made
    assert Recipe.model_validate({"name": "a", "method": AROP}).model_dump()["engine"] == {
        "name": "hf"
    }


def test_a_misspelt_engine_is_named():
    with pytest.raises(ValueError, match=r"no engine 'vlm'; did you mean 'vllm'"):
        recipe({"name": "vlm"})


# vLLM


def test_a_python_without_vllm_is_named_before_the_run():
    with pytest.raises(RecipeError, match=r"has no package vllm; install it there, or name"):
        check_recipe(recipe({"name": "vllm", "python": sys.executable}))
    with pytest.raises(RecipeError, match=r"engine\.python: no program /nowhere/python"):
        check_recipe(recipe({"name": "vllm", "python": "/nowhere/python"}))


def test_a_python_with_vllm_passes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    check_recipe(recipe({"name": "vllm", "python": sys.executable}))


def test_a_running_server_must_answer_and_can_take_adapters_only():
    url = "http://127.0.0.1:9"
    with pytest.raises(RecipeError, match=r"engine\.url http://127\.0\.0\.1:9 does not answer as"):
        check_recipe(recipe({"name": "vllm", "url": url}))
    with pytest.raises(RecipeError, match=r"model\.tuning full makes a new model each round"):
        check_recipe(recipe({"name": "vllm", "url": url}, model={"tuning": "full"}))
    with pytest.raises(ValueError, match=r"which engine\.tensor_parallel cannot change"):
        recipe({"name": "vllm", "url": url, "tensor_parallel": 2})


def test_a_rank_that_vllm_cannot_hold_is_an_error():
    with pytest.raises(RecipeError, match=r"model\.lora\.r is 600, and vLLM serves .* 512"):
        check_recipe(recipe({"name": "vllm"}, model={"lora": {"r": 600}}))


# A server with OpenAI's interface


def options(url: str, **more: Any) -> dict[str, Any]:
    return {"name": "openai", "url": url, "model": "m", "retries": 0, **more}


def test_another_models_answers_need_a_frozen_generator_and_no_log_probs():
    engine = options("http://127.0.0.1:9/v1")
    with pytest.raises(RecipeError, match=r"never trained; say so with method\.generator: frozen"):
        check_recipe(recipe(engine, method={**AROP, "generator": "current"}))
    for method, said in (
        ({"margin": {"kind": "confidence"}}, "margin.kind: confidence"),
        ({"margin": {"kind": "severity"}}, "margin.kind: severity"),
        ({"flaw": "infill"}, "flaw: infill"),
    ):
        with pytest.raises(RecipeError, match=rf"no log-probabilities.* asks for here \({said}\)"):
            check_recipe(recipe(engine, method={**AROP, **method}))
    with pytest.raises(RecipeError, match=r"section engine: .* cannot be reached"):
        check_recipe(recipe(engine))


def test_a_server_without_the_model_is_named():
    with (
        serve(lambda body: "Hi") as server,
        pytest.raises(RecipeError, match=r"serves no 'other'; it serves m$"),
    ):
        check_recipe(recipe(options(server.url, model="other")))


def test_answers_come_from_the_server_in_order_with_seeds_of_their_own(tokenizer):
    bodies = []

    def answer(body: dict[str, Any]) -> tuple[int, object]:
        bodies.append(body)
        text = body["messages"][-1]["content"]
        if text == "bad":
            return 400, {"error": {"message": "filtered"}}
        return 200, completion(f" {text}! ", finish="length" if text == "b" else "stop")

    with serve(answer) as server:
        made = OpenAI(**{k: v for k, v in options(server.url).items() if k != "name"})
        engine = made.open(
            EngineContext(Chat(tokenizer), "float32", None, (), False, Path("unused"))
        )
        engine.load_weights(Weights(Path("unused")), list)
        sampling = Sampling(temperature=0.5, top_k=3, max_new_tokens=9)
        found = engine.sample(requests("a", "b", "bad", "c"), sampling, seed=1)
    assert [r.text for r in found] == ["a!", "b!", "", "c!"]
    assert [r.finish for r in found] == ["stop", "length", "stop", "stop"]
    assert {body["top_k"] for body in bodies} == {3}
    # What is off is said as well: the server's model may have defaults of its own.
    off = {"min_p": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
    off |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    for body in bodies:
        assert {key: body[key] for key in off} == off
    assert {(body["max_tokens"], body["temperature"]) for body in bodies} == {(9, 0.5)}
    assert len({body["seed"] for body in bodies}) == 4
    assert all(0 <= body["seed"] < 2**31 for body in bodies)


def test_a_server_that_is_gone_in_the_middle_is_one_sentence(tokenizer):
    made = OpenAI(url="http://127.0.0.1:9/v1", model="m", retries=0)
    engine = made.open(EngineContext(Chat(tokenizer), "float32", None, (), False, Path("unused")))
    with pytest.raises(ApiError, match="cannot be reached"):
        engine.sample(requests("a"), Sampling(), seed=0)


def test_an_option_that_is_off_is_sent_as_off(tokenizer):
    bodies = asked_with(tokenizer, Sampling(temperature=1.0, max_new_tokens=9))
    assert bodies[0]["top_k"] == 0
    assert "stop" not in bodies[0]


def test_a_server_that_takes_openais_fields_only_gets_no_others(tokenizer):
    standard = {"sampling_fields": "standard"}
    [body] = asked_with(tokenizer, Sampling(max_new_tokens=9, stop=("x",)), **standard)
    assert body.keys() == {
        *("model", "messages", "max_tokens", "temperature", "top_p", "seed", "stop"),
        *("presence_penalty", "frequency_penalty"),
    }
    with pytest.raises(GenerationError, match="cannot send top_k and min_p; leave them out"):
        asked_with(tokenizer, Sampling(top_k=5), **standard)


def test_openais_own_server_wants_its_own_fields():
    own = {"url": "https://api.openai.com/v1", "model": "m"}
    with pytest.raises(ValueError, match=r"set engine\.sampling_fields to standard"):
        OpenAI(**own)
    assert OpenAI(**own, sampling_fields="standard").sampling_fields == "standard"


def asked_with(tokenizer: Any, sampling: Sampling, **more: Any) -> list[dict[str, Any]]:
    """What the server is asked for one answer."""
    bodies = []

    def answer(body: dict[str, Any]) -> str:
        bodies.append(body)
        return "Hi"

    with serve(answer) as server:
        made = OpenAI(**{k: v for k, v in options(server.url, **more).items() if k != "name"})
        setting = EngineContext(Chat(tokenizer), "float32", None, (), False, Path("unused"))
        made.open(setting).sample(requests("a"), sampling, seed=1)
    return bodies


def test_fake_answers_are_in_the_policys_tokens(tokenizer):
    """What comes after trains on them."""
    chat = Chat(tokenizer)
    engine = Fake().open(EngineContext(chat, "float32", None, (), False, Path("unused")))
    [answer] = engine.sample(requests("a"), Sampling(), seed=1)
    assert list(answer.token_ids) == chat.completion_ids(requests("a")[0].messages, answer.text)


def test_what_a_server_keeps_apart_as_thought_is_no_part_of_the_answer(tokenizer):
    def answer(body: dict[str, Any]) -> tuple[int, object]:
        whole = completion("Four.")
        whole["choices"][0]["message"]["reasoning_content"] = "2 and 2"
        return 200, whole

    with serve(answer) as server:
        made = OpenAI(**{k: v for k, v in options(server.url).items() if k != "name"})
        setting = EngineContext(Chat(tokenizer), "float32", None, (), False, Path("unused"))
        [found] = made.open(setting).sample(requests("a"), Sampling(), seed=1)
    assert (found.text, found.reasoning, found.token_ids) == ("Four.", "2 and 2", ())
