"""The cluster of a run: the user's own at `--address`, or the store's embedded one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.config import PipelineConfig
from pipelines.errors import Interrupted


def open_cluster(config: PipelineConfig, store: Path) -> str:
    """Connect to the configured cluster; returns its address.

    Raises:
        cluster.errors.ClusterError: unreachable, refused, or the ports are taken.
    """
    from cluster.session import connect, start_or_adopt

    token = Path(config.cluster.token_file).expanduser() if config.cluster.token_file else None
    if config.cluster.address:
        address = config.cluster.address
        if address == "auto":  # inside a job of the cluster, Ray says where the cluster is
            address = os.environ.get("RAY_ADDRESS", address)
        connect(address, token_file=token)
        return address
    head = start_or_adopt(store, num_cpus=config.cluster.num_cpus, token_path=token)
    connect(head)
    return head.address


def unit_runner(
    config: PipelineConfig,
    should_stop: Callable[[], bool],
    fn: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    num_cpus: float,
    on_done: Callable[[Any, Any], None],
) -> None:
    """Run unit functions on the connected cluster, bounded in flight.

    Raises:
        Interrupted: the user asked to stop; units in flight were finished.
    """
    from cluster.executor import run_units

    in_flight = config.cluster.max_in_flight or default_in_flight(config)
    done = 0

    def count(item: Any, result: Any) -> None:
        nonlocal done
        done += 1
        on_done(item, result)

    run_units(
        fn, items, on_done=count, num_cpus=num_cpus, max_in_flight=in_flight, spread=True, should_stop=should_stop
    )
    if done < len(items):
        raise Interrupted(f"stopped with {done} of {len(items)} units done; what is committed stays.")


def default_in_flight(config: PipelineConfig) -> int:
    """Units in flight: the physical cores of an embedded cluster, the CPUs of another."""
    if config.cluster.address is None:
        return os.cpu_count() or 1
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1) / config.cluster.task_cpus))
