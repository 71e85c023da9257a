"""W ≈ Σₖ Bₖ ⊗ Cₖ: the low-rank problem of the rearrangement R(W), whose row (i, j) is vec of block W_ij.

‖W − Σ Bₖ⊗Cₖ‖ = ‖R(W) − Σ vec(Bₖ) vec(Cₖ)ᵀ‖. Without weights the optimum is a truncated SVD of R(W), and the randomized
SVD of this package is run on it; row blocks of W are regrouped into row blocks of R(W) (or of R(W)ᵀ), and W is never in
one place. Under weights, and where the Cₖ are of low rank, alternating least squares starts from there.
"""

from dataclasses import replace
from typing import Any

import torch

from lowrank.decompositions.kronecker_als import Rearranged, alternate
from lowrank.decompositions.kronecker_shapes import choose_shape, kronecker_shapes, summary
from lowrank.decompositions.rearranged import nearest, rearrange, sides
from lowrank.decompositions.registry import Fit, Method, Problem
from lowrank.decompositions.shapes import KroneckerLayout, candidate_layouts, kronecker_bound, kronecker_layout
from lowrank.errors import RankError
from lowrank.factors.kronecker import KroneckerFactors
from lowrank.options import KroneckerOptions, KrylovOptions

#: Terms at which shapes are compared under an energy or error rule, which names no rank.
_FREE_RANK = 8


def kronecker(problem: Problem) -> Fit:
    """K Kronecker products: the optimum by an SVD of R(W), or alternating least squares from that.

    Where `shape` is None the shapes that divide W are compared, and the report's reason holds the choice and the
    Pareto front of error against numbers. Under weights they are compared with missing entries at 0, as is the start.

    Raises:
        DecompositionError: when `shape` does not divide W and is not to be padded, or is larger.
        RankError: when an energy or error rule meets weights, an inner rank or `solver="als"`, or the inner rank
            exceeds min(m₂, n₂).

    Source: Van Loan & Pitsianis 1993, "Approximation with Kronecker products", Theorem 2.1 (SVD) and section 5 (ALS).
    """
    options, what = problem.options, _describe(problem)
    direct = problem.weights is None and options.inner_rank is None and options.solver == "svd"
    if not direct and problem.rule.rank is None:
        raise RankError(
            f"{what}: under weights, with inner_rank or solver = als it cannot follow a bound on {problem.rule.kind}. "
            "Set decompose.rank."
        )
    layout, note = _layout(problem, what)
    if options.inner_rank is not None and options.inner_rank > min(layout.second):
        raise RankError(
            f"{what}: inner_rank = {options.inner_rank} > min(m2, n2) = {min(layout.second)} of second factors "
            f"{layout.second}. Set inner_rank <= {min(layout.second)}."
        )
    executor = problem.executor
    rearranged = rearrange(problem.matrix, layout, executor)
    start = nearest(rearranged, problem.rule, problem.total_energy, problem.seed, executor, KrylovOptions())
    if direct:
        fit = _from_svd(start, layout)
    else:
        weights = None if problem.weights is None else rearrange(problem.weights, layout, executor, rearranged.dtype)
        b, c, s = sides(start, layout)
        root = s.sqrt()[:, None]
        fit = alternate(problem, Rearranged(rearranged, weights, layout, executor), b * root, c * root)
    return replace(fit, reason=fit.reason + note)


def zero_kronecker(size: tuple[int, int], dtype: torch.dtype, rank: int, options: Any) -> KroneckerFactors:
    """Zero B and C of the shape that a fit would have taken; of the one with the fewest numbers where it compares."""
    what = f"decompose a zero matrix ({size[0]}x{size[1]}) by kronecker"
    free = options.shape is None
    layout = candidate_layouts(size, rank)[0] if free else kronecker_layout(what, size, options)
    b = torch.zeros(rank, *layout.first, dtype=dtype)
    if options.inner_rank is None:
        return KroneckerFactors(b, torch.zeros(rank, *layout.second, dtype=dtype), None, size)
    inner, (m2, n2) = min(options.inner_rank, *layout.second), layout.second
    left, right = torch.zeros(rank, m2, inner, dtype=dtype), torch.zeros(rank, inner, n2, dtype=dtype)
    return KroneckerFactors(b, left, right, size)


def _layout(problem: Problem, what: str) -> tuple[KroneckerLayout, str]:
    """The shape to take, and what the report says about the choice."""
    matrix, options = problem.matrix, problem.options
    if options.shape is not None:
        return kronecker_layout(what, matrix.shape, options), ""
    shapes = kronecker_shapes(
        matrix,
        rank=problem.rule.rank or _FREE_RANK,
        inner_rank=options.inner_rank,
        energy=problem.total_energy,
        seed=problem.seed,
        executor=problem.executor,
    )
    if options.inner_rank is not None:
        shapes = [shape for shape in shapes if options.inner_rank <= min(shape.second)] or shapes
    chosen = choose_shape(shapes, matrix.shape, matrix.compute_dtype)
    return KroneckerLayout(matrix.shape, chosen.first), summary(shapes, chosen)


def _from_svd(found: Fit, layout: KroneckerLayout) -> Fit:
    """Bₖ = √σₖ mat(uₖ), Cₖ = √σₖ mat(vₖ)."""
    b, c, s = sides(found, layout)
    root = s.sqrt().view(-1, 1, 1)
    factors = KroneckerFactors(
        root * b.reshape(-1, *layout.first), root * c.reshape(-1, *layout.second), None, layout.size
    )
    # Cutting the padding off again leaves less than the residual of the padded matrix.
    return replace(found, factors=factors, projection_energy=None if layout.padded else found.projection_energy)


def _describe(problem: Problem) -> str:
    m, n = problem.matrix.shape
    return f"decompose {problem.matrix.name} ({m}x{n}) by kronecker"


KRONECKER = Method(
    name="kronecker",
    family="kronecker",
    fit=kronecker,
    options=KroneckerOptions,
    zero=zero_kronecker,
    max_rank=kronecker_bound,
    weighted=True,
    low_rank="none",
    summary="sum of Kronecker products; the optimum from an SVD of the rearrangement, LoKr with inner_rank",
)
