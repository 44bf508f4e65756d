"""Presets have the sizes they are named for; counted without allocating them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from everlearn.errors import InvalidArgument
from everlearn.models.presets import PRESETS, hope_tiny, preset

COUNTS = {"hope-760m": 760e6, "hope-1b3": 1.3e9}


def count(config) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    assert count(preset(name)) == pytest.approx(COUNTS[name], rel=0.01)


def test_tiny_models_are_equal_in_parameters():
    counts = [count(preset(name)) for name in ("hope-tiny", "hope-attention-tiny", "transformer-tiny")]
    assert max(counts) < 1.01 * min(counts)


def test_fields_can_be_replaced():
    assert hope_tiny(vocab_size=99).vocab_size == 99
    assert preset("hope_tiny", chunk_size=16).memory_config().chunk_size == 16
    assert set(PRESETS) == {name.replace("_", "-") for name in PRESETS}


def test_unknown_names_are_named():
    with pytest.raises(InvalidArgument, match="'hope-9b'"):
        preset("hope-9b")
