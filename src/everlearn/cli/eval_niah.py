"""``everlearn eval niah``: long-context retrieval."""

from __future__ import annotations

from everlearn.cli.eval_suite import suite_command

eval_niah = suite_command("niah", "Needles in haystacks of growing length, read by models trained at a short one.")
