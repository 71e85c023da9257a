"""Run functions on the connected Ray cluster: `RayExecutor` for the numerics (`cluster.units` runs durable units).

Results are equal bit for bit wherever they run: every task computes on one thread, `map` keeps its order, and
`reduce` follows the fixed tree of `lowrank.executor`. Submission is bounded, so that a long list of tasks does not
fill the object store, and an exception surfaces as the type that the function raised.
"""

import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.failures import translate
from cluster.tasks import call, cancel, name_of, on_node, remote, require_fit
from lowrank.executor import Ref, tree_reduce


class RayExecutor:
    """The `lowrank.executor.Executor` over Ray tasks; connect first (`cluster.session.connect`).

    Args:
        num_cpus: logical CPUs per task; fractions let more tasks share a core.
        memory_bytes: memory that a task announces to the scheduler; None announces nothing.
        max_in_flight: most tasks submitted and unfinished; `map` waits beyond it. None takes twice what fits.
        max_retries: how often a task is run again after its worker or node died; never after an exception of its own.
        spread: place tasks round the nodes; False keeps them near their data.
        near: the node on which the files lie that a call's arguments name; any other text leaves it to
            `spread`. Only asked on several nodes; a node without room just now is passed over.
        resources: further resources of Ray's: tasks keep to the nodes that have them. They are not taken, as a task
            that waits for tasks of its own gives back CPUs only.

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
        near: Callable[[tuple[Any, ...]], str] | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        wanted = {"CPU": num_cpus} | ({"memory": memory_bytes} if memory_bytes else {})
        rooms = require_fit(wanted | dict(resources or {}))
        self.max_in_flight = max_in_flight or max(1, 2 * sum(rooms.values()))
        self._remote = remote(wanted, max_retries, spread, _call_packed)
        self._near, self._nodes = near, set(rooms) if len(rooms) > 1 else set[str]()
        self._only = itertools.cycle(sorted(rooms)) if resources and rooms else None
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
        cancel(self._pending)
        self._pending = []

    def _submit(self, fn: Callable[..., Any], arguments: tuple[Any, ...], label: str) -> Ref:
        import ray

        while len(self._pending) >= self.max_in_flight:
            _, self._pending = ray.wait(self._pending, num_returns=1, fetch_local=False)
        ref = self._remote.options(name=label or name_of(fn), **self._where(arguments)).remote(fn, *arguments)
        self._pending.append(ref)
        return ref

    def _where(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        node = self._near(arguments) if self._near is not None and self._nodes else ""
        node = node if node in self._nodes else ""
        if self._only is not None:
            return on_node(node or next(self._only), elsewhere=False)
        return on_node(node)


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
    return _pack(call(fn, *(_unpack(argument) for argument in arguments)))
