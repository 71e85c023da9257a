"""The threads that help with compiled work: many callers, pauses long enough to fall asleep, and fork()."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import pytest
import torch

from lowrank.kernels import dense

pytestmark = pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler")


def works(weight: torch.Tensor, x: torch.Tensor, expected: torch.Tensor, rounds: int) -> bool:
    return all(torch.equal(dense.product(x, weight), expected) for _ in range(rounds))  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [2, 5, 300])
def test_results_do_not_depend_on_threads_or_callers(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_ENTRIES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight, x = torch.randn(700, 33), torch.randn(5, 33)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = dense.product(x, weight)
    torch.testing.assert_close(expected, x @ weight.T)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(works, repeat(weight, 8), repeat(x), repeat(expected), repeat(300)))
    for _ in range(20):  # helpers have fallen asleep
        time.sleep(0.005)
        assert works(weight, x, expected, 1)


def test_a_forked_child_has_helpers_of_its_own() -> None:
    script = """
import os, sys, torch
from lowrank.kernels import dense
torch.set_num_threads(1)
dense._ENTRIES_PER_THREAD = 1
weight, x = torch.randn(700, 33), torch.randn(5, 33)
expected = dense.product(x, weight)
torch.get_num_threads = lambda: 4
for _ in range(50):
    dense.product(x, weight)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(dense.product(x, weight), expected) for _ in range(50)) else 1)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit("a child got another result")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
