"""Any call that changes a file may fail: what was there stays whole, the exit code says disk, and going on completes.

A library that is preloaded into a process of its own (`faulty_disk.c`) lets the calls fail, one after another: ENOSPC
from then on, EIO once. `make soak` tries every call, the suite a sample.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from soak import SEED, amount, record

HERE = Path(__file__).parent
SAMPLE = 30


@pytest.mark.timeout(3000)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's calls are interposed")
def test_whatever_call_fails(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library, root = tmp_path / "faulty.so", tmp_path / "disk"
    root.mkdir()
    source = HERE.parent / "faulty_disk.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    most = amount(SAMPLE, 0)
    done = subprocess.run(
        [sys.executable, str(HERE / "disk_faults.py"), str(library), str(root), str(most), str(SEED)],
        env=os.environ | {"LD_PRELOAD": str(library), "FAULTY_ROOT": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    record(
        "ENOSPC and EIO, call by call, in shard, decompose, quantize", found["tried"], found["wrong"],
        "exit 3, the earlier run whole, going on completes", seen=found["seen"], calls=found["calls"],
    )  # fmt: skip
    assert found["wrong"] == []
    assert found["tried"] == (most or 2 * found["calls"])
    assert found["calls"] > 300
    # Some calls write what can be done without: a cache of hashes, the lock's file.
    assert found["seen"]["exit 3"] > 0.7 * found["tried"]
    assert set(found["seen"]) <= {"exit 3", "nothing noticed"}
