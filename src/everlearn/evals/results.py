"""What every evaluation shares: one results file that is never half written, its rows, intervals, and provenance.

A results file is JSON: ``suite``, ``version``, ``complete`` (false until the very end), ``protocol`` (what must agree
for rows to be comparable), ``provenance``, ``rows`` (one a measurement, each with the keys that name it) and, once
complete, ``summary``.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from everlearn import __version__
from everlearn.errors import InvalidArgument

Row = dict[str, Any]


class Results:
    """A results file that grows row by row; each row is on disk, in a whole file, before :meth:`add` returns.

    Several processes may add to one file.

    Args:
        path: the JSON file; made if there is none, continued if it is there.
        suite: name of the evaluation.
        version: of its protocol's code.
        protocol: JSON; what must agree for old rows to count.
        keys: names of the columns that together name a row.

    Raises:
        InvalidArgument: the file is of another suite, version or protocol, or no results file at all.
    """

    def __init__(
        self, path: Path, *, suite: str, version: int, protocol: Mapping[str, Any], keys: Sequence[str]
    ) -> None:
        self.path, self.keys = Path(path), tuple(keys)
        head = {"suite": suite, "version": version, "protocol": json.loads(json.dumps(protocol))}
        self._head = {**head, "provenance": provenance()}
        self.rows = self._on_disk()

    def find(self, *values: Any) -> Row | None:
        """Return the row that ``values`` (in the order of ``keys``) name, or None."""
        return next((row for row in self.rows if tuple(row[key] for key in self.keys) == values), None)

    def add(self, row: Row) -> None:
        """Add a row; the file is incomplete again."""
        self.extend([row])

    def extend(self, rows: Sequence[Row]) -> None:
        """Add rows that belong together: all are on disk, or none; the file is incomplete again."""
        new = [json.loads(json.dumps(row, allow_nan=False)) for row in rows]
        with self._alone():
            rows = self._on_disk() + new
            write_json(self.path, {"complete": False, **self._head, "rows": rows})
            self.rows = rows

    def finish(self, summarise: Callable[[list[Row]], Any]) -> Any:
        """Mark the file complete, with the summary that ``summarise`` makes of all rows, and return that."""
        with self._alone():
            self.rows = self._on_disk()
            summary = summarise(self.rows)
            write_json(self.path, {"complete": True, **self._head, "summary": summary, "rows": self.rows})
        return summary

    def _on_disk(self) -> list[Row]:
        return _continued(self.path, self._head) if self.path.exists() else []

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder's lock, so that no row of another process is overwritten."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def read_results(path: Path, suite: str) -> dict[str, Any]:
    """Return the contents of a results file of ``suite``.

    Raises:
        InvalidArgument: there is none, it is damaged, or of another suite.
    """
    try:
        kept = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"out: {path} is no results file ({error})") from error
    if not isinstance(kept, dict) or kept.get("suite") != suite or not isinstance(kept.get("rows"), list):
        found = kept.get("suite") if isinstance(kept, dict) else type(kept).__name__
        raise InvalidArgument(f"out: {path} holds results of {found!r}, expected {suite!r}; choose another file")
    return kept


def _continued(path: Path, head: Mapping[str, Any]) -> list[Row]:
    kept = read_results(path, head["suite"])
    if kept.get("version") != head["version"]:
        raise InvalidArgument(
            f"out: {path} was made by version {kept.get('version')} of the protocol, this is {head['version']}; choose"
            " another file"
        )
    old, new = kept.get("protocol") or {}, head["protocol"]
    odd = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if odd:
        listed = ", ".join(f"{name} = {old.get(name)!r} (now {new.get(name)!r})" for name in odd)
        raise InvalidArgument(f"out: {path} was made by another protocol: {listed}; choose another file")
    return kept["rows"]


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """Return mean and half-width of the t-interval over seeds; the latter is None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    from scipy.stats import t

    return mean, float(t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def interval(values: Sequence[float | None]) -> str:
    """Return "mean ± half-width" of the 95% t-interval over seeds; "diverged" where a seed has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "diverged"
    mean, half = mean_interval(known)
    return f"{mean:.4g}" if half is None else f"{mean:.4g} ± {half:.2g}"


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return ``mean``, ``low`` and ``high`` of the 95% t-interval (None for a single value) and ``n``."""
    mean, half = mean_interval(values)
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "n": len(values)}


def duration(seconds: float) -> str:
    """Return a time in words, to the minute."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "under 1 min"


@functools.cache
def provenance() -> dict[str, Any]:
    """Return the command, commit, machine and library versions of this process."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return {
        "versions": {"everlearn": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "commit": git.stdout.strip(),
        "command": " ".join([_program(), *sys.argv[1:]]),
    }


def _program() -> str:
    """The program as one would call it again: ``python -m a.module``, or the name of a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def compute_clock() -> Callable[[], float]:
    """Return a clock of seconds of computing: of this process's processor where it has one thread, else of the wall.

    The former does not count what other programs take, so that a busy machine gives the same figures as an idle one.
    """
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that it is there whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
