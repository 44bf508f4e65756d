"""Level and Clock: due exactly when due, however the tokens are cut."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everlearn.errors import InvalidArgument
from everlearn.levels import Boundary, Clock, Level, check_levels, parent_of

FAST, MID, SLOW = Level("fast", 4), Level("mid", 6), Level("slow")


def test_ten_tokens_over_four():
    clock = Clock([Level("a", every=4)])
    assert clock.pieces(10) == [4, 4, 2]
    assert [b.offset for b in clock.advance(10)] == [4, 8]
    assert [b.offset for b in clock.advance(2)] == [2]
    assert clock.tokens == 12


def test_levels_due_together_share_one_boundary_and_keep_their_order():
    met = Clock([SLOW, MID, FAST]).advance(12)
    assert met == [Boundary(4, (FAST,)), Boundary(6, (MID,)), Boundary(8, (FAST,)), Boundary(12, (MID, FAST))]


@given(cuts=st.lists(st.integers(0, 9), max_size=12), periods=st.lists(st.integers(1, 7), min_size=1, max_size=3))
def test_boundaries_do_not_depend_on_the_cuts(cuts, periods):
    levels = [Level(f"l{i}", every=period) for i, period in enumerate(periods)]
    clock, met, at = Clock(levels), [], 0
    for count in cuts:
        met += [(at + b.offset, b.due) for b in clock.advance(count)]
        at += count
    naive = [(n, tuple(v for v in levels if n % v.every == 0)) for n in range(1, at + 1)]
    assert met == [(n, due) for n, due in naive if due]


@given(before=st.integers(0, 20), count=st.integers(0, 40), chunk_size=st.integers(1, 9) | st.none())
def test_pieces_end_at_every_boundary_and_chunk(before, count, chunk_size):
    clock = Clock([FAST, MID, SLOW], tokens=before)
    ends, at = [], before
    for size in clock.pieces(count, chunk_size):
        at += size
        ends.append(at)
    periods = (4, 6, chunk_size or 99)
    naive = [n for n in range(before + 1, before + count + 1) if any(n % period == 0 for period in periods)]
    assert ends == sorted({*naive, *([before + count] if count else [])})


def test_parents_and_resets():
    assert parent_of(FAST, (SLOW, FAST, MID)) == MID
    assert parent_of(MID, (SLOW, FAST, MID)) == SLOW
    assert parent_of(SLOW, (SLOW, FAST, MID)) is None
    clock = Clock([FAST, MID, SLOW])
    assert clock.resets([MID]) == (FAST,)
    assert clock.resets([FAST]) == ()
    assert clock.resets([SLOW]) == (MID,)


def test_state_resumes_and_refuses_other_levels():
    clock = Clock([FAST, MID])
    clock.advance(7)
    again = Clock([FAST, MID])
    again.load_state_dict(clock.state_dict())
    assert again.advance(20) == clock.advance(20)
    with pytest.raises(InvalidArgument, match="expected"):
        Clock([FAST]).load_state_dict(clock.state_dict())


def test_default_optimizer_and_any_other():
    weight = torch.nn.Parameter(torch.zeros(2))
    assert isinstance(FAST.optimizer([weight]), torch.optim.AdamW)
    own = Level("x", 1, optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    assert isinstance(own.optimizer([weight]), torch.optim.SGD)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "4"])
def test_bad_period(every):
    with pytest.raises(InvalidArgument, match="every"):
        Level("a", every=every)


@pytest.mark.parametrize("name", ["", "a.b", "1", "a b", None])
def test_bad_name(name):
    with pytest.raises(InvalidArgument, match="name"):
        Level(name, every=1)


def test_bad_lists_and_counts():
    for levels in ([], [FAST, Level("fast", 9)], ["fast"]):
        with pytest.raises(InvalidArgument, match="levels"):
            check_levels(levels)
    with pytest.raises(InvalidArgument, match="count"):
        Clock([FAST]).advance(-1)
    with pytest.raises(InvalidArgument, match="chunk_size"):
        Clock([FAST]).pieces(4, 0)


def test_levels_are_light():
    code = "import sys, everlearn; everlearn.Level('a', every=2); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
