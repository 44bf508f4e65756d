"""All speed benchmarks, one after the other: ``make bench``. Run it on a machine that does nothing else."""

from __future__ import annotations

import subprocess
import sys

for name in ("runtime", "optim_step", "speed"):
    print(f"== benchmarks.{name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
