"""Several processes train as one does: the same losses and weights, replicated or sharded, unbroken or resumed."""

import importlib.util
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from prefloop.errors import TrainingError
from prefloop.models.chat import Chat
from prefloop.models.policy import LoraOptions, ModelOptions, Policy
from prefloop.records import Message, Pair
from prefloop.run_folder import read_metrics
from prefloop.train import logprobs, losses
from prefloop.train.batches import Example, encode_pairs, plan, shares
from prefloop.train.losses import GroupLogps, LossOutput
from prefloop.train.options import TrainOptions
from prefloop.train.packing import TokenGroup, pack
from prefloop.train.placement import is_sharded
from prefloop.train.trainer import Job, Trainer

ROLES = ("chosen", "rejected")
# Seven pairs in sixes: the last step of an epoch has one, so one of two ranks has nothing to do.
OPTIONS = TrainOptions(
    epochs=2, lr=1e-2, batch_size=6, micro_batch_size=2, save_every=1, token_budget=90
)
PAIRS = [
    Pair(
        prompt_id=f"p{n}",
        round=0,
        prompt=(Message(role="user", content=f"Say {n} " + "please " * (n % 3)),),
        chosen=f"Here is {n * 7}, with {'care' * (n % 4)}.",
        rejected=f"Here is {n * 5}!",
    )
    for n in range(7)
]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
PLACEMENTS = {"replicated": {}, "fsdp2": FSDP2, "zero3": ZERO3}
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
EVERY_PLACEMENT = pytest.mark.parametrize(
    "placement", ["replicated", "fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)]
)

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["prefloop.train.trainer", "prefloop.recipe", "pytest"])


def dpo(logps: GroupLogps, progress: float) -> LossOutput:
    r_c, r_r = logps.ratio("chosen"), logps.ratio("rejected")
    return LossOutput(losses.dpo(r_c, r_r, beta=0.1), {"gap": (r_c - r_r).detach()})


def train(
    source: Path, folder: Path, *, tuning: str = "lora", stop: int = -1, **changes: Any
) -> None:
    """Train in this process, one of as many as the environment says; `stop` before that step."""
    torch.set_num_threads(1)
    model = ModelOptions.model_validate(
        {
            "source": str(source),
            "tuning": tuning,
            "lora": LoraOptions(r=4, alpha=8, dropout=changes.pop("dropout", 0.0)),
            "dtype": changes.pop("dtype", "float32"),
            "device": "cpu",
            "gradient_checkpointing": changes.pop("gradient_checkpointing", False),
        }
    )
    policy = Policy.load(model, seed=0)
    examples = list(encode_pairs(Chat(policy.tokenizer), PAIRS, ROLES, window=2048))
    job = Job(examples, ROLES, dpo, folder, seed=5, reference=changes.pop("reference", "initial"))
    trainer = Trainer(policy, OPTIONS.model_copy(update=changes))
    original = Trainer._step

    def step(self: Trainer, job: Job, ref: Any, chosen: Any, number: int, steps: int) -> Any:
        if number == stop:
            raise KeyboardInterrupt
        return original(self, job, ref, chosen, number, steps)

    Trainer._step = step  # type: ignore[method-assign]
    try:
        trainer.run(job)
    except KeyboardInterrupt:
        return
    finally:
        Trainer._step = original  # type: ignore[method-assign]
    # Twice: the second job finds the first one's weights, so "initial" and "round_start" differ.
    with patch.object(logprobs, "packed_logprobs", wraps=logprobs.packed_logprobs) as packed:
        trainer.run(replace(job, folder=folder / "second"))
    assert packed.called is trainer.options.packing
    if trainer.placement.sharded:
        assert {len(call.args[1]) for call in packed.call_args_list} <= {1}
    if whole := trainer.whole_policy():
        whole.save(folder / "policy")


def child(
    rank: int, count: int, port: int, extra: dict[str, str], call: Callable[[], None]
) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in places.items()} | extra
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    call()
    torch.distributed.destroy_process_group()


def in_ranks(count: int, extra: dict[str, str], *args: Any, **options: Any) -> None:
    """`train` with these arguments, by so many processes."""
    together(count, extra, partial(train, *args, **options))


def together(count: int, extra: dict[str, str], call: Callable[[], None]) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    ranks = [
        PROCESSES.Process(target=child, args=(rank, count, port, extra, call))
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * count


def same_curve(folder: Path, other: Path, tolerance: float = 1e-5) -> None:
    mine, theirs = (read_metrics(at / "metrics.jsonl") for at in (folder, other))
    assert len(mine) == len(theirs) == 4
    for row, expected in zip(mine, theirs, strict=True):
        assert row == pytest.approx(expected, rel=max(1e-4, 10 * tolerance), abs=10 * tolerance)
        assert row["loss"] == pytest.approx(expected["loss"], abs=tolerance)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "policy").glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@EVERY_PLACEMENT
