"""``python -m everlearn`` is the command ``everlearn``."""

from everlearn.cli import main

main()
