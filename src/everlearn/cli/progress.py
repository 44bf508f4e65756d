"""Progress on stderr: a bar on a terminal, one plain line a stage elsewhere, nothing where it is not wanted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Reporter:
    """Shows the progress that the runtime reports by ``reporter(stage, share)``; a context manager.

    Args:
        quiet: print no plain lines where stderr is no terminal (a bar on a terminal is always shown).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._stage: str | None = None
        self._said: str | None = None

    def __call__(self, stage: str, share: float, detail: str = "") -> None:
        """Show that ``share`` (0 to 1) of ``stage`` is done, and which ``detail`` of it comes next."""
        said = f"{stage}: {detail}" if detail else stage
        if not sys.stderr.isatty():
            if said != self._said and not self._quiet:
                print(said, file=sys.stderr, flush=True)
            self._said = said
            return
        bars = self._bars or _bars()
        if stage != self._stage or self._task is None:
            self._finish()
            self._task = bars.add_task(said, total=None)  # until a share is known the bar only moves
        bars.update(self._task, description=said)
        if share > 0:
            bars.update(self._task, total=1.0, completed=share)
        bars.start()
        self._bars, self._stage = bars, stage

    def counter(self, stage: str) -> Callable[[int, int, str], None]:
        """Return what shows the progress of ``stage`` as (done, in all, what comes next)."""
        return lambda done, total, what: self(stage, done / total, what)

    def close(self) -> None:
        """Take the bars off the terminal; a later report brings new ones."""
        if self._bars is not None:
            self._finish()
            self._bars.stop()
        self._bars, self._task, self._stage = None, None, None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finish(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, total=1.0, completed=1.0)
            self._bars.stop_task(self._task)


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
