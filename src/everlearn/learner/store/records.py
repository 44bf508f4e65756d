"""What the store takes and gives: plain frozen records, ready for JSON by ``dataclasses.asdict``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from ...errors import InvalidArgument

State = Literal["heard", "consolidated", "dismissed", "forgotten"]
STATES: tuple[State, ...] = ("heard", "consolidated", "dismissed", "forgotten")


@dataclass(frozen=True)
class Heard:
    """Something to journal: who said it, when (ISO 8601; None for now) and anything else as JSON."""

    text: str
    role: str = "user"
    meta: Mapping[str, Any] = field(default_factory=dict)
    told_at: str | None = None


@dataclass(frozen=True)
class Observation:
    """A journalled observation; ``night`` is the one that consolidated or dismissed it, None if none did."""

    id: int
    text: str
    role: str
    told_at: str
    meta: dict[str, Any]
    state: State
    night: int | None
    forgotten_at: str | None


@dataclass(frozen=True)
class Night:
    """A numbered snapshot of the slow level; ``unavailable`` says why its file is gone, None if it is there."""

    n: int
    parent: int
    created_at: str
    file: str
    sha256: str
    bytes: int
    metrics: dict[str, Any]
    unavailable: str | None


@dataclass(frozen=True)
class Dream:
    """A self-study example made on ``night`` from one observation."""

    id: int
    observation: int
    night: int
    payload: Any


def timestamp() -> str:
    """Return the current time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def heard_row(item: Heard) -> dict[str, Any]:
    """Return the observation row of ``item`` or raise InvalidArgument."""
    if not isinstance(item.text, str) or not item.text.strip():
        raise InvalidArgument(f"text: expected words to remember, got {item.text!r}")
    told_at = item.told_at if item.told_at is not None else timestamp()
    try:
        datetime.fromisoformat(told_at)
    except (TypeError, ValueError):
        raise InvalidArgument(f"told_at: expected an ISO 8601 time, got {told_at!r}") from None
    for name, value in (("text", item.text), ("role", item.role)):
        check_json(name, value)
    return {"text": item.text, "role": item.role, "told_at": told_at, "meta": json_object("meta", item.meta)}


def json_object(name: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return ``value`` (None counts as empty) as a dict that JSON can hold, or raise InvalidArgument."""
    if value is not None and not isinstance(value, Mapping):
        raise InvalidArgument(f"{name}: expected a mapping, got {type(value).__name__}")
    result = dict(value or {})
    check_json(name, result)
    return result


def check_json(name: str, value: Any) -> None:
    """Raise InvalidArgument unless ``value`` is finite JSON in valid Unicode."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{name}: not valid Unicode ({error.reason} at {error.start})") from None
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name}: cannot be kept as JSON ({error})") from None


def without_words(value: Any) -> Any:
    """Return ``value`` (JSON) with every string leaf gone: numbers may stay when the text they came from must not."""
    if isinstance(value, dict):
        return {key: without_words(item) for key, item in value.items() if not isinstance(item, str)}
    if isinstance(value, list):
        return [without_words(item) for item in value if not isinstance(item, str)]
    return value
