"""``everlearn forget``: no text, no dream and nothing learned from it stays."""

from __future__ import annotations

from typing import Annotated

import typer

from everlearn.cli.options import Options


def forget(
    options: Options,
    what: Annotated[str, typer.Argument(help="An id, the whole text, or a part of it that no other contains.")],
) -> None:
    """Make it forget something it was told. A model is needed only if it was learned already."""
    from everlearn.learner.journal import find_observations

    with options.store() as store:
        heard = {item.id: item for item in store.history()}
        live = [item for item in heard.values() if item.state != "forgotten"]
        named = what.isascii() and what.isdigit() and int(what) in heard
        ids = [int(what)] if named else find_observations(live, what)
        rebuild = store.needs_rebuild(ids)
        if not rebuild:
            store.forget(ids)
        night = store.head
    if rebuild:
        with options.learner() as (learner, _):
            learner.forget(ids)
            night = learner.store.head
    said = f"forgot {', '.join(map(str, ids))}" + (f"; the memory was rebuilt as night {night}" if rebuild else "")
    options.report({"forgotten": ids, "rebuilt": rebuild, "night": night}, said)
