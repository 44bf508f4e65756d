"""Gists: the formula, which words count, and which part of a conversation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from everlearn.memories.gist import MARK, SAYS, Gist

V, E = 12, 5
ENDS = 11  # the token that ends a part


@pytest.fixture
def gist() -> Gist:
    torch.manual_seed(0)
    made = Gist(E)
    weights = torch.rand(V) * 0.4 + 0.6
    weights[ENDS], weights[0] = MARK, 0.01
    spread = {"center": torch.randn(E), "whitener": torch.randn(E, E)}
    made.fill({"weights": weights, **spread, "behind": torch.tensor(2)})
    return made


TABLE = torch.randn(V, E, generator=torch.Generator().manual_seed(1))


def embed(ids: torch.Tensor) -> torch.Tensor:
    return TABLE[ids]


def read(gist: Gist, *ids: int) -> torch.Tensor:
    return gist([torch.tensor(ids, dtype=torch.long)], embed)[0]


def test_it_is_the_weighted_sum_of_the_definition(gist):
    """Term by term, in float64."""
    total = torch.zeros(E, dtype=torch.float64)
    for token in (3, 5, 5, 9):
        centred = TABLE[token].double() - gist.center.double()
        total += gist.weights[token].double() * (centred @ gist.whitener.double())
    torch.testing.assert_close(read(gist, 3, 5, 5, 9), (total / total.norm()).float())
    torch.testing.assert_close(read(gist, 9, 5, 3, 5), read(gist, 3, 5, 5, 9))  # words have no order


def test_a_common_word_hardly_counts(gist):
    alone = read(gist, 4, 7)
    assert F.cosine_similarity(read(gist, 4, 0, 7), alone, dim=0) > 0.99
    assert F.cosine_similarity(read(gist, 4, 8, 7), alone, dim=0) < 0.99


def asked(gist: Gist, *ids: int) -> list[int]:
    return gist.asked(torch.tensor(ids, dtype=torch.long)).tolist()


def test_the_part_that_is_asked_is_the_same_while_the_reply_is_spoken(gist):
    turn = 3, 2, ENDS, 5, ENDS  # somebody spoke before
    assert asked(gist, 4, 7, ENDS, 0, ENDS) == [4, 7]
    assert asked(gist, *turn, 4, 7, ENDS, 0, ENDS, 0) == [4, 7], "behind the words that begin a reply too"
    assert asked(gist, *turn, 4, 7, ENDS, 0, ENDS, 8, 9, 6) == [4, 7]
    assert asked(gist, *turn, 4, 7, ENDS, 0, ENDS, 8, 9, ENDS) == [0], "once it has ended something else is asked"
    assert asked(gist, 4, 7, ENDS) == [], "that is no conversation"
    gist.behind.zero_()
    assert asked(gist, 4, 7, ENDS, 8) == [8]
    assert asked(gist, 4, 7) == [4, 7]
    assert asked(gist) == []


def test_few_common_words_say_little(gist):
    assert read(gist, 4, 7).norm() == pytest.approx(1.0)
    gist.weights[8] = SAYS / 2
    assert read(gist, 8).norm() == pytest.approx(0.5, abs=1e-3)
    assert F.cosine_similarity(read(gist, 8), read(gist, 8, 8, 8), dim=0) == pytest.approx(1.0, abs=1e-4)


def test_texts_are_read_apart_and_marks_have_no_weight(gist):
    both = gist([torch.tensor([4, 7, ENDS]), torch.tensor([3])], embed)
    torch.testing.assert_close(both, torch.stack([read(gist, 4, 7), read(gist, 3)]))
    assert gist([], embed).shape == (0, E)


def test_words_that_are_not_known_say_nothing(gist):
    torch.testing.assert_close(read(gist, -1, 4, -1, 7, V + 3), read(gist, 4, 7))
    assert not read(gist, -1, -1).any()
    assert not read(gist).any()


def test_without_weights_it_says_nothing():
    assert torch.equal(Gist(E)([torch.tensor([1, 2])], embed), torch.zeros(1, E))
