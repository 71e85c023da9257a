"""A matrix as row blocks: read lazily, multiplied block by block, never whole in one process.

Blocks are tensors, slices of safetensors files, or refs of an `Executor`. The blocking follows from the shape
and `block_bytes` alone, never from the storage dtype, the files or the workers, so that neither of those
changes a result.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, repeat
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import CheckpointError, DecompositionError, NumericsError
from lowrank.executor import Executor, Ref, tree_reduce
from lowrank.factors import Factors

#: 4 bytes per entry whatever the storage dtype: blocks are computed in fp32.
_BYTES_PER_ENTRY = 4
#: BLAS picks kernels by alignment; torch allocates at 64 bytes, a buffer from a file or a store may not be.
_ALIGNMENT = 64
#: Entries that are widened to fp64 at a time.
_PIECE = 262_144


@dataclass(frozen=True)
class TensorSlice:
    """Rows `start:stop` of the tensor `key` in the safetensors file `path`.

    The stored tensor may itself be a row block of a larger one; rows count from its own first row.
    """

    path: str
    key: str
    start: int
    stop: int

    def read(self) -> Tensor:
        """Read only these rows, in their storage dtype.

        Raises:
            CheckpointError: when the file or the key is missing, the file is cut short, or the rows are not
                there.
        """
        from safetensors import SafetensorError, safe_open

        what = f"read rows {self.start}:{self.stop} of {self.key} from {self.path}"
        try:
            with safe_open(self.path, framework="pt") as file:
                stored = file.get_slice(self.key)
                rows: int = stored.get_shape()[0]
                if not 0 <= self.start < self.stop <= rows:
                    raise CheckpointError(f"{what}: the file holds rows 0:{rows}. Rebuild the shard manifest.")
                block: Tensor = stored[self.start : self.stop]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{what}: {error}. Download or shard the checkpoint again.") from error
        return block


Block = Tensor | TensorSlice | tuple[TensorSlice, ...]


@dataclass(frozen=True)
class BlockMatrix:
    """An (m, n) matrix W in row blocks W_p, with the products that every decomposition is written in.

    Attributes:
        name: the tensor's name, for messages.
        blocks: one `Block`, or a ref of one, per row block.
        row_offsets: P + 1 increasing row numbers from 0 to m; block p holds rows `row_offsets[p:p + 2]`.
        shape: (m, n) = (out_features, in_features).
        dtype: storage dtype; see `compute_dtype`.

    Example:
        >>> from lowrank.executor import SerialExecutor
        >>> w = BlockMatrix.from_tensor("w", torch.ones(5, 2), block_bytes=16)
        >>> w.row_offsets
        (0, 1, 3, 5)
        >>> w.rmatmat(w, SerialExecutor())
        tensor([[5., 5.],
                [5., 5.]])
    """

    name: str
    blocks: tuple[Any, ...]
    row_offsets: tuple[int, ...]
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def from_tensor(cls, name: str, tensor: Tensor, block_bytes: int | None = None) -> "BlockMatrix":
        """Cut a tensor (m, n) into row blocks (views); `block_bytes=None` keeps it in one."""
        shape = check_matrix(name, tuple(tensor.shape), tensor.dtype)
        offsets = (0, shape[0]) if block_bytes is None else plan_blocks(shape, block_bytes)
        blocks = tuple(tensor[a:b] for a, b in pairwise(offsets))
        return cls(name, blocks, offsets, shape, tensor.dtype)

    @classmethod
    def from_slices(
        cls,
        name: str,
        pieces: Sequence[TensorSlice],
        shape: Sequence[int],
        dtype: torch.dtype,
        block_bytes: int,
    ) -> "BlockMatrix":
        """Describe a stored matrix whose rows lie in `pieces`, in order, without reading any.

        A block may span pieces: the blocking, and so the result, does not depend on how the rows were stored.

        Raises:
            CheckpointError: when the pieces do not add up to m rows.
        """
        rows, columns = check_matrix(name, tuple(shape), dtype)
        stored = sum(piece.stop - piece.start for piece in pieces)
        if stored != rows:
            raise CheckpointError(
                f"assemble {name} ({rows}x{columns}): its pieces hold {stored} rows. Shard the checkpoint again."
            )
        offsets = plan_blocks((rows, columns), block_bytes)
        blocks = tuple(_cut(pieces, a, b) for a, b in pairwise(offsets))
        return cls(name, blocks, offsets, (rows, columns), dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """fp64 for fp64 storage, else fp32."""
        return compute_dtype(self.dtype)

    def place(self, executor: Executor) -> "BlockMatrix":
        """Store in-memory blocks with the executor once, in the compute dtype, and load a lone stored block.

        Several stored blocks stay lazy: they are read again by every product, and never held together.
        """
        if len(self.blocks) == 1:
            return replace(self, blocks=tuple(executor.map(read_block, self.blocks, label=f"load {self.name}")))
        held = (executor.put(read_block(b)) if isinstance(b, Tensor) else b for b in self.blocks)
        return replace(self, blocks=tuple(held))

    def hold(self, executor: Executor) -> "BlockMatrix":
        """Read every block once and keep it with the executor in the compute dtype, where memory allows that."""
        refs = executor.map(read_block, self.blocks, label=f"load {self.name}")
        return replace(self, blocks=tuple(refs))

    def matmat(self, x: Tensor, executor: Executor) -> "BlockMatrix":
        """Y = W X for x (n, k), in the row blocks of W."""
        refs = executor.map(_matmat, self.blocks, repeat(executor.put(x)), label=f"matmat {self.name}")
        return self.like(refs, x.shape[1])

    def rmatmat(self, y: "BlockMatrix", executor: Executor) -> Tensor:
        """Wᵀ Y = Σ_p W_pᵀ Y_p for y (m, k) in the same row blocks; returns (n, k)."""
        parts = executor.map(_rmatmat, self.blocks, y.blocks, label=f"rmatmat {self.name}")
        return _total(parts, executor)

    def gram(self, executor: Executor) -> Tensor:
        """Wᵀ W = Σ_p W_pᵀ W_p, (n, n) in fp64."""
        return _total(executor.map(_gram, self.blocks, label=f"gram {self.name}"), executor)

    def row_gram(self, executor: Executor) -> Tensor:
        """W Wᵀ, (m, m) in fp64, from all pairs of blocks; for m < n."""
        pairs = [(p, q) for p in range(len(self.blocks)) for q in range(p + 1)]
        left, right = ([self.blocks[i] for i in side] for side in zip(*pairs))
        tiles = executor.get(executor.map(_row_gram, left, right, label=f"row_gram {self.name}"))
        gram = torch.zeros(self.shape[0], self.shape[0], dtype=torch.float64)
        for (p, q), tile in zip(pairs, tiles):
            rows, columns = (slice(self.row_offsets[i], self.row_offsets[i + 1]) for i in (p, q))
            gram[rows, columns], gram[columns, rows] = tile, tile.T
        return gram

    def squared_norm(self, executor: Executor) -> float:
        """‖W‖_F² in fp64. Reads every entry, so it is also where non-finite ones are found.

        Raises:
            NumericsError: when an entry is NaN or infinite.
        """
        parts = executor.map(partial(_squared_norm, name=self.name), self.blocks, label=f"norm {self.name}")
        return _sum(parts, executor)

    def squared_residual(self, factors: Factors, executor: Executor, weights: "BlockMatrix | None" = None) -> float:
        """‖W − Ŵ‖_F² in fp64, or ‖√P ∘ (W − Ŵ)‖_F² under weights P, block by block."""
        shared, rows = repeat(executor.put(factors)), pairwise(self.row_offsets)
        under = repeat(None) if weights is None else weights.blocks
        parts = executor.map(_squared_residual, self.blocks, rows, shared, under, label=f"residual {self.name}")
        return _sum(parts, executor)

    def mask(self, weights: "BlockMatrix", executor: Executor) -> "BlockMatrix":
        """W in the compute dtype with 0 in place of entries whose weight is 0.

        Raises:
            NumericsError: when a weight is negative or not finite, or an entry under a positive weight is not finite.
        """
        refs = executor.map(partial(_mask, name=self.name), self.blocks, weights.blocks, label=f"mask {self.name}")
        return self.like(refs, self.shape[1])

    def weighted_squared_norm(self, weights: "BlockMatrix", executor: Executor) -> float:
        """‖√P ∘ W‖_F² in fp64."""
        parts = executor.map(_weighted_squared_norm, self.blocks, weights.blocks, label=f"norm {self.name}")
        return _sum(parts, executor)

    def to_tensor(self, executor: Executor) -> Tensor:
        """Gather the matrix in the compute dtype; meant for thin matrices and single blocks."""
        return torch.cat([read_block(block) for block in executor.get(list(self.blocks))])

    def like(self, refs: Sequence[Ref], columns: int) -> "BlockMatrix":
        """A matrix (m, columns) in the same row blocks, from one ref or tensor per block."""
        shape = (self.shape[0], columns)
        return BlockMatrix(self.name, tuple(refs), self.row_offsets, shape, self.compute_dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_matrix(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """Return (m, n), or raise `DecompositionError` when this is not a non-empty floating-point matrix."""
    what = f"decompose {name} ({'x'.join(map(str, shape))}, {dtype})"
    if len(shape) != 2:
        raise DecompositionError(f"{what}: need 2 dimensions. Leave this tensor out of decompose.targets.")
    if min(shape) < 1:
        raise DecompositionError(f"{what}: the matrix is empty. Leave this tensor out of decompose.targets.")
    if not dtype.is_floating_point:
        raise DecompositionError(f"{what}: need a floating-point dtype. Dequantize the checkpoint first.")
    return shape[0], shape[1]


def plan_blocks(shape: Sequence[int], block_bytes: int) -> tuple[int, ...]:
    """Row offsets of the fewest equal blocks of at most `block_bytes`, counted at 4 bytes per entry.

    Args:
        shape: (m, n), both at least 1.
        block_bytes: upper bound of one block in fp32, at least 1; one row is the smallest block. Larger
            blocks make fewer tasks, smaller ones need less memory per worker.

    Returns:
        P + 1 increasing offsets from 0 to m; block sizes differ by at most one row.

    Raises:
        ValueError: when `block_bytes` < 1.

    Example:
        >>> plan_blocks((10, 4), block_bytes=64)
        (0, 3, 6, 10)
    """
    if block_bytes < 1:
        raise ValueError(f"plan blocks of {shape}: block_bytes = {block_bytes}. Set block_bytes >= 1.")
    m, n = shape
    rows = max(1, block_bytes // (_BYTES_PER_ENTRY * n))
    count = -(-m // rows)
    return tuple(i * m // count for i in range(count + 1))


def read_block(block: Block) -> Tensor:
    """The values of a block in its compute dtype, contiguous and aligned as torch would allocate them."""
    if not isinstance(block, Tensor):
        rows = [piece.read() for piece in (block if isinstance(block, tuple) else (block,))]
        block = rows[0] if len(rows) == 1 else torch.cat(rows)
    values = block.to(compute_dtype(block.dtype)).contiguous()
    return values if values.data_ptr() % _ALIGNMENT == 0 else values.clone()


def load_block(block: Block, name: str) -> Tensor:
    """`read_block`, and refuse NaN and infinity.

    Raises:
        CheckpointError: when a stored block is missing or cut short.
        NumericsError: when an entry of tensor `name` is not finite.
    """
    values = read_block(block)
    low, high = torch.aminmax(values)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        count = int((~torch.isfinite(values)).sum())
        raise NumericsError(
            f"decompose {name}: {count} of {values.numel()} entries of a row block are NaN or infinite. "
            "Repair the checkpoint, or leave this tensor out of decompose.targets."
        )
    return values


def _cut(pieces: Sequence[TensorSlice], start: int, stop: int) -> tuple[TensorSlice, ...]:
    """Rows start:stop of the pieces laid end to end."""
    found, base = [], 0
    for piece in pieces:
        end = base + piece.stop - piece.start
        low, high = max(start, base), min(stop, end)
        if low < high:
            found.append(replace(piece, start=piece.start + low - base, stop=piece.start + high - base))
        base = end
    return tuple(found)


def _total(parts: Sequence[Ref], executor: Executor) -> Tensor:
    total: Tensor = executor.get(executor.reduce(operator.add, parts))
    return total


def _sum(parts: Sequence[Ref], executor: Executor) -> float:
    """Numbers are added here, along the same fixed tree: tasks would cost more than they do."""
    return float(tree_reduce(executor.get(list(parts)), operator.add))


def _matmat(block: Block, x: Tensor) -> Tensor:
    return read_block(block) @ read_block(x)


def _rmatmat(block: Block, y: Tensor) -> Tensor:
    # (YᵀW)ᵀ: BLAS walks the wide block along its rows, about twice as fast as WᵀY.
    return (read_block(y).T @ read_block(block)).T.contiguous()


def _gram(block: Block) -> Tensor:
    values = read_block(block).double()
    return values.T @ values


def _row_gram(left: Block, right: Block) -> Tensor:
    return read_block(left).double() @ read_block(right).double().T


def _squared_norm(block: Block, name: str) -> Tensor:
    values = read_block(block)
    total = _squared_sum(values)
    # A sum of squares is finite only if every entry is; fp32 squares cannot overflow fp64.
    return total if bool(torch.isfinite(total)) else _squared_sum(load_block(values, name))


def _squared_residual(block: Block, rows: tuple[int, int], factors: Factors, weights: Block | None) -> Tensor:
    residual = factors.reconstruct_rows(*rows).sub_(read_block(block))
    return _squared_sum(residual if weights is None else residual.mul_(read_block(weights).sqrt()))


def _mask(block: Block, weights: Block, name: str) -> Tensor:
    values, under = read_block(block), read_block(weights)
    if not bool((under >= 0).all()) or not bool(torch.isfinite(under).all()):
        raise NumericsError(
            f"decompose {name}: a weight is negative, NaN or infinite. Allowed are finite weights >= 0."
        )
    return load_block(torch.where(under > 0, values, 0.0), name)


def _weighted_squared_norm(block: Block, weights: Block) -> Tensor:
    return _squared_sum(read_block(block) * read_block(weights).sqrt())


def _squared_sum(values: Tensor) -> Tensor:
    """‖values‖² in fp64, a cache-sized piece at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for piece in torch.split(values.reshape(-1), _PIECE):
        exact = piece.double()
        total += torch.dot(exact, exact)
    return total
