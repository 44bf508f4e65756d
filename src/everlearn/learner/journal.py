"""Questions about the journal that need no model, so that a command can answer them at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from everlearn.errors import InvalidArgument
from everlearn.learner.store import MemoryStore, Observation


def find_observations(live: Sequence[Observation], what: str | int | Sequence[int]) -> list[int]:
    """Return the ids of those observations of ``live`` that are meant: by id, several, or by words.

    Words are the whole text of one, or a part that it alone has.

    Raises:
        InvalidArgument: none fits, or words fit several (lists them).
    """
    if not isinstance(what, str):
        ids = [what] if isinstance(what, int) else list(what)
        if not ids or not {item.id for item in live}.issuperset(ids):
            raise InvalidArgument(f"what: got {what}, expected ids of observations that are not forgotten")
        return ids
    sought = " ".join(what.casefold().split())
    if not sought:
        raise InvalidArgument("what: got nothing, expected the words or the id of an observation")
    texts = {item.id: " ".join(item.text.casefold().split()) for item in live}
    exact = [number for number, text in texts.items() if text == sought]
    if exact:
        return exact
    fitting = [number for number, text in texts.items() if sought in text]
    if len(fitting) == 1:
        return fitting
    if not fitting:
        raise InvalidArgument(f"what: nothing that was told contains {what!r}; `everlearn history` lists it all")
    listed = "; ".join(f"{item.id}: {item.text!r}" for item in live if item.id in fitting)
    raise InvalidArgument(f"what: {what!r} is in {len(fitting)} observations, name one by its id or its text: {listed}")


def diff_nights(store: MemoryStore, old: int, new: int | None = None) -> dict[str, Any]:
    """Return what separates night ``old`` from ``new`` (default: the current one): learned, lost, heard since."""
    new = store.head if new is None else new
    before = {item.id: item for item in store.history(old)}
    after = store.history(new)

    def named(items: Iterable[Observation]) -> list[dict[str, Any]]:
        return [{"id": item.id, "text": item.text} for item in items]

    known = "consolidated"
    return {
        "old": old,
        "new": new,
        "learned": named(o for o in after if o.state == known and before[o.id].state != known),
        "unlearned": named(o for o in after if o.state != known and before[o.id].state == known),
        "unchanged": sum(o.state == known and before[o.id].state == known for o in after),
    }
