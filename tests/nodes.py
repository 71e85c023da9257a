"""Nodes of one machine that see other file systems than the head does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def add_node_behind(mount: str, cluster: Path, num_cpus: int = 1) -> None:
    """One more node, whose file system differs by one mount."""
    add = "from pathlib import Path; from cluster import session; "
    add += f"session.add_node(Path({str(cluster)!r}), num_cpus={num_cpus})"
    command = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", add]
    added = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if added.returncode != 0:
        pytest.skip(f"no mount namespaces here: {added.stderr[-200:]}")
