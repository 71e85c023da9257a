"""Every fault that rankline promises to survive, at full size; the counts go to `benchmarks/results/soak.json`.

A job is a part of the test suite, run with RANKLINE_SOAK set; what it tried is told by `tests/soak.py`. A job that is
done is passed over the next time unless `--again` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import RESULTS, machine, versions

ROOT = Path(__file__).parent.parent
#: job -> what pytest runs
JOBS = {
    "leases": ["tests/pipelines/test_lease_interleavings.py"],
    "bits": ["tests/pipelines/test_maintenance.py"],
    "readers": ["tests/test_fuzz_readers.py"],
    "training": ["tests/cluster/test_training_faults.py"],
    "stages": ["tests/pipelines/test_killed_drivers.py", "-k", "not moments"],
    "moments": ["tests/pipelines/test_killed_drivers.py", "-k", "moments"],
    "nodes": ["tests/pipelines/test_cut_off.py"],
    "full_disk": ["tests/pipelines/test_full_disk.py"],
    "disk_calls": ["tests/pipelines/test_disk_faults.py"],
    "serving": ["tests/pipelines/test_serving_faults.py", "tests/cluster/serving/test_fuzz.py"],
}
PACKAGES = ["rankline", "torch", "ray", "deepspeed", "mlflow"]
MULTIPLIER = 10


def soak(job: str) -> dict[str, Any]:
    """Run one job; its rows, and a row of its own where pytest failed without one."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        environment = os.environ | {"RANKLINE_SOAK": str(MULTIPLIER), "RANKLINE_SOAK_ROWS": str(path)}
        command = [sys.executable, "-m", "pytest", "--timeout", "3600", *JOBS[job]]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if code != 0 and all(row["met"] for row in rows):
        rows.append(
            {"fault": f"{job}: pytest", "n": 1, "failures": 1, "bound_95": 1.0, "target": "passes", "met": False}
        )
    return {"rows": rows, "seconds": round(time.monotonic() - began), "date": time.strftime("%Y-%m-%d")}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as the README shows them."""
    lines = ["| fault | tried | failures | 95 % bound | to show |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['fault']} | {row['n']} | {row['failures']} | {row['bound_95']:.2g} | {row['target']} |" for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Try every fault at full size.")
    parser.add_argument("only", nargs="*", help=f"jobs to run (all): {', '.join(JOBS)}")
    parser.add_argument("--again", action="store_true", help="run jobs anew that are done")
    parser.add_argument("--markdown", action="store_true", help="print the table of what is there, run nothing")
    chosen = parser.parse_args()
    if unknown := set(chosen.only) - set(JOBS):
        parser.error(f"no such job: {', '.join(sorted(unknown))}; there are {', '.join(JOBS)}")
    path = RESULTS / "soak.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    done: dict[str, Any] = kept.get("jobs", {})
    for job in [] if chosen.markdown else chosen.only or JOBS:
        if job in done and not chosen.again:
            continue
        done[job] = soak(job)
        rows = [row for name in JOBS for row in done.get(name, {}).get("rows", [])]
        facts = {"machine": machine(), "versions": versions(PACKAGES)}
        path.write_text(json.dumps(facts | {"rows": rows, "jobs": done}, indent=1) + "\n")
    rows = [row for name in JOBS for row in done.get(name, {}).get("rows", [])]
    print(table(rows))
    return int(any(not row["met"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
