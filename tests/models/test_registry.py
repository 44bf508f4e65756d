"""Families by name, fitted to one another in parameters."""

from __future__ import annotations

import pytest

from everlearn.errors import InvalidArgument
from everlearn.models.hope import HopeConfig
from everlearn.models.registry import FAMILIES, build, count_parameters, family_config, family_name

SMALL = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}


@pytest.mark.parametrize("name", FAMILIES)
def test_fits_the_parameters(name):
    like = HopeConfig(**SMALL, pad_token_id=0)
    config = family_config(name, like)
    assert count_parameters(config) == pytest.approx(count_parameters(like), rel=0.03)
    assert (config.vocab_size, config.hidden_size, config.pad_token_id) == (16, 32, 0)
    assert sum(p.numel() for p in build(config).parameters()) == count_parameters(config)


def test_a_family_is_fitted_to_itself_by_leaving_it_alone():
    like = HopeConfig(**SMALL, memory={"rule": "gd"})
    assert family_config("hope", like) is like
    changed = family_config("hope", like, cms_periods=[1, 8])
    assert (changed.cms_periods, changed.memory, changed.intermediate_size) == ([1, 8], {"rule": "gd"}, 96)


def test_a_given_width_is_kept():
    assert family_config("transformer", HopeConfig(**SMALL), intermediate_size=7).intermediate_size == 7


def test_bad_input_is_named():
    assert family_name("Hope_Attention") == "hope-attention"
    with pytest.raises(InvalidArgument, match="'brass'"):
        family_name("brass")
    with pytest.raises(InvalidArgument, match="hidden_size"):
        family_config("transformer", HopeConfig(**SMALL), hidden_size=4)
    with pytest.raises(InvalidArgument, match="like: got"):
        family_config("hope", family_config("transformer", HopeConfig(**SMALL), intermediate_size=1))
