"""Word differences and distances, against the textbook table and by their own invariants."""

from hypothesis import given
from hypothesis import strategies as st

from prefloop.data.text_distance import (
    Span,
    edit_share,
    fold_whitespace,
    levenshtein,
    normalised_distance,
    spans,
)

WORDS = st.lists(st.sampled_from("abc"), max_size=12)
TEXTS = st.text(st.sampled_from("ab \n"), max_size=24)


def textbook(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row, above = [i], row
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def test_levenshtein_of_kitten_and_sitting_is_three():
    assert levenshtein("kitten", "sitting") == 3


@given(WORDS, WORDS)
def test_levenshtein_equals_the_textbook_table(a, b):
    assert levenshtein(a, b) == textbook(a, b)


def test_levenshtein_is_exact_beyond_a_machine_word():
    a = [str(n % 7) for n in range(300)]
    b = [str(n % 5) for n in range(280)]
    assert levenshtein(a, b) == textbook(a, b)


def test_normalised_distance_is_over_the_longer_side():
    assert normalised_distance([1, 2, 3, 4], [1, 2]) == 0.5
    assert normalised_distance([], []) == 0.0


@given(TEXTS, TEXTS)
def test_edit_share_is_symmetric_and_in_the_unit_interval(a, b):
    assert 0.0 <= edit_share(a, b) == edit_share(b, a) <= 1.0


def test_edit_share_counts_words_not_whitespace():
    assert edit_share("the cat  sat\n", "the dog sat") == 1 / 3
    assert edit_share("a  b", "a\nb") == 0.0
    assert edit_share("a b", "") == 1.0


def test_fold_whitespace_keeps_words_apart():
    assert fold_whitespace("\n a \t b\n") == "a b"


@given(TEXTS, TEXTS)
def test_spans_lose_nothing_of_either_text(old, new):
    found = spans(old, new)
    assert "".join(text for kind, text in found if kind != "new") == old
    assert "".join(text for kind, text in found if kind != "old") == new


def test_spans_keep_a_replaced_phrase_in_one_piece():
    assert spans("it is red here", "it was very green here") == [
        Span("same", "it "),
        Span("old", "is red"),
        Span("new", "was very green"),
        Span("same", " here"),
    ]


def test_spans_of_equal_texts_are_one_span_and_of_empty_ones_none():
    assert spans("a b", "a b") == [Span("same", "a b")]
    assert spans("", "") == []
