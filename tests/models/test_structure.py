"""The MLPs are found by structure in every family, and what cannot be stacked is said clearly."""

from __future__ import annotations

import pytest
import torch
from tiny_families import FAMILIES, HIDDEN, LAYERS, tiny
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from everlearn.errors import StackingError
from everlearn.models.structure import find_decoder, why_not_mlp


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_every_block_s_mlp(family):
    decoder = find_decoder(tiny(family))
    assert decoder.hidden_size == HIDDEN
    assert len(decoder.mlps) == LAYERS
    prefix = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(family, "model.layers")
    assert decoder.mlps == tuple(f"{prefix}.{i}.mlp" for i in range(LAYERS))


def test_looking_changes_nothing():
    model = tiny("gpt2").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_decoder(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_looking_never_takes_the_weights_away_from_other_threads():
    seen = []

    class Watched(nn.Sequential):
        def forward(self, x):
            seen.extend(parameter.device.type for parameter in mlp.parameters())
            return super().forward(x)

    mlp = Watched(*layers())
    assert why_not_mlp(mlp, 4) is None
    assert set(seen) == {"cpu"}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_mixture_of_experts_is_refused(family):
    model = tiny(family, num_local_experts=2, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    with pytest.raises(StackingError, match="mixture of experts"):
        find_decoder(model)


def test_mlp_that_is_no_module_of_its_own_is_refused():
    model = tiny("opt", ffn_dim=24, word_embed_proj_dim=HIDDEN)
    with pytest.raises(StackingError, match=r"no MLP in model\.decoder\.layers\.0"):
        find_decoder(model)


def test_other_models_are_refused():
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2}
    with pytest.raises(StackingError, match="encoder-decoder"):
        find_decoder(T5ForConditionalGeneration(T5Config(**sizes)))
    with pytest.raises(StackingError, match="configuration"):
        find_decoder(nn.Linear(3, 3))
    model = tiny()
    model.config.num_hidden_layers = 7
    with pytest.raises(StackingError, match="ModuleList of 7"):
        find_decoder(model)


class Masked(nn.Sequential):
    def forward(self, x, mask):
        return super().forward(x) * mask


class Pair(nn.Sequential):
    def forward(self, x):
        return super().forward(x), x


class Raising(nn.Sequential):
    def forward(self, x):
        raise RuntimeError("no")


def layers(out: int = 4) -> list[nn.Module]:
    return [nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, out)]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LayerNorm(4), "fewer than two"),
        (nn.Linear(4, 4), "fewer than two"),
        (nn.Sequential(*layers(5)), "does not map"),
        (Masked(*layers()), "takes x, mask"),
        (Pair(*layers()), "returns tuple"),
        (Raising(*layers()), "RuntimeError"),
        (nn.Sequential(*layers(), nn.Linear(4, 3)), "maps"),
        (nn.ModuleList([nn.Sequential(*layers())]), "experts"),
        (nn.Sequential(*layers(), nn.Conv1d(4, 4, 1)), "convolves"),
    ],
)
def test_reasons(module, reason):
    assert reason in why_not_mlp(module, 4)
    assert why_not_mlp(nn.Sequential(*layers()).bfloat16(), 4) is None
