"""Alternating least squares W ≈ L R: plain, with a ridge, non-negative, under weights and with missing entries.

    minimise ‖√P ∘ (W − L R)‖² + λ (‖L‖² + ‖R‖²)

Each half step solves one factor exactly, so that the objective never rises. Without weights the rows share one normal
matrix: L_p = W_p Rᵀ (RRᵀ + λI)⁻¹ stays with its row block, and only the sums LᵀL (r, r) and LᵀW (r, n) travel. The
fixed point is U_r (Σ_r − λ)₊ V_rᵀ. Under weights see `als_weighted`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, repeat
from typing import Any

import torch
from torch import Tensor

from lowrank.blocks import Block, read_block
from lowrank.decompositions.als_weighted import Progress, fit_weighted
from lowrank.decompositions.nonnegative import nonnegative_start, nonnegative_step
from lowrank.decompositions.registry import Fit, Method, Problem
from lowrank.decompositions.separable import flatten
from lowrank.decompositions.svd import randomized_svd, short_side
from lowrank.errors import RankError
from lowrank.executor import Executor, Ref
from lowrank.factors import LowRankFactors, SVDFactors
from lowrank.options import ALSOptions, RandomizedOptions
from lowrank.rank import resolvable_share


def als(problem: Problem) -> Fit:
    """Alternating least squares from the randomized SVD.

    Without weights and ridge a few sweeps polish the SVD, which also chooses the rank of an energy or error rule;
    weights that are an outer product are scaled away first. With other weights the start is the SVD of W with zeros
    for what is missing.

    Raises:
        RankError: for an energy or error rule with weights, a ridge or signs, where no spectrum tells the rank.
        DecompositionError: when a row or column has no observed entry and the ridge is 0.

    Source: the distributed form and the soft-thresholded fixed point, Hastie et al. 2015 (arXiv:1410.2596), sections
        2 and 3; ALS-WR, Zhou et al. 2008 (doi:10.1007/978-3-540-68880-8_32).
    """
    options: ALSOptions = problem.options
    penalised = options.ridge > 0 or options.nonnegative
    flattened = None if penalised else flatten(problem)
    if flattened is not None:
        found = als(flattened.problem)
        assert isinstance(found.factors, LowRankFactors)
        return replace(found, factors=flattened.restore(found.factors))
    if problem.rule.rank is None and (penalised or problem.weights is not None):
        raise RankError(
            f"decompose {problem.matrix.name} by als: a bound on {problem.rule.kind} needs a fit without missing "
            "entries, ridge and signs. Set decompose.rank."
        )
    warm = randomized_svd(replace(problem, weights=None, options=RandomizedOptions()))
    svd = warm.factors
    assert isinstance(svd, SVDFactors)
    if problem.weights is not None:
        return fit_weighted(problem, problem.weights, svd)
    found = _fit_plain(problem, svd)
    if penalised:
        return found
    reason = found.reason if warm.converged else warm.reason
    return replace(found, converged=found.converged and warm.converged, reason=reason, spectrum=warm.spectrum)


def zero_als(shape: tuple[int, int], dtype: torch.dtype, rank: int, options: Any) -> LowRankFactors:
    """L = 0 and R = 0, for a zero matrix."""
    return LowRankFactors(torch.zeros(shape[0], rank, dtype=dtype), torch.zeros(rank, shape[1], dtype=dtype))


@dataclass(frozen=True)
class _Sums:
    """LᵀL (r, r) in fp64 and LᵀW (r, n) of some row blocks."""

    gram: Tensor
    cross: Tensor

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(self.gram + other.gram, self.cross + other.cross)


def _fit_plain(problem: Problem, svd: SVDFactors) -> Fit:
    options, w, executor = problem.options, problem.matrix, problem.executor
    if options.nonnegative:
        left, right = nonnegative_start(svd)
        blocks: Sequence[Ref] = [executor.put(left[a:b].contiguous()) for a, b in pairwise(w.row_offsets)]
    else:
        # The fixed point itself, as far as the randomized SVD is exact.
        right, blocks = (svd.s - options.ridge).clamp(min=0).sqrt()[:, None] * svd.vh, []
    progress = Progress(problem.total_energy, options.tol, w.compute_dtype)
    for _ in range(options.n_iter):
        rows = partial(_row_step, ridge=options.ridge)
        present = blocks if options.nonnegative else repeat(None)
        blocks = executor.map(rows, w.blocks, present, repeat(executor.put(right)), label=f"als {w.name}")
        sums: _Sums = executor.get(_reduce(executor.map(_sums, w.blocks, blocks, label=f"als {w.name}"), executor))
        right = _column_step(sums, right, options.ridge, options.nonnegative)
        error = _squared_error(problem, sums, blocks, right)
        penalty = options.ridge * float(sums.gram.trace() + right.double().square().sum())
        if progress.rest(error, penalty):
            break
    left = torch.cat([read_block(block) for block in executor.get(list(blocks))])
    return progress.fit(LowRankFactors(left, right))


def _row_step(block: Block, left: Tensor | None, right: Tensor, ridge: float) -> Tensor:
    """L_p: the minimiser for these rows; given a non-negative `left`, a descent from there that keeps the signs."""
    values, r = read_block(block), read_block(right)
    gram = r.double() @ r.double().T
    if left is None:
        return values @ _damped_solve(gram, r.double(), ridge).T.to(r.dtype).contiguous()
    x = read_block(left)
    return _signed(gram, values @ r.T, x, ridge)


def _sums(block: Block, left: Tensor) -> _Sums:
    x = read_block(left)
    return _Sums(x.double().T @ x.double(), x.T @ read_block(block))


def _column_step(sums: _Sums, right: Tensor, ridge: float, nonnegative: bool) -> Tensor:
    if nonnegative:
        return _signed(sums.gram, sums.cross.T, right.T, ridge).T.contiguous()
    return _damped_solve(sums.gram, sums.cross.double(), ridge).to(right.dtype)


def _damped_solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(G + λI)⁻¹ C in fp64, for a positive semidefinite G (r, r), which rounding of tr G keeps from being singular."""
    damping = 4 * torch.finfo(torch.float64).eps * float(gram.trace()) + torch.finfo(torch.float32).tiny
    identity = torch.eye(len(gram), dtype=gram.dtype)
    factor, failed = torch.linalg.cholesky_ex(gram + (ridge + damping) * identity)
    while int(failed):
        damping *= 10
        factor, failed = torch.linalg.cholesky_ex(gram + (ridge + damping) * identity)
    return torch.cholesky_solve(cross, factor)


