"""Run functions on the connected Ray cluster: `RayExecutor` for the numerics, `run_units` for durable units.

Results are equal bit for bit wherever they run: every task computes on one thread, `map` keeps its order, and
`reduce` follows the fixed tree of `lowrank.executor`. Submission is bounded, so that a long list of tasks does not
fill the object store, and an exception surfaces as the type that the function raised.
"""

import functools
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from cluster.errors import ConnectError, ResourceError
from cluster.failures import translate
from lowrank.executor import Ref, tree_reduce

T = TypeVar("T")
R = TypeVar("R")

#: How long units in flight may take to end after another one failed, in seconds.
GRACE_S = 30.0
_POLL_S = 0.5


class RayExecutor:
    """The `lowrank.executor.Executor` over Ray tasks; connect first (`cluster.session.connect`).

    Args:
        num_cpus: logical CPUs per task; fractions let more tasks share a core.
        memory_bytes: memory that a task announces to the scheduler; None announces nothing.
        max_in_flight: most tasks submitted and unfinished; `map` waits beyond it. None takes twice what fits.
        max_retries: how often a task is run again after its worker or node died; never after an exception of its own.
        spread: place tasks round the nodes; False keeps them near their data.

    Raises:
        ResourceError: when no node is large enough for one task.
    """

    def __init__(
        self,
        *,
        num_cpus: float = 1.0,
        memory_bytes: int | None = None,
        max_in_flight: int | None = None,
        max_retries: int = 3,
        spread: bool = False,
    ) -> None:
        fitting = _require_fit(num_cpus, memory_bytes)
        self.max_in_flight = max_in_flight or 2 * fitting
        self._remote = _remote(num_cpus, memory_bytes, max_retries, spread, _call_packed)
        self._pending: list[Ref] = []

    def put(self, value: Any) -> Ref:
        """Store `value` once in the cluster and return its ref."""
        import ray

        return ray.put(_pack(value))

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], label: str = "") -> list[Ref]:
        """Submit one call of `fn` per tuple of elements; wait while `max_in_flight` are unfinished."""
        return [self._submit(fn, arguments, label) for arguments in zip(*iterables)]

    def reduce(self, fn: Callable[[Any, Any], Any], refs: Sequence[Ref], label: str = "") -> Ref:
        """Combine `refs` along the fixed tree; only refs travel through the driver."""
        return tree_reduce(refs, lambda left, right: self._submit(fn, (left, right), label))

    def get(self, refs: Any) -> Any:
        """Return the value of a ref, or the values of a list of refs.

        Raises:
            Exception: what the function raised, as it raised it; a `ClusterError` where the cluster failed.
        """
        import ray

        try:
            found = ray.get(refs)
        except ray.exceptions.RayError as error:
            raise translate(error, "get the results of a map") from error
        return [_unpack(value) for value in found] if isinstance(refs, list) else _unpack(found)

    def close(self) -> None:
        """Cancel what is unfinished; values stay alive as long as their refs."""
        _cancel(self._pending)
        self._pending = []

    def _submit(self, fn: Callable[..., Any], arguments: tuple[Any, ...], label: str) -> Ref:
        import ray

        while len(self._pending) >= self.max_in_flight:
            _, self._pending = ray.wait(self._pending, num_returns=1, fetch_local=False)
        ref = self._remote.options(name=label or _name(fn)).remote(fn, *arguments)
        self._pending.append(ref)
        return ref


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

    Raises:
        ResourceError: when no node is large enough for one unit.
        Exception: what the first failed unit raised, as it raised it; a `ClusterError` where the cluster failed.
    """
    fitting = _require_fit(num_cpus, None)
    bound = max_in_flight or fitting
    remote = _remote(num_cpus, None, 3, spread).options(name=_name(fn))
    waiting = iter(items)
    in_flight: dict[Ref, T] = {}
    try:
        while True:
            _refill(remote, fn, waiting, in_flight, bound, should_stop)
            if not in_flight:
                return
            _collect(in_flight, on_done, _POLL_S)
    except Exception as error:
        if not _is_lost(error):
            _drain(in_flight, on_done)
        raise
    finally:
        _cancel(list(in_flight))


def _refill(
    remote: Any, fn: Callable[[T], R], waiting: Any, in_flight: dict[Ref, T], bound: int, stop: Callable[[], bool]
) -> None:
    while len(in_flight) < bound and not stop():
        try:
            item = next(waiting)
        except StopIteration:
            return
        in_flight[remote.remote(fn, item)] = item


def _collect(in_flight: dict[Ref, T], on_done: Callable[[T, Any], None], timeout_s: float) -> None:
    """Hand over what has ended within `timeout_s`; the short wait lets signal handlers run."""
    import ray

    done, _ = ray.wait(list(in_flight), num_returns=1, timeout=timeout_s)
    for ref in done:
        item = in_flight.pop(ref)
        try:
            result = ray.get(ref)
        except ray.exceptions.RayError as error:
            raise translate(error, f"run the unit {item!r}") from error
        on_done(item, result)


def _drain(in_flight: dict[Ref, T], on_done: Callable[[T, Any], None]) -> None:
    """Let units in flight end, for `GRACE_S` at most; their failures give way to the first one."""
    deadline = time.monotonic() + GRACE_S
    while in_flight and time.monotonic() < deadline:
        try:
            _collect(in_flight, on_done, _POLL_S)
        except Exception as error:
            if _is_lost(error):
                raise


def _is_lost(error: BaseException | None) -> bool:
    """Whether the cluster is gone; Ray's core wraps what a signal handler raised inside of it."""
    while error is not None and not isinstance(error, ConnectError):
        error = error.__cause__
    return error is not None


