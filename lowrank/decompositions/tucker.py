"""Tucker of stacked matrices: W_k ≈ U_m G_k U_nᵀ with bases that all matrices share.

Higher-order orthogonal iteration on row blocks. With Y = W U_n, the row basis follows from Y alone, and the column
basis from one product Wᵀ(P Y), P the projection on the row (and depth) bases: two passes over W per sweep, and nothing
larger than (d·m, r) beside W.
"""

from functools import partial
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.blocks import BlockMatrix, read_block
from lowrank.decompositions.orthogonal import orthonormalize_columns
from lowrank.decompositions.registry import Fit, Method, Problem
from lowrank.decompositions.stack import (
    Stack,
    check_depth,
    relative_squared_error,
    rows_of_one,
    stack_of,
    total,
    whole_slices,
)
from lowrank.errors import RankError
from lowrank.factors import TuckerFactors
from lowrank.factors.stacked import along_depth, stacked_rows
from lowrank.options import TuckerOptions

#: Power steps on the row basis per sweep; each reads Y, not W.
_ROW_STEPS = 3
#: Sweeps before the first that counts: they find the leading spaces, as in randomized subspace iteration.
_START_SWEEPS = 2


class _Bases(NamedTuple):
    """Orthonormal bases of the modes; `depth` None is the identity."""

    row: Tensor
    column: Tensor
    depth: Tensor | None


def tucker(problem: Problem) -> Fit:
    """Tucker of a stack of d matrices (m, n): U_m (m, r), U_n (n, r), core (d, r, r), or (d', r, r) with `depth_rank`.

    ‖W − Ŵ‖² = ‖W‖² − ‖G‖²: every step of an orthogonal iteration raises ‖G‖, so the error never rises.

    Source: Tucker-2 and HOOI, De Lathauwer et al. 2000 (doi:10.1137/S0895479898346995), Algorithm 4.2, with orthogonal
        iterations in place of inner SVDs; convolution kernels, Kim et al. 2016 (arXiv:1511.06530), section 3.1.
    """
    stack, options = stack_of(problem), problem.options
    _check_depth_rank(problem, stack)
    bases = _start(stack, (problem.rank, problem.rank), options.depth_rank, problem.seed)
    history: list[float] = []
    converged = False
    for sweep in range(options.n_iter):
        y = stack.multiply(bases.column)
        bases, core = _row_steps(stack, y, bases)
        factors = TuckerFactors(core, bases.row, bases.column, bases.depth)
        captured = float(core.double().square().sum())
        share = relative_squared_error(stack, 1 - captured / problem.total_energy, factors, problem.total_energy)
        assert not history or share <= history[-1] ** 2 + 100 * torch.finfo(core.dtype).eps, (share, history)
        history.append(share**0.5)
        converged = sweep > 0 and history[-2] - history[-1] < options.tol
        if converged or sweep + 1 == options.n_iter:
            break
        bases = bases._replace(column=_column_step(stack, bases, core))
    return Fit(
        factors=factors,
        n_iter=len(history),
        converged=converged,
        reason=f"a sweep lowered the error by less than {options.tol:g}" if converged else "n_iter sweeps were run",
        history=tuple(history),
        projection_energy=captured,
    )


