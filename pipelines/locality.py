"""On which node the bytes of a tensor lie: the one that wrote its shard has the file in memory or on its disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.artifacts import ShardSet
from cluster.durable import units_at
from cluster.objects import Mirror

if TYPE_CHECKING:
    from lowrank.blocks import TensorSlice


@cache
def _maker(unit: Path, mirror: Mirror | None) -> str:
    """The node that made the unit in this directory; of another cluster, or "unknown", it is none of this one's."""
    return str(units_at(unit.parent.parent, mirror).sidecar(unit.name)["node"])


def rows_on(pieces: Iterable[TensorSlice]) -> str:
    """The node that has most of these rows; of several the first."""
    from cluster.ranges import RemoteSlice

    rows: Counter[str] = Counter()
    for piece in pieces:
        mirror = piece.mirror if isinstance(piece, RemoteSlice) else None
        rows[_maker(Path(piece.path).parent, mirror)] += piece.stop - piece.start
    return max(rows, key=rows.__getitem__, default="")


def weights_on(shards: ShardSet, modules: Sequence[str]) -> str:
    """The node that has most rows of the weights of these layers."""
    tensors = [shards.tensors[f"{module}.weight"] for module in modules]
    return rows_on(piece for tensor in tensors for piece in shards.slices(tensor.name, 0, tensor.shape[0]))


def block_on(arguments: Sequence[Any]) -> str:
    """The node that has a stored row block which a task is given; '' for a task without one."""
    from lowrank.blocks import TensorSlice

    for value in arguments:
        if isinstance(value, tuple) and value and all(isinstance(piece, TensorSlice) for piece in value):
            return rows_on(value)
    return ""
