"""Biased matrix factorisation of sparse ratings by alternating least squares, over row blocks and column blocks.

    r_ui ≈ μ + b_u + c_i + x_uᵀ z_i,   minimising
    Σ_(u,i) e_ui² + Σ_u s_u (λ‖x_u‖² + λ_b b_u²) + Σ_i s_i (λ‖z_i‖² + λ_b c_i²)

with s = the number of ratings of the row or column (ALS-WR), or 1. Each half step solves all rows of one side, each
jointly with its bias, against the other side, which is broadcast once. Rows of one block never leave it but as factors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise, repeat
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lowrank.decompositions.ratings_model import RatingsModel, RatingsReport
from lowrank.errors import DecompositionError, NumericsError, RankError
from lowrank.executor import Executor, Ref
from lowrank.kernels.sparse import HalfStep, Side, SparseRows

#: Above this rank three conjugate gradient steps from the last sweep cost less than a factorisation, for the same fit.
_CHOLESKY_RANK = 16
_CG_STEPS = 3
#: What rounding in fp32 may add to an objective: shares of itself and of Σ r².
_SLACK, _FLOOR = 1e-5, 1e-11
#: Larger ratings would overflow the fp32 normal matrices.
_LARGEST = 1e12


def fit_ratings(
    ratings: Any,
    *,
    rank: int,
    ridge: float = 0.1,
    bias_ridge: float | None = None,
    weighted_ridge: bool = True,
    biases: bool = True,
    n_iter: int = 15,
    tol: float = 1e-4,
    solver: Literal["auto", "cholesky", "cg"] = "auto",
    block_entries: int = 2**20,
    threads: int = 1,
    seed: int = 0,
    executor: Executor,
) -> RatingsModel:
    """Factorise sparse ratings r_ui ≈ μ + b_u + c_i + x_uᵀ z_i by alternating least squares, in fp32.

    The result depends on neither the executor, the number of workers nor `threads`.

    Args:
        ratings: (m, n) scipy sparse matrix, best CSR; every stored entry is a rating, explicit zeros too.
        rank: r of the factors, 1 <= r <= min(m, n).
        ridge: λ >= 0. With `weighted_ridge` in units of squared ratings, 0.05 to 0.2 for stars from 1 to 5;
            else some multiples of that times the usual number of ratings. Choose it on held-out ratings.
        bias_ridge: λ_b >= 0 of the biases; None takes `ridge`.
        weighted_ridge: λ times the number of ratings of the row or column (ALS-WR).
        biases: fit μ, b and c; else all are 0.
        n_iter: most sweeps, >= 1.
        tol: stop when a sweep lowers the objective by less than this share of it, >= 0.
        solver: per row `cholesky` (exact), `cg` (three conjugate gradient steps from the last sweep), or by rank.
        block_entries: ratings per block, at least 1; a block is the unit of work of an executor.
        threads: of each call, >= 1. 1 where the executor itself runs calls in parallel.
        seed: of the start.
        executor: where the blocks lie and are solved.

    Returns:
        The model with its report.

    Raises:
        DecompositionError: when an option is out of range, the matrix is empty, or a row or column is without
            ratings at `ridge` = 0.
        RankError: when the rank is outside its range.
        NumericsError: when a rating is NaN or infinite.

    Source: ALS-WR, Zhou et al. 2008 (doi:10.1007/978-3-540-68880-8_32), section 3; joint biases, Koren et al. 2009
        (doi:10.1109/MC.2009.263); warm-started conjugate gradients, Takács et al. 2011 (doi:10.1145/2043932.2043987).

    Example:
        >>> import scipy.sparse
        >>> from lowrank.executor import SerialExecutor
        >>> r = scipy.sparse.csr_matrix([[5.0, 4.0, 0.0], [4.0, 0.0, 1.0], [0.0, 4.0, 1.0]])
        >>> model = fit_ratings(r, rank=1, ridge=0.01, executor=SerialExecutor())
        >>> bool(model.rmse(r) < 0.2)
        True
    """
    began = time.perf_counter()
    _check(rank=(rank, 1), n_iter=(n_iter, 1), block_entries=(block_entries, 1), threads=(threads, 1))
    _check(ridge=(ridge, 0), bias_ridge=(ridge if bias_ridge is None else bias_ridge, 0), tol=(tol, 0))
    csr = _checked(ratings, rank)
    csc = csr.T.tocsr()
    empty = [int((np.diff(side.indptr) == 0).sum()) for side in (csr, csc)]
    _refuse_empty(csr, csc, ridge)
    step = HalfStep(
        mean=float(csr.data.mean(dtype=np.float64)) if biases else 0.0,
        ridge=ridge,
        bias_ridge=ridge if bias_ridge is None else bias_ridge,
        per_entry=weighted_ridge,
        bias=biases,
        cg_steps=_steps(solver, rank),
        threads=threads,
    )
    rows, columns = (_Half(side, step, block_entries, executor) for side in (csr, csc))
    placed = time.perf_counter()
    x, z, history, loss, converged = _alternate(rows, columns, _start(csr.shape[1], rank, seed), n_iter, tol)
    report = RatingsReport(
        rank=rank,
        n_iter=len(history),
        objective=tuple(history),
        train_rmse=float(np.sqrt(loss / csr.nnz)),
        converged=converged,
        empty_rows=empty[0],
        empty_columns=empty[1],
        bytes_per_sweep=2 * (x.factors.nbytes + x.biases.nbytes + z.factors.nbytes + z.biases.nbytes),
        seed=seed,
        seconds=time.perf_counter() - began,
        sweep_seconds=time.perf_counter() - placed,
    )
    return RatingsModel(step.mean, x.factors, x.biases, z.factors, z.biases, report)


class _Half:
    """One side of the ratings: its blocks with the executor, and the refs of their present solutions."""

    def __init__(self, matrix: Any, step: HalfStep, block_entries: int, executor: Executor) -> None:
        offsets = plan_entries(matrix.indptr, block_entries)
        self.blocks = [executor.put(SparseRows.from_csr(matrix[a:b])) for a, b in pairwise(offsets)]
        self.present: Sequence[Ref] = [None] * len(self.blocks)
        self.counts = np.diff(matrix.indptr).astype(np.float64) if step.per_entry else np.ones(matrix.shape[0])
        self.energy = float(np.square(matrix.data, dtype=np.float64).sum())
        self.step, self.executor = step, executor

    def solve(self, other: Side) -> tuple[Side, float]:
        """All rows of this side against the `other` one, and the sum of squared errors."""
        shared = repeat(self.executor.put(other))
        self.present = self.executor.map(
            partial(_solve_block, self.step), self.blocks, self.present, shared, label="ratings half step"
        )
        found = self.executor.get(list(self.present))
        factors = np.concatenate([side.factors for side, _ in found])
        return Side(factors, np.concatenate([side.biases for side, _ in found])), sum(loss for _, loss in found)

    def penalty(self, side: Side) -> float:
        """Σ s (λ‖x‖² + λ_b b²) in fp64."""
        squares = np.einsum("ir,ir->i", side.factors, side.factors, dtype=np.float64)
        biases = np.square(side.biases, dtype=np.float64)
        return float(self.counts @ (self.step.ridge * squares + self.step.bias_ridge * biases))


def plan_entries(indptr: NDArray[Any], block_entries: int) -> list[int]:
    """Row offsets of blocks of about `block_entries` entries, each at least one row, from the row starts alone.

    Example:
        >>> plan_entries(np.array([0, 3, 4, 4, 9]), block_entries=4)
        [0, 1, 4]
    """
    count = max(1, -(-int(indptr[-1]) // block_entries))
    wanted = np.searchsorted(indptr, [part * int(indptr[-1]) / count for part in range(1, count)])
    inner = {int(row) for row in wanted if 0 < row < len(indptr) - 1}
    return [0, *sorted(inner), len(indptr) - 1]


def _solve_block(
    step: HalfStep, block: SparseRows, present: tuple[Side, float] | None, other: Side
) -> tuple[Side, float]:
    return step(block, None if present is None else present[0], other)


def _alternate(
    rows: _Half, columns: _Half, z: Side, n_iter: int, tol: float
) -> tuple[Side, Side, list[float], float, bool]:
    history: list[float] = []
    converged, slack = False, _FLOOR * rows.energy
    for _ in range(n_iter):
        x, _ = rows.solve(z)
        z, loss = columns.solve(x)
        history.append(loss + rows.penalty(x) + columns.penalty(z))
        if len(history) > 1:
            assert history[-1] <= history[-2] * (1 + _SLACK) + slack, f"ALS: the objective rose, {history[-2:]}"
            converged = history[-2] - history[-1] <= tol * history[-2]
        if converged:
            break
    return x, z, history, loss, converged


def _start(count: int, rank: int, seed: int) -> Side:
    """Gaussian factors with rows of norm about 1, in fp64 draws."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, rank, generator=generator, dtype=torch.float64) / rank**0.5
    return Side(drawn.to(torch.float32).numpy(), np.zeros(count, np.float32))


