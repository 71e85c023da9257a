"""The same pipeline on a cluster of two nodes: both of them work, and no byte of the exact stages shows it."""

from __future__ import annotations

import json
import subprocess
import sys
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
from pipelines.config import to_dict
from pipelines.records import read_record
from pipelines.tracking import default_uri

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head and one more node, which alone has `linalg`, both on this machine, found by their address only."""
    store = tmp_path_factory.mktemp("cluster")
    head = session.start_or_adopt(store, num_cpus=4)
    try:
        session.add_node(store, num_cpus=4, resources={"linalg": 1})
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
        cluster={"address": None, "token_file": two_nodes.token_file, "system_metrics_s": 2.0},
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
    both_nodes_are_in_mlflow_and_in_the_report(config, nodes)


def both_nodes_are_in_mlflow_and_in_the_report(config: Any, nodes: set[str]) -> None:
    from mlflow import MlflowClient

    root = store_of(config).root
    record = read_record(store_of(config).run_dir(config.name))
    client = MlflowClient(tracking_uri=default_uri(root))
    metrics = client.get_run(record["mlflow_run_id"]).data.metrics
    system = {key.split("/")[1]: key for key in metrics if key.startswith("system/")}
    assert {name.rpartition("-")[2] for name in system} == {node[:8] for node in nodes}
    for name in system:
        for what in ("cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage",
                     "network_receive_megabytes"):  # fmt: skip
            history = client.get_metric_history(record["mlflow_run_id"], f"system/{name}/{what}")
            assert len(history) >= 3, what
            assert all(one.value >= 0 for one in history)
            assert [one.step for one in history] == sorted({one.step for one in history})
        shares = client.get_metric_history(record["mlflow_run_id"], f"system/{name}/cpu_utilization_percentage")
        assert max(one.value for one in shares) > 5, "both share a machine that works"
    report = (store_of(config).run_dir(config.name) / "report.html").read_text()
    assert "How busy the nodes were" in report
    assert all(name in report for name in system)


def test_stages_keep_to_the_nodes_that_have_what_they_ask_for(whole_line: Any, two_nodes: Any, tmp_path: Path) -> None:
    """Decomposition on one node, training on the other, both workers."""
    wanted = {"decompose": {"linalg": 0.01}, "finetune": {"node:__internal_head__": 0.01}}
    config = with_changes(
        whole_line.config,
        store={"path": str(tmp_path / "store")},
        cluster={"address": two_nodes.address, "token_file": two_nodes.token_file, "stage_resources": wanted},
        finetune={"num_workers": 2, "cpus_per_worker": 1.0, "placement": "strict_pack", "max_steps": 2},
        evaluate={"max_rows": 4, "must_improve": False},
    )
    for change, told in (
        ("cluster.stage_resources={quantize: {tape: 1}}", "quantize: run tasks of 2 CPU and 1 tape: no node is large"),
        (
            "finetune.placement=strict_spread",
            "'strict_spread': of 1 CPU, 0.01 node:__internal_head__ each",
        ),
    ):
        (tmp_path / "p.yaml").write_text(json.dumps(to_dict(config)))
        command = [sys.executable, "-m", "pipelines.cli", "plan", str(tmp_path / "p.yaml"), "--set", change]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 2, ended.stderr
        assert told in " ".join((ended.stdout + ended.stderr).split())
    driver = Driver(config)
    assert driver.wait(400) == 0, driver.text()
    decomposed, trained = nodes_of(config, "decompose", "commit"), nodes_of(config, "finetune", "rank")
    assert len(decomposed) == len(trained) == 1
    assert not decomposed & trained
    for stage in EXACT:
        assert unit_hashes(config, stage) == unit_hashes(whole_line.config, stage), stage


@pytest.mark.slow
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