def _signed(gram: Tensor, cross: Tensor, x: Tensor, ridge: float) -> Tensor:
    gram = gram.to(x.dtype)
    return nonnegative_step(gram, cross - x @ gram - ridge * x, x, torch.tensor(ridge, dtype=x.dtype))


def _squared_error(problem: Problem, sums: _Sums, blocks: Sequence[Ref], right: Tensor) -> float:
    """‖W − LR‖²: ‖W‖² − 2⟨LᵀW, R⟩ + ⟨LᵀL, RRᵀ⟩ while that keeps enough digits, else by blocks."""
    r, w, total = right.double(), problem.matrix, problem.total_energy
    squared = total - 2 * float((sums.cross.double() * r).sum()) + float((sums.gram * (r @ r.T)).sum())
    if squared >= resolvable_share(w.compute_dtype) * total:
        return squared
    executor = problem.executor
    parts = executor.map(_residual, w.blocks, blocks, repeat(executor.put(right)), label=f"residual {w.name}")
    return float(executor.get(_reduce(parts, executor)))


def _residual(block: Block, left: Tensor, right: Tensor) -> Tensor:
    rest = read_block(block) - read_block(left) @ read_block(right)
    norm: Tensor = torch.linalg.vector_norm(rest, dtype=torch.float64)
    return norm.square()


def _reduce(parts: Sequence[Ref], executor: Executor) -> Ref:
    return executor.reduce(_add, parts)


def _add(a: Any, b: Any) -> Any:
    return a + b


ALS = Method(
    name="als",
    family="als",
    fit=als,
    options=ALSOptions,
    zero=zero_als,
    max_rank=short_side,
    weighted=True,
    summary="alternating least squares; with a ridge, non-negative, under weights, with missing entries",
)
