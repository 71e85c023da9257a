"""Rank-one fits of many small tensors at once: column j of W as the tensor (m₁, …, m_L), row-major."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.blocks import Block, read_block
from lowrank.decompositions.descent import Descent

#: Entries of W that are worked on at a time: their fp64 Grams then stay small beside a block.
_CHUNK_ENTRIES = 2**19


@dataclass(frozen=True)
class ColumnFit:
    """Rank-one fits of a group of columns.

    Attributes:
        factors: L matrices (g, m_l), the columns of the factors as rows, norms shared evenly.
        energy: ‖fit‖² where every fit is an orthogonal projection, else NaN.
        squared_residuals: ‖√P ∘ (A − fit)‖² after every sweep; empty for the closed form.
        converged: whether all sweeps came to rest.
        unobserved: entries of the factors, all columns together, that have nothing observed; they are 0.
    """

    factors: list[Tensor]
    energy: float
    squared_residuals: list[float]
    converged: bool
    unobserved: int = 0


def fit_columns(block: Block, weights: Block | None, shape: Sequence[int], n_iter: int, tol: float) -> ColumnFit:
    """f₁ⱼ ⊗ … ⊗ f_Lⱼ nearest to every row of `block` (g, m₁·…·m_L), under weights of the same shape.

    Two factors without weights: σ₁u₁v₁ᵀ of the matrix (m₁, m₂), the global optimum. Else rank-one alternating least
    squares (HOOI) from the truncated chain of such SVDs, every step the exact minimiser of one factor.
    """
    values = read_block(block)
    under = None if weights is None else read_block(weights)
    step = max(1, _CHUNK_ENTRIES // values.shape[1])
    parts = []
    for low in range(0, len(values), step):
        p = None if under is None else under[low : low + step]
        parts.append(_fit_chunk(values[low : low + step], p, shape, n_iter, tol))
    return join(parts, dim=0)


def join(parts: Sequence[ColumnFit], dim: int) -> ColumnFit:
    """One fit of all columns; a part that came to rest early keeps its last residual."""
    sweeps = max(len(part.squared_residuals) for part in parts)
    padded = [part.squared_residuals + part.squared_residuals[-1:] * sweeps for part in parts]
    return ColumnFit(
        factors=[torch.cat(factors, dim=dim) for factors in zip(*(part.factors for part in parts))],
        energy=math.fsum(part.energy for part in parts),
        squared_residuals=[math.fsum(values[sweep] for values in padded) for sweep in range(sweeps)],
        converged=all(part.converged for part in parts),
        unobserved=sum(part.unobserved for part in parts),
    )


def contract(values: Tensor, factors: Sequence[Tensor], skip: int) -> Tensor:
    """Σ over all modes but `skip` of values (g, m₁·…·m_L) times the other factors (g, m_l); returns (g, m_skip)."""
    found, count = values, len(values)
    for factor in reversed(factors[skip + 1 :]):
        found = torch.bmm(found.reshape(count, -1, factor.shape[1]), factor[:, :, None])
    for factor in factors[:skip]:
        found = torch.bmm(factor[:, None], found.reshape(count, factor.shape[1], -1))
    return found.reshape(count, -1)


def outer(factors: Sequence[Tensor]) -> Tensor:
    """f₁ ⊗ … ⊗ f_L of every row; (g, m₁·…·m_L)."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None]).flatten(1)
    return product


def squared_residual(values: Tensor, under: Tensor | None, factors: Sequence[Tensor]) -> float:
    """‖√P ∘ (A − f₁ ⊗ … ⊗ f_L)‖² in fp64."""
    residual = outer(factors).sub_(values) if len(factors) > 1 else factors[0] - values
    if under is not None:
        residual = residual.mul_(under.sqrt())
    return float(torch.linalg.vector_norm(residual, dtype=torch.float64)) ** 2


