"""``everlearn export``: the whole memory in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everlearn.cli.options import Options


def export(
    options: Options, file: Annotated[Path, typer.Argument(help="Where to; an existing file is replaced.")]
) -> None:
    """Write the whole memory, journal and weights, to one file."""
    file = file.expanduser()
    with options.store(read_only=True) as store:
        manifest = store.export(file)
    lost = f", without the damaged nights {manifest['damaged']}" if manifest["damaged"] else ""
    options.report({"file": str(file), **manifest}, f"{file}: {file.stat().st_size / 2**20:.1f} MiB{lost}")
