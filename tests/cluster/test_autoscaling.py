"""A cluster that grows: Ray's own autoscaler over its provider of fake nodes, in a network namespace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from machines import Machines

ROOT = Path(__file__).parents[2]
GROWS = {
    "cluster_name": "fake",
    "max_workers": 1,
    "provider": {"type": "fake_multinode", "use_node_id_as_ip": True},
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "grown": {"resources": {"CPU": 1, "tape": 4}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5.0,
    "auth": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "cluster_synced_files": [],
}
CODE = """
import json, sys, time
from pathlib import Path
from cluster import session
from cluster.autoscaling import present
from cluster.connection import living
from cluster.units import run_units

session.connect(sys.argv[1], token_file=Path(sys.argv[2]))
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL as CHANNEL
from ray.experimental.internal_kv import _internal_kv_get

deadline = time.monotonic() + 60
while not present():
    assert time.monotonic() < deadline
    time.sleep(0.2)

def where(_):
    import ray
    return ray.get_runtime_context().get_node_id()

asked, homes = [], {}
before = set(living())
def done(index, node):
    asked.append(json.loads(_internal_kv_get(CHANNEL)))
    homes[index] = node
run_units(where, range(3), on_done=done, num_cpus=0.1, resources={"tape": 0.5}, node_wait_s=90)
assert not before & set(homes.values()), homes
assert asked[0] == [{"CPU": 0.1, "tape": 0.5}] * 3, asked
assert json.loads(_internal_kv_get(CHANNEL)) == []
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_units_that_fit_no_node_yet_make_the_cluster_grow() -> None:
    with Machines() as machines:
        machines.start(num_cpus=1, autoscaling=GROWS)
        command = [*machines.head.within, sys.executable, "-c", CODE, machines.address, str(machines.token)]
        ended = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=200)
        logs = "".join(path.read_text()[-3000:] for path in machines.root.rglob("monitor*"))
        assert ended.returncode == 0, ended.stdout + ended.stderr + logs
