"""Coverage-guided fuzzing of one reader: `python tests/fuzz_readers.py TARGET -max_total_time=180`.

Needs atheris (`pip install atheris`), which is no dependency. Arguments after TARGET go to libFuzzer; a directory
among them keeps the inputs that reached something new. A crash prints the input, which belongs into
`tests/test_damaged_readers.py`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("fuzz the readers: atheris is not installed. pip install atheris (Linux, CPython 3.11), or run "
                 "tests/test_fuzz_readers.py, which needs hypothesis alone.")  # fmt: skip
    sys.path[:0] = [str(ROOT), str(ROOT.parent)]
    with atheris.instrument_imports(include=["lowrank", "cluster", "pipelines", "yaml", "gguf"]):
        from fuzz_targets import TARGETS, try_reader

    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz_readers.py TARGET [libFuzzer's options]; targets: {', '.join(TARGETS)}")
    name = sys.argv.pop(1)
    seen: Counter[str] = Counter()

    with tempfile.TemporaryDirectory() as scratch:
        seeds, place = Path(scratch) / "seeds", Path(scratch) / "place"
        seeds.mkdir()
        place.mkdir()
        for index, data in enumerate(TARGETS[name].seeds()):
            (seeds / str(index)).write_bytes(data)

        def once(data: bytes) -> None:
            seen[try_reader(name, data, place)] += 1
            if seen.total() % 1000 == 0:
                print(f"{name}: {seen.total()} executions, {dict(seen)}", file=sys.stderr)

        limits = ["-timeout=10", "-rss_limit_mb=4096", "-max_len=8192"]
        atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], str(seeds)], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
