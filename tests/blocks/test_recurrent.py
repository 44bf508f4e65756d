"""Recurrent mixers against their quadratic forms, transformers' layers, and flash-linear-attention's references."""

from __future__ import annotations

import pytest
import torch
from fla_reference import reference
from torch import nn
from torch.nn import functional as F
from transformers import Mamba2Config, Qwen3NextConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet, torch_recurrent_gated_delta_rule

from everlearn.blocks.attention import rotate
from everlearn.blocks.context import Context
from everlearn.blocks.recurrent import DeltaNet, GatedDeltaNet, LinearAttention, Retention, initial_step_bias, share
from everlearn.blocks.ssd import StateSpace
from everlearn.errors import InvalidArgument

HIDDEN, HEADS, LENGTH = 16, 2, 70  # more than one chunk


def drawn(mixer: nn.Module) -> nn.Module:
    """With parameters that matter, in float32 as the references compute."""
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mixer.eval()


def inputs() -> tuple[torch.Tensor, Context]:
    return torch.randn(2, LENGTH, HIDDEN), Context(torch.arange(LENGTH)[None])


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


@torch.no_grad()
def test_linear_attention_is_its_quadratic_form():
    layer, (x, context) = drawn(LinearAttention(HIDDEN, HEADS)), inputs()
    q, k, v = (heads(part) for part in layer.in_proj(x).chunk(3, dim=-1))
    scores = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    y = (scores / scores.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(layer(x, None, context)[0], layer.out_proj(y.transpose(1, 2).flatten(2)))


@torch.no_grad()
def test_linear_attention_is_flash_linear_attentions():
    naive = reference("linear_attn", "naive_recurrent_linear_attn")
    layer, (x, context) = drawn(LinearAttention(HIDDEN, HEADS)), inputs()
    q, k, v = (heads(part).transpose(1, 2) for part in layer.in_proj(x).chunk(3, dim=-1))
    y, _ = naive(F.elu(q) + 1, F.elu(k) + 1, v, normalize=True)
    torch.testing.assert_close(layer(x, None, context)[0], layer.out_proj(y.flatten(2)))


def retained(layer, x, context, reads):
    """Retention's layer with ``reads(q, k, v)`` in the middle."""
    q, k, v, gate = layer.in_proj(x).split(layer.sizes, dim=-1)
    q, k = (rotate(heads(part), context.positions) for part in (q, k))
    y = reads(q, k, heads(v))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
    return layer.out_proj(y.transpose(1, 2).flatten(2) * F.silu(gate))


@torch.no_grad()
def test_retention_is_its_parallel_form():
    layer, (x, context) = drawn(Retention(HIDDEN, HEADS)), inputs()

    def parallel(q, k, v):
        gamma = 1 - 2.0 ** torch.tensor([-5.0, -6.0])
        age = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        decay = torch.where(age >= 0, gamma[:, None, None] ** age.clamp(min=0), 0.0)
        return (q @ k.mT * 8**-0.5 * decay) @ v

    torch.testing.assert_close(layer(x, None, context)[0], retained(layer, x, context, parallel), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_retention_is_flash_linear_attentions():
    naive = reference("retention", "naive_retention")
    layer, (x, context) = drawn(Retention(HIDDEN, HEADS)), inputs()
    torch.testing.assert_close(layer(x, None, context)[0], retained(layer, x, context, naive), rtol=1e-4, atol=1e-4)


def delta(layer, x, reads):
    """DeltaNet's layer with ``reads(q, k, v, rate)`` in the middle, all ``[B, T, heads, ...]``."""
    mixed, rate = layer.in_proj(x).split(layer.sizes, dim=-1)
    taps = layer.conv.weight.T.unsqueeze(1)
    mixed = F.silu(F.conv1d(F.pad(mixed.mT, (3, 0)), taps, groups=taps.shape[0]).mT)
    q, k, v = (heads(part).transpose(1, 2) for part in mixed.chunk(3, dim=-1))
    y = reads(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, rate.sigmoid())
    return layer.out_proj(layer.norm(y).flatten(2))


@torch.no_grad()
def test_deltanet_is_transformers_delta_rule():
    layer, (x, context) = drawn(DeltaNet(HIDDEN, HEADS)), inputs()

    def theirs(q, k, v, rate):
        return torch_recurrent_gated_delta_rule(q, k, v, g=torch.zeros_like(rate), beta=rate)[0]

    torch.testing.assert_close(layer(x, None, context)[0], delta(layer, x, theirs), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_deltanet_is_flash_linear_attentions():
    naive = reference("delta_rule", "delta_rule_recurrence")
    layer, (x, context) = drawn(DeltaNet(HIDDEN, HEADS)), inputs()

    def theirs(q, k, v, rate):
        return naive(*(part.transpose(1, 2) for part in (q, k, v, rate)))[0].transpose(1, 2)

    torch.testing.assert_close(layer(x, None, context)[0], delta(layer, x, theirs), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_gated_deltanet_is_qwen3_nexts_layer():
    ours, (x, context) = drawn(GatedDeltaNet(HIDDEN, HEADS)), inputs()
    config = Qwen3NextConfig(
        hidden_size=HIDDEN,
        linear_num_value_heads=HEADS,
        linear_num_key_heads=HEADS,
        linear_key_head_dim=6,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
        rms_norm_eps=1e-6,
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0).eval()
    q, k, v, gate, rate, step = (
        part.unflatten(0, (HEADS, -1)) for part in ours.in_proj.weight.split([12, 12, 24, 24, 2, 2])
    )
    theirs.in_proj_qkvz.weight.copy_(torch.cat((q, k, v, gate), dim=1).flatten(0, 1))  # they are sorted by head
    theirs.in_proj_ba.weight.copy_(torch.cat((rate, step), dim=1).flatten(0, 1))
    theirs.conv1d.weight.copy_(ours.conv.weight.T.unsqueeze(1))
    theirs.dt_bias.copy_(ours.decay_bias)
    theirs.A_log.copy_(ours.decay_log)
    theirs.norm.weight.copy_(ours.norm.weight)
    theirs.out_proj.weight.copy_(ours.out_proj.weight)
    torch.testing.assert_close(ours(x, None, context)[0], theirs(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gated_delta_rule_is_flash_linear_attentions():
    naive = reference("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    ours, (x, context) = drawn(GatedDeltaNet(HIDDEN, HEADS)), inputs()
    mixed, gate, rate, step = ours.in_proj(x).split(ours.sizes, dim=-1)
    mixed = F.silu(ours.conv(mixed, ours.conv.init_state(2), context)[0])
    q, k, v = (heads(part).transpose(1, 2) for part in mixed.split([12, 12, 24], dim=-1))
    decay = -ours.decay_log.exp() * F.softplus(step + ours.decay_bias)
    y, _ = naive(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, rate.sigmoid(), decay)
    y = ours.norm(y) * F.silu(heads(gate).transpose(1, 2))
    torch.testing.assert_close(ours(x, None, context)[0], ours.out_proj(y.flatten(2)), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_state_space_is_mamba2s_layer():
    ours, (x, context) = drawn(StateSpace(HIDDEN, HEADS, state_size=6)), inputs()
    config = Mamba2Config(
        hidden_size=HIDDEN, num_heads=4, head_dim=8, state_size=6, n_groups=1, expand=2, conv_kernel=4,
        use_conv_bias=True, use_bias=False, layer_norm_epsilon=1e-6, num_hidden_layers=1, chunk_size=16,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, 0).eval()
    theirs.in_proj.weight.copy_(ours.in_proj.weight)
    theirs.conv1d.weight.copy_(ours.conv.weight.T.unsqueeze(1))
    theirs.conv1d.bias.copy_(ours.conv.bias)
    theirs.dt_bias.copy_(ours.step_bias)
    theirs.A_log.copy_(ours.decay_log)
    theirs.D.copy_(ours.skip)
    theirs.norm.weight.copy_(ours.norm.weight)
    theirs.out_proj.weight.copy_(ours.out_proj.weight)
    torch.testing.assert_close(ours(x, None, context)[0], theirs(x), rtol=1e-4, atol=1e-4)


def test_published_starts():
    step = F.softplus(initial_step_bias(1000))
    assert 0.001 <= step.min() < 0.002
    assert 0.05 < step.max() <= 0.1001
    drawn_now = GatedDeltaNet(HIDDEN, HEADS).draw()
    assert (drawn_now["decay_log"].exp() <= 16).all()
    assert torch.equal(StateSpace(HIDDEN, HEADS).draw()["skip"], torch.ones(4))


def test_sizes_must_divide():
    assert share("size", 12.0, 3) == 4
    with pytest.raises(InvalidArgument, match="hidden_size: got 9"):
        DeltaNet(9, 2)
    with pytest.raises(InvalidArgument, match="hidden_size: got 6"):
        Retention(6, 2)
    with pytest.raises(InvalidArgument, match="expand_k hidden_size"):
        GatedDeltaNet(16, 2, expand_k=0.7)
