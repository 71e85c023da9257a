"""A stack of matrices (m, n) in row blocks that may cut anywhere: the two small sums that CP and Tucker need.

Row k·m + i of the matrix is row i of matrix k. With Y (d·m, r) in the same row blocks, a factor of the m mode needs a
sum over k, and one of the depth mode a sum over i; every block adds its share, and only (m, r) and (d, r) travel.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, repeat
from typing import Any

import torch
from torch import Tensor

from lowrank.blocks import Block, BlockMatrix, read_block
from lowrank.decompositions.registry import Problem
from lowrank.errors import DecompositionError, NumericsError
from lowrank.executor import Executor, Ref
from lowrank.factors import Factors
from lowrank.options import StackOptions
from lowrank.rank import resolvable_share

#: Columns from which Wᵀ Y is no slower than (Yᵀ W)ᵀ.
_THIN = 16


@dataclass(frozen=True)
class Stack:
    """The tensor (*depths, m, n) as the matrix (Πdepths · m, n).

    Attributes:
        matrix: W in row blocks.
        depths: lengths of the leading modes, at least one.
        executor: where the blocks are.
    """

    matrix: BlockMatrix
    depths: tuple[int, ...]
    executor: Executor

    @property
    def depth(self) -> int:
        """Number of stacked matrices."""
        return math.prod(self.depths)

    @property
    def rows(self) -> int:
        """m, rows of one matrix."""
        return self.matrix.shape[0] // self.depth

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(*depths, m)."""
        return *self.depths, self.rows

    def multiply(self, x: Tensor) -> BlockMatrix:
        """Y = W X for x (n, r), in the row blocks of W."""
        # xᵀ row-major: BLAS then runs along rows of both, up to four times as fast for a small r.
        w, shared = self.matrix, self.executor.put(x.T.contiguous())
        return w.like(self.executor.map(_multiply, w.blocks, repeat(shared), label=f"stack {w.name}"), x.shape[1])

    def multiply_transposed(self, left_rows: Callable[..., Tensor], shared: Any) -> Tensor:
        """Wᵀ Y (n, r), the rows start:stop of Y being left_rows(start, stop, *shared), made where W is."""
        w, executor = self.matrix, self.executor
        step = partial(_multiply_transposed, left_rows=left_rows)
        rows, handed = pairwise(w.row_offsets), repeat(executor.put(shared))
        return total(executor.map(step, w.blocks, rows, handed, label=f"stack {w.name}"), executor)

    def sum_over_depth(self, y: BlockMatrix, scale: Tensor) -> Tensor:
        """Σ_k s_k ∘ Y_k for Y_k (m, r) and scale (d, r); returns (m, r)."""
        step = partial(_sum_over_depth, m=self.rows)
        return self._total(y, step, scale)

    def sum_over_rows(self, y: BlockMatrix, a: Tensor) -> Tensor:
        """Σ_i a_i ∘ Y_ki for a (m, r); returns (d, r)."""
        step = partial(_sum_over_rows, m=self.rows, depth=self.depth)
        return self._total(y, step, a)

    def _total(self, y: BlockMatrix, step: partial[Tensor], shared: Tensor) -> Tensor:
        rows = pairwise(y.row_offsets)
        parts = self.executor.map(step, y.blocks, rows, repeat(self.executor.put(shared)), label=f"stack {y.name}")
        return total(parts, self.executor)


def stack_of(problem: Problem) -> Stack:
    """The matrix of a problem as a stack of `problem.options.depth`.

    Raises:
        DecompositionError: when the depth does not divide the rows.
    """
    check_depth(problem.matrix.name, problem.matrix.shape, problem.options)
    return Stack(problem.matrix, problem.options.depths, problem.executor)


def check_depth(name: str, shape: tuple[int, int], options: StackOptions) -> None:
    """Refuse a depth that does not divide the rows.

    Raises:
        DecompositionError: naming divisors of the rows.
    """
    m, n = shape
    depth = math.prod(options.depths)
    if m % depth:
        raise DecompositionError(
            f"decompose {name} ({m}x{n}): depth = {depth} does not divide its {m} rows. "
            f"Set depth to the number of stacked matrices, for example one of {divisors(m)[:12]}."
        )


def rows_of_one(shape: tuple[int, int], options: StackOptions) -> int:
    """m of one matrix of a stack of this shape; at least 1, so that a wrong depth is reported by `check_depth`."""
    return max(1, shape[0] // math.prod(options.depths))


def divisors(m: int) -> list[int]:
    """All divisors of m >= 1, increasing.

    Example:
        >>> divisors(12)
        [1, 2, 3, 4, 6, 12]
    """
    small = [k for k in range(1, int(m**0.5) + 1) if m % k == 0]
    return sorted({*small, *(m // k for k in small)})


def whole_slices(y: Tensor, rows: tuple[int, int], m: int) -> tuple[int, Tensor]:
    """The number of the first matrix that rows start:stop touch, and the rows as (K, m, r), zeros where they end."""
    start, stop = rows
    first, end = start // m, -(-stop // m)
    if (first * m, end * m) != rows:
        y = torch.nn.functional.pad(y, (0, 0, start - first * m, end * m - stop))
    return first, y.view(end - first, m, -1)


def total(parts: list[Ref], executor: Executor) -> Tensor:
    """Σ of equal-shaped tensors along the fixed tree."""
    return read_block(executor.get(executor.reduce(operator.add, parts)))


def relative_squared_error(stack: Stack, share: float, factors: Factors, energy: float) -> float:
    """`share`, or ‖W − Ŵ‖²/‖W‖² by blocks where `share`, a difference of norms, has lost its digits.

    Raises:
        NumericsError: when `share` is not finite: a product of W overflowed.
    """
    m, n = stack.matrix.shape
    if not math.isfinite(share):
        raise NumericsError(f"decompose {stack.matrix.name} ({m}x{n}): a product overflows. Scale the matrix down.")
    if share >= resolvable_share(stack.matrix.compute_dtype):
        return share
    return stack.matrix.squared_residual(factors, stack.executor) / energy


def _multiply(block: Block, x_transposed: Tensor) -> Tensor:
    return read_block(block) @ read_block(x_transposed).T


def _multiply_transposed(
    block: Block, rows: tuple[int, int], shared: tuple[Tensor, ...], left_rows: Callable[..., Tensor]
) -> Tensor:
    values, left = read_block(block), left_rows(*rows, *map(read_block, shared))
    # BLAS is several times faster with the thin factor on the left while it is very thin, and slower after that.
    return (left.T @ values).T.contiguous() if left.shape[1] < _THIN else values.T @ left


def _sum_over_depth(block: Tensor, rows: tuple[int, int], scale: Tensor, m: int) -> Tensor:
    first, layers = whole_slices(read_block(block), rows, m)
    result = torch.zeros_like(layers[0])
    for layer, factor in zip(layers, read_block(scale)[first:]):
        result.addcmul_(layer, factor)
    return result


def _sum_over_rows(block: Tensor, rows: tuple[int, int], a: Tensor, m: int, depth: int) -> Tensor:
    first, layers = whole_slices(read_block(block), rows, m)
    a = read_block(a)
    result = layers.new_zeros(depth, a.shape[1])
    result[first : first + len(layers)] = (layers * a).sum(1)
    return result
