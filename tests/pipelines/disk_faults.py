"""A process whose disk refuses: run by `test_disk_faults` with the library of `faulty_disk.c` preloaded.

Arguments: the library, a directory for the store (FAULTY_ROOT), how many calls to let fail (0: all), a seed. Prints
what it saw as JSON.
"""

from __future__ import annotations

import ctypes
import errno
import json
import random
import shutil
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lines import run_serially, store_of, tiny_pipeline, unit_hashes, with_changes

from pipelines import maintenance
from pipelines.errors import exit_code
from pipelines.lease import lease, store_in_use
from pipelines.records import write_record

STAGES = ("shard", "decompose", "quantize")


def attempt(config: Any) -> dict[str, dict[str, str]]:
    """The line's stages that need no cluster, with its leases and its record; hashes of all units."""
    store = store_of(config)
    directory = store.run_dir(config.name)
    directory.mkdir(parents=True, exist_ok=True)
    with store_in_use(store.root), lease(directory / "lease.json"):
        made = run_serially(config, *STAGES)
        keys = {stage: path.name for stage, path in made.items()}
        manifests = {stage: json.loads((path / "manifest.json").read_text())["sha256"] for stage, path in made.items()}
        write_record(directory, {"name": config.name, "status": "FINISHED", "keys": keys, "manifests": manifests})
    return {stage: unit_hashes(config, stage) for stage in STAGES}


def main() -> None:
    library, root, most, seed = ctypes.CDLL(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    earlier = tiny_pipeline(root, None, name="earlier", decompose={"rank": 1})
    config = with_changes(earlier, name="later", shard={"shard_bytes": 4096}, decompose={"rank": 2})
    attempt(earlier)
    before = set((root / "store" / "_artifacts").glob("*/*"))

    def clear() -> None:
        for path in set((root / "store" / "_artifacts").glob("*/*")) - before:
            shutil.rmtree(path)
        shutil.rmtree(root / "store" / "later", ignore_errors=True)

    attempt(config)  # imports, caches and the like
    clear()
    library.faults_arm(ctypes.c_long(-1), 0, 0)
    expected = attempt(config)
    calls = library.faults_count()
    tried = [(call, error) for call in range(calls) for error in (errno.ENOSPC, errno.EIO)]
    if most:
        tried = random.Random(seed).sample(tried, most)
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    for call, error in tried:
        clear()
        # A full disk stays full, a broken write need not come again.
        library.faults_arm(ctypes.c_long(call), error, int(error == errno.ENOSPC))
        try:
            attempt(config)
            outcome = "nothing noticed"
        except Exception as caught:
            outcome = f"exit {exit_code(caught)}"
            if exit_code(caught) != 3:
                wrong.append(f"call {call}, {errno.errorcode[error]}: {''.join(traceback.format_exception(caught))}")
        finally:
            library.faults_arm(ctypes.c_long(-1), 0, 0)
        seen[outcome] += 1
        if problems := maintenance.verify(store_of(earlier), "earlier")["problems"]:
            wrong.append(f"call {call}: the earlier run is damaged: {problems}")
        if attempt(config) != expected or maintenance.verify(store_of(config), "later")["problems"]:
            wrong.append(f"call {call}: going on gave something else")
    print(json.dumps({"calls": calls, "tried": len(tried), "seen": seen, "wrong": wrong}))


if __name__ == "__main__":
    main()
