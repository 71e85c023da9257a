"""Truncated SVD: exact, and randomized with power iterations. Both end in the same Rayleigh-Ritz step.

W ≈ U_r Σ_r V_rᵀ is optimal in every unitarily invariant norm (Eckart-Young). The randomized method finds the
subspace from 2q + 2 products with W; the exact one from LAPACK or, when the matrix is in several blocks or
its short side is small, from the fp64 Gram of the short side.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lowrank.blocks import BlockMatrix
from lowrank.decompositions.orthogonal import orthonormalize, orthonormalize_columns
from lowrank.decompositions.registry import Fit, Method, Problem
from lowrank.executor import Executor
from lowrank.factors import SVDFactors
from lowrank.options import NoOptions, RandomizedOptions
from lowrank.rank import resolvable_share

#: Up to this short side, the fp64 Gram with eigh is faster than LAPACK's SVD in fp32.
_GRAM_SIDE = 2048
#: First basis of an energy or error rule; it doubles until the rule is met.
_FIRST_RANK = 16


def exact_svd(problem: Problem) -> Fit:
    """The truncated SVD of W, with the whole spectrum.

    Gram route: WᵀW = V Σ² Vᵀ in fp64 (or WWᵀ when m < n), then one Rayleigh-Ritz step with W itself, which
    restores the accuracy that squaring W costs the kept singular triplets. In fp64, spectrum entries beyond
    the kept rank are then good to 1e-8 · σ₁ only; a single fp64 block takes LAPACK's SVD, and every σ to
    rounding. The Gram, min(m, n)² in fp64, is held by the caller's process.
    """
    w, executor = problem.matrix, problem.executor
    single = len(w.blocks) == 1
    if single and (w.compute_dtype == torch.float64 or min(w.shape) > _GRAM_SIDE):
        return _lapack_svd(problem)
    wide = w.shape[0] < w.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(w.row_gram(executor) if wide else w.gram(executor))
    s = eigenvalues.clamp(min=0).flip(0).sqrt()
    rank, converged = _choose_exact(problem, s)
    leading = vectors.flip(1)[:, :rank].to(w.compute_dtype).contiguous()
    q = _as_blocks(leading, w, executor) if wide else orthonormalize(w.matmat(leading, executor), executor)
    factors = _rayleigh_ritz(w, q, w.rmatmat(q, executor), rank, executor)
    spectrum = torch.cat([factors.s, s[rank:].to(factors.s.dtype)])
    return svd_fit(factors, spectrum, 0, converged)


def randomized_svd(problem: Problem) -> Fit:
    """Randomized subspace iteration with an orthonormal basis after every product.

    Y = WΩ; q times: Y = W orth(Wᵀ orth(Y)); Q = orth(Y); SVD of QᵀW. The basis has r + `oversampling`
    columns; under an energy or error rule it starts small and doubles, each round starting from the previous
    right vectors, until the rule is met. A basis of more than half of min(m, n) columns is left to
    `exact_svd`, which is cheaper by then.

    Source: Halko, Martinsson, Tropp 2011 (arXiv:0909.4061), Algorithms 4.4 and 5.1.
    """
    w, rule, executor = problem.matrix, problem.rule, problem.executor
    if rule.rank is None and rule.tail_share < resolvable_share(w.compute_dtype):
        return exact_svd(problem)
    limit = min(w.shape)
    rank = min(rule.cap(rule.rank or min(_FIRST_RANK, limit)), limit)
    start = torch.empty(w.shape[1], 0, dtype=w.compute_dtype)
    for n_rounds in range(1, limit + 2):
        size = rank + problem.options.oversampling
        if 2 * size > limit:
            return exact_svd(problem)
        fresh = _gaussian(w.shape[1], size - start.shape[1], problem.seed + n_rounds - 1, w.compute_dtype)
        q, z = _subspace_iteration(w, torch.cat([start, fresh], dim=1), problem.options.n_iter, executor)
        found = _rayleigh_ritz(w, q, z, size, executor)
        if rule.met(found.s[:rank], problem.total_energy) or rule.cap(rank + 1) == rank:
            break
        start, rank = found.vh.T, rule.cap(2 * rank)
    kept = rule.choose(found.s[:rank], problem.total_energy)
    converged = rule.met(found.s[:kept], problem.total_energy)
    return svd_fit(_truncate(found, kept), found.s, problem.options.n_iter * n_rounds, converged)


def svd_fit(factors: SVDFactors, spectrum: Tensor, n_iter: int, converged: bool) -> Fit:
    """The fit of factors whose product is an orthogonal projection of W."""
    return Fit(
        factors=factors,
        spectrum=spectrum,
        n_iter=n_iter,
        converged=converged,
        reason="the rank rule is met" if converged else "max_rank was reached before the rank rule was met",
        projection_energy=float(factors.s.double().square().sum()),
    )


def zero_svd(shape: tuple[int, int], dtype: torch.dtype, rank: int, options: Any) -> SVDFactors:
    """Orthonormal U and V with σ = 0, for a zero matrix."""
    (m, n), zeros = shape, torch.zeros(rank, dtype=dtype)
    return SVDFactors(torch.eye(m, rank, dtype=dtype), zeros, torch.eye(rank, n, dtype=dtype))


def short_side(shape: tuple[int, int], options: Any) -> int:
    """min(m, n), the largest rank of an SVD."""
    return min(shape)


def _subspace_iteration(w: BlockMatrix, start: Tensor, n_iter: int, executor: Executor) -> tuple[BlockMatrix, Tensor]:
    """Q (m, l), a basis of the range of W(WᵀW)^q · start, and Z = WᵀQ (n, l)."""
    q = orthonormalize(w.matmat(start, executor), executor)
    z = w.rmatmat(q, executor)
    for _ in range(n_iter):
        q = orthonormalize(w.matmat(orthonormalize_columns(z), executor), executor)
        z = w.rmatmat(q, executor)
    return q, z


def _rayleigh_ritz(w: BlockMatrix, q: BlockMatrix, z: Tensor, rank: int, executor: Executor) -> SVDFactors:
    """The `rank` leading triplets of Q Qᵀ W, from the small SVD of QᵀW = Zᵀ."""
    # QR first: the SVD is then l×l, and V stays orthonormal for the smallest singular values.
    v, r = torch.linalg.qr(z.double())
    u_small, s, vh_small = torch.linalg.svd(r.T)
    rotation = u_small[:, :rank].to(w.compute_dtype).contiguous()
    u = q.matmat(rotation, executor).to_tensor(executor)
    vh = (vh_small[:rank] @ v.T).to(w.compute_dtype)
    return fix_signs(u, s[:rank].to(w.compute_dtype), vh)


def _lapack_svd(problem: Problem) -> Fit:
    u, s, vh = torch.linalg.svd(problem.matrix.to_tensor(problem.executor), full_matrices=False)
    rank, converged = _choose_exact(problem, s)
    return svd_fit(_truncate(fix_signs(u, s, vh), rank), s, 0, converged)


def _choose_exact(problem: Problem, s: Tensor) -> tuple[int, bool]:
    # The spectrum's own sum: its tail then has no rounding of ‖W‖² in it, and small error bounds stay
    # reachable.
    total = float(s.double().square().sum())
    rank = problem.rule.choose(s, total)
    return rank, problem.rule.met(s[:rank], total)


def _as_blocks(u: Tensor, w: BlockMatrix, executor: Executor) -> BlockMatrix:
    rows = (u[a:b] for a, b in pairwise(w.row_offsets))
    return w.like([executor.put(block) for block in rows], u.shape[1])


def _gaussian(n: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Ω (n, columns) from the seed alone: drawn in fp64, so that dtype and blocking do not change it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(columns, n, generator=generator, dtype=torch.float64).T.to(dtype).contiguous()


def fix_signs(u: Tensor, s: Tensor, vh: Tensor) -> SVDFactors:
    """Make the largest entry of each column of U positive: an SVD is unique up to these signs."""
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return SVDFactors((u * signs).contiguous(), s.contiguous(), (signs[:, None] * vh).contiguous())


def _truncate(f: SVDFactors, rank: int) -> SVDFactors:
    return SVDFactors(f.u[:, :rank].contiguous(), f.s[:rank].contiguous(), f.vh[:rank].contiguous())


EXACT_SVD = Method(
    name="exact_svd",
    family="svd",
    fit=exact_svd,
    options=NoOptions,
    zero=zero_svd,
    max_rank=short_side,
    summary="the optimum; LAPACK, or the fp64 Gram of the short side",
)
RANDOMIZED_SVD = Method(
    name="randomized_svd",
    family="svd",
    fit=randomized_svd,
    options=RandomizedOptions,
    zero=zero_svd,
    max_rank=short_side,
    summary="subspace iteration with CholeskyQR2; for a rank well below min(m, n)",
)
