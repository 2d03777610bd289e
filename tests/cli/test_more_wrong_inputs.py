"""More wrong inputs, over all verbs: exit code 2, and one line that says where and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Shell

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
"""Nine lists of nine aliases: a few hundred bytes that stand for 9 ** 10 values."""
PAIR = json.dumps({"prompt": "p", "chosen": "good", "rejected": "bad"}) + "\n"
FILES: dict[str, str | bytes] = {
    "laughs.yaml": LAUGHS,
    "list.yaml": "- method\n",
    "text.yaml": "just words\n",
    "latin.yaml": "name: caf\xe9\n".encode("latin-1"),
    "zero.yaml": b"method: {name: ial}\nname: a\0b\n",
    "twice.yaml": "method: {name: ial}\nmethod: {name: arop}\n",
    "number.yaml": "method: 3\n",
    "null.yaml": "method: {name: null}\n",
    "empty.jsonl": "",
    "blank.jsonl": "\n\n \n",
    "pairs.jsonl": "".join(PAIR.replace('"p"', f'"p{n}"') for n in range(24)),
    "half.jsonl": PAIR + '{"prompt": "p", "chosen": "good"}\n',
    "latin.jsonl": '{"prompt": "caf\xe9", "response": "a"}\n'.encode("latin-1"),
    "wide.jsonl": '{"prompt": "a", "response": "b"}\n'.encode("utf-16"),
    "surrogate.jsonl": '{"prompt": "\\ud800", "response": "b"}\n' * 8,
    "deep.jsonl": '{"prompt": "a", "response": ' + "[" * 3000 + "]" * 3000 + "}\n",
    "a.jsonl": '{"prompt": "q", "answer": "a"}\n',
    "c.jsonl": '{"prompt": "q", "answer": "c"}\n',
    "b.jsonl": '{"prompt": "other", "answer": "b"}\n',
    "latin.txt": "caf\xe9".encode("latin-1"),
    "bad.gz": b"\x1f\x8b\x08broken",
    "bad.jsonl.gz": b"\x1f\x8b\x08broken",
    "deaf.jinja": "<|im_start|>Hello<|im_end|>{% if add_generation_prompt %}<|im_start|>{% endif %}",
    "loud.jinja": "{% for m in messages %}{{ m.content }}{{ 'x' * 10000000 }}{% endfor %}",
    "endless.jinja": "{% for a in range(10 ** 12) %}{% endfor %}",
    "broken.jinja": "{{ 1 / 0 }}",
    "mine.py": (
        "def fails(prompt, responses):\n    raise RuntimeError('no\\nluck')\n"
        "def one(prompt, responses):\n    return [1.0]\n"
        "def text(prompt, responses):\n    return 'ab'\n"
        "def number(prompt, responses):\n    return 3.0\n"
        "def none(a):\n    return [1.0, 2.0]\nvalue = 3\n"
    ),
    "boom.py": "1 / 0\n",
    "package/boom.py": "{}['x']\n",
    "exits.py": "import sys\nsys.exit(0)\n",
    "measures.yaml": "win_rate: {chnk: 3}\n",
    "compare.yaml": "base: r.yaml\nseeds: [0, 1]\nvariants: {plain: {}}\n",
    "same.yaml": "base: r.yaml\nseeds: [0, 0]\nvariants: {plain: {}}\n",
    "trap.yaml": "base: r.yaml\nvariants: {../up: {}}\n",
    "late.yaml": "base: r.yaml\nvariants: {plain: {train.lrr: 1}}\n",
    "circle.yaml": "base: circle.yaml\nvariants: {plain: {}}\n",
    "control.yaml": "base: r.yaml\ncontrol: plian\nvariants: {plain: {}}\n",
    "reward.yaml": "data: {train: [pairs.jsonl]}\nmodel: {source: MODEL}\n",
}


def set_(*values: str) -> tuple[str, ...]:
    return tuple(word for value in values for word in ("--set", value))


CHECK = ("check", "r.yaml")
RUN = ("run", "r.yaml")
DATA = ("data", "rows.jsonl", "--model", "MODEL")
JUDGE = ("judge", "check")
REWARD = ("reward", "train", "reward.yaml")
API = "judge={name: api, model: m, url: 'URL'}"

CASES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    # The recipe
    (("check", "laughs.yaml"), ("laughs.yaml", "aliases", "write it plainly")),
    (("run", "laughs.yaml"), ("laughs.yaml", "aliases", "write it plainly")),
    (("check", "list.yaml"), ("list.yaml", "section")),
    (("check", "text.yaml"), ("text.yaml", "section")),
    (("check", "latin.yaml"), ("latin.yaml is not UTF-8",)),
    (("check", "zero.yaml"), ("zero.yaml:2",)),
    (("check", "twice.yaml"), ("twice.yaml:2:1", "'method' is given twice")),
    (("check", "number.yaml"), ("method", "3")),
    (("check", "null.yaml"), ("method",)),
    (("check", "."), (". is a folder, and no run",)),
    (("check", ""), ("recipe",)),
    (("check", "r.yaml", *set_("method.name=boom.ial")), ("boom",)),
    (("check", "r.yaml", *set_("method={name: package.boom}")), ("package.boom", "KeyError", "boom.py:1")),
    (("check", "r\x1b[31m.yaml"), ("r\\x1b[31m.yaml",)),
    (("check", "\u202erecipe"), ("\\u202erecipe",)),
    (("check", "caf\udce9.yaml"), ("'caf\\udce9.yaml' is not UTF-8", "rename")),
    (("run", "r.yaml", "--out", "caf\udce9"), ("is not UTF-8", "rename")),
    (("merge", "runs/r", "caf\udce9"), ("is not UTF-8", "rename")),
    (("evaluate", "runs/r", "--data", "caf\udce9"), ("is not UTF-8", "rename")),
    (("reward", "train", "reward.yaml", "--out", "caf\udce9"), ("is not UTF-8", "rename")),
    ((*CHECK, *set_('data.train="a\\0b"')), ("no file or folder a\\x00b",)),
    ((*CHECK, *set_('name="a\\0b"')), ("name",)),
    ((*CHECK, *set_('launch.command="a\\0b"')), ("launch.command",)),
    # Values
    ((*CHECK, *set_("train.lr=.nan")), ("train.lr",)),
    ((*CHECK, *set_("train.lr=.inf")), ("train.lr",)),
    ((*CHECK, *set_("method.sampling.temperature=.nan")), ("method.sampling.temperature",)),
    ((*CHECK, *set_("method.sampling.temperature=.inf")), ("method.sampling.temperature",)),
    ((*CHECK, *set_("method.sampling.top_p=.nan")), ("method.sampling.top_p",)),
    ((*CHECK, *set_("guard.max_kl=.nan")), ("guard.max_kl",)),
    ((*CHECK, *set_("loop.lr_factors=[.inf]")), ("loop.lr_factors",)),
    ((*CHECK, *set_("loop.budget={seconds: .nan}")), ("loop.budget",)),
    ((*CHECK, *set_("loop.budget={}")), ("loop.budget limits nothing",)),
    ((*CHECK, *set_("loop.rounds=-1")), ("loop.rounds", "-1")),
    ((*CHECK, *set_("loop.rounds=1.5")), ("loop.rounds", "1.5")),
    ((*CHECK, *set_("loop.rounds=true")), ("loop.rounds", "true")),
    ((*CHECK, *set_(f"loop.rounds={'9' * 5000}")), ("loop.rounds",)),
    ((*CHECK, *set_("loop.round=3")), ("'round'", "did you mean 'rounds'?")),
    ((*CHECK, *set_("method.samplign.top_p=1")), ("'samplign'", "did you mean 'sampling'?")),
    ((*CHECK, *set_("model.tuning=lroa")), ("model.tuning", "lora")),
    ((*CHECK, *set_("model.lora.r=0")), ("model.lora.r", "0")),
    ((*RUN, *set_("model.device=gpu0")), ("model.device", "gpu0")),
    ((*RUN, *set_("model.device=cuda:99")), ("cuda:99",)),
    ((*RUN, *set_("method.sampling.max_new_tokens=1000000000000000")), ("max_new_tokens",)),
    ((*RUN, *set_("model.lora.target_modules='([a-z'")), ("target_modules",)),
    ((*RUN, *set_("model.lora.target_modules=[nothing_like_it]")), ("nothing_like_it",)),
    ((*CHECK, *set_('launch.command=\'accelerate launch "x\'')), ("launch.command", "quotes")),
    ((*CHECK, *set_("launch.command=''")), ("launch.command",)),
    ((*CHECK, *set_("launch={processes: 2, command: x}")), ("not both",)),
    ((*CHECK, *set_("launch.command=accelerate launch --config_file gone.yaml")), ("gone.yaml",)),
    ((*CHECK, *set_("judge={name: rules, min_words: 9, max_words: 3}")), ("min_words", "max_words")),
    ((*CHECK, *set_(API.replace("URL", "ftp://h/v1"))), ("judge.url",)),
    ((*CHECK, *set_(API.replace("URL", "http://h:0/v1"))), ("is no address",)),
    ((*CHECK, *set_(API.replace("URL", "http://\u0430.com/v1"))), ("is no address",)),
    ((*CHECK, *set_(API.replace("}", ", key_env: NOT_SET_AT_ALL}").replace("URL", "http://h/v1"))), ("NOT_SET_AT_ALL", "export it")),
    ((*CHECK, *set_("judge={name: python, function: mine}")), ("judge.function",)),
    ((*CHECK, *set_("judge={name: python, function: 'mine:gone'}")), ("mine:gone", "module:function")),
    ((*CHECK, *set_("judge={name: python, function: 'mine:value'}")), ("is no function",)),
    ((*CHECK, *set_("judge={name: python, function: 'boom:f'}")), ("boom", "division by zero")),
    ((*CHECK, *set_("judge={name: python, function: 'exits:f'}")), ("exits", "judge.function")),
    # Templates
    ((*CHECK, *set_("model.chat_template=deaf.jinja")), ("chat template",)),
    ((*CHECK, *set_("model.chat_template=loud.jinja")), ("chat template",)),
    ((*CHECK, *set_("model.chat_template=endless.jinja")), ("chat template",)),
    ((*CHECK, *set_("model.chat_template=broken.jinja")), ("chat template", "division by zero")),
    ((*CHECK, *set_("model.chat_template=.")), ("model.chat_template",)),
    # Data
    (("data", "gone.jsonl", "--model", "MODEL"), ("gone.jsonl",)),
    (("data", "empty.jsonl", "--model", "MODEL"), ("empty.jsonl holds no rows",)),
    (("data", "blank.jsonl", "--model", "MODEL"), ("blank.jsonl",)),
    (("data", "latin.jsonl", "--model", "MODEL"), ("latin.jsonl", "UTF-8")),
    (("data", "wide.jsonl", "--model", "MODEL"), ("wide.jsonl",)),
    (("data", "deep.jsonl", "--model", "MODEL"), ("deep.jsonl",)),
    (("data", "bad.jsonl.gz", "--model", "MODEL"), ("bad.jsonl.gz",)),
    (("data", "rows.jsonl", "--model", "rows.jsonl"), ("rows.jsonl",)),
    (("data", "rows.jsonl", "--model", "./gone"), ("./gone",)),
    ((*DATA, *set_("prompt_feild=x")), ("'prompt_feild'", "did you mean 'prompt_field'?")),
    ((*DATA, *set_("prompt_field=nope")), ("nope",)),
    ((*CHECK, *set_("data.train=surrogate.jsonl")), ("surrogate.jsonl:1",)),
    ((*CHECK, *set_("data.holdout=-1")), ("data.holdout", "-1")),
    ((*CHECK, *set_("data.limit=0")), ("data.limit", "0")),
    ((*CHECK, *set_("data.eval=gone.jsonl")), ("gone.jsonl",)),
    # Places to write
    ((*RUN, "--out", "r.yaml"), ("cannot write to r.yaml",)),
    ((*RUN, "--out", "/proc/r"), ("cannot write to /proc/r",)),
    (("schema", "--out", "folder"), ("folder",)),
    (("schema", "--out", "/proc/none/x.json"), ("/proc/none/x.json",)),
    # Looking back
    (("show", "rows.jsonl"), ("rows.jsonl is no run",)),
    (("show", "folder"), ("folder is no run",)),
    (("watch", "gone"), ("gone is no run",)),
    (("watch", "rows.jsonl"), ("rows.jsonl is no run",)),
    (("verify", "folder"), ("folder is no run",)),
    (("verify", "gone", "--redo"), ("gone is no run",)),
    (("report", "folder"), ("folder is no run",)),
    (("report", "runs/r", "--out", "folder"), ("folder",)),
    (("report", "runs/r", "--out", "rows.jsonl/r.html"), ("rows.jsonl",)),
    (("report", "runs/r", "--evaluation", "list.yaml"), ("list.yaml",)),
    (("report", "runs/r", "--evaluation", "folder"), ("folder",)),
    (("show", "runs/r", "--pair", "\x1b[2J"), ("\\x1b[2J",)),
    (("export", "runs/r", "folder"), ("cut-off",)),
    (("merge", "runs/r", "folder"), ("folder exists",)),
    (("merge", "folder", "m"), ("folder is no run",)),
    # Evaluating and comparing
    (("evaluate", "gone/here/now"), ("gone/here/now",)),
    (("evaluate", "runs/r@7"), ("runs/r", "7")),
    (("evaluate", "runs/r@-1"), ("runs/r",)),
    (("evaluate", "runs/r", "runs/r"), ("named twice",)),
    (("evaluate", "runs/r", "--suite", "quik"), ("'quik'", "did you mean 'quick'?")),
    (("evaluate", "runs/r", "--measures", "measures.yaml"), ("'chnk'", "did you mean 'chunk'?")),
    (("evaluate", "runs/r", "--measures", "folder"), ("folder",)),
    (("evaluate", "runs/r", "--measures", "laughs.yaml"), ("laughs.yaml", "aliases")),
    (("evaluate", "runs/r", "--set", "win_rate=3"), ("win_rate",)),
    (("evaluate", "runs/r", "--set", "winrate.x=3"), ("'winrate'", "did you mean 'win_rate'?")),
    (("evaluate", "runs/r", "--data", "empty.jsonl"), ("empty.jsonl",)),
    (("evaluate", "runs/r", "--out", "r.yaml"), ("r.yaml",)),
    (("evaluate", "runs/r", "--judge", "{name"), ("judge {name",)),
    (("evaluate", "folder"), ("folder",)),
    (("compare", "gone.yaml"), ("gone.yaml",)),
    (("compare", "folder"), ("folder",)),
    (("compare", "r.yaml"), ("r.yaml",)),
    (("compare", "same.yaml"), ("holds a seed twice",)),
    (("compare", "trap.yaml"), ("'../up' cannot name a folder",)),
    (("compare", "late.yaml"), ("'lrr'", "did you mean 'lr'?")),
    (("compare", "circle.yaml"), ("circle.yaml",)),
    (("compare", "control.yaml"), ("'plian'", "did you mean 'plain'?")),
    (("compare", "laughs.yaml"), ("laughs.yaml", "aliases")),
    (("compare", "compare.yaml", "--only", "plian", "--check"), ("plian", "'plain'?")),
    (("compare", "compare.yaml", "--out", "r.yaml"), ("r.yaml",)),
    # People
    (("annotate", "a.jsonl", "gone.jsonl"), ("gone.jsonl",)),
    (("annotate", "a.jsonl", "b.jsonl"), ("a.jsonl", "b.jsonl")),
    (("annotate", "a.jsonl", "folder"), ("folder",)),
    (("annotate", "a.jsonl", "empty.jsonl"), ("empty.jsonl",)),
    (("annotate", "a.jsonl", "latin.jsonl"), ("latin.jsonl",)),
    (("annotate", "a.jsonl", "c.jsonl", "--report", "--votes", "gone.jsonl"), ("gone.jsonl",)),
    (("annotate", "a.jsonl", "rows.jsonl", "--instructions", "latin.txt"), ("rows.jsonl",)),
    # Judges and reward models
    ((*JUDGE, "similarty", "--data", "pairs.jsonl"), ("'similarty'", "did you mean 'similarity'?")),
    ((*JUDGE, "gone.yaml", "--data", "pairs.jsonl"), ("no file gone.yaml",)),
    ((*JUDGE, "list.yaml", "--data", "pairs.jsonl"), ("list.yaml",)),
    ((*JUDGE, "{name: [rules]}", "--data", "pairs.jsonl"), ("judge",)),
    ((*JUDGE, "{}", "--data", "pairs.jsonl"), ("judge",)),
    ((*JUDGE, "[a: b]", "--data", "pairs.jsonl"), ("judge",)),
    ((*JUDGE, "{name: rules, max_words: 3}", "--data", "gone.jsonl"), ("gone.jsonl",)),
    ((*JUDGE, "{name: rules, max_words: 3}", "--data", "half.jsonl"), ("half.jsonl:2",)),
    ((*JUDGE, "{name: rules, max_words: 3}", "--data", "empty.jsonl"), ("empty.jsonl",)),
    ((*JUDGE, "{name: rules, max_words: 3}", "--data", "pairs.jsonl", "--targets", "b.jsonl"), ("b.jsonl",)),
    ((*JUDGE, "{name: python, function: 'mine:fails'}", "--data", "pairs.jsonl"), ("mine:fails", "RuntimeError", "no luck", "mine.py:2")),
    ((*JUDGE, "{name: python, function: 'mine:one'}", "--data", "pairs.jsonl"), ("1 scores for 2",)),
    ((*JUDGE, "{name: python, function: 'mine:text'}", "--data", "pairs.jsonl"), ("gave 'ab'",)),
    ((*JUDGE, "{name: python, function: 'mine:number'}", "--data", "pairs.jsonl"), ("gave 3.0",)),
    ((*JUDGE, "{name: python, function: 'mine:none'}", "--data", "pairs.jsonl"), ("mine:none", "TypeError")),
    ((*JUDGE, "self_judge", "--data", "pairs.jsonl"), ("--policy",)),
    (("reward", "train", "gone.yaml"), ("gone.yaml",)),
    (("reward", "train", "r.yaml"), ("r.yaml: unknown key",)),
    (("reward", "train", "laughs.yaml"), ("laughs.yaml", "aliases")),
    ((*REWARD, *set_("data.train=[]")), ("data.train",)),
    ((*REWARD, *set_("data.holdout=1.5")), ("data.holdout", "1.5")),
    ((*REWARD, *set_("train.lr=.nan")), ("train.lr",)),
    ((*REWARD, *set_("model.source=./gone")), ("./gone",)),
    ((*REWARD, *set_("data.train=[half.jsonl]")), ("half.jsonl:2",)),
    ((*REWARD, "--out", "r.yaml"), ("r.yaml",)),
]  # fmt: skip


@pytest.fixture
def littered(shell: Shell, run_folder: Path) -> Shell:
    """The folder with everything that the cases name."""
    Path("package").mkdir()
    for name, content in FILES.items():
        data = content if isinstance(content, bytes) else content.encode()
        Path(name).write_bytes(data.replace(b"MODEL", str(shell.model).encode()))
    Path("folder").mkdir()
    shell.monkeypatch.syspath_prepend(Path.cwd())
    return shell


@pytest.mark.parametrize(("words", "saying"), CASES, ids=[" ".join(w)[:70] for w, _ in CASES])
def test_a_wrong_input_is_one_line_with_place_and_remedy(
    littered: Shell, words: tuple[str, ...], saying: tuple[str, ...]
) -> None:
    littered.refuses(*(word.replace("MODEL", str(littered.model)) for word in words), saying=saying)
