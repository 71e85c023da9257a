"""The same pipeline on a cluster of two nodes: both of them work, and no byte of the exact stages shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from lines import EXACT, Driver, assert_nothing_done_twice, stage_units, store_of, unit_hashes, with_changes
from nodes import add_node_behind
from object_stores import settings

from cluster import session
from pipelines.cli import main

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Any]:
    """A head and one more node, both on this machine, found by their address only."""
    store = tmp_path / "cluster"
    head = session.start_or_adopt(store, num_cpus=4)
    try:
        session.add_node(store, num_cpus=4)
        yield head
    finally:
        session.stop(store)


def nodes_of(config: Any, stage: str, event: str) -> set[str]:
    """Nodes on which workers (not the driver, which makes the small units) did something."""
    small = ("index", "train-tokens", "plain-lora")
    lines = stage_units(config, stage).ledger()
    return {line["node"] for line in lines if line["event"] == event and line["unit"] not in small}


def test_two_nodes_share_the_work_and_leave_the_same_bytes(whole_line: Any, two_nodes: Any, tmp_path: Path) -> None:
    config = with_changes(
        whole_line.config,
        store={"path": str(tmp_path / "store")},
        cluster={"address": None, "token_file": two_nodes.token_file},
        finetune={"num_workers": 2, "cpus_per_worker": 1.0},
    )
    driver = Driver(config, "--address", two_nodes.address)
    assert driver.wait(400) == 0, driver.text()
    reports = pq.read_table(stage_units(config, "decompose").path("index") / "index.parquet").to_pylist()
    assert len(reports) == 6
    assert all(report["num_blocks"] >= 3 for report in reports)
    nodes = nodes_of(config, "decompose", "commit")
    assert len(nodes) == 2
    assert "driver" not in nodes
    assert nodes_of(config, "quantize", "commit") == nodes
    assert nodes_of(config, "finetune", "rank") == nodes
    for stage in EXACT:
        assert unit_hashes(config, stage) == unit_hashes(whole_line.config, stage), stage
        assert assert_nothing_done_twice(config, stage) == 0


def test_two_nodes_share_nothing_but_an_object_store(
    whole_line: Any, s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has a cache of its own behind one path; a third node, which cannot write to its own, is refused by name."""
    cluster, sections = tmp_path / "cluster", settings(s3.uri(), tmp_path)
    cache = Path(sections["store"]["cache"])
    cache.mkdir()
    head = session.start_or_adopt(cluster, num_cpus=4)
    try:
        add_node_behind(f'mount -t tmpfs none "{cache}"', cluster, num_cpus=4)
        config = with_changes(
            whole_line.config,
            **sections,
            cluster={"address": None, "token_file": head.token_file},
            finetune={"num_workers": 2, "cpus_per_worker": 1.0},
        )
        driver = Driver(config, "--address", head.address)
        assert driver.wait(400) == 0, driver.text()
        add_node_behind(f'mount -t tmpfs -o ro none "{cache}"', cluster)
        refused = Driver(config, "--address", head.address)
        assert refused.wait(200) == 4, refused.text()
    finally:
        session.stop(cluster)
    said = " ".join(refused.text().split())
    assert said.count("it cannot use the store") == 1, said
    assert "Read-only file system" in said
    assert "store.cache" in said
    nodes = nodes_of(config, "decompose", "commit")
    assert len(nodes) == 2
    assert nodes_of(config, "quantize", "commit") == nodes
    assert nodes_of(config, "finetune", "rank") == nodes
    for stage in EXACT:
        assert unit_hashes(config, stage) == unit_hashes(whole_line.config, stage), stage
        assert assert_nothing_done_twice(config, stage) == 0
    made = {path.name for path in (cache / "_artifacts").glob("decompose/*/units/*")}
    assert made < set(unit_hashes(config, "decompose")), "the head's cache lacks what the other node made"
    assert main(["verify", "tiny", "--store", store_of(config).name, "--cache", str(tmp_path / "empty")]) == 0
    capsys.readouterr()
