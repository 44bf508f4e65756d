"""``everlearn eval lm``: language modelling."""

from __future__ import annotations

from everlearn.cli.eval_suite import suite_command

eval_lm = suite_command("lm", "Language models on books: held-out perplexity, WikiText-2, LAMBADA, BLiMP.")
