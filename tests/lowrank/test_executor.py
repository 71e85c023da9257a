"""The executor contract, as `cluster.executor` has to keep it too."""

import operator
from functools import partial
from itertools import repeat

import pytest

from lowrank.executor import SerialExecutor, tree_reduce


def _bracket(left: str, right: str) -> str:
    return f"({left}{right})"


@pytest.mark.parametrize(
    ("count", "tree"),
    [(1, "a"), (2, "(ab)"), (3, "((ab)c)"), (4, "((ab)(cd))"), (5, "(((ab)(cd))e)"), (7, "(((ab)(cd))((ef)g))")],
)
def test_the_tree_depends_on_positions_only(count: int, tree: str) -> None:
    assert tree_reduce("abcdefg"[:count], _bracket) == tree
    assert SerialExecutor().reduce(_bracket, list("abcdefg"[:count])) == tree


def test_reduce_refuses_no_items() -> None:
    with pytest.raises(ValueError, match="got no items"):
        SerialExecutor().reduce(operator.add, [])


def test_map_keeps_order_resolves_refs_and_broadcasts() -> None:
    executor = SerialExecutor()
    base = executor.put(10)
    refs = executor.map(partial(pow, mod=7), [3, 2, 1], repeat(base), label="powers")
    assert executor.get(refs) == [pow(3, 10, 7), pow(2, 10, 7), 1]
    assert executor.get(refs[0]) == pow(3, 10, 7)
