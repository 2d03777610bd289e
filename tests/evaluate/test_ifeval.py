"""IFEval through lm-evaluation-harness's checkers: known answers, no download, the same every time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from prefloop.errors import DataError
from prefloop.evaluate.measures.ifeval import Ifeval, InstructionRules
from prefloop.records import Request
from tests.evaluate.asking import KilledAt, subject, write_rows

for module in ("lm_eval", "langdetect", "punkt"):
    pytest.importorskip(module, reason="needs the extra eval, which make setup installs")


def row(name: str, prompt: str, *instructions: tuple[str, dict[str, object]]) -> dict[str, object]:
    return {
        "id": name,
        "prompt": prompt,
        "instruction_id_list": [kind for kind, _ in instructions],
        "kwargs": [given for _, given in instructions],
    }


ROWS = [
    row("commas", "Write without commas, 3 words", ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 3})),
    row("title", "Write a title", ("detectable_format:title", {})),
    row("end", "End with BYE", ("startend:end_checker", {"end_phrase": "BYE"})),
]  # fmt: skip
ANSWERS = {
    "commas": "One, two, three",
    "title": "<<A title>>\nText.",
    "end": "Sure!\nIt is done. *BYE*\nAnything else?",
}


def answer(request: Request, seed: int) -> str:
    text = request.messages[-1].content
    return next(ANSWERS[str(r["id"])] for r in ROWS if r["prompt"] == text)


def test_the_four_accuracies_of_answers_worked_out_by_hand(tmp_path: Path) -> None:
    measure = Ifeval(data=write_rows(tmp_path / "ifeval.jsonl", ROWS))
    measure.check()
    found = measure.run(subject(tmp_path / "work", answer))
    assert {name: e.value for name, e in found.estimates.items()} == {
        "ifeval_prompt_strict": 1 / 3,  # the title alone
        "ifeval_instruction_strict": 2 / 4,  # and three words
        "ifeval_prompt_loose": 2 / 3,  # without its last line and its asterisks, it ends with BYE
        "ifeval_instruction_loose": 3 / 4,
    }
    assert found.estimates["ifeval_instruction_strict"].count == 4
    assert found.facts is not None
    assert found.facts["by_instruction"]["punctuation:no_comma"] == {
        "count": 1,
        "strict": 0,
        "loose": 0,
    }


def test_they_equal_the_harness_own_scoring_item_by_item(tmp_path: Path) -> None:
    InstructionRules()  # its sentence model must be there before the harness is imported
    from lm_eval.tasks.ifeval.utils import process_results

    measure = Ifeval(data=write_rows(tmp_path / "ifeval.jsonl", ROWS))
    found = {item.id: item for item in measure.run(subject(tmp_path / "work", answer)).items}
    for given in ROWS:
        name = str(given["id"])
        theirs = process_results({**given, "key": 0}, [ANSWERS[name]])
        for mode in ("strict", "loose"):
            flags = theirs[f"inst_level_{mode}_acc"]
            assert found[name].texts[mode] == "".join("01"[flag] for flag in flags)
            assert found[name].values[f"ifeval_prompt_{mode}"] == theirs[f"prompt_level_{mode}_acc"]


def test_sentences_are_counted_by_punkt_without_a_download() -> None:
    rules = InstructionRules()
    at_least_three = {"relation": "at least", "num_sentences": 3}
    for text, enough in (("Dr. No left. He ran.", False), ("He left. She ran. All slept.", True)):
        found = rules.check("p", ["length_constraints:number_sentences"], [at_least_three], text)
        assert found.strict == (enough,)


def test_checking_leaves_the_programs_random_numbers_alone_and_repeats() -> None:
    rules = InstructionRules()
    # Without a letter the checker draws one.
    asked = ("keywords:letter_frequency", {"let_frequency": 4, "let_relation": "at least"})
    random.seed(5)
    before = random.getstate()
    found = {rules.check("prompt", [asked[0]], [asked[1]], "tttt eeee").strict for _ in range(20)}
    assert len(found) == 1
    assert random.getstate() == before


@pytest.mark.parametrize("sign", ["#", "!"])
def test_a_sign_that_a_row_names_as_its_letter_is_counted(sign: str) -> None:
    rules = InstructionRules()
    options = {"letter": sign, "let_frequency": 4, "let_relation": "at least"}
    for text, enough in (
        (f"a{sign} b{sign} c{sign} d{sign}", True),
        (f"{sign * 3} aaaa tttt", False),
    ):
        followed = rules.check("a prompt", ["keywords:letter_frequency"], [options], text)
        assert followed.strict == followed.loose == (enough,)


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        (("no:such_rule", {}), "no instruction 'no:such_rule'"),
        (("length_constraints:number_words", {"relation": "at least"}), "lacks num_words"),
        (("punctuation:no_comma", {"commas": 3}), "refuses its kwargs"),
    ],
)
def test_a_row_that_does_not_say_what_it_demands_is_an_error(
    instruction: tuple[str, dict[str, object]], words: str, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "bad.jsonl", [row("x", "Write", instruction)])
    with pytest.raises(DataError, match=words):
        Ifeval(data=data).run(subject(tmp_path / "work"))


def test_rows_of_another_form_are_named_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names no file"):
        Ifeval().check()
    data = write_rows(tmp_path / "plain.jsonl", [{"prompt": "Write"}])
    with pytest.raises(DataError, match=r"plain\.jsonl:1 has no lists instruction_id_list"):
        Ifeval(data=data).check()
    data = write_rows(tmp_path / "text.jsonl", [{**ROWS[0], "kwargs": [{}, "at least 3 words"]}])
    with pytest.raises(DataError, match=r"text\.jsonl:1 has kwargs that are no objects"):
        Ifeval(data=data).check()
    twice = write_rows(tmp_path / "twice.jsonl", [ROWS[0]] * 2)
    with pytest.raises(DataError, match=r"twice\.jsonl:2 repeats the id 'commas'"):
        Ifeval(data=twice).check()


def test_a_killed_measure_goes_on(tmp_path: Path) -> None:
    measure = Ifeval(data=write_rows(tmp_path / "ifeval.jsonl", ROWS), chunk=1)
    killed = KilledAt(3, answer)
    with pytest.raises(KeyboardInterrupt):
        measure.run(subject(tmp_path / "work", killed))
    found = measure.run(subject(tmp_path / "work", killed))
    assert killed.calls == 3 + 1
    assert found == measure.run(subject(tmp_path / "unbroken", answer))
