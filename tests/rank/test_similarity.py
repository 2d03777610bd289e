import pytest
from pydantic import ValidationError

from prefloop import plugins, rank
from prefloop.generate.templates import PromptSet
from prefloop.rank import NoVerdict, Verdict
from prefloop.rank.similarity import Similarity
from prefloop.records import Message, Prompt


def _prompt(target: str | None) -> Prompt:
    return Prompt(id="p", messages=(Message(role="user", content="Where?"),), target=target)


def _scores(target: str | None, *answers: str, word_order: int = 0) -> Verdict:
    judge = Similarity(word_order=word_order).open(None, PromptSet("compact"))
    return judge.score([_prompt(target)], [answers])[0]


def test_the_target_itself_scores_100_and_a_disjoint_answer_0():
    assert _scores("in the north", "in the north", "XYZ") == pytest.approx((100.0, 0.0))


def test_chrf_follows_popovic_by_hand():
    """Target "ab", answer "a": only unigrams count. Precision 1/1, recall 1/2, beta 2:
    F = (1 + 4) * 1 * 0.5 / (4 * 1 + 0.5) = 5/9."""
    assert _scores("ab", "a") == pytest.approx((500 / 9,))


def test_word_order_2_tells_apart_what_characters_alone_cannot():
    """chrF drops spaces, so a space in the wrong place is seen by chrF++ only."""
    plain = _scores("in the north", "int henorth")
    assert isinstance(plain, tuple)
    assert plain[0] == pytest.approx(100.0)
    with_words = _scores("in the north", "int henorth", word_order=2)
    assert isinstance(with_words, tuple)
    assert with_words[0] < 100.0


def test_a_group_with_an_empty_response_has_no_verdict():
    assert _scores("in the north", "in the north", " \n") == NoVerdict("empty response")


@pytest.mark.parametrize("target", [None, "", "  "])
def test_without_a_target_there_is_no_verdict(target):
    assert _scores(target, "in the north") == NoVerdict("no target")


def test_verdicts_come_in_the_order_of_the_groups():
    judge = Similarity().open(None, PromptSet("compact"))
    verdicts = judge.score([_prompt("ab"), _prompt(None), _prompt("ab")], [["ab"], ["ab"], ["q"]])
    assert verdicts == [(100.0,), NoVerdict("no target"), (0.0,)]


def test_similarity_is_found_by_its_file_name_and_asks_for_targets():
    found = plugins.find(rank, "similarity", rank.Judge, "judge")
    assert found is Similarity
    assert found.needs_target
    assert not found.needs_policy


def test_a_negative_word_order_is_refused():
    with pytest.raises(ValidationError, match="word_order"):
        Similarity(word_order=-1)
