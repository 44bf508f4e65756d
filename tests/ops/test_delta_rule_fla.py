"""The mapping onto flash-linear-attention's layout, through a plain kernel with its documented recurrence."""

from __future__ import annotations

import torch

from everlearn.ops import delta_rule_fla
from everlearn.ops.delta_rule import gated_delta_rule


def kernel_by_the_book(q, k, v, g, beta, scale, initial_state, output_final_state):
    """`[B, T, H, D]`, state `[B, H, K, V]`: decay, then replace what the key holds, then read."""
    assert output_final_state
    batch, length, heads, key_dim = q.shape
    state = initial_state if initial_state is not None else q.new_zeros(batch, heads, key_dim, v.shape[-1])
    outs = []
    for t in range(length):
        state = state * g[:, t].exp()[..., None, None]
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        write = beta[:, t].unsqueeze(-1) * (v[:, t] - held)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    return torch.stack(outs, dim=1), state


def test_mapping_is_exact():
    q, k = torch.randn(2, 2, 3, 6, 4, dtype=torch.float64).unbind(0)
    v = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    k = torch.nn.functional.normalize(k, dim=-1)
    decay, rate = -torch.rand(2, 3, 6, dtype=torch.float64), torch.rand(2, 3, 6, dtype=torch.float64)
    state = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for start in (state, None):
        for log_decay in (decay, None):
            ours = gated_delta_rule(q, k, v, log_decay, rate, start, chunk_size=4)
            theirs = delta_rule_fla.gated_delta_rule(q, k, v, log_decay, rate, start, kernel=kernel_by_the_book)
            torch.testing.assert_close(theirs, ours)


def test_serves_only_cuda():
    assert not delta_rule_fla.serves(torch.zeros(1, 1, 2, 2))
