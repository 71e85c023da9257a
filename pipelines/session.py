"""The cluster of a run: the user's own at `--address`, or the store's embedded one."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.objects import Mirror
from pipelines.artifacts import Store
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


def require_alike_nodes(store: Path, mirror: Mirror | None = None) -> None:
    """Nothing on one node; on several each must have our versions and share the store.

    Raises:
        cluster.errors.ConnectError: one does not; see `cluster.node_check.check_nodes`.
    """
    from cluster.connection import nodes
    from cluster.node_check import check_nodes

    if sum(node["alive"] for node in nodes()) > 1:
        check_nodes(store, mirror)


def require_room(config: PipelineConfig, stages: Collection[str]) -> None:
    """A node must fit the tasks of each of these stages, and the nodes all training workers.

    Raises:
        cluster.errors.ResourceError: none does, or they do not.
    """
    from cluster.autoscaling import present
    from cluster.connection import living
    from cluster.errors import ResourceError
    from cluster.placement import refuse_unfit
    from cluster.tasks import require_fit

    cpus = {"decompose": config.cluster.task_cpus, "quantize": config.cluster.task_cpus}
    for stage in [stage for stage in ("shard", "decompose", "quantize", "evaluate") if stage in stages]:
        try:
            require_fit({"CPU": cpus.get(stage, 1.0), **resources_of(config, stage)})
        except ResourceError as error:
            raise ResourceError(f"{stage}: {error}") from error
    if "finetune" in stages and not present():
        nodes, tune = list(living().values()), config.finetune
        gpu = {"GPU": 1.0} if any(node.get("GPU") for node in nodes) else {}
        wanted = {"CPU": tune.cpus_per_worker, **gpu, **resources_of(config, "finetune")}
        refuse_unfit(nodes, wanted, tune.num_workers, tune.placement)


def resources_of(config: PipelineConfig, stage: str) -> dict[str, float]:
    """What each task of a stage takes beside CPUs."""
    return {name: amount for owner, given in config.cluster.stage_resources.items() if owner == stage
            for name, amount in given.items()}  # fmt: skip


def node_refusals(config: PipelineConfig, stages: Collection[str]) -> list[Exception]:
    """What stands against these stages on the user's own cluster that only its nodes can tell: they are asked."""
    from cluster.connection import disconnect
    from cluster.errors import ClusterError

    store = Store.of(config.store)
    try:
        open_cluster(config, store.root)
        require_alike_nodes(store.root, store.mirror)
        require_room(config, stages)
    except ClusterError as error:
        return [error]
    finally:
        disconnect()
    return []


@contextlib.contextmanager
def on_cluster(config: PipelineConfig, store: Store) -> Iterator[None]:
    """Connect; once the cluster answers no more, whatever Ray raises in the block ends as one clear error.

    Raises:
        cluster.errors.ClusterError: as `open_cluster`; ConnectError when it is gone, or its nodes are not alike.
    """
    from cluster.errors import ConnectError
    from cluster.watch import EMBEDDED_PATIENCE_S, PATIENCE_S, answers, watched

    address = open_cluster(config, store.root)
    require_alike_nodes(store.root, store.mirror)
    gone = ConnectError(f"the Ray cluster at {address} answers no more; what is committed stays. Resume the run.")
    lost = False

    def tell(_signal: int, _frame: FrameType | None) -> None:
        nonlocal lost
        lost = True
        raise gone

    try:
        previous = signal.signal(signal.SIGUSR1, tell)
    except ValueError:  # not the main thread
        yield
        return
    patience = EMBEDDED_PATIENCE_S if config.cluster.address is None else PATIENCE_S
    try:
        with watched(address, patience, partial(_thread.interrupt_main, signal.SIGUSR1)):
            yield
    except BaseException as error:
        # Ray's own errors may come before the watch is sure of it.
        ray_failed = isinstance(error, Exception) and not isinstance(error, Interrupted)
        if error is not gone and (lost or (ray_failed and not answers(address))):
            raise gone from error
        raise
    finally:
        signal.signal(signal.SIGUSR1, previous)


def unit_runner(
    config: PipelineConfig,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
    fn: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    num_cpus: float,
    on_done: Callable[[Any, Any], None],
    near: Callable[[Any], str] | None = None,
    resources: Mapping[str, float] | None = None,
) -> None:
    """Run unit functions on the connected cluster, bounded in flight; one at a time once memory ran out.

    `near` and `resources` say where; see `cluster.units.run_units`.

    Raises:
        Interrupted: the user asked to stop; units in flight were finished.
        OutOfMemoryError: a unit does not fit even alone.
    """
    from cluster.errors import OutOfMemoryError
    from cluster.failures import is_out_of_memory
    from cluster.units import run_units

    done: set[int] = set()

    def count(item: Any, result: Any) -> None:
        done.add(id(item))
        on_done(item, result)

    def run(in_flight: int | None) -> None:
        run_units(
            fn,
            [item for item in items if id(item) not in done],
            on_done=count,
            num_cpus=num_cpus,
            max_in_flight=in_flight,
            should_stop=should_stop,
            near=near,
            resources=resources,
            node_wait_s=config.cluster.node_wait_s,
        )

    in_flight = config.cluster.max_in_flight or default_in_flight(config)
    try:
        try:
            run(in_flight)
        except Exception as error:
            if in_flight == 1 or not is_out_of_memory(error):
                raise
            together = f"{in_flight} units in flight" if in_flight else "as many units in flight as fit"
            say(f"out of memory with {together}; the other {len(items) - len(done)} go one at a time")
            run(1)
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"a unit ran out of memory alone on its node ({error}).") from error
        raise
    if len(done) < len(items):
        raise Interrupted(f"stopped with {len(done)} of {len(items)} units done; what is committed stays.")


def default_in_flight(config: PipelineConfig) -> int | None:
    """Units in flight: the physical cores of an embedded cluster; None, as many as fit, on another, which may grow."""
    return os.cpu_count() or 1 if config.cluster.address is None else None
