"""Presets have the sizes they are named for; counted without allocating them."""

from __future__ import annotations

import pytest

from everlearn.errors import InvalidArgument
from everlearn.models.presets import PRESETS, hope_tiny, preset
from everlearn.models.registry import FAMILIES, count_parameters

COUNTS = {"hope-760m": 760e6, "hope-1b3": 1.3e9}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    assert count_parameters(preset(name)) == pytest.approx(COUNTS[name], rel=0.01)


@pytest.mark.parametrize("size", ["tiny", "760m", "1b3"])
def test_hope_has_levels(size):
    assert len(preset(f"hope-{size}").cms_periods) > 1


@pytest.mark.parametrize("size", ["tiny", "760m"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_are_equal_in_parameters(family, size):
    wanted = count_parameters(preset(f"hope-{size}"))
    assert count_parameters(preset(f"{family}-{size}")) == pytest.approx(wanted, rel=0.03)


def test_fields_can_be_replaced():
    assert hope_tiny(vocab_size=99).vocab_size == 99
    assert preset("hope_tiny", chunk_size=16).memory_config().chunk_size == 16
    changed = preset("transformer_tiny", vocab_size=99, rope_theta=5.0)
    assert (changed.vocab_size, changed.rope_theta) == (99, 5.0)
    assert set(PRESETS) == {name.replace("_", "-") for name in PRESETS}


def test_unknown_names_are_named():
    with pytest.raises(InvalidArgument, match="'hope-9b'"):
        preset("hope-9b")