def test_two_ranks_train_as_one(model_folder, tmp_path, placement, tuning):
    changes = {"tuning": tuning, "optimizer": "rmsprop" if tuning == "full" else "adamw"}
    train(model_folder, tmp_path / "one", **changes)
    in_ranks(2, PLACEMENTS[placement], model_folder, tmp_path / "two", **changes)
    for part in (".", "second"):
        same_curve(tmp_path / "two" / part, tmp_path / "one" / part)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "one" / "policy").is_dir()


@pytest.mark.slow
@EVERY_PLACEMENT
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-5),
        ({"gradient_checkpointing": True, "tuning": "full"}, 1e-5),
        ({"packing": False}, 1e-5),
        ({"reference": "round_start", "tuning": "full"}, 1e-5),
        ({"dtype": "bfloat16"}, 2e-2),
        ({"tuning": "full", "mixed_precision": "bf16"}, 2e-2),
    ],
    ids=str,
)
def test_two_ranks_train_as_one_with_other_options(
    model_folder, tmp_path, placement, changes, tolerance
):
    train(model_folder, tmp_path / "one", **changes)
    in_ranks(2, PLACEMENTS[placement], model_folder, tmp_path / "two", **changes)
    for part in (".", "second"):
        same_curve(tmp_path / "two" / part, tmp_path / "one" / part, tolerance)


@pytest.mark.slow
@EVERY_PLACEMENT
def test_three_ranks_train_as_one(model_folder, tmp_path, placement):
    """Weights do not divide by three."""
    changes = {"tuning": "full", "optimizer": "rmsprop"}
    train(model_folder, tmp_path / "one", **changes)
    in_ranks(3, PLACEMENTS[placement], model_folder, tmp_path / "three", **changes)
    for part in (".", "second"):
        same_curve(tmp_path / "three" / part, tmp_path / "one" / part)


@EVERY_PLACEMENT
def test_two_ranks_go_on_to_the_same_bytes(model_folder, tmp_path, placement):
    """Dropout draws random numbers, each rank its own."""
    extra = PLACEMENTS[placement]
    changes = {"dropout": 0.2, "epochs": 1, "batch_size": 4}
    in_ranks(2, extra, model_folder, tmp_path / "unbroken", **changes)
    in_ranks(2, extra, model_folder, tmp_path / "broken", stop=1, **changes)
    assert not (tmp_path / "broken" / "policy").exists()
    in_ranks(2, extra, model_folder, tmp_path / "broken", **changes)
    for name in ("metrics.jsonl", "second/metrics.jsonl", "policy/adapter_model.safetensors"):
        assert (tmp_path / "unbroken" / name).read_bytes() == (
            tmp_path / "broken" / name
        ).read_bytes()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not {path.suffix for path in files} & {".pt", ".bin", ".pkl", ".tmp"}


# Who computes what.


def example(tokens: int, branch: int = 3) -> Example:
    prompt = tuple(range(tokens - 2 * branch))
    return Example("x", TokenGroup(prompt, ((1,) * branch, (2,) * branch)))


def test_ranks_get_shares_that_are_even_in_tokens_and_whole_together():
    sizes = [900, 10, 20, 300, 310, 305]
    split = shares(sizes, 2)
    assert sorted(split[0] + split[1]) == list(range(6))
    assert all(share == sorted(share) for share in split)
    loads = [sum(sizes[place] for place in share) for share in split]
    assert max(loads) - min(loads) <= 50
    assert shares(sizes, 1) == [[0, 1, 2, 3, 4, 5]]


def test_one_rank_takes_the_micro_batches_in_order():
    examples = [example(20 + n) for n in range(5)]
    ((*passes,),) = plan(examples, [4, 2, 0, 1], ranks=1, size=3)
    assert [(p.indices, p.counts) for p in passes] == [([4, 2, 0], True), ([1], True)]


def test_sharded_ranks_make_equally_many_passes_of_one_row():
    examples = [example(size) for size in (60, 15, 16, 17, 18, 19, 90)]
    plans = plan(examples, range(7), ranks=3, size=4, one_row_of=64)
    assert len({len(passes) for passes in plans}) == 1
    assert sorted(i for passes in plans for p in passes if p.counts for i in p.indices) == [
        *range(7)
    ]
    assert any(not p.counts for passes in plans for p in passes)
    for passes in plans:
        for p in passes:
            assert len(pack([examples[i].group for i in p.indices], 64)) == 1
            assert len(p.indices) <= 4


def test_the_first_version_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(TrainingError, match="fsdp_version: 2"):
        is_sharded()
