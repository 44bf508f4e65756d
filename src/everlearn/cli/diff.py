"""``everlearn diff``: what separates two nights."""

from __future__ import annotations

from typing import Annotated

import typer

from everlearn.cli.options import Options


def diff(
    options: Options,
    old: Annotated[int | None, typer.Argument(min=0, show_default=False, help="Default: the one before NEW.")] = None,
    new: Annotated[int | None, typer.Argument(min=0, show_default=False, help="Default: the current night.")] = None,
) -> None:
    """Show what was learned, and what was lost, from one night to another."""
    from everlearn.learner.journal import diff_nights

    with options.store(read_only=True) as store:
        new = store.head if new is None else new
        parents = {night.n: night.parent for night in store.nights()}
        found = diff_nights(store, parents.get(new, 0) if old is None else old, new)
    lines = [f"night {found['old']} to night {found['new']}: {found['unchanged']} known to both"]
    lines += [f"+ {item['id']} {item['text']}" for item in found["learned"]]
    lines += [f"- {item['id']} {item['text']}" for item in found["unlearned"]]
    options.report(found, *lines)
