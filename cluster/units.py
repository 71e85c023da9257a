"""Durable units on the cluster: each commits its own output, and the driver hears of it as it ends.

Submission is bounded. On several nodes a unit goes where its input lies, as long as no node idles for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from cluster.autoscaling import hint
from cluster.errors import ConnectError, JobError
from cluster.failures import translate
from cluster.placement import Waiting
from cluster.tasks import call, cancel, name_of, on_node, remote, require_fit, rooms_for, shown
from cluster.watch import head_answers
from lowrank.executor import Ref

T = TypeVar("T")
R = TypeVar("R")

#: How long units in flight may take to end after another one failed, in seconds.
GRACE_S = 30.0
#: How long work waits for a node once those that fitted are gone, in seconds.
NODE_WAIT_S = 120.0
#: Times that a unit runs again after its worker or node was lost.
RETRIES = 3
_POLL_S = 0.5
#: Between two looks at the cluster's nodes, in seconds.
_LOOK_S = 2.0


class UnitRunner(Protocol):
    """How a stage runs its durable units: `run_units` on the cluster, `run_units_serial` in this process."""

    def __call__(
        self,
        fn: Callable[[T], R],
        items: Sequence[T],
        *,
        on_done: Callable[[T, R], None],
        num_cpus: float = 1.0,
        max_in_flight: int | None = None,
        spread: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
        near: Callable[[T], str] | None = None,
        resources: Mapping[str, float] | None = None,
        node_wait_s: float = NODE_WAIT_S,
    ) -> None:
        """Call `fn` on each item and `on_done(item, result)` as each call ends."""
        ...


def run_units_serial(
    fn: Callable[[T], R],
    items: Sequence[T],
    *,
    on_done: Callable[[T, R], None],
    num_cpus: float = 1.0,
    max_in_flight: int | None = None,
    spread: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    near: Callable[[T], str] | None = None,
    resources: Mapping[str, float] | None = None,
    node_wait_s: float = NODE_WAIT_S,
) -> None:
    """Run units one after another in this process; the options of placement have no meaning here."""
    for item in items:
        if should_stop():
            return
        on_done(item, fn(item))


def run_units(
    fn: Callable[[T], R],
    items: Sequence[T],
    *,
    on_done: Callable[[T, R], None],
    num_cpus: float = 1.0,
    max_in_flight: int | None = None,
    spread: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    near: Callable[[T], str] | None = None,
    resources: Mapping[str, float] | None = None,
    node_wait_s: float = NODE_WAIT_S,
) -> None:
    """Run durable units as Ray tasks, and hand each result to the driver in the order of completion.

    A unit commits its own output, so this keeps no state. When a unit or `on_done` fails, nothing more is
    submitted, units in flight get `GRACE_S` to end (`on_done` is called for those that succeed) unless the cluster is
    gone, the rest is cancelled, and the first exception is raised. Units lost with their worker or node run again,
    three times.

    Args:
        fn: the unit of work; importable by name.
        items: its argument, one per unit, in order of submission.
        on_done: called in the driver, one at a time.
        num_cpus: logical CPUs per unit.
        max_in_flight: most units submitted and unfinished; None takes as many as fit the cluster.
        spread: place units round the nodes.
        should_stop: asked before each submission; once true, units in flight end and the call returns.
        near: the node that a unit's input lies on; see `cluster.placement.Waiting`. Only asked on several nodes.
        resources: further resources of Ray's that a unit takes, which send it to the nodes that have them.
        node_wait_s: seconds to wait for a node once those that fitted are gone.

    Raises:
        ResourceError: when no node is large enough for one unit, and no autoscaler can bring one.
        JobError: when every node that fitted is gone, and none came for `node_wait_s`.
        Exception: what the first failed unit raised, as it raised it; a `ClusterError` where the cluster failed.
    """
    wanted = {"CPU": num_cpus, **(resources or {})}
    units = Flight(fn, Waiting(items, near), wanted, max_in_flight, spread, node_wait_s)
    try:
        with hint(wanted, min(len(items), max_in_flight or len(items))):
            while True:
                units.refill(should_stop)
                if not units.in_flight:
                    return
                units.collect(on_done, _POLL_S)
    except Exception as error:
        if not _is_lost(error) and not units.stranded:
            _drain(units, on_done)
        raise
    finally:
        cancel(list(units.in_flight))


class Flight(Generic[T]):
    """Units that wait and units on their way, and the rooms of the nodes that fit them."""

    def __init__(
        self,
        fn: Callable[[T], Any],
        waiting: Waiting[T],
        wanted: Mapping[str, float],
        bound: int | None,
        spread: bool,
        node_wait_s: float,
    ) -> None:
        self._fn, self._waiting, self._wanted, self._bound = fn, waiting, wanted, bound
        self._rooms = require_fit(wanted)
        self._shortage = Shortage(wanted, node_wait_s)
        self._remote, self._spread = remote(wanted, RETRIES, spread, call), spread
        self._lost: Counter[int] = Counter()
        self.in_flight: dict[Ref, tuple[T, str]] = {}

    def refill(self, stop: Callable[[], bool]) -> None:
        """Submit while there is room."""
        while self._waiting and len(self.in_flight) < self._limit() and not stop():
            item, node = self._waiting.take(self._free() if self._spread else {})
            task = self._remote.options(name=name_of(self._fn), **on_node(node))
            self.in_flight[task.remote(self._fn, item)] = (item, node)

    @property
    def stranded(self) -> bool:
        """Whether there is no node left that any of them could end on."""
        return self._shortage.over

    def _limit(self) -> int:
        return self._bound or max(1, sum(self._rooms.values()))

    def _free(self) -> dict[str, int]:
        taken = Counter(node for _, node in self.in_flight.values())
        return {node: room - taken[node] for node, room in self._rooms.items()}

    def collect(self, on_done: Callable[[T, Any], None], timeout_s: float) -> None:
        """Hand over what has ended within `timeout_s`; the short wait lets signal handlers run."""
        import ray

        done, _ = ray.wait(list(self.in_flight), num_returns=1, timeout=timeout_s)
        for ref in done:
            item, _node = self.in_flight.pop(ref)
            try:
                result = ray.get(ref)
            except ray.exceptions.RayError as error:
                raise translate(error, f"run the unit {item!r}") from error
            on_done(item, result)
        if (rooms := self._shortage.look()) is not None:
            self._rooms = rooms
            self._leave_lost_nodes()

    def _leave_lost_nodes(self) -> None:
        """Units whose node the cluster has given up go elsewhere at once.

        Where a network is cut, nobody closes the connection to a worker: Ray itself waits for it for two minutes and
        more after the node was declared dead. A unit that ends there all the same commits what the other one would.
        """
        for ref, (item, node) in list(self.in_flight.items()):
            if node and node not in self._rooms:
                self._lost[id(item)] += 1
                if self._lost[id(item)] > RETRIES:
                    raise JobError(f"run the unit {item!r}: {RETRIES + 1} nodes were lost with it. Look at them.")
                del self.in_flight[ref]
                cancel([ref])
                self._waiting.put_back(item)


class Shortage:
    """Looks now and then whether any node fits; when none has for too long, what waits for one will not end."""

    def __init__(self, wanted: Mapping[str, float], node_wait_s: float) -> None:
        self._wanted, self._wait_s = wanted, node_wait_s
        self._looked = self._fitted = time.monotonic()
        self.over = False

    def look(self) -> dict[str, int] | None:
        """The rooms of the nodes, or None where it is too early to look again, or the head does not answer.

        Raises:
            JobError: no node has fitted for too long.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return None
        self._looked = now
        if not head_answers():
            return None
        rooms = rooms_for(self._wanted)
        if rooms:
            self._fitted = now
        elif now - self._fitted > self._wait_s:
            self.over = True
            raise JobError(
                f"run tasks of {shown(self._wanted)}: every node that fitted is gone, and none came in "
                f"{self._wait_s:g} s (cluster.node_wait_s). Add such a node, then resume; what is committed stays."
            )
        return rooms


def _drain(units: Flight[T], on_done: Callable[[T, Any], None]) -> None:
    """Let units in flight end, for `GRACE_S` at most; their failures give way to the first one."""
    deadline = time.monotonic() + GRACE_S
    while units.in_flight and time.monotonic() < deadline:
        try:
            units.collect(on_done, _POLL_S)
        except Exception as error:
            if _is_lost(error):
                raise


def _is_lost(error: BaseException | None) -> bool:
    """Whether the cluster is gone; Ray's core wraps what a signal handler raised inside of it."""
    while error is not None and not isinstance(error, ConnectError):
        error = error.__cause__
    return error is not None
