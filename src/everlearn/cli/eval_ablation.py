"""``everlearn eval ablation``: what each part of HOPE buys."""

from __future__ import annotations

from everlearn.cli.eval_suite import suite_command

eval_ablation = suite_command("ablation", "HOPE without each of its parts, as language models on books.")