def compress(stack: Stack, ranks: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A near-optimal Tucker compression in a few passes: core (d, r_m, r_n), U_m (m, r_m), U_n (n, r_n)."""
    bases = _start(stack, ranks, None, seed)
    y = stack.multiply(bases.column)
    bases, core = _row_steps(stack, y, bases)
    return core, bases.row, bases.column


def _start(stack: Stack, ranks: tuple[int, int], depth_rank: int | None, seed: int) -> _Bases:
    """Bases after a few sweeps from random ones."""
    generator = torch.Generator().manual_seed(seed)
    dtype = stack.matrix.compute_dtype
    sizes = zip((stack.rows, stack.matrix.shape[1]), ranks)
    drawn = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size, rank in sizes]
    row, column = (torch.linalg.qr(basis).Q.to(dtype) for basis in drawn)
    depth = None
    if depth_rank is not None and depth_rank < stack.depth:
        depth = torch.eye(stack.depth, depth_rank, dtype=dtype)
    bases = _Bases(row, column, None)
    for _ in range(_START_SWEEPS):
        y = stack.multiply(bases.column)
        bases, core = _row_steps(stack, y, bases)
        bases = bases._replace(column=_column_step(stack, bases, core))
    return bases._replace(depth=depth)


def _row_steps(stack: Stack, y: BlockMatrix, bases: _Bases) -> tuple[_Bases, Tensor]:
    """Improve the row and depth bases for fixed Y = W U_n; returns them and the core."""
    for step in range(_ROW_STEPS + 1):
        inner = _project(stack, y, bases.row)
        if bases.depth is not None:
            bases = bases._replace(depth=_leading(inner.flatten(1), bases.depth.shape[1]))
        if step == _ROW_STEPS:
            break
        bases = bases._replace(row=_row_step(stack, y, _project_depth(inner, bases.depth)))
    core = inner if bases.depth is None else along_depth(bases.depth.T, inner)
    return bases, core.contiguous()


def _row_step(stack: Stack, y: BlockMatrix, inner: Tensor) -> Tensor:
    """orth(Σ_k Y_k inner_kᵀ) with inner_k (r_m, r_n): one orthogonal iteration on Σ_k Y_k Y_kᵀ."""
    executor = stack.executor
    step = partial(_expand, m=stack.rows)
    parts = executor.map(step, y.blocks, pairwise(y.row_offsets), repeat(executor.put(inner)), label=f"tucker {y.name}")
    return orthonormalize_columns(total(parts, executor))


def _column_step(stack: Stack, bases: _Bases, core: Tensor) -> Tensor:
    """orth(Wᵀ P W U_n): rows (k, i) of P W U_n are U_m[i] core_k."""
    inner = core if bases.depth is None else along_depth(bases.depth, core)
    return orthonormalize_columns(stack.multiply_transposed(_model_rows, (bases.row, inner)))


def _project(stack: Stack, y: BlockMatrix, row_basis: Tensor) -> Tensor:
    """U_mᵀ Y_k for every k, (d, r_m, r_n)."""
    executor = stack.executor
    step = partial(_project_block, m=stack.rows, depth=stack.depth)
    shared = repeat(executor.put(row_basis))
    return total(executor.map(step, y.blocks, pairwise(y.row_offsets), shared, label=f"tucker {y.name}"), executor)


def _project_depth(inner: Tensor, depth_basis: Tensor | None) -> Tensor:
    """U_d U_dᵀ along the first mode."""
    return inner if depth_basis is None else along_depth(depth_basis @ depth_basis.T, inner)


def _leading(unfolded: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (d, rank) of a short and wide matrix, from its fp64 Gram."""
    wide = unfolded.double()
    vectors: Tensor = torch.linalg.eigh(wide @ wide.T).eigenvectors
    return vectors.flip(1)[:, :rank].to(unfolded.dtype).contiguous()


def _project_block(block: Tensor, rows: tuple[int, int], row_basis: Tensor, m: int, depth: int) -> Tensor:
    first, layers = whole_slices(read_block(block), rows, m)
    basis = read_block(row_basis)
    result = layers.new_zeros(depth, basis.shape[1], layers.shape[2])
    result[first : first + len(layers)] = basis.T @ layers
    return result


def _expand(block: Tensor, rows: tuple[int, int], inner: Tensor, m: int) -> Tensor:
    first, layers = whole_slices(read_block(block), rows, m)
    result = layers.new_zeros(m, inner.shape[1])
    for layer, small in zip(layers, read_block(inner)[first:]):
        result.addmm_(layer, small.T)
    return result


def _model_rows(start: int, stop: int, row_basis: Tensor, inner: Tensor) -> Tensor:
    """Rows start:stop of the stacked U_m inner_k."""
    return stacked_rows(row_basis, inner, start, stop)


def _check_depth_rank(problem: Problem, stack: Stack) -> None:
    m, n = problem.matrix.shape
    if problem.options.depth_rank is not None and problem.options.depth_rank > stack.depth:
        raise RankError(
            f"decompose {problem.matrix.name} ({m}x{n}) by tucker: depth_rank {problem.options.depth_rank} > depth = "
            f"{stack.depth}. Set depth_rank <= {stack.depth}."
        )


def zero_tucker(shape: tuple[int, int], dtype: torch.dtype, rank: int, options: Any) -> TuckerFactors:
    """Orthonormal bases and a zero core."""
    check_depth("a zero matrix", shape, options)
    m = rows_of_one(shape, options)
    d = shape[0] // m
    row, column = (torch.eye(size, rank, dtype=dtype) for size in (m, shape[1]))
    depth = None if options.depth_rank is None or options.depth_rank >= d else options.depth_rank
    core = torch.zeros(depth or d, rank, rank, dtype=dtype)
    return TuckerFactors(core, row, column, None if depth is None else torch.eye(d, depth, dtype=dtype))


def tucker_bound(shape: tuple[int, int], options: Any) -> int:
    """min(m, n) of one matrix of the stack."""
    return min(rows_of_one(shape, options), shape[1])


TUCKER = Method(
    name="tucker",
    family="tucker",
    fit=tucker,
    options=TuckerOptions,
    zero=zero_tucker,
    max_rank=tucker_bound,
    rules=frozenset({"rank"}),
    summary="one row and one column basis for a stack of matrices, and a small core for each",
)
