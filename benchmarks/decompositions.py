"""Measure the decompositions against their peers: python benchmarks/decompositions.py [JOB ...] [--again] [--json]

Prints a row per comparison as it comes and writes benchmarks/results/decompositions.json; a job that was measured
before with the same versions on the same processor is printed from there.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from harness import keep_memory, main

FAMILIES = ("svd", "ratings", "als", "hadamard", "kronecker", "cp")
PACKAGES = ["torch", "numpy", "scipy", "scikit-learn", "dask", "distributed", "ray", "tensorly", "scikit-image"]

if __name__ == "__main__":
    keep_memory()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    jobs = {name: job for family in FAMILIES for name, job in import_module(f"jobs_{family}").JOBS.items()}
    main("decompositions", jobs, PACKAGES)