def _steps(solver: str, rank: int) -> int:
    if solver not in ("auto", "cholesky", "cg"):
        raise DecompositionError(f"fit ratings: solver = {solver!r}. Set solver to auto, cholesky or cg.")
    return _CG_STEPS if solver == "cg" or (solver == "auto" and rank > _CHOLESKY_RANK) else 0


def _check(**values: tuple[float, float]) -> None:
    for name, (value, least) in values.items():
        if not value >= least or value == float("inf"):
            raise DecompositionError(f"fit ratings: {name} = {value}. Set {name} >= {least}, finite.")


def _checked(ratings: Any, rank: int) -> Any:
    """The ratings as CSR in fp32, every stored entry kept."""
    if not hasattr(ratings, "tocsr") or len(ratings.shape) != 2:
        got = type(ratings).__name__
        raise DecompositionError(f"fit ratings: got {got}, need a scipy sparse matrix. Build one with scipy.sparse.")
    csr = ratings.tocsr()
    what = f"fit ratings ({csr.shape[0]}x{csr.shape[1]}, {csr.nnz} entries)"
    if not csr.nnz:
        raise DecompositionError(f"{what}: there are no ratings. Give at least one entry.")
    if rank > min(csr.shape):
        raise RankError(f"{what}: rank {rank} > min(m, n) = {min(csr.shape)}. Set rank <= {min(csr.shape)}.")
    csr = csr.astype(np.float32)
    bad = int((~(np.abs(csr.data) <= _LARGEST)).sum())
    if bad:
        raise NumericsError(f"{what}: {bad} ratings are NaN, infinite or beyond {_LARGEST:g}. Remove or scale them.")
    return csr


def _refuse_empty(csr: Any, csc: Any, ridge: float) -> None:
    for what, side in (("rows", csr), ("columns", csc)):
        empty = np.flatnonzero(np.diff(side.indptr) == 0)
        if len(empty) and ridge == 0:
            raise DecompositionError(
                f"fit ratings ({csr.shape[0]}x{csr.shape[1]}): {len(empty)} {what} have no ratings "
                f"(first: {empty[0]}), which ridge = 0 leaves undetermined. Set ridge > 0, or remove them."
            )
