"""Titans' mixers against what they are made of, segment by segment."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from everlearn.blocks.attention import rotate
from everlearn.blocks.context import Context
from everlearn.blocks.titans import MemoryAsContext, TitansMixer
from everlearn.memories.self_modifying_plan import Piece
from everlearn.memories.titans import Inputs
from everlearn.memories.titans_naive import titans_naive

HIDDEN, HEADS, LENGTH, CHUNK = 8, 2, 11, 4


def drawn(mixer: nn.Module) -> nn.Module:
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer.double()


def columns(x):
    """``[B, T, heads d]`` to ``[B heads, d, T]``."""
    return x.unflatten(-1, (HEADS, -1)).permute(0, 2, 3, 1).flatten(0, 1)


def rows(x):
    return x.unflatten(0, (-1, HEADS)).permute(0, 3, 1, 2).flatten(2)


def unit(x):
    return x / (x.square().sum(1, keepdim=True) + 1e-6).sqrt()


def memory_inputs(mixed, rates, gates):
    q, k, v = (columns(part) for part in F.silu(mixed).chunk(3, dim=-1))
    step, keep, momentum = torch.sigmoid(rates.unflatten(-1, (3, HEADS)) + gates.bias).permute(2, 0, 3, 1).flatten(1, 2)
    return Inputs(unit(q), unit(k), v, gates.step_max * step, keep.log(), momentum.log(), torch.ones_like(step))


def test_mixer_is_its_memory_between_projections():
    layer, x = drawn(TitansMixer(HIDDEN, HEADS, chunk_size=CHUNK, width=3)), torch.randn(2, LENGTH, HIDDEN).double()
    mixed, gate, rates = x.matmul(layer.in_proj.weight.T).split([24, 8, 6], dim=-1)
    mixed = F.conv1d(F.pad(mixed.mT, (3, 0)), layer.conv.weight.T.unsqueeze(1), groups=24).mT
    y, now, momentum = titans_naive(layer.memory, memory_inputs(mixed, rates, layer.gates), CHUNK)
    y = layer.norm(rows(y).unflatten(-1, (HEADS, -1))).flatten(2) * F.silu(gate)
    found, state = layer(x, None, Context(torch.arange(LENGTH)[None]))
    torch.testing.assert_close(found, layer.out_proj(y))
    for i in range(2):
        torch.testing.assert_close(state[f"now.{i}"].flatten(0, 1), now[i])
        torch.testing.assert_close(state[f"momentum.{i}"].flatten(0, 1), momentum[i])
    assert {x.shape[0] for x in state.state_dict().values()} == {2}


def test_memory_as_context_is_its_definition():
    """Segment by segment, with full attention over the sequence ``[persistent, h, x]`` written out."""
    layer = drawn(MemoryAsContext(HIDDEN, HEADS, chunk_size=CHUNK, persistent=3, width=3))
    x, outs = torch.randn(2, LENGTH, HIDDEN).double(), []
    mixed = torch.cat((layer.query_proj(x), layer.key_value_proj(x)), dim=-1)
    mixed = F.conv1d(F.pad(mixed.mT, (3, 0)), layer.conv.weight.T.unsqueeze(1), groups=4 * HIDDEN).mT
    carry, persistent = layer.memory.init_carry(2), layer.persistent.weight.expand(2, -1, -1)
    for start in range(0, LENGTH, CHUNK):
        query, wanted, own = mixed[:, start : start + CHUNK].split([HIDDEN, HIDDEN, 2 * HIDDEN], dim=-1)
        length = query.shape[1]
        recalled = layer.recall_norm(rows(layer.memory.recall(carry, unit(columns(F.silu(wanted))))))
        others = layer.key_value_proj(torch.cat((persistent, recalled), dim=1))
        key, value = torch.cat((others, own), dim=1).chunk(2, dim=-1)
        query, key, value = (z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in (query, key, value))
        place = torch.arange(length)
        turned = torch.cat((key[:, :, :3], rotate(key[:, :, 3:], torch.cat((place, place))[None])), dim=2)
        causal = place[:, None] >= place
        seen = torch.cat((torch.ones(length, 3, dtype=torch.bool), causal, causal), dim=1)
        scores = (rotate(query, place[None]) @ turned.mT / 2).masked_fill(~seen, -torch.inf)
        y = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        given = memory_inputs(*layer.memory_proj(y).split([24, 6], dim=-1), layer.gates)
        carry, read = layer.memory.write(carry, given, Piece(0, length, True, True))
        outs.append(layer.out_proj(y * torch.sigmoid(layer.memory_norm(rows(read)))))
    found, state = layer(x, None, Context(torch.arange(LENGTH)[None]))
    torch.testing.assert_close(found, torch.cat(outs, dim=1))
    assert state["keys"].shape == (2, HEADS, 2 * CHUNK, 4)


def test_rates_start_where_they_are_told():
    layer = TitansMixer(HIDDEN, HEADS, step_max=2.0, step=0.1, keep=0.9, momentum=0.25)
    layer.gates.bias.data.copy_(layer.gates.draw()["bias"])
    step, log_keep, log_momentum = layer.gates(torch.zeros(1, 1, 6))
    torch.testing.assert_close(step, torch.full((2, 1), 0.1))
    torch.testing.assert_close(log_keep.exp(), torch.full((2, 1), 0.9))
    torch.testing.assert_close(log_momentum.exp(), torch.full((2, 1), 0.25))