def _cancel(refs: list[Ref]) -> None:
    import ray

    for ref in refs:
        ray.cancel(ref, force=True)


def _call(fn: Callable[..., Any], *arguments: Any) -> Any:
    """Run in the worker: one thread, because the order of a sum depends on how many share it."""
    # a worker that has not imported torch reads OMP_NUM_THREADS=1 when it does (set by the head, and by Ray)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
    return fn(*arguments)


@dataclass(frozen=True)
class _Array:
    """A tensor on its way: Ray maps a numpy array from shared memory, but copies a tensor for every task."""

    values: Any


def _pack(value: Any) -> Any:
    """Tensors of a value, or of a tuple, as arrays."""
    torch = sys.modules.get("torch")
    if torch is None:
        return value
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_pack(item) for item in value)
    if type(value) is torch.Tensor and value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64):
        return _Array(value.detach().contiguous().numpy())
    return value


def _unpack(value: Any) -> Any:
    """What `_pack` packed; the memory is shared, and nobody may write to it."""
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_unpack(item) for item in value)
    if not isinstance(value, _Array):
        return value
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(value.values)


def _call_packed(fn: Callable[..., Any], *arguments: Any) -> Any:
    return _pack(_call(fn, *(_unpack(argument) for argument in arguments)))


def _remote(num_cpus: float, memory_bytes: int | None, max_retries: int, spread: bool, call: Any = _call) -> Any:
    import ray

    return ray.remote(
        num_cpus=num_cpus,
        memory=memory_bytes,
        max_retries=max_retries,
        retry_exceptions=False,
        scheduling_strategy="SPREAD" if spread else "DEFAULT",
    )(call)


def _require_fit(num_cpus: float, memory_bytes: int | None) -> int:
    """Return how many tasks fit the cluster at once; Ray itself would wait for ever for a node that is not there."""
    from cluster.connection import nodes

    alive = [node for node in nodes() if node["alive"]]
    fitting = sum(int(node["num_cpus"] // num_cpus) for node in alive if node["memory_bytes"] >= (memory_bytes or 0))
    if fitting == 0:
        sizes = ", ".join(f"{node['num_cpus']:g} CPUs and {node['memory_bytes']} bytes" for node in alive)
        raise ResourceError(
            f"run tasks of {num_cpus:g} CPUs and {memory_bytes or 0} bytes: no node is large enough, there are "
            f"[{sizes}]. Ask for less per task, or add a larger node."
        )
    return fitting


def _name(fn: Callable[..., Any]) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__qualname__", type(fn).__name__)
