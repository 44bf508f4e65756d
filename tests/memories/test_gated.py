"""The gated memory: exact where its gate is closed, one gate a pass, private to threads and copies."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from everlearn.errors import InvalidArgument
from everlearn.memories.gated import Gate, GatedMemory, gated_memories, rms_normalise

D, R = 8, 4


def pair() -> tuple[GatedMemory, GatedMemory]:
    make = gated_memories(R)
    low, high = make(D), make(D)
    for memory in (low, high):
        torch.nn.init.normal_(memory.W1)
    return low, high


def test_closed_gate_changes_no_bit():
    low, high = pair()
    x = torch.randn(3, 5, D)
    assert torch.equal(low(x), x)
    assert torch.equal(high(x), x)


def test_open_gate_is_the_formula():
    low, _ = pair()
    low.gate.set_(torch.randn(D), torch.tensor(0.3))
    x = torch.randn(3, 5, D)
    n = rms_normalise(x)
    g = (n @ low.gate.weight + 0.3).clamp(0, 1)[..., None]
    assert ((g > 0) & (g < 1)).any()
    expected = g * (torch.nn.functional.silu(n @ low.W2.T + low.b) @ low.W1.T)
    torch.testing.assert_close(low.delta(x), expected)


def test_upper_memory_uses_what_the_lowest_opened():
    low, high = pair()
    low.gate.set_(torch.zeros(D), torch.tensor(0.25))
    x = torch.randn(2, 3, D)
    low(x)
    y = torch.randn(2, 3, D)
    n = rms_normalise(y)
    inner = torch.nn.functional.silu(n @ high.W2.T + high.b) @ high.W1.T
    torch.testing.assert_close(high.delta(y), 0.25 * inner)


def test_upper_memory_alone_is_an_error():
    _, high = pair()
    with pytest.raises(InvalidArgument, match="has not run"):
        high(torch.randn(1, D))


def test_gate_is_state_of_the_lowest_memory_only():
    low, high = pair()
    assert {"gate.weight", "gate.bias"} <= set(low.state_dict())
    assert set(high.state_dict()) == {"W1", "W2", "b"}
    assert not {"gate.weight", "gate.bias"} & set(dict(low.named_parameters()))


def test_copy_has_a_gate_of_its_own():
    low, high = pair()
    chain = copy.deepcopy(torch.nn.ModuleList([low, high]))
    chain[0].gate.set_(torch.zeros(D), torch.tensor(1.0))
    assert float(low.gate.bias) == -1.0
    x = torch.randn(2, D)
    chain[0](x)
    assert not torch.equal(chain[1](x), x)
    with pytest.raises(InvalidArgument):
        high(x)


def test_threads_do_not_mix():
    low, high = pair()
    low.gate.set_(torch.zeros(D), torch.tensor(1.0))
    x = torch.randn(4, D)
    low(x)
    seen: list[type] = []

    def other() -> None:
        try:
            high(x)
        except InvalidArgument as error:
            seen.append(type(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [InvalidArgument]


def test_bad_sizes():
    with pytest.raises(InvalidArgument, match="hidden_size"):
        Gate(0)
    with pytest.raises(InvalidArgument, match="width"):
        GatedMemory(4, 0, Gate(4), opens=False)
    with pytest.raises(InvalidArgument, match="width"):
        GatedMemory(4, -1, Gate(4), opens=True)
    with pytest.raises(InvalidArgument, match="weight, bias"):
        Gate(4).set_(torch.zeros(3), torch.tensor(0.0))
