"""W ≈ (C₁E₁) ⊙ … ⊙ (C_L E_L): Khatri-Rao products of low-rank factors, by exact block steps.

With the other factors fixed, v_j their product in column j, t_j the contraction of column j of W with v_j over ‖v_j‖²
and D = diag(‖v_j‖), the objective is ‖(U − T) D‖² + const: the best U = C E of rank r is SVD_r(T D) D⁻¹. Under weights
the same with a weight Σ_q P v² for every entry, minimised in C, then in E.
"""

import math
from functools import partial
from itertools import pairwise, repeat
from typing import Any

import torch
from torch import Tensor

from lowrank.blocks import Block, read_block
from lowrank.decompositions.columns import contract, squared_residual
from lowrank.decompositions.descent import Descent
from lowrank.decompositions.khatri_rao import column_groups, factor_rows, fit_groups
from lowrank.decompositions.registry import Fit, Method, Problem
from lowrank.decompositions.shapes import khatri_rao_rows_of, middle_divisors
from lowrank.decompositions.weighted import solve_rows
from lowrank.executor import Ref
from lowrank.factors.khatri_rao import LowRankKhatriRaoFactors
from lowrank.options import KhatriRaoOptions

#: Sweeps of the chain under weights whose factors are cut to start from.
_START_SWEEPS = 5

#: C (m_l, r) and E (r, n) of one factor.
Pair = tuple[Tensor, Tensor]


def khatri_rao_low_rank(problem: Problem) -> Fit:
    """Column-weighted truncated SVDs in turn, from the chain's optimum; monotone.

    The rank r is that of every factor, or min(m_l, n) where that is smaller. Columns of W are in groups as for the
    chain; what travels per step is one factor (m_l, n).

    Raises:
        DecompositionError: when m₁·…·m_L does not give m rows and padding does not allow it.

    Source: derived here from the normal equations; no publication is known to us.
    """
    shape, options = factor_rows(problem), problem.options
    state = _State(problem, shape)
    watch = Descent(options.n_iter, options.tol, problem.matrix.compute_dtype)
    while True:
        for mode in range(len(shape)):
            state.improve(mode)
        state.balance()
        if watch.add(math.sqrt(state.squared_residual() / problem.total_energy)):
            break
    left, right = zip(*state.pairs)
    factors = LowRankKhatriRaoFactors(tuple(left), tuple(right), problem.matrix.shape[0])
    return Fit(
        factors=factors,
        n_iter=len(watch.history),
        converged=watch.converged,
        reason=watch.reason,
        history=tuple(watch.history),
    )


class _State:
    """The factors C_l E_l, and the groups of columns of W that judge them."""

    def __init__(self, problem: Problem, shape: tuple[int, ...]) -> None:
        self.executor, self.shape = problem.executor, shape
        self.groups, self.offsets = column_groups(problem, problem.matrix, shape)
        self.under: list[Ref] | None = None
        if problem.weights is not None:
            self.under = column_groups(problem, problem.weights, shape)[0]
        chain = fit_groups(problem, self.groups, self.under, shape, _START_SWEEPS)
        free = [factor.T for factor in chain.factors]
        norms = [torch.linalg.vector_norm(factor, dim=0, dtype=torch.float64) for factor in free]
        self.pairs: list[Pair] = []
        for mode, factor in enumerate(free):
            scale = math.prod(norm for other, norm in enumerate(norms) if other != mode)
            rank = min(problem.rank, *factor.shape)
            self.pairs.append(_cut_columns(factor.double(), torch.as_tensor(scale), rank, factor.dtype))

    def improve(self, mode: int) -> None:
        """Set C E of one factor to the minimiser, or under weights C, then E."""
        step = partial(_contract, mode=mode)
        refs = self.executor.map(step, self.groups, self.under or repeat(None), self._columns(), label="khatri_rao")
        rhs, curvature = (torch.cat(parts).T for parts in zip(*self.executor.get(refs)))
        c, e = self.pairs[mode]
        if self.under is None:
            weight = curvature.double().clamp(min=0).sqrt()[0]
            best = torch.where(weight > 0, rhs.double() / torch.where(weight > 0, weight**2, 1.0), 0.0)
            self.pairs[mode] = _cut_columns(best, weight, c.shape[1], c.dtype)
        else:
            c = solve_rows(curvature, rhs, e, 0.0, c)
            self.pairs[mode] = c, solve_rows(curvature.T, rhs.T, c.T, 0.0, e.T.contiguous()).T.contiguous()

    def balance(self) -> None:
        """Equal norms of all factors in every column."""
        norms = [torch.linalg.vector_norm((c @ e).double(), dim=0) for c, e in self.pairs]
        whole = math.prod(norm.pow(1 / len(norms)) for norm in norms)
        for mode, ((c, e), norm) in enumerate(zip(self.pairs, norms)):
            scale = torch.where(norm > 0, whole / torch.where(norm > 0, norm, 1.0), 0.0)
            self.pairs[mode] = c, (e.double() * scale).to(e.dtype)

    def squared_residual(self) -> float:
        """‖√P ∘ (W − Ŵ)‖², padding included."""
        refs = self.executor.map(
            _residual, self.groups, self.under or repeat(None), self._columns(), label="khatri_rao"
        )
        return math.fsum(self.executor.get(refs))

    def _columns(self) -> list[list[Tensor]]:
        """Per group, the columns of every factor as rows (g, m_l)."""
        whole = [(c @ e).T for c, e in self.pairs]
        return [[factor[a:b].contiguous() for factor in whole] for a, b in pairwise(self.offsets)]


