"""A cluster whose nodes differ is refused by name: one without the store, one with other code."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lines import tiny_pipeline
from nodes import ROOT, add_node_behind

import lowrank.errors
from cluster import session
from cluster.node_check import versions
from pipelines.config import to_dict

pytestmark = [pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A head, a node that has an empty directory in place of the store, and one with another version of our code."""
    root = tmp_path_factory.mktemp("nodes")
    cluster, store, other = root / "cluster", root / "store", root / "errors.py"
    store.mkdir()
    ours = Path(lowrank.errors.__file__)
    other.write_text(ours.read_text() + "# another version\n")
    head = session.start_or_adopt(cluster, num_cpus=2)
    try:
        for mount in (f'mount -t tmpfs none "{store}"', f'mount --bind "{other}" "{ours}"'):
            add_node_behind(mount, cluster)
        yield head, store
    finally:
        session.stop(cluster)


def test_what_differs_is_told_by_node(three_nodes: tuple[Any, Path]) -> None:
    head, store = three_nodes
    # In a process of its own, as this one is connected to the cluster of the other tests.
    code = (
        "import sys; from pathlib import Path; from cluster.connection import connect; "
        "from cluster.node_check import check_nodes; "
        "connect(sys.argv[1], token_file=Path(sys.argv[2])); check_nodes(Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, head.address, head.token_file, str(store)]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "cluster.errors.ConnectError: the cluster's nodes are not alike" in asked.stderr
    lines = [line for line in asked.stderr.splitlines() if line.startswith("127.0.0.1: ")]
    assert len(lines) == 2, asked.stderr
    assert sum("does not share the store" in line and "No such file" in line for line in lines) == 1
    told = [line for line in lines if f"(here {versions()['rankline']})" in line]
    assert len(told) == 1
    assert "torch" not in told[0]
    assert not any((store / "_nodes").iterdir()), "nothing is left behind"


def test_plan_run_and_doctor_refuse_such_a_cluster(three_nodes: tuple[Any, Path], tmp_path: Path) -> None:
    head, store = three_nodes
    config = tiny_pipeline(tmp_path, head, store={"path": str(store)})
    (tmp_path / "p.yaml").write_text(json.dumps(to_dict(config)))
    environment = os.environ | {"RAY_AUTH_TOKEN_PATH": head.token_file}
    doctor = ["doctor", "--address", head.address, "--store", str(store)]
    for code, command in ((4, ["plan", str(tmp_path / "p.yaml")]), (4, ["run", str(tmp_path / "p.yaml")]), (2, doctor)):
        ended = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        said = " ".join((ended.stdout + ended.stderr).split())
        assert ended.returncode == code, said
        assert "does not share the store" in said
        assert "Install the same versions on every node" in said
