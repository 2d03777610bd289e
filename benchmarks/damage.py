"""Claim: a file that was damaged is named, or changes nothing; it is never used unnoticed.

Plays a tiny run of every method, an evaluation, a comparison, votes and a reward model once. Then, again and
again, a copy of one of them is damaged at random and a command is given that reads it. Counted by kind of file:

noticed    one sentence and an exit code, or `prefloop verify` names the file
harmless   the command ends well, and its result is byte for byte that of the undamaged copy; of a run
           `prefloop verify` sees the damage all the same, unless it says that it does not
silent     it ends well with another result
traceback  anything else

`--kills` and `--disks` do the same for processes that are killed, and for files that may not grow;
`--edits` damages what runs are made from (rows, pairs, model) between their stop and the command that goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kill_resume import tiny_model

SEALED_BY_NOTHING = ("README.md", "report.html", "console.log", ".lock", "comparison", "evaluation")
"""Files that are written and not read again, or that are the user's to write on."""
VERDICTS = ("noticed", "harmless", "harmless, unseen by verify", "silent", "traceback")
METHODS = ("ial", "arop", "dpo", "ipo", "spin", "spac", "spa", "self_rewarding", "sft", "ppo")
_SAMPLING = {"temperature": 0.7, "max_new_tokens": 8}


class Case(NamedTuple):
    """A folder to be damaged, what it holds, and what may be asked of it."""

    name: str
    folder: Path
    commands: dict[str, Callable[[Path], list[str]]]
    """By name, the words of a command about a copy of the folder."""


