"""The vLLM engine against a stand-in server: what it asks, whose weights answer, and how everything ends."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
from safetensors.torch import save_file
from torch import ones

from prefloop.errors import GenerationError, RecipeError
from prefloop.generate.engine import EngineContext, Weights
from prefloop.generate.engines.vllm import VLLM, VLLMEngine
from prefloop.generate.vllm_server import _answer
from prefloop.generate.weight_check import probe
from prefloop.models.chat import Chat
from prefloop.records import Message, Request, Response, Sampling, Scored
from tests.stand_in.vllm.entrypoints.cli.main import fingerprint, logprobs

STAND_IN = Path(__file__).parents[1] / "stand_in"
SAMPLING = Sampling(max_new_tokens=6)


class Trainer:
    """What the trainer's model would say, had it the weights of these folders."""

    def __init__(self, chat: Chat, *folders: Path) -> None:
        self.chat, self.weights = chat, fingerprint(*folders)

    def score(
        self, requests: list[Request], answers: list[Response], *, top: int = 0
    ) -> list[Scored]:
        found = []
        for request, answer in zip(requests, answers, strict=True):
            ids = self.chat.completion_ids(request.messages, answer.text)
            row = [*self.chat.prompt_ids(request.messages), *ids]
            pairs = list(pairwise(row))[-len(ids) :]
            chosen = tuple(logprobs(self.weights, before)[token] for before, token in pairs)
            found.append(Scored(token_ids=tuple(ids), offsets=(), logprobs=chosen))
        return found


@pytest.fixture
def chat(tokenizer: Any) -> Chat:
    return Chat(tokenizer)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return weights_in(tmp_path / "model", 1.0)


