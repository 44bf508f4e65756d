"""``everlearn rollback``: back to an earlier night."""

from __future__ import annotations

from typing import Annotated

import typer

from everlearn.cli.options import Options


def rollback(
    options: Options,
    night: Annotated[
        int, typer.Argument(min=0, help="A number from `everlearn history --nights`; 0: nothing learned.")
    ],
) -> None:
    """Return to the memory as it was after a night, bit for bit. Nothing heard is lost: later days are heard again."""
    with options.store() as store:
        store.rollback(night)
        status = store.status()
    waiting = status["observations"]["heard"]
    options.report(status, f"night {night} is the current one; {waiting} observations wait for a sleep")
