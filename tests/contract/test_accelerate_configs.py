"""Every shipped config of accelerate is read by accelerate itself, and its environment by our placements."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from prefloop.config import SHIPPED
from prefloop.train.placement import is_sharded
from prefloop.train.sharded import _config

FOLDER = SHIPPED / "accelerate"
KINDS = {
    "ddp": "MULTI_GPU",
    "fsdp2": "FSDP",
    "zero3": "DEEPSPEED",
    "cpu-ddp": "MULTI_GPU",
    "cpu-fsdp2": "FSDP",
}


def environment(name: str) -> dict[str, str]:
    """What accelerate tells each process, of all that it sets."""
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), "worker.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        _, told = prepare_deepspeed_cmd_env(args)
    else:
        told = prepare_multi_gpu_env(args)
    return {key: value for key, value in told.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def test_every_config_is_known_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_config(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type.value == KINDS[name]
    assert config.num_processes == (2 if name.startswith("cpu") else 8)
    assert config.mixed_precision == "no"
    assert config.use_cpu is name.startswith("cpu")


@pytest.mark.parametrize("name", KINDS)
def test_processes_learn_whether_weights_are_sharded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment(name).items():
        monkeypatch.setenv(key, value)
    assert is_sharded() is ("fsdp2" in name or name == "zero3")


def test_deepspeed_is_told_of_its_zero_section_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in environment("zero3").items():
        monkeypatch.setenv(key, value)
    found = _config()
    assert found["zero_optimization"]["stage"] == 3
    assert "auto" not in found["zero_optimization"].values()
    assert "fp16" not in found
    assert "bf16" not in found
