"""`prefloop push`: a real run's folder, huggingface_hub's own client, and a stand-in of the Hub."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard
from peft import AutoPeftModelForCausalLM

from prefloop.records import Pair, write_jsonl
from prefloop.run.publish import MERGED
from prefloop.run_folder import RunDir
from tests.cli.conftest import Shell, called
from tests.fake_hub import TOKEN, Hub

# huggingface_hub's own, of the way in which it gives httpx2 a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")
MODEL = {"README.md", "adapter_config.json", "adapter_model.safetensors", "recipe.yaml"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # Where hf_xet is installed the client sends large files through it, without asking the server.
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    server = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", partial(HfApi, server.endpoint, TOKEN))
    yield server
    huggingface_hub.close_session()
    server.close()


@pytest.fixture
def run_folder(run_folder: Path) -> Path:
    """The run with pairs of whole answers; the tiny model's are all cut off."""
    round_dir = RunDir(run_folder).round(0)
    pairs = [
        pair.model_copy(update={"unfinished": ()}) for pair in round_dir.records("pairs", Pair)
    ]
    write_jsonl(round_dir.path / "pairs.jsonl", pairs)
    round_dir.finish("pairs")
    return run_folder


def with_token(monkeypatch: pytest.MonkeyPatch, hub: Hub, token: str | None) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", partial(HfApi, hub.endpoint, token))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


def printed(shell: Shell, *words: str) -> dict[str, Any]:
    """What the command prints as JSON."""
    assert called(shell.monkeypatch, *words, "--json") == 0
    found: dict[str, Any] = json.loads(shell.capsys.readouterr().out)
    return found


def test_without_yes_it_says_what_would_go_and_sends_nothing(
    shell: Shell, run_folder: Path, hub: Hub
) -> None:
    would = printed(shell, "push", str(run_folder), "me/mine")
    model, data = would["repositories"]
    assert (would["sent"], would["private"]) == (False, True)
    assert (model["id"], data["id"]) == ("me/mine", "me/mine-pairs")
    assert set(model["files"]) >= MODEL
    assert set(data["files"]) == {"README.md", "pairs.jsonl"}
    assert hub.repositories == {}


