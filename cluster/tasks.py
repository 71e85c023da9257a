"""One Ray task: what it takes of a node, which node it goes to, and how it runs there."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from cluster.autoscaling import present
from cluster.errors import ResourceError
from cluster.placement import room
from lowrank.executor import Ref


def call(fn: Callable[..., Any], *arguments: Any) -> Any:
    """Run in the worker: one thread, because the order of a sum depends on how many share it."""
    # a worker that has not imported torch reads OMP_NUM_THREADS=1 when it does (set by the head, and by Ray)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
    return fn(*arguments)


def cancel(refs: list[Ref]) -> None:
    """End tasks, the ones that run too."""
    import ray

    for ref in refs:
        ray.cancel(ref, force=True)


def remote(wanted: Mapping[str, float], max_retries: int, spread: bool, body: Any) -> Any:
    """`body` as a remote function that takes so much of a node; never run again after an exception of its own."""
    import ray

    further = {name: amount for name, amount in wanted.items() if name not in ("CPU", "GPU", "memory")}
    return ray.remote(
        num_cpus=wanted["CPU"],
        num_gpus=wanted.get("GPU"),
        memory=wanted.get("memory"),
        resources=further or None,
        max_retries=max_retries,
        retry_exceptions=False,
        scheduling_strategy="SPREAD" if spread else "DEFAULT",
    )(body)


def on_node(node: str, elsewhere: bool = True) -> dict[str, Any]:
    """The option that runs a task on a node, none for ''.

    It runs `elsewhere` where the node has no room just now, and in any case where the node is gone.
    """
    if not node:
        return {}
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=elsewhere)}


def rooms_for(wanted: Mapping[str, float]) -> dict[str, int]:
    """How many tasks each living node holds that holds any."""
    from cluster.connection import living

    rooms = {node: room(resources, wanted) for node, resources in living().items()}
    return {node: number for node, number in rooms.items() if number > 0}


def require_fit(wanted: Mapping[str, float]) -> dict[str, int]:
    """The rooms of the nodes that fit; Ray itself would wait for ever for a node that is not there."""
    from cluster.connection import living

    rooms = rooms_for(wanted)
    if not rooms and not present():
        sizes = ", ".join(shown({name: node.get(name, 0.0) for name in wanted}) for node in living().values())
        raise ResourceError(
            f"run tasks of {shown(wanted)}: no node is large enough, there are [{sizes}]. Ask for less per task "
            "(cluster.task_cpus, cluster.stage_resources), or add such a node."
        )
    return rooms


def shown(wanted: Mapping[str, float]) -> str:
    """For messages."""
    return " and ".join(f"{amount:g} {name}" for name, amount in wanted.items())


def name_of(fn: Callable[..., Any]) -> str:
    """What a task is called in Ray's own lists."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__qualname__", type(fn).__name__)
