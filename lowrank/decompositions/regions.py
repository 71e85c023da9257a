"""Parts of a matrix in row blocks, regrouped: other rows or columns together, their axes permuted.

Kronecker and Khatri-Rao fits work on rearrangements of W whose rows are not rows of W. A `Region` says which rows and
columns one task needs and how they lie in its block; stored blocks are read again by every use, never held together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor

from lowrank.blocks import BlockMatrix, TensorSlice, read_block
from lowrank.errors import CheckpointError
from lowrank.executor import Executor, Ref


@dataclass(frozen=True)
class Region:
    """Rows `runs` and columns `columns` of W, zero beyond its edges, as a matrix with permuted axes.

    Attributes:
        runs: (start, stop) of rows, laid end to end.
        columns: (start, stop).
        view: sizes of the axes into which rows × columns are split, row-major.
        order: permutation of those axes.
        row_axes: how many of the permuted axes make the rows of the result.
    """

    runs: tuple[tuple[int, int], ...]
    columns: tuple[int, int]
    view: tuple[int, ...]
    order: tuple[int, ...]
    row_axes: int


@dataclass(frozen=True)
class _Copy:
    """Rows start:stop of one block go to rows from `target` on."""

    start: int
    stop: int
    target: int


@dataclass(frozen=True)
class StoredRegion:
    """A region of stored blocks, read when it is used; `read_block` takes it like any stored block."""

    region: Region
    dtype: torch.dtype
    copies: tuple[tuple[_Copy, ...], ...]
    blocks: tuple[Any, ...]

    def read(self) -> Tensor:
        """Gather it, block by block.

        Raises:
            CheckpointError: when a stored block is missing or cut short.
        """
        return _gather(self.region, self.copies, *self.blocks, dtype=self.dtype)


def regroup(
    matrix: BlockMatrix, regions: Sequence[Region], dtype: torch.dtype, executor: Executor, label: str
) -> list[Ref]:
    """One block of this dtype per region: lazy where W is stored, made by a task each where it is held.

    A task gets those blocks that its region overlaps, and copies out of them one by one.
    """
    plans = [_plan(region, matrix.row_offsets) for region in regions]
    copies = [tuple(plan.values()) for plan in plans]
    blocks = [tuple(matrix.blocks[index] for index in plan) for plan in plans]
    if all(_is_stored(block) for block in matrix.blocks):
        return [StoredRegion(*part) for part in zip(regions, [dtype] * len(regions), copies, blocks)]
    # One argument per block: an executor resolves refs that are arguments, not refs inside of one.
    return executor.map(partial(_gather, dtype=dtype), regions, copies, *zip_longest(*blocks), label=label)


def _plan(region: Region, offsets: Sequence[int]) -> dict[int, tuple[_Copy, ...]]:
    """What to copy from which block."""
    plan: dict[int, tuple[_Copy, ...]] = {}
    for index, (first, last) in enumerate(pairwise(offsets)):
        target, copies = 0, []
        for start, stop in region.runs:
            low, high = max(start, first), min(stop, last)
            if low < high:
                copies.append(_Copy(low - first, high - first, target + low - start))
            target += stop - start
        if copies:
            plan[index] = tuple(copies)
    return plan


def _gather(region: Region, copies: Sequence[Sequence[_Copy]], *blocks: Any, dtype: torch.dtype) -> Tensor:
    start, stop = region.columns
    rows = sum(last - first for first, last in region.runs)
    found = torch.zeros(rows, stop - start, dtype=dtype)
    for block, wanted in zip(blocks, copies):
        for copy in wanted:
            values = _cut(block, copy.start, copy.stop, start, stop)
            found[copy.target : copy.target + len(values), : values.shape[1]] = values
    split = found.view(region.view).permute(region.order)
    return split.reshape(math.prod(split.shape[: region.row_axes]), -1)


def _is_stored(block: Any) -> bool:
    return isinstance(block, TensorSlice) or (isinstance(block, tuple) and isinstance(block[0], TensorSlice))


def _cut(block: Any, start: int, stop: int, first: int, last: int) -> Tensor:
    """Rows start:stop and columns first:last of a block, reading no others."""
    if not _is_stored(block):
        return block[start:stop, first:last] if isinstance(block, Tensor) else read_block(block)[start:stop, first:last]
    parts, base = [], 0
    for piece in block if isinstance(block, tuple) else (block,):
        end = base + piece.stop - piece.start
        low, high = max(start, base), min(stop, end)
        if low < high:
            rows = replace(piece, start=piece.start + low - base, stop=piece.start + high - base)
            parts.append(_read_columns(rows, first, last))
        base = end
    return torch.cat(parts)


def _read_columns(piece: TensorSlice, first: int, last: int) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(piece.path, framework="pt") as file:
            stored = file.get_slice(piece.key)
            rows, columns = stored.get_shape()
            if (first == 0 and last >= columns) or piece.stop > rows:
                return piece.read()
            values: Tensor = stored[piece.start : piece.stop, first : min(last, columns)]
            return values
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"read columns {first}:{last} of {piece.key} from {piece.path}: {error}. "
            "Download or shard the checkpoint again."
        ) from error
