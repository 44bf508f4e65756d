"""``everlearn eval formal``: state tracking on formal languages."""

from __future__ import annotations

from everlearn.cli.eval_suite import suite_command

eval_formal = suite_command("formal", "Formal languages: train on short strings, test on longer ones.", tasks=True)
