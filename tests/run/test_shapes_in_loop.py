"""A whole round of IAL and AROP on tiny models with the tokenizers and templates that people use: the same tokens throughout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer

from benchmarks import shapes as bench
from prefloop.models.chat_template import set_template_date
from prefloop.records import Candidates, Pair, Response
from prefloop.run_folder import RoundDir, read_run
from prefloop.train.packing import TokenGroup

R1_END = "<｜end▁of▁sentence｜>"
AROUND = {
    "zephyr": ("", "</s>"),
    "gemma3": ("", "<end_of_turn>"),
    "phi3": ("", "<|end|>"),
    "llama3": ("", "<|eot_id|>"),
    "qwen3, thinking": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "qwen3, not thinking": ("", "<|im_end|>"),
    "gpt-oss": ("<|channel|>final<|message|>", "<|return|>"),
    "glm4": ("", "<|user|>"),
    "r1": ("\n</think>\n\n", R1_END),
}
"""What the template puts around an answer that nobody sampled, after its generation prompt."""
STOPS = {name: {end, *bench.SHAPES[name].named_ends} for name, (_, end) in AROUND.items()}
THINKS = {"qwen3, thinking": "</think>", "r1": "</think>", "gpt-oss": "<|channel|>final<|message|>"}
QUICK = [("zephyr", "ial"), ("gpt-oss", "ial"), ("llama3", "arop"), ("r1", "arop, infilled flaw")]
CASES = [
    pytest.param(shape, method, marks=() if (shape, method) in QUICK else pytest.mark.slow)
    for shape in bench.SHAPES
    for method in bench.METHODS
]


class Played(NamedTuple):
    """One round: what it left, and what the trainer computed."""

    row: Any
    round_dir: RoundDir
    groups: list[TokenGroup]
    tokenizer: Any
    arguments: dict[str, Any]

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_ids(self, pair: Pair) -> tuple[int, ...]:
        """What transformers makes of the pair's question."""
        turns = [{"role": m.role, "content": m.content} for m in pair.prompt]
        rendered = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, **self.arguments
        )
        return tuple(rendered["input_ids"])

    def trained(self, pair: Pair) -> dict[str, tuple[int, ...]]:
        """The pair's tokens as the model was given them, found by its question."""
        prompt = self.prompt_ids(pair)
        # The reference's pass and the training step's compute the same.
        found = {group.completions for group in self.groups if group.prompt == prompt}
        assert len(found) == 1
        roles = ("target", "chosen", "rejected") if pair.target else ("chosen", "rejected")
        return dict(zip(roles, found.pop(), strict=True))


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    yield
    set_template_date(None)


@pytest.fixture
def played(shape: str, method: str, tmp_path: Path) -> Played:
    groups: list[TokenGroup] = []
    row = bench.play(shape, method, tmp_path, groups)
    return Played(
        row,
        read_run(tmp_path / "run").round(0),
        groups,
        AutoTokenizer.from_pretrained(tmp_path / "model"),
        bench.SHAPES[shape].arguments,
    )


def text_of(played: Played, ids: tuple[int, ...]) -> str:
    return str(played.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def sampled(group: Candidates) -> list[Response]:
    return [response for response in group.responses.values() if response.token_ids]


@pytest.mark.parametrize(("shape", "method"), CASES)
def test_a_round_samples_judges_and_trains_the_same_tokens(
    played: Played, shape: str, method: str
) -> None:
    groups = {g.prompt.id: g for g in played.round_dir.records("candidates", Candidates)}
    pairs = played.round_dir.records("pairs", Pair)
    answers = [answer for group in groups.values() for answer in sampled(group)]
    assert answers
    for answer in answers:
        check_end(played, answer, STOPS[shape])
        check_thought(played, answer, THINKS.get(shape))
    assert sum(bool(a.reasoning) for a in answers) == (
        played.row.thoughts if shape in THINKS else 0
    )
    assert bool(played.row.thoughts) == (shape in THINKS)
    assert played.row.pairs == len(pairs) >= 2
    assert played.row.pairs + sum(played.row.rejects.values()) == 6
    before, end = AROUND[shape]
    for pair in pairs:
        trained = played.trained(pair)
        for role, ids in trained.items():
            name = pair.origin.get(role)
            answer = groups[pair.prompt_id].responses[name] if name else None
            if answer is not None and answer.token_ids:
                assert ids == answer.token_ids
            else:
                assert text_of(played, ids) == before + getattr(pair, role) + end
                assert text_of(played, played.prompt_ids(pair) + ids).endswith(end)
    assert played.row.first_loss == pytest.approx(played.row.expected_loss, abs=1e-5)


def check_end(played: Played, answer: Response, stops: set[str]) -> None:
    """One token of the stops, at the end, unless the limit came first."""
    ends = [token in stops for token in played.tokenizer.convert_ids_to_tokens(answer.token_ids)]
    assert not any(ends[:-1])
    assert ends[-1] == (answer.finish == "stop")


def check_thought(played: Played, answer: Response, close: str | None) -> None:
    """What people read has no thought in it, and neither it nor the thought has a tag."""
    said = text_of(played, answer.token_ids)
    if close is None or close not in said:
        assert not answer.reasoning or not answer.text
    for text in (answer.text, answer.reasoning):
        assert "think>" not in text
        assert "<|" not in text
    if close is None:
        return
    assert not set("xyz") & set(answer.text)
    if answer.text:
        assert answer.text in said.partition(close)[2]


def test_each_family_s_target_is_how_its_template_goes_on() -> None:
    """The table that the rounds are held against, held against transformers."""
    for name, (before, end) in AROUND.items():
        shape = bench.SHAPES[name]
        tokenizer = shape.tokenizer()
        turns = [{"role": "user", "content": "Why?"}]
        options = {"tokenize": False, **shape.arguments}
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
        turns.append({"role": "assistant", "content": "So."})
        whole = tokenizer.apply_chat_template(turns, **options)
        if (
            name == "r1"
        ):  # closes the thought that its prompt has opened, and its conversations do not have
            prompt = prompt.removesuffix("<think>\n")
            before = ""
        if name == "glm4":  # the next turn's first token
            turns.append({"role": "user", "content": "And?"})
            whole = tokenizer.apply_chat_template(turns, **options)
        assert whole.startswith(prompt + before + "So." + end)


def test_the_script_prints_a_table_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        bench.Row(
            shape="phi3",
            method="ial",
            answers=3,
            stops={"<|end|>": 2, "length limit": 1},
            thoughts=0,
            rejects={"cut off": 1},
            pairs=1,
            trained={"target": "text: R <|end|>", "chosen": "C <|end|>"},
            first_loss=1.0,
            expected_loss=1.0,
        )
    ]
    monkeypatch.setattr(bench, "play", lambda *_: rows[0])
    arguments = ["shapes.py", "--shapes", "phi3", "--methods", "ial"]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    assert capsys.readouterr().out.splitlines()[-1] == (
        "| phi3 | ial | `<\\|end\\|>` 2, length limit 1 |  | cut off 1 | 1 | "
        "target text: `R <\\|end\\|>`; chosen `C <\\|end\\|>` |"
    )
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    bench.main()
    assert json.loads(capsys.readouterr().out)[0]["stops"] == {"<|end|>": 2, "length limit": 1}
