"""The mapping onto flash-linear-attention's layout, through a plain kernel with its documented recurrence."""

from __future__ import annotations

import sys
import types

import torch
from fla_reference import reference

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


def test_serves_only_cuda(monkeypatch):
    monkeypatch.setattr(delta_rule_fla.importlib.util, "find_spec", lambda name: object())
    assert not delta_rule_fla.serves(torch.zeros(1, 1, 2, 2))


def test_serves_cuda_tensors_where_the_package_is(monkeypatch):
    class OnCuda:
        is_cuda, dtype = True, torch.float32

        def __init__(self, dims, dtype=torch.float32):
            self.dims, self.dtype = dims, dtype

        def dim(self):
            return self.dims

    monkeypatch.setattr(delta_rule_fla.importlib.util, "find_spec", lambda name: object())
    assert delta_rule_fla.serves(OnCuda(4))
    assert not delta_rule_fla.serves(OnCuda(3))
    assert not delta_rule_fla.serves(OnCuda(4, torch.float64))
    monkeypatch.setattr(delta_rule_fla.importlib.util, "find_spec", lambda name: None)
    assert not delta_rule_fla.serves(OnCuda(4))


def test_the_kernel_is_what_runs_where_it_serves(monkeypatch):
    """The dispatch itself, with the kernel's module replaced by one on plain tensors."""
    module = types.ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = kernel_by_the_book
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    q = k = torch.nn.functional.normalize(torch.randn(1, 2, 5, 3), dim=-1)
    v, rate = torch.randn(1, 2, 5, 4), torch.rand(1, 2, 5)
    ours = gated_delta_rule(q, k, v, -rate, rate)
    calls = []
    monkeypatch.setattr(delta_rule_fla, "serves", lambda q: calls.append(q) or True)
    torch.testing.assert_close(gated_delta_rule(q, k, v, -rate, rate), ours)
    assert calls


def test_mapping_is_exact_by_the_reference_the_package_ships():
    naive = reference("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    q, k = torch.randn(2, 2, 3, 6, 4).unbind(0)
    k = torch.nn.functional.normalize(k, dim=-1)
    v, state = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 4, 4)
    decay, rate = -torch.rand(2, 3, 6), torch.rand(2, 3, 6)
    for start in (state, None):
        ours = gated_delta_rule(q, k, v, decay, rate, start, chunk_size=4)
        theirs = delta_rule_fla.gated_delta_rule(q, k, v, decay, rate, start, kernel=naive)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