def weights_in(folder: Path, value: float) -> Path:
    folder.mkdir()
    save_file({"weight": ones(2) * value}, folder / "model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def opened(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., VLLMEngine]]:
    """Opens engines over the stand-in, and closes them."""
    path = [str(STAND_IN), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    engines = []

    def open_engine(lora_rank: int | None = 8, **options: Any) -> VLLMEngine:
        setting = EngineContext(
            chat, "float32", lora_rank, ("q_proj", "up_proj"), False, tmp_path / "engine.log"
        )
        engines.append(VLLM(**options).open(setting))
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()


@pytest.fixture
def load_weights(chat: Chat) -> Callable[..., None]:
    def serve_weights(engine: VLLMEngine, model: Path, adapter: Path | None = None) -> None:
        trainer = Trainer(chat, *(folder for folder in (model, adapter) if folder))
        engine.load_weights(Weights(model, adapter), lambda: probe(trainer))  # type: ignore[arg-type]

    return serve_weights


def requests(count: int = 3, prefix: str = "") -> list[Request]:
    return [
        Request(messages=(Message(role="user", content=f"Question {n}"),), prefix=prefix)
        for n in range(count)
    ]


def processes(log: Path) -> list[int]:
    lines = [line for line in log.read_text().splitlines() if line.startswith("processes:")]
    return [int(word) for word in lines[-1].split()[1:]]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


# What an engine is asked for.


def test_samples_carry_seeds_of_their_own_and_the_log_probs_of_their_tokens(
    opened, load_weights, model
):
    engine = opened()
    load_weights(engine, model)
    first = engine.sample(requests(), SAMPLING, seed=1)
    assert engine.sample(requests(), SAMPLING, seed=1) == first
    assert engine.sample(requests(), SAMPLING, seed=2) != first
    assert len({response.token_ids for response in first}) == 3
    weights = fingerprint(model)
    for request, response in zip(requests(), first, strict=True):
        prompt = engine._chat.prompt_ids(request.messages)
        row = [prompt[-1], *response.token_ids]
        chosen = [logprobs(weights, a)[b] for a, b in pairwise(row)]
        assert response.mean_logprob == pytest.approx(sum(chosen) / len(chosen))
        assert response.finish == ("stop" if row[-1] in engine._chat.stop_ids else "length")


def test_a_begun_answer_is_continued_and_keeps_its_space(opened, load_weights, model, chat):
    engine = opened()
    load_weights(engine, model)
    (whole,) = engine.sample(requests(1, prefix="It is"), SAMPLING, seed=3)
    expected = chat.decode([t for t in whole.token_ids if t not in chat.stop_ids])
    assert whole.text == expected


def test_scores_have_the_log_probs_and_likeliest_tokens_of_every_place(
    opened, load_weights, model, chat
):
    engine = opened()
    load_weights(engine, model)
    (scored,) = engine.score(requests(1), [Response(text="Yes.")], top=3)
    (expected,) = Trainer(chat, model).score(requests(1), [Response(text="Yes.")])
    assert scored.token_ids == expected.token_ids
    assert scored.logprobs == pytest.approx(expected.logprobs)
    assert scored.offsets[-1] == (4, 4)
    for place, token in enumerate(scored.token_ids[:-1]):
        row = logprobs(fingerprint(model), token)
        assert list(scored.top_logprobs[place + 1]) == pytest.approx(sorted(row)[-3:][::-1])
        assert len(scored.top_texts[place + 1]) == 3
    assert engine.score(requests(1), [Response(text="Yes.")])[0].top_texts == ()


def test_options_are_chosen_from_by_their_probabilities(opened, load_weights, model, chat):
    engine = opened()
    load_weights(engine, model)
    (row,) = engine.choose(requests(1), ["1", "2", "3"])
    last = chat.prompt_ids(requests(1)[0].messages)[-1]
    known = [logprobs(fingerprint(model), last)[chat.text_ids(o)[0]] for o in ("1", "2", "3")]
    assert row == pytest.approx([math.exp(logprob) for logprob in known])
    with pytest.raises(GenerationError, match="do not differ in their first token"):
        engine.choose(requests(1), ["yes", "yellow"])


def test_a_prompt_that_is_too_long_is_refused_in_the_servers_words(opened, load_weights, model):
    engine = opened()
    load_weights(engine, model)
    long = [Request(messages=(Message(role="user", content="x" * 3000),))]
    with pytest.raises(
        GenerationError, match=r"refuses a request \(maximum context length is 2048"
    ):
        engine.sample(long, SAMPLING, seed=0)


def test_every_sampling_value_goes_along_with_every_request(
    opened, load_weights, model, monkeypatch
):
    """A server that runs already may take a repetition penalty from its model's generation_config."""
    engine = opened()
    load_weights(engine, model)
    bodies: list[dict[str, Any]] = []
    real = engine._server.ask_all

    def listening(path: str, asked: list[dict[str, Any]], done: Any) -> Any:
        bodies.extend(asked)
        return real(path, asked, done)

    monkeypatch.setattr(engine._server, "ask_all", listening)
    (answer,) = engine.sample(requests(1), SAMPLING, seed=1)
    engine.score(requests(1), [answer])
    engine.choose(requests(1), ["1", "2"])
    assert len(bodies) == 3
    off = {"top_k": 0, "min_p": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}
    for body in bodies:
        assert {key: body[key] for key in off} == off
        assert body["presence_penalty"] == body["frequency_penalty"] == 0.0
        assert "temperature" in body


def test_sampled_tokens_are_scored_as_they_were_drawn(opened, load_weights, model):
    engine = opened()
    load_weights(engine, model)
    asks = requests(6)
    for answer, scored in zip(
        found := engine.sample(asks, SAMPLING, seed=1), engine.score(asks, found), strict=True
    ):
        assert scored.token_ids == answer.token_ids
        assert scored.mean_logprob == pytest.approx(answer.mean_logprob)
    assert engine.score(asks[:1], [Response(text="", finish="length")])[0].token_ids == ()


def test_an_adapter_of_more_than_linear_modules_is_refused(chat, tmp_path):
    setting = EngineContext(
        chat, "float32", 8, ("q_proj",), False, tmp_path / "log", ("mlp.experts.gate_up_proj",)
    )
    with pytest.raises(RecipeError, match=r"changes mlp\.experts\.gate_up_proj, and vLLM serves"):
        VLLM().open(setting)


# Weights.


def test_each_round_is_served_under_a_fresh_name_and_the_one_before_is_gone(
    opened, load_weights, model, tmp_path
):
    engine = opened()
    load_weights(engine, model)
    answers = [engine.sample(requests(), SAMPLING, seed=1)]
    for number in range(2):
        load_weights(engine, model, weights_in(tmp_path / f"adapter-{number}", number))
        answers.append(engine.sample(requests(), SAMPLING, seed=1))
        load_weights(engine, model, tmp_path / f"adapter-{number}")
    assert len({answer[0].token_ids for answer in answers}) == 3
    names = [card["id"] for card in ask_models(engine)]
    assert names[0] == "policy"
    assert len(names) == 2
    assert names[1].endswith("-2")
    load_weights(engine, model)
    assert engine.sample(requests(), SAMPLING, seed=1) == answers[0]
    assert len(ask_models(engine)) == 1


def ask_models(engine: VLLMEngine) -> list[dict[str, Any]]:
    transport = httpx2.HTTPTransport(uds=engine._server._socket)
    with httpx2.Client(transport=transport) as client:
        cards: list[dict[str, Any]] = client.get("http://localhost/v1/models").json()["data"]
    return cards


def test_whole_models_are_exchanged_by_a_new_server(opened, load_weights, model, tmp_path):
    engine = opened(lora_rank=None)
    load_weights(engine, model)
    before = processes(tmp_path / "engine.log")
    load_weights(engine, weights_in(tmp_path / "next", 2.0))
    assert gone(before)
    assert all(map(alive, processes(tmp_path / "engine.log")))
    assert "--enable-lora" not in (tmp_path / "engine.log").read_text()


def test_the_probe_catches_a_server_that_keeps_its_first_adapter(
    opened, load_weights, model, tmp_path, monkeypatch
):
    monkeypatch.setenv("STAND_IN", "stale")
    engine = opened()
    load_weights(engine, model, weights_in(tmp_path / "first", 1.0))
    with pytest.raises(
        GenerationError, match=r"does not answer with the weights in .*/second: its log"
    ):
        load_weights(engine, model, weights_in(tmp_path / "second", 2.0))


def test_the_probe_catches_another_model(opened, model, chat, tmp_path):
    engine = opened()
    trainer = Trainer(chat, weights_in(tmp_path / "other", 2.0))
    with pytest.raises(GenerationError, match="nats a token away from the trainer's"):
        engine.load_weights(Weights(model), lambda: probe(trainer))  # type: ignore[arg-type]


def test_an_adapter_that_the_server_refuses_is_named(opened, load_weights, model, tmp_path):
    engine = opened()
    (tmp_path / "empty").mkdir()
    with pytest.raises(GenerationError, match=r"will not load the adapter .*/empty \(no adapter"):
        load_weights(engine, model, tmp_path / "empty")


def test_a_server_that_runs_already_gets_the_adapter_and_is_left_as_it_was(
    opened, load_weights, model, tmp_path, monkeypatch
):
    adapter = weights_in(tmp_path / "adapter", 3.0)
    words = [*("-m", "vllm.entrypoints.cli.main", "serve"), str(model)]
    command = [sys.executable, *words, "--served-model-name", "theirs"]
    opened(max_num_seqs=1)  # sets the path to the stand-in
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as own:
        assert own.stdout is not None
        try:
            port = [own.stdout.readline() for _ in range(3)][-1].split()[1]
            url = f"http://127.0.0.1:{port}"
            VLLM(url=url).check(tuning="lora", lora_rank=8)
            engine = opened(url=url)
            load_weights(engine, model)
            base = engine.sample(requests(), SAMPLING, seed=1)
            load_weights(engine, model, adapter)
            assert engine.sample(requests(), SAMPLING, seed=1) != base
            assert len(httpx2.get(f"{url}/v1/models").json()["data"]) == 2
            engine.close()
            assert [c["id"] for c in httpx2.get(f"{url}/v1/models").json()["data"]] == ["theirs"]
        finally:
            os.killpg(own.pid, signal.SIGKILL)
    with pytest.raises(
        GenerationError, match=r"server at http://127.* is gone or failing .*start it"
    ):
        engine.sample(requests(), SAMPLING, seed=1)


def test_a_damaged_answer_is_a_failure_of_the_server():
    """Like one that cannot be reached, which Server says in a sentence."""
    request = httpx2.Request("POST", "http://x/v1/completions")
    kind = {"Content-Type": "application/json"}
    response = httpx2.Response(200, headers=kind, content=b'{"choices": [', request=request)
    with pytest.raises(httpx2.HTTPError, match="damaged"):
        _answer(response)


# The command.


def test_the_command_says_what_the_recipe_says(opened, load_weights, model, tmp_path):
    engine = opened(
        lora_rank=12,
        tensor_parallel=2,
        data_parallel=3,
        gpu_memory=0.5,
        max_num_seqs=7,
        eager=True,
        arguments=("--max-model-len", "512"),
    )
    load_weights(engine, model)
    said = (tmp_path / "engine.log").read_text().splitlines()[0].split()
    wanted = (
        "--dtype=float32 --tensor-parallel-size=2 --data-parallel-size=3 --max-num-seqs=7 "
        "--gpu-memory-utilization=0.5 --max-lora-rank=16 --enable-lora --enforce-eager "
        "--enable-prefix-caching --generation-config=vllm --max-model-len 512 "
        "--lora-target-modules q_proj up_proj"
    )
    assert set(wanted.split()) <= set(said)


# The end.


def test_closing_ends_all_processes_and_a_later_question_starts_new_ones(
    opened, load_weights, model, tmp_path
):
    engine = opened()
    load_weights(engine, model)
    engine.offload()
    before = processes(tmp_path / "engine.log")
    assert all(map(alive, before))
    engine.close()
    assert gone(before)
    load_weights(engine, model)
    assert len(engine.sample(requests(), SAMPLING, seed=1)) == 3


def test_it_rests_while_the_policy_trains_where_the_recipe_says_so(
    opened, load_weights, model, tmp_path
):
    engine = opened(stay=False)
    load_weights(engine, model)
    engine.offload()
    assert gone(processes(tmp_path / "engine.log"))


@pytest.mark.parametrize("victim", [0, 1], ids=["server", "server and engine"])
def test_a_killed_server_is_reported_in_a_sentence_and_leaves_nothing(
    opened, load_weights, model, tmp_path, victim
):
    engine = opened()
    load_weights(engine, model)
    found = processes(tmp_path / "engine.log")
    for pid in found[: victim + 1]:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        GenerationError, match=r"^vLLM was killed by SIGKILL .*the same command goes"
    ):
        engine.sample(requests(), SAMPLING, seed=1)
    assert gone(found)


def test_a_server_killed_in_the_middle_of_answers_is_reported(
    opened, load_weights, model, chat, tmp_path, monkeypatch
):
    engine = opened()
    monkeypatch.setenv("STAND_IN", "slow")
    trainer = Trainer(chat, model)
    found: list[int] = []

    def kill() -> None:
        log = tmp_path / "engine.log"
        while not (log.exists() and "processes:" in log.read_text()):
            time.sleep(0.05)
        time.sleep(0.5)
        found.extend(processes(log))
        os.kill(found[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(GenerationError, match=r"^vLLM was killed by SIGKILL"):
        engine.load_weights(Weights(model), lambda: probe(trainer))  # type: ignore[arg-type]
    assert gone(found)


def test_a_server_that_cannot_start_is_quoted(opened, load_weights, model, monkeypatch):
    monkeypatch.setenv("STAND_IN", "broken")
    with pytest.raises(
        GenerationError, match=r"could not be started: ValueError: no kernel .*engine\.log$"
    ):
        load_weights(opened(), model)


HOLDER = """
import sys, time
from pathlib import Path
from prefloop.generate.vllm_server import Server
server = Server(None, Path(sys.argv[1]), concurrency=1, timeout=60.0)
command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", sys.argv[2]]
server.start([*command, "--served-model-name=policy"], 60.0)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_a_run_that_is_killed(opened, model, tmp_path, end):
    log = tmp_path / "engine.log"
    command = [sys.executable, "-c", HOLDER, str(log), str(model)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        found = processes(log)
        assert all(map(alive, found))
        run.send_signal(end)
    assert gone(found)
