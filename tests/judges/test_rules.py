import pytest
from pydantic import ValidationError

from prefloop.generate.templates import PromptSet
from prefloop.judges import NoVerdict, Verdict
from prefloop.judges.rules import Rules, count_sentences, count_words
from prefloop.records import Message, Prompt

PROMPT = Prompt(id="p", messages=(Message(role="user", content="Where?"),))


def score(text: str, **rules: object) -> Verdict:
    judge = Rules.model_validate(rules).open(None, PromptSet("compact"))
    return judge.score([PROMPT], [[text]])[0]


@pytest.mark.parametrize(
    ("rules", "kept", "broken"),
    [
        ({"min_words": 3}, "one two three", "one two"),
        ({"max_words": 2}, "don't go", "one two three"),
        ({"min_characters": 4}, "北方之地", "北方"),
        ({"max_characters": 2}, "北方", "北方之地"),
        ({"max_sentences": 1}, "It costs 3.50 euros.", "It is. It was."),
        ({"paragraphs": 2}, "one\n\ntwo", "one\ntwo"),
        ({"bullets": 2}, "These:\n* one\n- two", "* one\n* two\n* three"),
        ({"bullets": 0}, "none - at all", "- one"),
        ({"include": ["art"]}, "The ART of it.", "A party."),
        ({"include": ["New  York"]}, "in new york.", "in newyork"),
        ({"include": ["C++"]}, "I like C++!", "I like C."),
        ({"exclude": ["art"]}, "A party.", "art"),
        ({"starts_with": "Dear"}, "Dear all,", "dear all,"),
        ({"ends_with": "?"}, "Right? ", "Right."),
        ({"case": "lower"}, "straße 3", "Straße 3"),
        ({"case": "upper"}, "ÉTÉ 3!", "été"),
        ({"case": "upper"}, "A", "123"),
        ({"no_commas": True}, "one and two", "一，二"),
        ({"is_json": True}, '{"a": [1]}', "{'a': 1}"),
        ({"is_json": True}, '```json\n{"a": 1}\n```', 'Here: {"a": 1}'),
        ({"matches": [r"\d{4}"]}, "in 1990", "in 90"),
        ({"matches_not": [r"(?i)as an ai"]}, "I think so.", "As an AI I cannot."),
    ],
)
def test_a_rule_is_kept_or_broken(rules: dict[str, object], kept: str, broken: str) -> None:
    assert score(kept, **rules) == (1.0,)
    assert score(broken, **rules) == (0.0,)


def test_the_score_is_the_share_of_rules_kept_each_listed_value_being_one() -> None:
    assert score("red blue", include=["red", "green", "blue"], max_words=1) == (0.5,)


def test_a_bound_from_both_sides_is_two_rules() -> None:
    assert score("a b c", min_words=2, max_words=2) == (0.5,)


def test_sentences_are_counted_by_their_end_marks_in_several_scripts() -> None:
    assert count_sentences('He said "no." Then he left! Why?') == 3
    assert count_sentences("你好。再见！") == 2
    assert count_sentences("no mark") == 1
    assert count_sentences("...") == 0


def test_words_are_runs_of_letters_and_digits() -> None:
    assert count_words("It's 3 o’clock - really, naïve") == 5


def test_an_empty_answer_has_no_verdict() -> None:
    judge = Rules(max_words=3).open(None, PromptSet("compact"))
    assert judge.score([PROMPT], [["fine", " "]]) == [NoVerdict("empty response")]


def test_a_judge_without_a_rule_is_refused() -> None:
    with pytest.raises(ValidationError, match="has no rule; give at least one"):
        Rules()


def test_a_broken_expression_is_named() -> None:
    with pytest.raises(ValidationError, match="is no regular expression"):
        Rules(matches=("(",))