def _cut_columns(factor: Tensor, weight: Tensor, rank: int, dtype: torch.dtype) -> Pair:
    """C and E of the rank-r matrix nearest to `factor` (m, n) with column j weighted: SVD_r(T D) D⁻¹, in fp64."""
    weight = weight.expand(factor.shape[1])
    u, s, vh = torch.linalg.svd(factor * weight, full_matrices=False)
    root = s[:rank].sqrt()
    e = root[:, None] * vh[:rank] / torch.where(weight > 0, weight, 1.0)
    e = torch.where(weight > 0, e, 0.0)
    return (u[:, :rank] * root).to(dtype).contiguous(), e.to(dtype).contiguous()


def _contract(block: Block, weights: Block | None, factors: list[Tensor], mode: int) -> tuple[Tensor, Tensor]:
    """Σ_q P A v and Σ_q P v² for every entry (g, m_l) of one factor; the latter (g, 1) without weights."""
    values, known = read_block(block), [read_block(factor) for factor in factors]
    if weights is None:
        squares = [torch.linalg.vector_norm(f, dim=1, keepdim=True).square() for f in known]
        squares[mode] = torch.ones_like(squares[mode])
        return contract(values, known, mode), math.prod(squares)
    under = read_block(weights)
    return contract(under * values, known, mode), contract(under, [f.square() for f in known], mode)


def _residual(block: Block, weights: Block | None, factors: list[Tensor]) -> float:
    under = None if weights is None else read_block(weights)
    return squared_residual(read_block(block), under, [read_block(factor) for factor in factors])


def zero_low_rank(size: tuple[int, int], dtype: torch.dtype, rank: int, options: Any) -> LowRankKhatriRaoFactors:
    """Zero factors."""
    what = f"decompose a zero matrix ({size[0]}x{size[1]}) by khatri_rao_low_rank"
    shape, n = khatri_rao_rows_of(what, size[0], options), size[1]
    ranks = [min(rank, rows, n) for rows in shape]
    left = tuple(torch.zeros(rows, r, dtype=dtype) for rows, r in zip(shape, ranks))
    return LowRankKhatriRaoFactors(left, tuple(torch.zeros(r, n, dtype=dtype) for r in ranks), size[0])


def largest_rank(size: tuple[int, int], options: KhatriRaoOptions) -> int:
    """min(max m_l, n): from there on every factor is free."""
    return min(max(options.shape or middle_divisors(size[0])), size[1])


KHATRI_RAO_LOW_RANK = Method(
    name="khatri_rao_low_rank",
    family="khatri_rao",
    fit=khatri_rao_low_rank,
    options=KhatriRaoOptions,
    zero=zero_low_rank,
    max_rank=largest_rank,
    rules=frozenset({"rank"}),
    weighted=True,
    low_rank="expanded",
    summary="column-wise Kronecker product of low-rank factors; column-weighted SVDs in turn",
)
