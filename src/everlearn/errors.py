"""The whole exception tree. Every error a user can meet derives from :class:`EverlearnError`."""

from __future__ import annotations


class EverlearnError(Exception):
    """Base of all errors that everlearn raises on purpose; the CLI prints them without a traceback (exit code 1)."""


class InvalidArgument(EverlearnError, ValueError):
    """An argument is out of range or of the wrong shape: names it, what came and what was expected."""


class StackingError(EverlearnError, ValueError):
    """A model's structure does not allow levels to be stacked on it."""


class FingerprintError(EverlearnError, ValueError):
    """A memory was made on another base model, or with another layout, than the one it is loaded on."""


class ModelNotFound(EverlearnError, OSError):
    """A model could not be found or fetched."""


class StoreError(EverlearnError, OSError):
    """A memory folder cannot be read or written."""


class StoreLocked(StoreError):
    """Another process has the memory folder open."""


class StoreCorrupt(StoreError):
    """A file of the memory folder is damaged; the message names it and says what can be done."""


class SleepRejected(EverlearnError, RuntimeError):
    """A sleep did not pass its checks; nothing was committed and the day's observations are still heard."""
