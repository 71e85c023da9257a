"""What every benchmark shares: paired timings, one form of result row, a file that grows row by row.

A job is a function without arguments that returns rows. Results go to `benchmarks/results/<name>.json` after every
job; a job whose rows are there already, from the same versions, is passed over unless `--again` is given.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
THREADS = 2
#: Pause before every timed call: idle threads of another library's pool still spin for tens of milliseconds.
_REST_S = 0.2
#: A memory-keeping allocator for both sides: fresh pages cost more than many of the products that fill them.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}
#: Beside it where threads allocate: arenas of their own cannot grow by so much at once, and take more and more instead.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. `ratio` is peer over ours for times (above 1 we are faster), ours over peer for errors."""

    job: str
    peer: str
    ratio: float
    direction: str = ">="
    target: float = 0.0
    met: bool = True
    error_ours: float | None = None
    error_peer: float | None = None
    note: str = ""


def row(
    job: str, peer: str, ratio: float, target: float, direction: str = ">=", *, valid: bool = True, **facts: Any
) -> Row:
    """A row whose `met` follows from the target; `valid` is the side condition (error no worse than the peer's)."""
    reached = ratio >= target if direction == ">=" else ratio <= target
    return Row(
        job=job, peer=peer, ratio=ratio, direction=direction, target=target, met=bool(reached and valid), **facts
    )


def paired(calls: Mapping[str, Callable[[], Any]], repeats: int = 3) -> tuple[dict[str, float], dict[str, Any]]:
    """Run the calls in turn, `repeats` times; the least wall time of each in seconds, and its last result."""
    best = dict.fromkeys(calls, float("inf"))
    found: dict[str, Any] = {}
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(_REST_S)
            began = time.perf_counter()
            found[name] = call()
            best[name] = min(best[name], time.perf_counter() - began)
    return best, found


class Pipe:
    """A peer in an environment of its own, asked over pipes: one JSON document per line each way."""

    def __init__(self, python: str, script: Path) -> None:
        self._script = script
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  it lives as long as the peer
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        code = self._process.wait()
        self._log.seek(0)
        raise RuntimeError(f"{self._script.name} ended with {code}:\n{self._log.read()[-2000:]}")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def peers_python(kind: str = "") -> str | None:
    """The interpreter of `.venv-peers`, or `.venv-peers-kind`, or what RANKLINE_PEERS[_KIND]_PYTHON names; or None."""
    given = os.environ.get(f"RANKLINE_PEERS{'_' if kind else ''}{kind.upper()}_PYTHON")
    own = Path(__file__).parent.parent / f".venv-peers{'-' if kind else ''}{kind}" / "bin" / "python"
    path = Path(given) if given else own
    return str(path) if path.is_file() else None


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    import torch

    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": THREADS,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "date": time.strftime("%Y-%m-%d"),
        "allocator": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
    }


def versions(names: list[str]) -> dict[str, str]:
    """Installed versions of packages; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def keep_memory(**more: str) -> None:
    """Start this script again under the allocator settings (`more`: further ones) and threads that both sides share."""
    wanted = (
        ALLOCATOR
        | more
        | {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    )
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


def main(name: str, jobs: Mapping[str, Callable[[], list[Row]]], packages: list[str]) -> None:
    """Run the jobs of a benchmark, print every row as it comes, and write the results after each."""
    parser = argparse.ArgumentParser(description=f"Measure {name} against its peers.")
    parser.add_argument("only", nargs="*", help=f"jobs to run (all): {', '.join(jobs)}")
    parser.add_argument("--again", action="store_true", help="measure jobs anew that have results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON at the end")
    parser.add_argument("--markdown", action="store_true", help="print the table of what is there, measure nothing")
    chosen = parser.parse_args()
    keep_memory()
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    if chosen.markdown:
        print(markdown(kept["rows"]))
        return
    facts = {"machine": machine(), "versions": versions(packages)}
    before = kept.get("machine", {})
    same = kept.get("versions") == facts["versions"] and all(
        before.get(name) == facts["machine"][name] for name in ("cpu", "allocator")
    )
    done: dict[str, list[dict[str, Any]]] = kept.get("jobs", {}) if same else {}
    print(json.dumps(facts), flush=True)
    for job, measure in jobs.items():
        if chosen.only and job not in chosen.only:
            continue
        if chosen.again or job not in done:
            done[job] = [asdict(found) for found in measure()]
            rows = [found for key in jobs for found in done.get(key, [])]
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(facts | {"rows": rows, "jobs": done}, indent=1) + "\n")
        for found in done[job]:
            _print(found)
    if chosen.json:
        print(path.read_text())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as the documentation shows them."""
    lines = ["| job | peer | ratio | target | met | error ours / peer |", "|---|---|---|---|---|---|"]
    for found in rows:
        sign = "≥" if found["direction"] == ">=" else "≤"
        target = f"{sign} {found['target']:g}" if found["target"] else "–"
        met = ("yes" if found["met"] else "**no**") if found["target"] else "–"
        errors = [f"{found[key]:.5g}" if found[key] is not None else "–" for key in ("error_ours", "error_peer")]
        lines.append(
            f"| {found['job']} | {found['peer']} | {found['ratio']:.2f} | {target} | {met} | {' / '.join(errors)} |"
        )
    return "\n".join(lines)


def _print(found: Mapping[str, Any]) -> None:
    errors = [f"{found[key]:.6g}" if found[key] is not None else "-" for key in ("error_ours", "error_peer")]
    mark = "met" if found["met"] else "NOT MET"
    print(
        f"{found['job']:<52} | {found['peer']:<36} | {found['ratio']:8.3f} {found['direction']} {found['target']:<5g} "
        f"{mark:<7} | error {errors[0]} / {errors[1]} | {found['note']}",
        flush=True,
    )