def prefloop(words: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, output and complaints of a command, in this process; 70 for a traceback."""
    from prefloop import cli

    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv
    sys.argv = ["prefloop", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:  # noqa: BLE001
        code = 70
        err.write(f"{type(error).__name__}: {error}")
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def recipe(name: str, model: Path, rows: Path, pairs: Path) -> dict[str, Any]:
    """A run of two small rounds."""
    method: dict[str, Any] = {"name": name}
    judged: dict[str, Any] = {"judge": {"name": "similarity"}}
    gates = {"cut_off": False, "identical": False, "meta_talk": False}
    if name in ("ial", "arop"):
        gates |= {"max_edit_share": None, "max_length_ratio": None}
        method |= {"sampling": _SAMPLING, "gates": gates}
        method |= {"advice": _SAMPLING} if name == "ial" else {}
    labelled = name in ("dpo", "ipo", "spa", "spac")
    if name == "self_rewarding":
        method |= {"sampling": _SAMPLING, "gates": {"cut_off": False}}
    elif name == "ppo":
        method |= {"sampling": {"temperature": 1.0, "max_new_tokens": 8}}
    elif name == "spin":
        method |= {"sampling": _SAMPLING}
    return {
        "model": {"source": str(model), "device": "cpu"},
        "data": {"train": str(pairs if labelled else rows), "holdout": 3},
        "method": method,
        **judged,
        "generate": {"chunk_size": 2},
        "loop": {"rounds": 2, "prompts_per_round": 4},
        "train": {"epochs": 1, "lr": 1e-3, "batch_size": 2, "micro_batch_size": 1, "save_every": 1},
        "evaluate": {"prompts": 3, "introspection": False, "sampling": _SAMPLING},
        "guard": {"min_stop_rate": 0.0, "max_reject_share": 1.0},
    }


# What is damaged.


def cases(folder: Path) -> list[Case]:
    """All that is played once; a method that these tiny data do not suit is left out, and said."""
    model, rows, pairs = folder / "model", folder / "rows.jsonl", folder / "pairs.jsonl"
    tiny_model(model)
    texts = [{"prompt": f"question {n}?", "response": f"answer {n} " * 3} for n in range(12)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    both = [
        {"prompt": f"question {n}?", "chosen": f"good answer {n}", "rejected": f"bad {n}"}
        for n in range(24)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in both))
    found = []
    for name in METHODS:
        path, out = folder / f"{name}.yaml", folder / f"run-{name}"
        path.write_text(json.dumps(recipe(name, model, rows, pairs)))
        code, _, err = prefloop(["run", str(path), "--out", str(out), "--json"])
        if code:
            print(f"{name} cannot be played: {err}", file=sys.stderr)
            continue
        found.append(Case(name, out, run_commands(path)))
    found += [*_evaluation(folder, found), *_comparison(folder, found), *_reward(folder, pairs)]
    found.append(_votes(folder))
    return found


def run_commands(path: Path) -> dict[str, Callable[[Path], list[str]]]:
    return {
        "run": lambda run: ["run", str(path), "--out", str(run), "--json"],
        "show": lambda run: ["show", str(run), "--json"],
        "verify": lambda run: ["verify", str(run)],
        "export": lambda run: ["export", str(run), str(run.with_suffix(".out.jsonl"))],
        "merge": lambda run: ["merge", str(run), str(run.with_suffix(".merged"))],
    }


def _evaluation(folder: Path, found: Sequence[Case]) -> list[Case]:
    subject, out = found[0].folder, folder / "evaluation"
    words = ["evaluate", str(subject), "--measures", str(folder / "measures.yaml"), "--json"]
    (folder / "measures.yaml").write_text(json.dumps({"divergence": {}, "win_rate": {}}))
    code, _, err = prefloop([*words, "--out", str(out)])
    if code:
        print(f"evaluate cannot be played: {err}", file=sys.stderr)
        return []
    return [Case("evaluate", out, {"evaluate": lambda copy: [*words, "--out", str(copy)]})]


def _comparison(folder: Path, found: Sequence[Case]) -> list[Case]:
    path, out = folder / "compare.yaml", folder / "comparison"
    base = str(folder / f"{found[0].name}.yaml")
    values = {"base": base, "seeds": [0, 1], "variants": {"plain": {}, "hot": {"train.lr": 0.002}}}
    path.write_text(json.dumps(values))
    code, _, err = prefloop(["compare", str(path), "--out", str(out), "--json"])
    if code:
        print(f"compare cannot be played: {err}", file=sys.stderr)
        return []
    words = lambda copy: ["compare", str(path), "--out", str(copy), "--json"]  # noqa: E731
    return [
        Case("compare", out, {"compare": words, "table": lambda copy: [*words(copy), "--table"]})
    ]


def _reward(folder: Path, pairs: Path) -> list[Case]:
    path, out = folder / "reward.yaml", folder / "reward"
    values = {
        "model": {"source": str(folder / "model"), "device": "cpu"},
        "data": {"train": [str(pairs)]},
        "train": {"epochs": 1, "batch_size": 4, "micro_batch_size": 4, "max_length": 64},
    }
    path.write_text(json.dumps(values))
    code, _, err = prefloop(["reward", "train", str(path), "--out", str(out), "--json"])
    if code:
        print(f"reward train cannot be played: {err}", file=sys.stderr)
        return []
    train = lambda copy: ["reward", "train", str(path), "--out", str(copy), "--json"]  # noqa: E731

    def check(copy: Path) -> list[str]:
        return [
            "judge",
            "check",
            f"{{name: reward_model, model: {copy}}}",
            "--data",
            str(pairs),
            "--json",
        ]

    return [Case("reward", out, {"reward train": train, "judge check": check})]


def _votes(folder: Path) -> Case:
    from prefloop.annotate.items import AnnotationPlan, read_comparison
    from prefloop.annotate.service import AnnotationService
    from prefloop.annotate.votes import VoteFile

    sides, out = [folder / f"{name}.jsonl" for name in "ab"], folder / "votes"
    for side in sides:
        rows = [{"prompt": f"question {n}", "answer": f"{side.stem}{n}"} for n in range(8)]
        side.write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = read_comparison(str(sides[0]), str(sides[1]))
    out.mkdir()
    desk = AnnotationService(
        comparison, AnnotationPlan(), VoteFile(out / "votes.jsonl", comparison, AnnotationPlan())
    )
    state = desk.join("Ann")
    for number in range(8):
        choice: Any = ("first", "second", "tie")[number % 3]
        state = desk.vote("Ann", state["item"]["id"], choice, None, 1.5)
    desk.close()
    words = ["annotate", *map(str, sides), "--report", "--json", "--votes"]
    return Case("annotate", out, {"report": lambda copy: [*words, str(copy / "votes.jsonl")]})


# How.


def _flip(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def _edit(data: bytes, draw: random.Random) -> bytes:
    """Another digit: still well-formed."""
    digits = [m.start() for m in re.finditer(rb"\d", data)]
    if not digits:
        return _flip(data, draw)
    at = draw.choice(digits)
    other = draw.choice([d for d in b"123456789" if d != data[at]])
    return data[:at] + bytes([other]) + data[at + 1 :]


def _without_last_line(data: bytes, _: random.Random) -> bytes:
    return data[: data[:-1].rfind(b"\n") + 1]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped bit": _flip,
    "edited digit": _edit,
    "last line lost": _without_last_line,
    "cut off": lambda data, draw: data[: draw.randrange(len(data))],
    "emptied": lambda data, draw: b"",
    "last line twice": lambda data, draw: data + data[data[:-1].rfind(b"\n") + 1 :],
    "garbage at the end": lambda data, draw: data + draw.randbytes(8),
}


def kind_of(path: Path) -> str:
    """Files of one kind, counted together."""
    return re.sub(r"\d{2,}", "N", re.sub(r"[0-9a-f]{12,}", "HASH", path.name))


def result(case: str, command: str, folder: Path, out: str) -> Any:
    """What a command has brought about, without times and places."""
    if command == "run":
        names = ("*.safetensors", "result.jsonl", "pairs.jsonl")
        kept = [p for name in names for p in folder.rglob(name) if "train" not in p.parts]
        published = [p for p in kept if p.parent == folder / "policy" or p.name == "result.jsonl"]
        return {str(p.relative_to(folder)): p.read_bytes() for p in published}
    if command in ("export", "merge"):
        made = folder.with_suffix(".out.jsonl" if command == "export" else ".merged")
        files = sorted(made.rglob("*")) if made.is_dir() else [made]
        return [p.read_bytes() for p in files if p.suffix in (".jsonl", ".safetensors")]
    text = re.sub(r'"/[^"\n]*/', '"', out.replace(str(folder), "/HERE"))
    drop = r'"(seconds|kept_from_before|time|peak_memory_mb|folder|model|seconds_by_stage)": '
    return re.sub(drop + r"(\{[^}]*\}|[^,}\n]*)", "", text)


def one_damage(case: Case, number: int, draw: random.Random) -> tuple[str, str, str]:
    """The kind of file, what became of it, and how it came about."""
    copy = case.folder.with_name(f"copy-{number}")
    shutil.copytree(case.folder, copy)
    name = draw.choice(list(case.commands))
    if name == "run" and (copy / "rounds/0001").is_dir():
        # A finished run reads little; most are to go on.
        for later in draw.choice(_UNDONE):
            _remove(copy / "rounds" / later)
    words = case.commands[name](copy)
    files = sorted(p for p in copy.rglob("*") if p.is_file() and p.stat().st_size)
    files = [p for p in files if not any(word in p.name for word in SEALED_BY_NOTHING)]
    target, how = draw.choice(files), draw.choice(list(DAMAGES))
    data = target.read_bytes()
    damaged = DAMAGES[how](data, draw)
    target.write_bytes(damaged)
    code, out, err = prefloop(words)
    about = f"{name}: {how} of {target.relative_to(copy)}: {(err or out).strip()[-300:]}"
    if code or damaged == data:
        verdict = {70: "traceback", 0: "harmless"}.get(code, "noticed")
    else:
        verdict = _of_a_success(case, name, copy, target, out)
    # Another file may lie there by now: what the command made anew is as it is to be.
    rewritten = not target.exists() or target.read_bytes() != damaged
    if verdict == "harmless" and damaged != data and "verify" in case.commands and not rewritten:
        seen = prefloop(["verify", str(copy)])[0]
        verdict = "harmless" if seen else "harmless, unseen by verify"
    _remove(copy, copy.with_suffix(".out.jsonl"), copy.with_suffix(".merged"))
    return f"{case.name}/{kind_of(target)}", verdict, about


_UNDONE = ([], ["0001"], ["0001/train.done.json", "0001/policy"], ["0001/pairs.done.json"])
"""What is taken out of a run's rounds before it goes on."""


def _of_a_success(case: Case, name: str, copy: Path, target: Path, out: str) -> str:
    """The verdict on a command that ended well beside the damaged `target`, by what it printed and made."""
    if name == "verify":
        return "noticed" if "damaged" in out and ": 0" not in out else "silent"
    if case.name == "annotate" and '"torn_bytes": 0' not in out:
        return "noticed"  # the report says how many bytes are no vote
    if result(case.name, name, copy, out) == _KNOWN[case.name, name]:
        return "harmless"
    # A table goes on without the cell, and says why.
    told = target.name in out or (case.name == "compare" and '"missing": {}' not in out)
    return "noticed" if told else "silent"


def one_edit(case: Case, number: int, draw: random.Random) -> tuple[str, str, str]:
    """As `one_damage`, for a run's inputs: damaged after round 0, and put back afterwards."""
    copy = case.folder.with_name(f"copy-{number}")
    shutil.copytree(case.folder, copy)
    _remove(*copy.glob("rounds/0001"))
    folder = case.folder.parent
    sources = [folder / "rows.jsonl", folder / "pairs.jsonl", *sorted((folder / "model").iterdir())]
    target, how = draw.choice(sources), draw.choice(list(DAMAGES))
    data = target.read_bytes()
    target.write_bytes(DAMAGES[how](data, draw))
    code, out, err = prefloop(case.commands["run"](copy))
    target.write_bytes(data)
    same = not code and result(case.name, "run", copy, out) == result(
        case.name, "run", case.folder, ""
    )
    verdict = {70: "traceback", 0: "harmless" if same else "silent"}.get(code, "noticed")
    _remove(copy)
    about = f"run: {how} of {target.relative_to(folder)}: {(err or out).strip()[-300:]}"
    return f"input/{kind_of(target)}", verdict, about


_KNOWN: dict[tuple[str, str], Any] = {}


def learn(case: Case) -> None:
    """The result of each command on what is not damaged; one that fails there is not asked for."""
    for name, command in list(case.commands.items()):
        whole = case.folder.with_name("whole")
        shutil.copytree(case.folder, whole)
        code, out, err = prefloop(command(whole))
        if code:
            print(f"{case.name}: {name} cannot be asked for: {err}", file=sys.stderr)
            del case.commands[name]
        else:
            _KNOWN[case.name, name] = result(case.name, name, whole, out)
        _remove(whole, whole.with_suffix(".out.jsonl"), whole.with_suffix(".merged"))


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# Processes that end early.


MAKES = ("run", "evaluate", "compare", "reward train")
"""Commands that make a folder, and go on with what they have made of it."""


def interrupted(case: Case, number: int, draw: random.Random, seconds: float, how: str) -> str:
    """Begin a command, killed or with files that may not grow; then once more without. What came of it."""
    name = next(name for name in MAKES if name in case.commands)
    out = case.folder.with_name(f"{how}-{number}")
    words = case.commands[name](out)
    limit = draw.choice((100, 1_000, 5_000, 20_000, 60_000))

    def limited() -> None:
        if how == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    process = subprocess.Popen(
        [sys.executable, "-m", "prefloop", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=limited,
        start_new_session=True,
    )
    if how == "kill":
        time.sleep(draw.uniform(0, seconds))
        os.killpg(process.pid, signal.SIGKILL)  # a comparison's cells as well
    said = process.communicate()[1].decode(errors="replace")
    if "Traceback" in said:
        print(f"{name}, limit {limit}: {said[-2000:]}", file=sys.stderr)
        return "traceback"
    code, text, err = prefloop(words)
    if code:
        print(f"{how} of {name}: {err}", file=sys.stderr)
        return "lost"
    wanted = result(case.name, "run", case.folder, "") if name == "run" else _KNOWN[case.name, name]
    same = result(case.name, name, out, text) == wanted
    _remove(out)
    if not same:
        return "other bytes"
    return "resumed to the same bytes" if process.returncode else "ended in time"


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All damages; the numbers that the script prints."""
    draw = random.Random(options.seed)
    found = [case for case in cases(folder) if not options.only or case.name in options.only]
    for case in found:
        if options.count or "run" not in case.commands:
            learn(case)
    counts: dict[str, Counter[str]] = {}
    wrong = []
    runs = [case for case in found if "run" in case.commands]
    tries = [(one_damage, found[number % len(found)]) for number in range(options.count)]
    tries += [(one_edit, runs[number % len(runs)]) for number in range(options.edits)]
    for number, (one, case) in enumerate(tries):
        kind, verdict, about = one(case, number, draw)
        counts.setdefault(kind, Counter())[verdict] += 1
        if verdict in VERDICTS[2:]:
            print(f"{number}: {kind}: {verdict}: {about}", file=sys.stderr, flush=True)
            wrong.append({"kind": kind, "verdict": verdict, "about": about})
    total = sum(counts.values(), Counter[str]())
    early: dict[str, Counter[str]] = {"kill": Counter(), "disk": Counter()}
    made = [case for case in found if set(MAKES) & set(case.commands)]
    for how, times in (("kill", options.kills), ("disk", options.disks)):
        for number in range(times):
            case = made[number % len(made)]
            came = interrupted(case, number, draw, options.seconds, how)
            early[how][came] += 1
            print(f"{how} {number}: {case.name}: {came}", file=sys.stderr, flush=True)
    return {
        "damages": options.count,
        "edits": options.edits,
        **{name: total[name] for name in VERDICTS},
        "cases": [case.name for case in found],
        "kinds": {kind: dict(counted) for kind, counted in sorted(counts.items())},
        "wrong": wrong,
        "kills": dict(early["kill"]),
        "disks": dict(early["disk"]),
        "seed": options.seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=600, help="damages over all kinds")
    parser.add_argument("--edits", type=int, default=0, help="damages of what runs are made from")
    parser.add_argument("--kills", type=int, default=0, help="processes to kill")
    parser.add_argument("--disks", type=int, default=0, help="runs whose files may not grow")
    parser.add_argument("--seconds", type=float, default=20.0, help="the latest kill")
    parser.add_argument("--only", nargs="*", help="of these cases alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder).resolve())
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for kind, counted in found["kinds"].items():
            print(f"{kind:48}" + "  ".join(f"{name} {n}" for name, n in counted.items()))
        print({k: found[k] for k in ("damages", *VERDICTS)})
        print(found["kills"], found["disks"])
    sys.exit(1 if found["silent"] or found["traceback"] else 0)


if __name__ == "__main__":
    main()
