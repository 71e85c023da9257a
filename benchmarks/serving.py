"""Measure the serving engine against its peers: python benchmarks/serving.py [JOB ...] [--again]

Prints a row per comparison as it comes and writes benchmarks/results/serving.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

from harness import ONE_ARENA, keep_memory, main

PACKAGES = ["torch", "peft", "transformers", "ray"]

if __name__ == "__main__":
    keep_memory(**ONE_ARENA)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from jobs_serving import JOBS
    from jobs_serving_http import JOBS as HTTP_JOBS
    from jobs_serving_peers import JOBS as PEER_JOBS

    main("serving", JOBS | PEER_JOBS | HTTP_JOBS, PACKAGES)
