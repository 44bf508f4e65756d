"""The naive references of flash-linear-attention, where it lies; its kernels and their compiler are not needed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def reference(family: str, name: str) -> Callable[..., Any]:
    """A function of ``fla/ops/FAMILY/naive.py``, loaded by itself; skips the test where it is not installed."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        pytest.skip("flash-linear-attention is not installed")
    pytest.importorskip("einops")
    path = Path(found.submodule_search_locations[0]) / "ops" / family / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_{family}_naive", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
