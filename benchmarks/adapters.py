"""Measure the adapter families against their peers: python benchmarks/adapters.py [JOB ...] [--again]

Prints a row per comparison as it comes and writes benchmarks/results/adapters.json; a job that was measured before
with the same versions on the same processor is printed from there.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from harness import keep_memory, main

PARTS = ("adapter_layers", "nf4", "training")
PACKAGES = ["torch", "peft", "bitsandbytes", "transformers", "accelerate", "deepspeed"]

if __name__ == "__main__":
    keep_memory()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    jobs = {name: job for part in PARTS for name, job in import_module(f"jobs_{part}").JOBS.items()}
    main("adapters", jobs, PACKAGES)
