"""``everlearn eval mad``: memory primitives."""

from __future__ import annotations

from everlearn.cli.eval_suite import suite_command

eval_mad = suite_command("mad", "MAD: six synthetic tasks, each for one ability of a sequence model.", tasks=True)
