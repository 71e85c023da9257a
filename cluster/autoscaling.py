"""What the cluster's autoscaler is told; nothing where there is none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping


def present() -> bool:
    """Whether an autoscaler that can start nodes looks after the connected cluster.

    Ray's monitor reports on every cluster. Where it only watches, each node is of a type of its own, `node_<id>`;
    groups of nodes with names of the user's own exist where it can start more of them.
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    types = (status.get("autoscaler_report") or {}).get("active_nodes") or {}
    return any(not name.startswith(("node_", "local.cluster.node")) for name in [*types, *_types_v2()])


def _types_v2() -> list[str]:
    """Types of nodes that the second autoscaler (KubeRay's) tells; none where the first one runs, or none."""
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    if not is_autoscaler_v2(gcs_client=global_worker.gcs_client):
        return []
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(global_worker.gcs_client.address)
    return [node.ray_node_type_name for node in [*status.active_nodes, *status.idle_nodes] if node.ray_node_type_name]


@contextlib.contextmanager
def hint(bundle: Mapping[str, float], count: int) -> Iterator[None]:
    """Ask for room for so many tasks at once while the block runs; the autoscaler follows it within its limits."""
    if count < 1 or not present():
        yield
        return
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle)] * count)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # the cluster may be gone by now
            request_resources(bundles=[])
