"""W ≈ F₁ ⊙ … ⊙ F_L, column by column: column j of W, as the tensor (m₁, …, m_L), by one of rank one.

Columns do not know of each other, so that groups of columns are fitted apart, each in one task to its end. A group is
regrouped from the row blocks of W and holds as many numbers as one of them.
"""

import math
from functools import partial
from itertools import repeat
from typing import Any

import torch

from lowrank.blocks import BlockMatrix
from lowrank.decompositions.columns import ColumnFit, fit_columns, join
from lowrank.decompositions.regions import regroup
from lowrank.decompositions.registry import Fit, Method, Problem
from lowrank.decompositions.shapes import column_regions, khatri_rao_rows_of
from lowrank.executor import Ref
from lowrank.factors.khatri_rao import KhatriRaoFactors
from lowrank.options import KhatriRaoOptions


def khatri_rao(problem: Problem) -> Fit:
    """The chain of free factors: the global optimum for two factors without weights, else a local one by ALS.

    F₁, F₂ from σ₁u₁v₁ᵀ of every column as a matrix (m₁, m₂); more factors, or weights, by rank-one alternating least
    squares, monotone. A row of a factor with nothing observed in a column is 0 there.

    Raises:
        DecompositionError: when m₁·…·m_L does not give m rows and padding does not allow it.

    Source: De Lathauwer, De Moor, Vandewalle 2000, "On the best rank-1 approximation of higher-order tensors",
        Algorithm 3.2, per column; for two factors Eckart-Young.
    """
    shape = factor_rows(problem)
    groups, _ = column_groups(problem, problem.matrix, shape)
    under = column_groups(problem, problem.weights, shape)[0] if problem.weights is not None else None
    fit = fit_groups(problem, groups, under, shape, problem.options.n_iter)
    m = problem.matrix.shape[0]
    factors = KhatriRaoFactors(tuple(factor.T.contiguous() for factor in fit.factors), m)
    history = tuple(math.sqrt(squared / problem.total_energy) for squared in fit.squared_residuals)
    projected = not history and math.prod(shape) == m
    return Fit(
        factors=factors,
        n_iter=len(history),
        converged=fit.converged,
        reason=_reason(fit, problem.options),
        history=history,
        projection_energy=fit.energy if projected else None,
    )


def factor_rows(problem: Problem) -> tuple[int, ...]:
    """(m₁, …, m_L) for this matrix, or the refusal of a shape that does not fit it."""
    m, n = problem.matrix.shape
    return khatri_rao_rows_of(f"decompose {problem.matrix.name} ({m}x{n}) by khatri_rao", m, problem.options)


def column_groups(problem: Problem, matrix: BlockMatrix, shape: tuple[int, ...]) -> tuple[list[Ref], list[int]]:
    """Wᵀ in row blocks, as many as W has, padded to m₁·…·m_L columns; and their offsets."""
    regions, offsets = column_regions(matrix.shape[1], shape, len(matrix.blocks))
    dtype = problem.matrix.compute_dtype
    return regroup(matrix, regions, dtype, problem.executor, label=f"columns {matrix.name}"), offsets


def fit_groups(
    problem: Problem, groups: list[Ref], under: list[Ref] | None, shape: tuple[int, ...], n_iter: int
) -> ColumnFit:
    """Fit every group of columns in a task of its own."""
    fit = partial(fit_columns, shape=shape, n_iter=n_iter, tol=problem.options.tol)
    refs = problem.executor.map(fit, groups, under or repeat(None), label=f"khatri_rao {problem.matrix.name}")
    return join(problem.executor.get(refs), dim=0)


def zero_khatri_rao(size: tuple[int, int], dtype: torch.dtype, rank: int, options: Any) -> KhatriRaoFactors:
    """Zero factors."""
    shape = khatri_rao_rows_of(f"decompose a zero matrix ({size[0]}x{size[1]}) by khatri_rao", size[0], options)
    return KhatriRaoFactors(tuple(torch.zeros(rows, size[1], dtype=dtype) for rows in shape), size[0])


def _reason(fit: ColumnFit, options: KhatriRaoOptions) -> str:
    if not fit.squared_residuals:
        return "direct: the optimum of every column"
    unseen = f"; {fit.unobserved} entries of factors have nothing observed and are 0" if fit.unobserved else ""
    if fit.converged:
        return f"a sweep lowered the relative error of every group of columns by less than {options.tol:g}{unseen}"
    return f"n_iter = {options.n_iter} sweeps ended before the error of every group of columns came to rest{unseen}"


KHATRI_RAO = Method(
    name="khatri_rao",
    family="khatri_rao",
    fit=khatri_rao,
    options=KhatriRaoOptions,
    zero=zero_khatri_rao,
    max_rank=None,
    rules=frozenset(),
    weighted=True,
    low_rank="none",
    summary="chain of column-wise Kronecker products; the optimum of every column, of full rank",
)
