"""``everlearn status``: the memory in numbers."""

from __future__ import annotations

from rich.table import Table

from everlearn.cli.options import Options


def status(options: Options) -> None:
    """Show how much was heard and learned, on which model, and how large the memory is."""
    with options.store(read_only=True) as store:
        found = store.status()
        sizes = {night.n: night.bytes for night in store.nights()}
    found["memory_bytes"] = sizes.get(found["head"], 0)
    base = found["base"] or {}
    counts = ", ".join(f"{count} {state}" for state, count in found["observations"].items())
    rows = {
        "memory": found["path"],
        "base model": base.get("name", "none yet"),
        "observations": counts,
        "night": f"{found['head']} (last sleep: {found['last_sleep'] or 'never'})",
        "nights to return to": ", ".join(map(str, found["available"])),
        "in the weights": f"{found['memory_bytes'] / 2**20:.1f} MiB",
        "on disk": f"{found['bytes'] / 2**20:.1f} MiB",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    options.report(found, table)
