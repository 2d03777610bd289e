"""What a run spends: counted where it is spent, kept over a kill, and the end of a run that has spent enough."""

import json
from collections import Counter
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from prefloop.generate.engines.fake import FakeEngine
from prefloop.models.chat import Chat
from prefloop.models.policy import Policy
from prefloop.recipe import Recipe
from prefloop.recipe.options import Budget
from prefloop.records import Candidates, Message, Request, Response, Sampling
from prefloop.run.chunks import ChunkStore, Journal
from prefloop.run.engine import Metered, _adapted, _adapted_otherwise
from prefloop.run.loop import run
from prefloop.run_folder import RunDir
from prefloop.train.trainer import Trainer
from tests.conftest import model_options
from tests.run.test_loop import OPEN

SHORT = {"max_new_tokens": 5}


def recipe(model: Path, **loop: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "spender",
            "model": {"source": str(model), "device": "cpu", "dtype": "float32"},
            "method": {
                "name": "arop",
                "sampling": SHORT,
                "margin": {"kind": "confidence"},
                "gates": OPEN,
            },
            "data": {"limit": 4},
            "generate": {"chunk_size": 1},
            "loop": {"rounds": 5, "prompts_per_round": 2, "carry_optimizer": False, **loop},
            "train": {"epochs": 2, "batch_size": 2, "micro_batch_size": 2},
            "evaluate": {"prompts": 1, "introspection": False, "every_round": False},
            "guard": {"min_stop_rate": 0.0},
        }
    )


def manifests(folder: Path, round: int = 0) -> dict[str, dict[str, Any]]:
    round_dir = folder / "rounds" / f"{round:04d}"
    found = [json.loads(path.read_text()) for path in round_dir.glob("*.done.json")]
    return {manifest["stage"]: manifest for manifest in found}


def tokens(folder: Path) -> int:
    """Of all answers of round 0, each of which is a phase's own."""
    groups = RunDir(folder).round(0).records("candidates", Candidates)
    return sum(len(r.token_ids) for group in groups for r in group.responses.values())


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def test_a_metered_engine_answers_as_it_would_and_counts(tokenizer):
    chat = Chat(tokenizer)
    asks = [Request(messages=(Message(role="user", content=text),)) for text in ("one", "three")]
    counts: Counter[str] = Counter()
    plain, metered = FakeEngine(), Metered(FakeEngine(), chat, counts)
    answers = metered.sample(asks, Sampling(), seed=1)
    assert answers == plain.sample(asks, Sampling(), seed=1)
    prompts = sum(len(chat.prompt_ids(ask.messages)) for ask in asks)
    drawn = sum(len(answer.token_ids) for answer in answers)
    assert counts == {"generated_tokens": drawn, "read_tokens": prompts}
    scored = metered.score(asks, answers)
    assert scored == plain.score(asks, answers)
    given = sum(len(one.token_ids) for one in scored)
    assert counts["read_tokens"] == 2 * prompts + given
    assert metered.choose(asks, "ab") == plain.choose(asks, "ab")
    assert counts == {"generated_tokens": drawn, "read_tokens": 3 * prompts + given}


def test_a_run_ends_after_the_round_in_which_it_reaches_its_budget(model_folder, tmp_path):
    """Two rounds of 2 prompts x 4 phases x at most 5 tokens pass 50; the result is measured all the same."""
    budget = {"generated_tokens": 50}
    outcome = run(recipe(model_folder, budget=budget), tmp_path / "r", Console(file=StringIO()))
    rounds = [round_dir.number for round_dir in RunDir(outcome.folder).rounds()]
    drawn = [manifests(outcome.folder, n)["candidates"]["generated_tokens"] for n in rounds]
    assert rounds == [0, 1]
    assert drawn[0] < 50 <= sum(drawn)
    assert [result.round for result in outcome.results] == [-1, 1]
    last, published = (outcome.folder / p for p in ("rounds/0001/policy", "policy"))
    weights = "adapter_model.safetensors"
    assert (last / weights).read_bytes() == (published / weights).read_bytes()
    found = manifests(outcome.folder)
    assert found["candidates"]["generated_tokens"] == tokens(outcome.folder)
    assert found["ranked"]["read_tokens"] > 0
    assert "generated_tokens" not in found["ranked"]
    assert found["train"]["tokens"] == 2 * found["train"]["reference_tokens"] > 0
    assert all(manifest["peak_memory_mb"] > 50 for manifest in found.values())


def test_a_killed_stage_keeps_what_it_has_spent(model_folder, tmp_path, monkeypatch):
    options = recipe(model_folder, rounds=1)
    append = Journal.append
    with monkeypatch.context() as patch:

        def dying(at: Journal | Trainer, *chunk: Any) -> None:
            if isinstance(at, Trainer) or (at.chunks and "candidates" in str(at._main)):
                raise KeyboardInterrupt
            append(at, *chunk)

        patch.setattr(Journal, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            run(options, tmp_path / "killed", Console(file=StringIO()))
        patch.setattr(Trainer, "run", dying)
        patch.setattr(Journal, "append", append)
        with pytest.raises(KeyboardInterrupt):
            run(options, tmp_path / "killed", Console(file=StringIO()))
    spent = manifests(tmp_path / "killed")["candidates"]["generated_tokens"]
    assert spent == tokens(tmp_path / "killed")


def test_parts_of_several_processes_bring_their_counts(tmp_path):
    parts = ChunkStore(tmp_path, "candidates")
    prompt = {"id": "p", "messages": [{"role": "user", "content": "?"}]}
    # Separators of lines elsewhere, which JSON does not escape.
    answer = Response(text="x\u2028y\x85z")
    group = Candidates.model_validate({"prompt": prompt, "responses": {"a": answer}})
    parts.write(3, [group], {"generated_tokens": 7})
    assert parts.read(3) == ([group], {"generated_tokens": 7})


def test_weights_that_multiply_are_all_but_a_table_that_is_only_looked_up(model_folder, tokenizer):
    policy = Policy.load(model_options(model_folder))
    plain = LlamaForCausalLM.from_pretrained(model_folder)
    everything = sum(weight.numel() for weight in plain.parameters())
    assert policy.multiplying_weights == everything - len(tokenizer) * 32
    # Tied, the table is the head as well and counts once.
    policy.model.get_base_model().lm_head.weight = policy.model.get_input_embeddings().weight
    assert policy.multiplying_weights == everything - len(tokenizer) * 32


def test_a_budget_that_limits_nothing_is_refused():
    with pytest.raises(ValueError, match="limits nothing"):
        Budget()


# peft reads a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_engine_is_told_all_that_the_adapter_changes(model_folder):
    """Also where a pattern names the modules; and experts that are parameters of one module."""
    pattern = {"r": 2, "target_modules": r".*\.(q|v)_proj"}
    policy = Policy.load(model_options(model_folder, lora=pattern))
    assert _adapted(policy) == ("q_proj", "v_proj")
    assert _adapted_otherwise(policy) == ()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **heads, **experts))
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    mixture: Any = SimpleNamespace(model=get_peft_model(base, config))
    assert _adapted(mixture) == ("q_proj",)
    assert _adapted_otherwise(mixture) == ("experts.gate_up_proj",)