def _fit_chunk(values: Tensor, under: Tensor | None, shape: Sequence[int], n_iter: int, tol: float) -> ColumnFit:
    factors = _chain_start(values, shape)
    if under is None and len(shape) <= 2:
        energy = float(torch.linalg.vector_norm(factors[-1], dtype=torch.float64)) ** 2
        return ColumnFit(_balance(factors), energy, [], True)
    energy = _squared(values, under)
    if energy == 0:
        zeros = [torch.zeros_like(factor) for factor in factors]
        return ColumnFit(zeros, math.nan, [0.0], True, _unobserved(under, factors))
    watch = Descent(n_iter, tol, values.dtype)
    targets = values if under is None else under * values
    while True:
        for mode in range(len(factors)):
            _improve(factors, mode, targets, under)
        if watch.add(math.sqrt(squared_residual(values, under, factors) / energy)):
            break
    residuals = [error**2 * energy for error in watch.history]
    return ColumnFit(_balance(factors), math.nan, residuals, watch.converged, _unobserved(under, factors))


def _unobserved(under: Tensor | None, factors: Sequence[Tensor]) -> int:
    if under is None:
        return 0
    ones = [torch.ones_like(factor) for factor in factors]
    return sum(int((contract(under, ones, mode) == 0).sum()) for mode in range(len(factors)))


def _chain_start(values: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """u₁ of every row as (m₁, rest), then the same of u₁ᵀA, and so on; all of unit norm but the last."""
    factors, rest = [], values
    for size in shape[:-1]:
        u, rest = _leading(rest.reshape(len(rest), size, -1))
        factors.append(u)
    return [*factors, rest]


def _leading(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """u₁ (g, p) and u₁ᵀA = σ₁v₁ᵀ (g, q) of every matrix (g, p, q), from the fp64 Gram of its short side."""
    values = matrices.double()
    if values.shape[1] <= values.shape[2]:
        u = _leading_vectors(values @ values.mT)
    else:
        v = _leading_vectors(values.mT @ values)
        u = (values @ v[:, :, None]).squeeze(2)
        # Av = 0 only for A = 0: any unit vector will do then.
        u = torch.where((u == 0).all(1, keepdim=True), torch.eye(1, u.shape[1], dtype=u.dtype), u)
        u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True)
    u = u * torch.where(u.gather(1, u.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    return u.to(matrices.dtype), (u[:, None] @ values).squeeze(1).to(matrices.dtype)


def _leading_vectors(grams: Tensor) -> Tensor:
    """The eigenvector (g, p) of the largest eigenvalue of every symmetric matrix (g, p, p), on one thread.

    Between thousands of tiny eigenproblems the threads of one would spend more on meeting than on work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        vectors: Tensor = torch.linalg.eigh(grams).eigenvectors
        return vectors[:, :, -1]
    finally:
        torch.set_num_threads(threads)


def _improve(factors: list[Tensor], mode: int, targets: Tensor, under: Tensor | None) -> None:
    """Set one factor to its exact minimiser; the others are brought to unit norm, so that the step is well scaled."""
    for other in range(len(factors)):
        if other != mode:
            factors[other] = _unit(factors[other])
    rhs = contract(targets, factors, mode)
    if under is None:
        factors[mode] = rhs
        return
    curvature = contract(under, [factor.square() for factor in factors], mode)
    factors[mode] = divide(rhs, curvature, factors[mode])


def divide(rhs: Tensor, curvature: Tensor, present: Tensor) -> Tensor:
    """rhs / curvature; an entry of vanishing curvature keeps its present value, one with nothing observed is 0."""
    floor = torch.finfo(rhs.dtype).eps ** 2 * curvature.amax(dim=1, keepdim=True)
    solved = rhs / torch.where(curvature > floor, curvature, 1.0)
    return torch.where(curvature > floor, solved, torch.where(curvature > 0, present, 0.0))


def _unit(factor: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(factor, dim=1, keepdim=True)
    return factor / torch.where(norm > 0, norm, 1.0)


def _balance(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same products with equal norms of all factors of a column."""
    norms = [torch.linalg.vector_norm(factor, dim=1, keepdim=True, dtype=torch.float64) for factor in factors]
    whole = math.prod(norm.pow(1 / len(factors)) for norm in norms)
    scales = (torch.where(norm > 0, whole / norm, 0.0) for norm in norms)
    return [(factor.double() * scale).to(factor.dtype) for factor, scale in zip(factors, scales)]


def _squared(values: Tensor, under: Tensor | None) -> float:
    seen = values if under is None else values * under.sqrt()
    return float(torch.linalg.vector_norm(seen, dtype=torch.float64)) ** 2
