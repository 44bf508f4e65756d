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
    made.fill({"weights": weights, "center": torch.randn(E), "whitener": torch.randn(E, E)})
    return made


TABLE = torch.randn(V, E, generator=torch.Generator().manual_seed(1))


def embed(ids: torch.Tensor) -> torch.Tensor:
    return TABLE[ids]


def read(gist: Gist, *ids: int) -> torch.Tensor:
    return gist(torch.tensor(ids), embed)


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


def test_the_last_part_that_says_something_counts(gist):
    question = read(gist, 4, 7)
    torch.testing.assert_close(read(gist, 3, 2, ENDS, 4, 7), question)
    torch.testing.assert_close(read(gist, 3, 2, ENDS, 4, 7, ENDS, 0, 0, ENDS), question)
    assert 2 * gist.weights[0] < SAYS
    torch.testing.assert_close(read(gist, 4, 7, ENDS, 8), read(gist, 8))


def test_words_that_are_not_known_say_nothing(gist):
    torch.testing.assert_close(read(gist, -1, 4, -1, 7), read(gist, 4, 7))
    assert not read(gist, -1, -1).any()
    assert not read(gist, 0, ENDS, 0).any()
    assert not gist(torch.zeros(0, dtype=torch.long), embed).any()


def test_without_weights_it_says_nothing():
    assert torch.equal(Gist(E)(torch.tensor([1, 2]), embed), torch.zeros(E))
