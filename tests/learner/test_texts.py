"""Words and sentences."""

from __future__ import annotations

import pytest

from everlearn.learner.texts import LONG, before_asking, has, sentences, split_passage, words

CAT = "My cat is Nils."


def test_a_word_is_found_but_for_its_endings():
    assert has("cortado", "Two CORTADOS, please")
    assert has("liege", "from Liège")
    assert not has("cat", "cats")
    assert not has("paloma", "Palermo")


def test_words_fold_case_and_accents():
    assert words("Crème BRÛLÉE, 3-pack!") == ["creme", "brulee", "3", "pack"]


def test_long_messages_are_dreamt_of_by_the_sentence():
    assert split_passage("My  cat\nis Nils.") == [CAT]
    long = "I went to the market with my sister today. " * 5 + CAT
    assert len(split_passage(long)) == 6
    assert split_passage(long)[-1] == CAT
    priced = " ".join(["It was 3.5 miles to example.com and back."] * 6)
    assert split_passage(priced) == ["It was 3.5 miles to example.com and back."] * 6
    endless = split_passage("word " * 1000)
    assert max(len(part.split()) for part in endless) <= LONG
    assert len(" ".join(endless).split()) == 1000
    assert split_passage(f"Hi! I'm Dr. Olsson. {'We had a lot of rain today. ' * 3}Bye now.") == [
        "Hi! I'm Dr. Olsson.",
        *["We had a lot of rain today."] * 2,
        "We had a lot of rain today. Bye now.",
    ]
    question = "What shall I cook tonight for all of my family and their many friends? Any idea?"
    assert split_passage(f"I'm vegan. {question}") == ["I'm vegan.", question], "what is told apart from what is asked"
    assert sentences("She is at the BBC. He has a TV. We see Dr. Ek and Mrs. Ho.") == [
        "She is at the BBC.",
        "He has a TV.",
        "We see Dr. Ek and Mrs. Ho.",
    ]
    clauses = "after all these years and " * 6 + "in the rain; so we took the early train to the coast and slept"
    assert split_passage(clauses) == clauses.replace("; ", ";\n").split("\n"), "cut behind a mark, not in the midst"
    late = "the name that my old grandmother gave " * 6 + "is this: Nils."
    assert " ".join(split_passage(late)) == late, "no end is cut off that would be too short"


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("I'm from Ghent, any tips?", "I'm from Ghent"),
        ("I'm vegan, as you know; what shall I cook?", "I'm vegan, as you know"),
        ("I swim - a lot - is that bad?", ""),  # a hyphen joins words
        ("I live in Ghent, as you know.", ""),  # asks nothing
        ("Well then, what shall I cook?", ""),  # too little
        ("我住在根特这个城市，有什么建议？", ""),  # words are not set apart
    ],
)
def test_what_is_told_before_a_question_ends_at_the_last_mark(sentence, told):
    assert before_asking(sentence) == told
