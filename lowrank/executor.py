"""Where work runs: the one interface between the numerics and a cluster.

An algorithm writes `executor.map(fn, blocks)` and never learns whether the calls ran in this process or on a
cluster. Functions must be importable by name (top-level functions, or `functools.partial` of them), so that
shipping one costs a name and not a closure.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

#: A value, or an opaque handle of one that lives elsewhere. Only the executor that made it can read it.
Ref: TypeAlias = Any

T = TypeVar("T")


class Executor(Protocol):
    """Runs functions over values that may live in other processes.

    Results never depend on the number of workers: `map` keeps the order of its input, and `reduce` combines
    along `tree_reduce`, a tree that is fixed by the number of items alone.
    """

    def put(self, value: Any) -> Ref:
        """Store `value` once, and return a handle that `map` and `reduce` accept in its place."""
        ...

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], label: str = "") -> list[Ref]:
        """Call `fn` with one element of each iterable, as the builtin `map` does, and return a ref per call.

        Elements that are refs are resolved to their values before the call; others are passed as they are.
        Iteration ends with the shortest iterable, so `itertools.repeat(ref)` broadcasts one value.
        """
        ...

    def reduce(self, fn: Callable[[Any, Any], Any], refs: Sequence[Ref], label: str = "") -> Ref:
        """Combine `refs` (at least one) with the binary `fn` along the fixed tree of `tree_reduce`."""
        ...

    def get(self, refs: Any) -> Any:
        """Return the value of one ref, or the list of values of a list of refs."""
        ...


class SerialExecutor:
    """Runs every call at once, in order, in this process; a ref is the value itself.

    Example:
        >>> import operator
        >>> executor = SerialExecutor()
        >>> squares = executor.map(pow, [1, 2, 3], [2, 2, 2])
        >>> executor.get(executor.reduce(operator.add, squares))
        14
    """

    def put(self, value: Any) -> Ref:
        return value

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], label: str = "") -> list[Ref]:
        return list(map(fn, *iterables))

    def reduce(self, fn: Callable[[Any, Any], Any], refs: Sequence[Ref], label: str = "") -> Ref:
        return tree_reduce(refs, fn)

    def get(self, refs: Any) -> Any:
        return refs


def tree_reduce(items: Sequence[T], combine: Callable[[T, T], T]) -> T:
    """Combine neighbours, level by level: ((x₀+x₁)+(x₂+x₃))+x₄.

    Floating-point addition is not associative, so the tree is part of the result: it depends on positions
    only, never on which item was ready first.

    Args:
        items: at least one item; both executors pass refs or values.
        combine: the binary operation on two neighbours, left one first.

    Returns:
        The one item that is left.

    Raises:
        ValueError: when `items` is empty.

    Example:
        >>> tree_reduce(list("abcde"), lambda a, b: f"({a}{b})")
        '(((ab)(cd))e)'
    """
    level = list(items)
    if not level:
        raise ValueError("reduce: got no items, need at least one. Pass the refs that map returned.")
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [combine(pair[0], pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
    return level[0]
