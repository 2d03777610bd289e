"""Training state on disk: what was saved comes back bit for bit, the newest wins, nothing is pickled."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prefloop.errors import RunFolderError
from prefloop.train import checkpoint
from prefloop.train.placement import Ranks, Replicated


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.frozen, self.free = nn.Linear(3, 4), nn.Linear(4, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.free(self.frozen(x))


def make(kind: str, seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(seed)
    free = [weight for weight in net.parameters() if weight.requires_grad]
    if kind == "rmsprop":
        return net, torch.optim.RMSprop(free, lr=0.1)
    return net, torch.optim.AdamW(free, lr=0.1)


def step(net: Net, optimizer: torch.optim.Optimizer) -> None:
    """One update from the global random state, as dropout draws from it."""
    optimizer.zero_grad()
    net(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()


def save(folder: Path, net: Net, optimizer: torch.optim.Optimizer, **position: int) -> None:
    placement = Replicated(net, Ranks(), lambda parameters: optimizer)
    random = [checkpoint.random_state()]
    state = checkpoint.State(placement.weights(), placement.optimizer_state(), random)
    checkpoint.save_checkpoint(folder, state, **position)


def load(folder: Path, net: Net, optimizer: torch.optim.Optimizer) -> dict[str, int] | None:
    found = checkpoint.load_checkpoint(folder, ranks=1)
    if found is None:
        return None
    state, position = found
    placement = Replicated(net, Ranks(), lambda parameters: optimizer)
    placement.set_weights(state.weights)
    placement.set_optimizer_state(state.optimizer)
    checkpoint.set_random_state(state.random[0])
    return position


def free(net: Net) -> torch.Tensor:
    return torch.cat([net.free.weight.flatten(), net.free.bias]).detach()


@pytest.mark.parametrize("kind", ["adamw", "rmsprop"])
def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path, kind):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net, optimizer = make(kind)
        for _ in range(3):
            step(net, optimizer)
        save(tmp_path, net, optimizer, step=3, metrics_bytes=70)
        for _ in range(3):
            step(net, optimizer)

        other, fresh = make(kind)
        other.free.weight.data.fill_(9.0)
        torch.manual_seed(4)
        position = load(tmp_path, other, fresh)
        assert position == {"step": 3, "metrics_bytes": 70}
        for _ in range(3):
            step(other, fresh)
    assert torch.equal(free(net), free(other))


def test_the_optimiser_goes_from_one_round_to_the_next(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net, optimizer = make("adamw")
        step(net, optimizer)
        state = Replicated(net, Ranks(), lambda parameters: optimizer).optimizer_state()
        checkpoint.save_tensors(tmp_path / "optimizer.safetensors", state)
        other, carried = make("adamw")
        found = load_file(tmp_path / "optimizer.safetensors")
        Replicated(other, Ranks(), lambda parameters: carried).set_optimizer_state(found)
    before, after = optimizer.state_dict(), carried.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys() == {0, 1}
    for number, state in before["state"].items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in state.items():
            assert torch.equal(value, after["state"][number][key])


def test_only_the_newest_checkpoint_is_kept(tmp_path):
    net, optimizer = make("adamw")
    for number in (1, 2, 10):
        save(tmp_path, net, optimizer, step=number)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000010"]
    checkpoint.drop_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_checkpoint_nothing_changes(tmp_path):
    net, optimizer = make("adamw")
    before = free(net)
    assert load(tmp_path, net, optimizer) is None
    assert torch.equal(before, free(net))


def test_of_two_checkpoints_the_newest_counts(tmp_path, monkeypatch):
    """Killed after the new one was put in its place, before the old one was removed."""
    net, optimizer = make("adamw")
    save(tmp_path, net, optimizer, step=1)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        net.free.bias.fill_(7.0)
    monkeypatch.setattr(
        "shutil.rmtree", lambda path, ignore_errors=False: ignore_errors or killed(path)
    )
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, net, optimizer, step=2)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    other, fresh = make("adamw", seed=1)
    assert load(tmp_path, other, fresh) == {"step": 2}
    assert torch.equal(free(net), free(other))


def test_a_checkpoint_killed_half_way_does_not_count_and_does_not_hinder(tmp_path, monkeypatch):
    net, optimizer = make("adamw")
    save(tmp_path, net, optimizer, step=1)

    def killed(tensors: dict[str, torch.Tensor], path: Path, **_: object) -> None:
        path.write_bytes(b"torn")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, net, optimizer, step=2)
    assert load(tmp_path, net, optimizer) == {"step": 1}
    save(tmp_path, net, optimizer, step=2)
    assert load(tmp_path, net, optimizer) == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000002"]


def test_nothing_is_pickled_and_frozen_weights_are_left_out(tmp_path):
    net, optimizer = make("adamw")
    step(net, optimizer)
    save(tmp_path, net, optimizer, step=1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    saved = load_file(tmp_path / "checkpoint-000001" / "weights.safetensors")
    assert saved.keys() == {"free.weight", "free.bias"}


def test_another_number_of_processes_cannot_go_on(tmp_path):
    net, optimizer = make("adamw")
    save(tmp_path, net, optimizer, step=1)
    with pytest.raises(
        RunFolderError, match=r"made by 1 processes and cannot go on exactly with 2"
    ):
        checkpoint.load_checkpoint(tmp_path, ranks=2)


def test_a_state_without_accelerators_is_taken_over_where_there_are_some(monkeypatch):
    """A run that was begun on another machine; generators that it had not begin where they are."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    state = checkpoint.random_state()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: taken.append(device))
    checkpoint.set_random_state(state)
    assert taken == []
    checkpoint.set_random_state({**state, "cuda1": state["cpu"]})
    assert taken == [1]
