"""Weighted least squares for every row at once: all normal matrices come out of one product with the weights.

Row i of X minimises Σ_j p_ij (a_ij − x_i z_j)² + λ_i ‖x_i‖². Its normal matrix Σ_j p_ij z_j z_jᵀ is linear in p_i, so
those of all rows are G = P·(Zᵀ•Zᵀ), a product of m×n by n×r(r+1)/2 (the upper triangles only), beside b = (P∘A) Zᵀ.
The columns' normal equations add over row blocks. Weighted ALS uses this with the weights P; a Hadamard factor with
P∘H², where H is the other factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.kernels import solve_packed

#: Packed normal matrices of one slice of rows, in numbers: they stay small beside a block.
_SLICE_ENTRIES = 4 * 2**20


@dataclass(frozen=True)
class NormalEquations:
    """G_i x_i = b_i for every row i; equations of disjoint sets of observations add.

    Attributes:
        grams: (rows, r(r+1)/2), the upper triangles of G_i, row by row.
        rhs: (rows, r), the b_i.
    """

    grams: Tensor
    rhs: Tensor

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(self.grams + other.grams, self.rhs + other.rhs)

    def solve(self, ridge: float | Tensor, start: Tensor) -> Tensor:
        """Minimise xᵀ(G_i + λ_i I)x − 2 b_iᵀx for every row, from `start`, in fp64.

        One proximal Newton step x = s + (G_i + (λ_i + δ_i) I)⁻¹ (b_i − (G_i + λ_i I) s), where δ_i is what λ_i lacks
        of a few roundings of tr G_i: the exact minimiser where G_i + λ_i I has full rank, and where it has not a point
        that is never worse than `start`. Rows without observations (G_i = 0) become 0.

        Args:
            ridge: λ >= 0, one for all or one per row (rows,).
            start: (rows, r), the present solution; zeros when there is none.

        Returns:
            (rows, r) in the dtype of `grams`.
        """
        shifts = torch.as_tensor(ridge, dtype=torch.float64).expand(len(self.rhs))
        return solve_packed(self.grams, self.rhs, shifts, start)


def pair_products(basis: Tensor) -> Tensor:
    """Zᵀ•Zᵀ: the products z_a z_b, a ≤ b, of every column z of `basis` (r, n); returns (n, r(r+1)/2)."""
    r, n = basis.shape
    products, low = basis.new_empty(r * (r + 1) // 2, n), 0
    for a in range(r):
        torch.mul(basis[a], basis[a:], out=products[low : low + r - a])
        low += r - a
    return products.T


def row_equations(weights: Tensor, targets: Tensor, basis: Tensor) -> NormalEquations:
    """The normal equations of every row of X in P∘(A − X Z).

    Args:
        weights: (rows, n), P >= 0.
        targets: (rows, n), P∘A.
        basis: (r, n), Z.
    """
    return NormalEquations(weights @ pair_products(basis), targets @ basis.T)


def column_equations(weights: Tensor, targets: Tensor, left: Tensor) -> NormalEquations:
    """The part of one row block in the normal equations of every column of Z in P∘(A − X Z); it adds over blocks.

    Args:
        weights: (rows, n), P >= 0.
        targets: (rows, n), P∘A.
        left: (rows, r), the rows of X.
    """
    r = left.shape[1]
    # Into rows of its own: the solver reads one packed matrix at a time.
    grams = torch.mm(weights.T, pair_products(left.T), out=left.new_empty(weights.shape[1], r * (r + 1) // 2))
    # (XᵀT)ᵀ: BLAS walks the wide block along its rows.
    return NormalEquations(grams, (left.T @ targets).T.contiguous())


def solve_rows(
    weights: Tensor, targets: Tensor, basis: Tensor, ridge: float | Tensor, start: Tensor | None = None
) -> Tensor:
    """Rows x_i that minimise Σ_j p_ij (a_ij − x_i z_j)² + λ_i ‖x_i‖², a slice of rows at a time.

    Args:
        weights: (rows, n), P >= 0, fp32 or fp64.
        targets: (rows, n), P∘A.
        basis: (r, n), Z.
        ridge: λ >= 0, one for all or one per row (rows,).
        start: (rows, r), what singular rows fall back to; None starts from 0.

    Returns:
        (rows, r) in the dtype of `basis`.

    Source: the row-wise normal equations of weighted low-rank approximation, Srebro and Jaakkola 2003, section 2.
    """
    (rows, r), pairs = (len(weights), len(basis)), pair_products(basis)
    shifts = torch.as_tensor(ridge, dtype=torch.float64).expand(rows)
    start = basis.new_zeros(rows, r) if start is None else start
    step = max(1, _SLICE_ENTRIES // pairs.shape[1])
    found = []
    for low in range(0, rows, step):
        part = slice(low, low + step)
        equations = NormalEquations(weights[part] @ pairs, targets[part] @ basis.T)
        found.append(equations.solve(shifts[part], start[part]))
    return torch.cat(found)
