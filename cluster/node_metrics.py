"""How busy every node is while a run goes: one light sampler per node, told by the driver to whoever keeps metrics.

The driver measures its own node; every other one has an actor that takes no CPU of Ray's and does nothing between two
questions. A node that does not answer is left out until it does; nothing here can end a run.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

#: Samples of a node that are handed over together.
BATCH = 6
_ANSWER_S = 5.0
_MB = 1e6


class NodeMetricSink(Protocol):
    """Who keeps the figures: `pipelines.tracking` writes them to MLflow."""

    def __call__(self, samples: list[tuple[str, float, dict[str, float]]]) -> None:
        """Keep samples: (node, seconds since the epoch, value by name)."""
        ...


class Sampler:
    """The figures of the machine that it runs on, named as MLflow names its system metrics."""

    def __init__(self) -> None:
        import psutil

        self._gpus = _gpu_handles()
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # the next call tells the share since this one

    def sample(self) -> dict[str, float]:
        """CPU, memory and disk now; network since the start; each GPU's share and memory."""
        import psutil

        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / _MB,
            "disk_available_megabytes": disk.free / _MB,
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / _MB,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / _MB,
        }
        return found | self._sample_gpus()

    def _sample_gpus(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for index, (nvml, handle) in enumerate(self._gpus):
            with contextlib.suppress(nvml.NVMLError):
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                found[f"gpu_{index}_memory_usage_megabytes"] = memory.used / _MB
                found[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
                found[f"gpu_{index}_utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        return found


def _gpu_handles() -> list[tuple[Any, Any]]:
    """(NVML, handle) of each GPU; none without NVIDIA's library."""
    try:
        import pynvml
    except ImportError:
        from ray._private.thirdparty import pynvml  # what Ray's own agents use
    try:
        pynvml.nvmlInit()
        return [(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


@contextlib.contextmanager
def node_metrics(sink: NodeMetricSink, every_s: float | None) -> Iterator[None]:
    """Sample every node of the connected cluster so often while the block runs; None samples nothing."""
    if every_s is None:
        yield
        return
    ended = threading.Event()
    nodes = _Nodes(sink)

    def follow() -> None:
        while not ended.wait(every_s):
            nodes.look()
        nodes.hand_over()

    thread = threading.Thread(target=follow, name="rankline-nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2 * _ANSWER_S)
        nodes.close()


class _Nodes:
    """The samplers of a cluster, and what they have told that is not handed over yet."""

    def __init__(self, sink: NodeMetricSink) -> None:
        self._sink, self._own = sink, Sampler()
        self._actors: dict[str, Any] = {}
        self._asked: dict[Any, str] = {}
        self._samples: list[tuple[str, float, dict[str, float]]] = []
        self._looks = 0

    def look(self) -> None:
        """One sample of every node that answers in time."""
        try:
            self._ask()
        except Exception as error:  # the cluster may be going down; the run's own threads will tell
            logging.getLogger(__name__).debug("nodes were not sampled: %s", error)
        self._looks += 1
        if self._looks % BATCH == 1:  # the first look too, so that short runs have something
            self.hand_over()

    def _ask(self) -> None:
        import ray

        from cluster.watch import head_answers

        if not head_answers():
            return
        here, names = ray.get_runtime_context().get_node_id(), _names()
        self._samples.append((names.get(here, here[:8]), time.time(), self._own.sample()))
        self._actors = {node: actor for node, actor in self._actors.items() if node in names}
        for node in names.keys() - {here}:
            if node not in self._actors:
                self._actors[node] = _start(node)
            if node not in self._asked.values():
                self._asked[self._actors[node].sample.remote()] = node
        if not self._asked:
            return
        done, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=_ANSWER_S)
        for ref in done:
            node = self._asked.pop(ref)
            try:
                self._samples.append((names.get(node, node[:8]), time.time(), ray.get(ref)))
            except ray.exceptions.RayError:
                self._actors.pop(node, None)

    def hand_over(self) -> None:
        """Give the sink what has come together; a sink that fails loses it."""
        samples, self._samples = self._samples, []
        if samples:
            try:
                self._sink(samples)
            except Exception as error:
                logging.getLogger(__name__).debug("samples were not kept: %s", error)

    def close(self) -> None:
        """End the actors."""
        import ray

        from cluster.watch import head_answers

        for actor in self._actors.values() if head_answers() else ():
            with contextlib.suppress(Exception):
                ray.kill(actor)


def _names() -> Mapping[str, str]:
    """A name that people can read for each living node: its address, and the start of its id."""
    from cluster.connection import nodes

    return {node["node_id"]: f"{node['address']}-{node['node_id'][:8]}" for node in nodes() if node["alive"]}


def _start(node: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_restarts=0)(Sampler).options(scheduling_strategy=here).remote()
