"""The rearrangement R(W) of a matrix in blocks: its row (i, j) is vec of block W_ij, and Kronecker products are its
terms of rank one. It is a `BlockMatrix` like any other, so that every SVD of this package runs on it.

Source: Van Loan & Pitsianis 1993, "Approximation with Kronecker products", Theorem 2.1.
"""

import math

import torch
from torch import Tensor

from lowrank.blocks import BlockMatrix
from lowrank.decompositions.krylov import block_krylov
from lowrank.decompositions.regions import regroup
from lowrank.decompositions.registry import Fit, Problem
from lowrank.decompositions.shapes import KroneckerLayout
from lowrank.executor import Executor
from lowrank.factors import SVDFactors
from lowrank.options import KrylovOptions
from lowrank.rank import RankRule


def rearrange(
    matrix: BlockMatrix, layout: KroneckerLayout, executor: Executor, dtype: torch.dtype | None = None
) -> BlockMatrix:
    """R(W), or R(W)ᵀ where `layout.transposed`, in as many row blocks as W; lazy where W is stored.

    `dtype` is fp32 or fp64, None the compute dtype of W.

    Example:
        >>> from lowrank.executor import SerialExecutor
        >>> w = BlockMatrix.from_tensor("w", torch.arange(8.0).view(2, 4))
        >>> rearrange(w, KroneckerLayout((2, 4), (2, 2)), SerialExecutor()).to_tensor(SerialExecutor())
        tensor([[0., 1.],
                [2., 3.],
                [4., 5.],
                [6., 7.]])
    """
    regions, offsets = layout.regions(len(matrix.blocks))
    dtype = dtype or matrix.compute_dtype
    refs = regroup(matrix, regions, dtype, executor, label=f"rearrange {matrix.name}")
    shape = math.prod(layout.first), math.prod(layout.second)
    shape = shape[::-1] if layout.transposed else shape
    return BlockMatrix(matrix.name, tuple(refs), tuple(offsets), shape, dtype)


def nearest(
    rearranged: BlockMatrix, rule: RankRule, energy: float, seed: int, executor: Executor, options: KrylovOptions
) -> Fit:
    """The truncated SVD of R(W) (or its transpose), missing entries at 0."""
    problem = Problem(
        matrix=rearranged,
        weights=None,
        rule=rule,
        total_energy=energy,
        seed=seed,
        options=options,
        executor=executor,
    )
    return block_krylov(problem)


def sides(found: Fit, layout: KroneckerLayout) -> tuple[Tensor, Tensor, Tensor]:
    """vec(Bₖ) (K, m₁n₁) and vec(Cₖ) (K, m₂n₂), orthonormal rows each, and σ (K,), of an SVD of R(W)."""
    factors = found.factors
    assert isinstance(factors, SVDFactors)
    u, vh = factors.u.T, factors.vh
    return (vh, u, factors.s) if layout.transposed else (u, vh, factors.s)
