"""Gates: what they let pass, what they do not, and that ordinary answers are not taken for meta talk."""

import inspect
import re

import pytest

from prefloop.data.prompts import EMBEDDED, DataOptions, read_prompts
from prefloop.methods._gates import REMEDIES, Gates, is_meta_talk
from prefloop.records import Response

META_TALK = [
    "Here is the improved answer: Mercury is the planet closest to the Sun.",
    "Here's the refined response:\n\nIce floats because it is less dense than water.",
    "Sure! Here is a revised version: She doesn't like coffee.",
    "Certainly, here is the corrected answer: 17 + 26 = 43.",
    "Here is the rewritten version of the answer: Mercury.",
    "Here is an improved version of your previous answer: Mercury.",
    "Here is the flawed version:\nMercury is the third planet.",
    "Here is the answer with one subtle flaw: 17 + 26 = 44.",
    "Here is the text with one small mistake: Ice sinks in water.",
    "Here’s my answer: a candle.",
    "Here is a response to the question: Paris.",
    "Here is the improved and shortened answer: Paris.",
    "Below is the final answer: 43.",
    "This is the improved response.",
    "**Improved response:** Carrots, potatoes and beetroot.",
    "Refined answer:\nCarrots.",
    "The revised version is shorter and names the source.",
    "Improved version\n\nThe town is loved for its market.",
    '"Better answer: 83"',
    "I have improved the answer by adding an example.",
    "I've rewritten the previous response so that it is clear.",
    "I have made the changes that were asked for in the suggestions.",
    "Based on the suggestions, the town is loved for its quiet lanes.",
    "Following your suggestions: the town is loved for its quiet lanes.",
    "The previous answer was wrong: 17 + 26 is 43.",
    "Suggestions for improvement: name the source.",
    "As an expert advisor, I would name the source.",
    "Okay. Here is a better version: the river is long.",
    "Of course! Here are the improved answers:",
]

ORDINARY = [
    "Here is a list of three fruits: apples, pears and plums.",
    "Here are three suggestions for a birthday party: a picnic, a film night, a treasure hunt.",
    "Here is the corrected sentence: She doesn't like coffee.",
    "Here's a shorter version of the paragraph: Ice floats because it is light.",
    "Here is the corrected version of the sentence: She doesn't like coffee.",
    "Here is a draft of the letter, with a warm ending: Dear neighbours, thank you.",
    "Here is a polite response to the customer's complaint: We are sorry to hear it.",
    "Here is the answer to the riddle: a candle.",
    "Here is an example sentence: The cat sleeps.",
    "Here is the recipe in five steps: 1. Boil the water.",
    "Here are the answers: 1. B 2. A 3. D",
    "Here is how the immune response works: white cells find the intruder.",
    "Sure! A haiku: Old pond, a frog jumps in.",
    "Sure, I can help. First, switch the router off and on again.",
    "Of course the Earth is round.",
    "This is a common response to stress.",
    "This is an old version of the story, told in the north.",
    "This is the text of a sign at the station.",
    "Below is a table of the planets and their moons.",
    "The new version of Python adds pattern matching.",
    "The revised edition was printed in 1998.",
    "The final answer is 43.",
    "Final answer: 43",
    "The answer is B, because light is faster than sound.",
    "The original version of the song was recorded in 1972.",
    "Better answers come from better questions.",
    "She worked as an advisor to the president for six years.",
    "As an advisor to the queen, he saw every letter.",
    "I have added the milk to the shopping list.",
    "I've made a table of the three options.",
    "Based on the review, the guest was unhappy: negative.",
    "Following the recipe, let the dough rest for an hour.",
    "According to the text, the town lies on a river.",
    "There are many books on the table.",
    "I can't help with that, but I can explain how to set up a power of attorney.",
    "Improved roads made the journey shorter.",
    "Suggestions from readers filled two pages.",
    "",
]


@pytest.mark.parametrize("text", META_TALK)
def test_talk_about_the_answer_is_meta_talk(text: str) -> None:
    assert is_meta_talk(text)


@pytest.mark.parametrize("text", ORDINARY)
def test_an_ordinary_answer_is_no_meta_talk(text: str) -> None:
    assert not is_meta_talk(text)


def test_no_answer_of_the_embedded_instructions_is_meta_talk() -> None:
    parts = [read_prompts(EMBEDDED, DataOptions(), part=part) for part in ("train", "eval")]
    prompts = [prompt for part in parts for prompt in part]
    assert len(prompts) > 250
    assert [p.target for p in prompts if is_meta_talk(p.target or "")] == []


def reason(first: str, second: str, cut: bool = False, **gates: object) -> str | None:
    return Gates(**gates).reason_against(
        Response(text=first, finish="length" if cut else "stop"), Response(text=second)
    )


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_answer_never_passes(empty: str) -> None:
    nothing_else = Gates(cut_off=False, identical=False, meta_talk=False).model_dump()
    assert reason(empty, "yes", **nothing_else) == "empty answer"
    assert reason("yes", empty, **nothing_else) == "empty answer"


def test_two_different_answers_pass() -> None:
    assert reason("It floats.", "It sinks.") is None


@pytest.mark.parametrize(
    ("first", "second", "gate", "why"),
    [
        ("It  floats.", "It floats.\n", "identical", "identical"),
        ("Here is the improved answer: yes.", "yes.", "meta_talk", "meta talk"),
        ("yes.", "Here is the improved answer: yes.", "meta_talk", "meta talk"),
    ],
)
def test_a_gate_rejects_unless_it_is_off(first: str, second: str, gate: str, why: str) -> None:
    assert reason(first, second) == why
    assert reason(first, second, **{gate: False}) is None


def test_an_answer_cut_off_is_rejected_on_either_side() -> None:
    cut, whole = Response(text="one two", finish="length"), Response(text="one three")
    assert Gates().reason_against(cut, whole) == "cut off"
    in_thought = Response(text="", reasoning="hm", finish="length")
    assert Gates().reason_against(whole, in_thought) == "cut off"
    assert Gates(cut_off=False).reason_against(whole, in_thought) == "empty answer"
    assert Gates().reason_against(whole, cut) == "cut off"
    assert Gates(cut_off=False).reason_against(cut, whole) is None


def test_the_length_ratio_is_a_bound_that_may_be_reached() -> None:
    """Four characters against two: ratio 2; the order does not matter and outer spaces do not count."""
    assert reason("abcd", "  ab ", max_length_ratio=2.0) is None
    assert reason("abcde", "ab", max_length_ratio=2.0) == "length ratio"
    assert reason("ab", "abcde", max_length_ratio=2.0) == "length ratio"


def test_the_edit_share_is_a_bound_that_may_be_reached() -> None:
    """One of two words differs: share 1/2."""
    assert reason("it floats", "it sinks", max_edit_share=0.5) is None
    assert reason("it floats", "it sinks", max_edit_share=0.49) == "edit share"


def test_each_gate_that_can_be_loosened_has_a_remedy() -> None:
    phrases = set(re.findall(r'return "(.*)"', inspect.getsource(Gates.reason_against)))
    assert phrases - {"empty answer"} == set(REMEDIES)
    for option in re.findall(r"method\.gates\.(\w+)", " ".join(REMEDIES.values())):
        assert option in Gates.model_fields
