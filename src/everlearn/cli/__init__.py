"""The command line, one file a command. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings


def main() -> None:
    """Run ``everlearn`` with the arguments of this process and end it: 0 done, 1 an error, 2 usage, 130 interrupted."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries: what concerns the user is said as an error
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter still gets the rest
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (importing it gives `input` its line editing)
    try:
        from everlearn.cli.app import app

        app(prog_name="everlearn")
    except KeyboardInterrupt:
        sys.exit(130)


__all__ = ["main"]
