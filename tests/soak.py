"""How many times a fault is tried: a seeded sample in the suite, all of it by `make soak`, which keeps the counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

#: More than 1: `make soak`. Some tests multiply their size by it.
SOAK = int(os.environ.get("RANKLINE_SOAK", "1"))
SEED = 0


def amount(sample: T, full: T) -> T:
    """Trials, or their number: `sample` in the suite, `full` when soaking."""
    return full if SOAK > 1 else sample


def bound_95(n: int, failures: int) -> float:
    """Upper 95 % confidence bound of the probability of a failure (Clopper and Pearson 1934; near 3/n for none)."""
    from scipy.stats import beta

    return 1.0 if failures >= n else float(beta.ppf(0.95, failures + 1, n - failures))


def record(fault: str, n: int, wrong: list[Any], target: str, **facts: Any) -> None:
    """Tell what was tried and what went wrong; `make soak` collects these lines."""
    row = {
        "fault": fault,
        "n": n,
        "failures": len(wrong),
        "bound_95": bound_95(n, len(wrong)),
        "target": target,
        "met": not wrong and n > 0,
        "seed": SEED,
        "wrong": [str(one)[:300] for one in wrong[:5]],
        **facts,
    }
    print(f"\n{json.dumps(row)}")
    path = os.environ.get("RANKLINE_SOAK_ROWS")
    if path:
        with Path(path).open("a") as handle:
            handle.write(json.dumps(row) + "\n")
