"""Tiny real models, tokenizers and prompts, made here: no network, no hub."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefloop.cli.switches import Verbosity
from prefloop.generate.cpu import attention, draws, layers
from prefloop.models.policy import Policy
from prefloop.models.sources import ModelOptions
from prefloop.records import Message, Prompt
from tests.c_compiler import needs_c_compiler

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_configure() -> None:
    """A shell gives what it starts in the background an ignored Ctrl-C, and tests that send one would wait for good."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def byte_tokenizer() -> Any:
    """A byte-level tokenizer with ChatML turns: every text survives the round trip."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of the tiny models; tests leave it as it is."""
    return byte_tokenizer()


def tiny_llama(vocabulary: int, seed: int = 0, *, intermediate_size: int = 48) -> LlamaForCausalLM:
    """A two-layer Llama with grouped queries and random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=intermediate_size,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                bos_token_id=None,
                eos_token_id=1,
                pad_token_id=1,
            )
        ).eval()


def trainable_weights(policy: Policy) -> list[nn.Parameter]:
    """What an optimiser is given."""
    return [weight for weight in policy.model.parameters() if weight.requires_grad]


def labelled_prompts(count: int) -> list[Prompt]:
    """Prompts p0, p1 and so on with a target and a labelled pair."""
    return [
        Prompt(
            id=f"p{n}",
            messages=(Message(role="user", content=f"Question {n}?"),),
            target=f"right {n}",
            chosen=f"good {n}",
            rejected=f"bad {n}",
        )
        for n in range(count)
    ]


def save_tiny_llama(folder: Path, tokenizer: Any, seed: int = 0) -> Path:
    """The tiny model and its tokenizer as files."""
    tiny_llama(len(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_section(folder: Path | str, **more: Any) -> dict[str, Any]:
    """A recipe's section `model` as tests have it: in float32, which `auto` is on some CPUs only."""
    return {"source": str(folder), "device": "cpu", "dtype": "float32", **more}


def model_options(folder: Path | str, **more: Any) -> ModelOptions:
    """The same as options."""
    return ModelOptions.model_validate(model_section(folder, **more))


_DECIDES = "prefloop.models.dtype.multiplies_bfloat16_fast"


@pytest.fixture
def fast_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which `auto` may be bfloat16."""
    monkeypatch.setattr(_DECIDES, lambda: True)


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU multiplies bfloat16 fast: one that does, and one that does not."""
    fast = bool(request.param)
    monkeypatch.setattr(_DECIDES, lambda: fast)
    return fast


@pytest.fixture(autouse=True)
def usual_verbosity() -> Iterator[None]:
    """A test that asks the command line for quiet leaves the next one's bars alone."""
    yield
    Verbosity.reset()


@pytest.fixture(autouse=True, scope="session")
def what_every_run_begins_with_is_brief() -> Iterator[None]:
    """Runs time this machine only for a moment, and of equal options on one model the policy is checked once."""
    from prefloop.run import estimate, session

    passed: dict[tuple[str, ...], Any] = {}
    check = session.check_policy

    def check_once(policy: Policy, train: Any, folder: Path) -> Any:
        options = (policy.options.model_dump_json(), train.model_dump_json())
        if options not in passed:
            passed[options] = check(policy, train, folder)
        return passed[options]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "check_policy", check_once)
        patch.setattr(estimate, "_MOMENT", 0.01)
        yield


@pytest.fixture(autouse=True, scope="session")
def the_command_line_is_built_once() -> Iterator[None]:
    """As in a process that is one command; typer builds all commands anew whenever it is called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.main.get_command", cache(typer.main.get_command))
        yield


@pytest.fixture
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that no power cut will end need not wait until its files are on the disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def model(tokenizer: Any) -> LlamaForCausalLM:
    """A fresh tiny model; tests may change it."""
    return tiny_llama(len(tokenizer))


@pytest.fixture(params=[pytest.param("C", marks=needs_c_compiler), "torch"])
def computing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Decoding by the compiled functions, and by torch as where there is no compiler."""
    if request.param == "torch":
        for room, name in ((attention, "_compiled"), (draws, "_compiled"), (layers, "_rows")):
            monkeypatch.setattr(room, name, lambda *_: None)
    return str(request.param)


@pytest.fixture(scope="session")
def model_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a folder that recipes can name."""
    return save_tiny_llama(tmp_path_factory.mktemp("model"), tokenizer)
