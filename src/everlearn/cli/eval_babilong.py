"""``everlearn eval babilong``: reasoning over very long text."""

from __future__ import annotations

from everlearn.cli.eval_suite import suite_command

eval_babilong = suite_command(
    "babilong", "Questions about facts hidden in books, at lengths far beyond those trained on."
)