def test_with_yes_exactly_that_goes_private(shell: Shell, run_folder: Path, hub: Hub) -> None:
    would = printed(shell, "push", str(run_folder), "me/mine")
    sent = printed(shell, "push", str(run_folder), "me/mine", "--yes")
    assert sent["addresses"] == [
        f"{hub.endpoint}/me/mine",
        f"{hub.endpoint}/datasets/me/mine-pairs",
    ]
    for repository in would["repositories"]:
        there = hub.repositories[f"{repository['type']}s", repository["id"]]
        assert there.private
        assert {name: len(text) for name, text in there.files.items()} == repository["files"]
    assert not (run_folder / ".push").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_what_arrives_opens_as_users_open_it(
    shell: Shell, run_folder: Path, hub: Hub, tmp_path: Path
) -> None:
    shell("push", str(run_folder), "me/mine", "--yes")
    for kind, name in (("models", "me/mine"), ("datasets", "me/mine-pairs")):
        folder = tmp_path / kind
        folder.mkdir()
        for file, text in hub.files(name, kind).items():
            (folder / file).write_bytes(text)
    config = json.loads((tmp_path / "models/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == shell.model.name
    config["base_model_name_or_path"] = str(shell.model)
    (tmp_path / "models/adapter_config.json").write_text(json.dumps(config))
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "models")
    rows = load_dataset(
        str(tmp_path / "datasets"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert set(rows.column_names) >= {"prompt", "chosen", "rejected"}
    assert "prefloop" in ModelCard((tmp_path / "models/README.md").read_text()).data.tags
    assert DatasetCard((tmp_path / "datasets/README.md").read_text()).data.configs


def test_nothing_that_goes_names_this_machine_or_its_folders(
    shell: Shell, run_folder: Path, hub: Hub
) -> None:
    shell("push", str(run_folder), "me/mine", "--yes")
    for there in hub.repositories.values():
        for name, text in there.files.items():
            for secret in (
                str(Path.cwd()),
                str(shell.model.parent),
                str(Path.home()),
                platform.node(),
            ):
                if len(secret) > 3 and not name.endswith((".safetensors", "tokenizer.json")):
                    assert secret.encode() not in text, (name, secret)


def test_a_card_that_was_edited_to_name_a_folder_is_refused(
    shell: Shell, run_folder: Path, hub: Hub
) -> None:
    with (run_folder / "policy/README.md").open("a") as card:
        card.write(f"\nMade in {Path.cwd()}/here\n")
    shell.refuses(
        "push", str(run_folder), "me/mine", "--yes", saying=("README.md", "take that out")
    )
    assert hub.repositories == {}


def test_public_is_public_and_no_pairs_leaves_the_pairs_here(
    shell: Shell, run_folder: Path, hub: Hub
) -> None:
    code, err = shell("push", str(run_folder), "me/mine", "--public", "--no-pairs", "--yes")
    assert code == 0, err
    assert {key: there.private for key, there in hub.repositories.items()} == {
        ("models", "me/mine"): False
    }


def test_a_push_that_was_cut_off_goes_on_and_sends_nothing_twice(
    shell: Shell, run_folder: Path, hub: Hub
) -> None:
    hub.cut_off = 100
    push = ("push", str(run_folder), "me/mine", "--yes", "-q")
    shell.refuses(*push, saying=("connection to the Hub was lost", "same command goes on"))
    assert hub.files("me/mine") == {}
    hub.cut_off = 0
    code, err = shell(*push)
    assert (code, err) == (0, ""), err
    assert set(hub.files("me/mine")) >= MODEL
    hub.puts.clear()
    code, err = shell(*push)
    assert (code, err) == (0, ""), err
    assert hub.puts == []
    assert hub.repositories["models", "me/mine"].commits == 1


def test_a_name_that_is_taken_needs_update(shell: Shell, run_folder: Path, hub: Hub) -> None:
    code, err = shell("push", str(run_folder), "me/mine", "--yes", "-q")
    assert (code, err) == (0, ""), err
    (run_folder / "pushed.json").unlink()
    (run_folder / "policy/README.md").write_text("---\ntags: [other]\n---\nAnother card.\n")
    push = ("push", str(run_folder), "me/mine", "--yes", "-q")
    shell.refuses(*push, saying=("me/mine is on the Hub already", "--update"))
    assert b"Another" not in hub.files("me/mine")["README.md"]
    assert shell(*push, "--update") == (0, "")
    assert b"Another" in hub.files("me/mine")["README.md"]


def test_what_was_made_public_there_is_not_added_to_in_private(
    shell: Shell, run_folder: Path, hub: Hub
) -> None:
    shell("push", str(run_folder), "me/mine", "--yes", "-q")
    hub.repositories["models", "me/mine"].private = False
    shell.refuses("push", str(run_folder), "me/mine", "--yes", saying=("is public", "--public"))


@pytest.mark.parametrize(
    ("token", "saying"), [("hf_wrong", "does not know the token"), (None, "no token of the Hub")]
)
def test_a_wrong_or_missing_token(
    shell: Shell, run_folder: Path, hub: Hub, token: str | None, saying: str
) -> None:
    with_token(shell.monkeypatch, hub, token)
    shell.refuses("push", str(run_folder), "me/mine", "--yes", saying=(saying, "hf auth login"))


def test_no_right_to_write_there(shell: Shell, run_folder: Path, hub: Hub) -> None:
    shell.refuses(
        "push", str(run_folder), "others/mine", "--yes", saying=("may not write to others",)
    )


COMMIT, UPLOAD, CREATE = "/commit/", "/content/", "/repos/create"


@pytest.mark.parametrize(
    ("path", "status", "saying"),
    [
        (COMMIT, 401, ("does not know the token", "hf auth login")),
        (COMMIT, 403, ("may not write to me", "the role write")),
        (UPLOAD, 403, ("storage does not take the upload", "same command goes on")),
        (COMMIT, 404, ("has no me/mine, or hides it", "HF_ENDPOINT")),
        (COMMIT, 409, ("changed by someone else", "same command goes on")),
        (COMMIT, 412, ("changed by someone else", "same command goes on")),
        ("/preupload/", 429, ("no more requests", "wait 30 s")),
        (CREATE, 503, ("fails at the moment", "being mended", "same command goes on")),
        (UPLOAD, 500, ("fails at the moment", "same command goes on")),
        (COMMIT, 413, ("refuses me/mine", "being mended", "correct that")),
    ],
)
def test_each_refusal_has_a_remedy_of_its_own(
    shell: Shell, run_folder: Path, hub: Hub, path: str, status: int, saying: tuple[str, ...]
) -> None:
    hub.refuses, hub.headers = {path: status}, {"Retry-After": "30"} if status == 429 else {}
    push = ("push", str(run_folder), "me/mine", "--yes", "-q")
    code, err = shell(*push)
    assert code == 2
    assert "connection" not in err
    for words in saying:
        assert words in err
    # What was begun is finished by the same command, once the Hub lets it.
    hub.refuses = {}
    assert shell(*push) == (0, "")


def test_offline_mode_is_no_lost_connection(shell: Shell, run_folder: Path, hub: Hub) -> None:
    shell.monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    shell.refuses("push", str(run_folder), "me/mine", "--yes", saying=("HF_HUB_OFFLINE", "unset"))


def test_a_hub_that_is_not_there(shell: Shell, run_folder: Path, hub: Hub) -> None:
    shell.monkeypatch.setattr(huggingface_hub, "HfApi", partial(HfApi, "http://127.0.0.1:9", TOKEN))
    shell.refuses("push", str(run_folder), "me/mine", "--yes", saying=("connection to the Hub",))


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/a--b", "me/.x"])
def test_a_name_that_no_repository_can_have(shell: Shell, run_folder: Path, name: str) -> None:
    shell.refuses("push", str(run_folder), name, saying=("not of the form owner/name",))


@pytest.fixture
def merged(shell: Shell, run_folder: Path) -> Path:
    """The run's policy as one model."""
    assert shell("merge", str(run_folder), "merged")[0] == 0
    return Path("merged")


def test_a_merged_model_goes_as_it_was_written_with_a_card_that_may_be_edited(
    shell: Shell, run_folder: Path, hub: Hub, merged: Path
) -> None:
    with (merged / "README.md").open("a") as card:
        card.write("\nA word more.\n")
    push = ("push", str(run_folder), "me/mine", "--merged", "merged", "--no-pairs", "--yes", "-q")
    assert shell(*push) == (0, "")
    there = hub.files("me/mine")
    assert {"config.json", "model.safetensors", "README.md"} <= set(there)
    assert MERGED not in there
    assert there["README.md"].endswith(b"A word more.\n")


def test_a_folder_that_is_no_merged_model_of_this_policy_is_refused(
    shell: Shell, run_folder: Path, merged: Path
) -> None:
    def refused(folder: Path | str, saying: str) -> None:
        words = ("push", str(run_folder), "me/mine", "--merged", str(folder))
        shell.refuses(*words, saying=(saying, "run prefloop merge runs/r FOLDER"))

    # The base model itself has the right architecture and vocabulary.
    refused(shell.model, "was not written by prefloop merge")
    config = (merged / "config.json").read_text()
    (merged / "config.json").write_text(config.replace("vocab_size", "vocab_sizf"))
    refused(merged, "config.json is not as it was written")
    (merged / "config.json").write_text(config)
    # The run recommends another policy now.
    manifest = RunDir(run_folder).published
    with (run_folder / "policy/adapter_config.json").open("a") as file:
        file.write(" ")
    manifest.write({"round": 0}, sorted((run_folder / "policy").glob("adapter*")))
    refused(merged, "was merged from another policy than the one that runs/r recommends")


def test_a_run_without_a_policy_and_a_folder_without_a_model(
    shell: Shell, run_folder: Path, tmp_path: Path
) -> None:
    words = ("push", str(run_folder), "me/mine")
    shell.refuses(*words, "--merged", str(tmp_path), saying=("holds no model",))
    (run_folder / "policy.done.json").unlink()
    for file in (run_folder / "policy").iterdir():
        file.unlink()
    (run_folder / "policy").rmdir()
    shell.refuses(*words, saying=("has no policy; finish it with prefloop run",))
