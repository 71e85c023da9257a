"""Alternating least squares for W ≈ Σₖ Bₖ ⊗ Cₖ: under weights, and with second factors of low rank.

Both half-steps solve normal equations of the rearranged problem ‖√R(P) ∘ (R(W) − Σ vec(Bₖ) vec(Cₖ)ᵀ)‖, the same ones as
weighted ALS of any matrix. For one term they are the closed forms B_ij = ⟨P_ij∘W_ij, C⟩ / ⟨P_ij, C∘C⟩ and
C = Σ B_ij (P_ij∘W_ij) ⊘ Σ B_ij² P_ij.
"""

import operator
from dataclasses import dataclass
from itertools import pairwise, repeat

import torch
from torch import Tensor

from lowrank.blocks import Block, BlockMatrix, read_block
from lowrank.decompositions.descent import Descent
from lowrank.decompositions.registry import Fit, Problem
from lowrank.decompositions.shapes import KroneckerLayout
from lowrank.decompositions.weighted import (
    NormalEquations,
    column_equations,
    pair_products,
    row_equations,
    solve_rows,
)
from lowrank.executor import Executor, Ref
from lowrank.factors.kronecker import KroneckerFactors


@dataclass(frozen=True)
class Rearranged:
    """R(W) and R(P), or their transposes, in row blocks; asks for the normal equations of either side."""

    matrix: BlockMatrix
    weights: BlockMatrix | None
    layout: KroneckerLayout
    executor: Executor

    def equations(self, of_first: bool, other: Tensor) -> NormalEquations:
        """Those of vec(B) (m₁n₁ rows) given vec(C), or of vec(C) (m₂n₂ rows) given vec(B); `other` (K, ...)."""
        return self._of_rows(other) if of_first != self.layout.transposed else self._of_columns(other)

    def squared_residual(self, first: Tensor, second: Tensor) -> float:
        """‖√R(P) ∘ (R(W) − Σ vec(Bₖ) vec(Cₖ)ᵀ)‖² in fp64."""
        left, right = (second, first) if self.layout.transposed else (first, second)
        shared = repeat(self.executor.put(right))
        parts = self.executor.map(_squared_residual, self.matrix.blocks, self._under(), self._rows(left), shared)
        return float(self.executor.get(self.executor.reduce(operator.add, parts)))

    def _of_rows(self, basis: Tensor) -> NormalEquations:
        shared = repeat(self.executor.put(basis))
        refs = self.executor.map(_row_equations, self.matrix.blocks, self._under(), shared, label="kronecker rows")
        parts: list[NormalEquations] = self.executor.get(refs)
        return NormalEquations(torch.cat([p.grams for p in parts]), torch.cat([p.rhs for p in parts]))

    def _of_columns(self, left: Tensor) -> NormalEquations:
        refs = self.executor.map(
            _column_equations, self.matrix.blocks, self._under(), self._rows(left), label="kronecker columns"
        )
        found: NormalEquations = self.executor.get(self.executor.reduce(operator.add, refs))
        return found

    def _under(self) -> "repeat[None] | tuple[Ref, ...]":
        return repeat(None) if self.weights is None else self.weights.blocks

    def _rows(self, left: Tensor) -> list[Tensor]:
        return [left[:, a:b].T.contiguous() for a, b in pairwise(self.matrix.row_offsets)]


def alternate(problem: Problem, rearranged: Rearranged, first: Tensor, second: Tensor) -> Fit:
    """Alternate exact minimisers from vec(B) `first` (K, m₁n₁) and vec(C) `second` (K, m₂n₂).

    With an inner rank the step of Cₖ, the other terms fixed, is the truncated SVD of its unconstrained minimiser: the
    objective is const + ‖Bₖ‖² ‖Cₖ − Cₖ*‖². Under weights it is a step of weighted ALS on both halves of Cₖ.
    """
    options, layout = problem.options, rearranged.layout
    inner = None if options.inner_rank is None else _cut(second.view(-1, *layout.second), options.inner_rank)
    weighted = rearranged.weights is not None
    watch = Descent(options.n_iter, options.tol, first.dtype)
    while True:
        if inner is not None:
            second = torch.bmm(*inner).flatten(1)
        of_first = rearranged.equations(True, second)
        first = of_first.solve(0.0, first.T.contiguous()).T
        first, second, scale = _balance(first, second)
        of_second = rearranged.equations(False, first)
        if inner is None:
            second = of_second.solve(0.0, second.T.contiguous()).T
        else:
            inner = _inner_step(of_second, (inner[0], inner[1] * scale.view(-1, 1, 1)), weighted)
            second = torch.bmm(*inner).flatten(1)
        error = (rearranged.squared_residual(first, second) / problem.total_energy) ** 0.5
        if watch.add(error):
            break
    factors = _factors(first, second, inner, layout)
    return Fit(
        factors=factors,
        n_iter=len(watch.history),
        converged=watch.converged,
        reason=watch.reason + _unobserved(of_first, of_second),
        history=tuple(watch.history),
    )


def _factors(
    first: Tensor, second: Tensor, inner: tuple[Tensor, Tensor] | None, layout: KroneckerLayout
) -> KroneckerFactors:
    b = first.reshape(-1, *layout.first).contiguous()
    if inner is None:
        return KroneckerFactors(b, second.reshape(-1, *layout.second).contiguous(), None, layout.size)
    return KroneckerFactors(b, inner[0].contiguous(), inner[1].contiguous(), layout.size)


def _unobserved(of_first: NormalEquations, of_second: NormalEquations) -> str:
    """How many entries of B and of C no observed entry of W meets; they are 0."""
    first, second = (int((side.grams == 0).all(1).sum()) for side in (of_first, of_second))
    if first + second == 0:
        return ""
    return f"; {first} entries of every first and {second} of every second factor have nothing observed and are 0"


def _balance(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale every term so that ‖Bₖ‖ = ‖Cₖ‖; returns also what Cₖ was multiplied by."""
    ours, theirs = (torch.linalg.vector_norm(side, dim=1, dtype=torch.float64) for side in (first, second))
    scale = torch.where((ours > 0) & (theirs > 0), (ours / theirs).sqrt(), 1.0)
    grow = scale.to(first.dtype)[:, None]
    return first / grow, second * grow, grow


def _cut(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L (K, m₂, r) and R (K, r, n₂) of the best rank-r approximation of every matrix, singular values shared evenly."""
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    root = s[:, :rank].sqrt()
    left, right = u[:, :, :rank] * root[:, None], root[:, :, None] * vh[:, :rank]
    return left.to(matrices.dtype), right.to(matrices.dtype)


def _inner_step(equations: NormalEquations, inner: tuple[Tensor, Tensor], weighted: bool) -> tuple[Tensor, Tensor]:
    """Improve Cₖ = Lₖ Rₖ term by term, the others fixed: G_kk Cₖ = b_k − Σ_{l≠k} G_kl C_l, entry by entry."""
    left, right = inner[0].clone(), inner[1].clone()
    terms, shape = len(left), (left.shape[1], right.shape[2])
    pairs = torch.triu_indices(terms, terms)
    index = torch.zeros(terms, terms, dtype=torch.long)
    index[pairs[0], pairs[1]] = index[pairs[1], pairs[0]] = torch.arange(pairs.shape[1])
    for k in range(terms):
        c = torch.bmm(left, right).flatten(1)
        others = [other for other in range(terms) if other != k]
        cross = equations.grams[:, index[k, others]] * c[others].T
        targets = (equations.rhs[:, k] - cross.sum(1)).view(shape)
        weights = equations.grams[:, index[k, k]].view(shape)
        if weighted:
            left[k] = solve_rows(weights, targets, right[k], 0.0, left[k])
            right[k] = solve_rows(weights.T, targets.T, left[k].T, 0.0, right[k].T).T
        elif float(weights[0, 0]) > 0:
            best = _cut((targets / weights)[None], left.shape[2])
            left[k], right[k] = best[0][0], best[1][0]
    return left, right


def _row_equations(block: Block, weights: Block | None, basis: Tensor) -> NormalEquations:
    values, basis = read_block(block), read_block(basis)
    if weights is None:
        return NormalEquations(pair_products(basis).sum(0).repeat(len(values), 1), values @ basis.T)
    under = read_block(weights)
    return row_equations(under, under * values, basis)


def _column_equations(block: Block, weights: Block | None, left: Tensor) -> NormalEquations:
    values, left = read_block(block), read_block(left)
    if weights is None:
        grams = pair_products(left.T).sum(0).repeat(values.shape[1], 1)
        return NormalEquations(grams, (left.T @ values).T.contiguous())
    under = read_block(weights)
    return column_equations(under, under * values, left)


def _squared_residual(block: Block, weights: Block | None, left: Tensor, right: Tensor) -> Tensor:
    residual = read_block(left) @ read_block(right)
    residual = residual.sub_(read_block(block))
    if weights is not None:
        residual = residual.mul_(read_block(weights).sqrt())
    norm: Tensor = torch.linalg.vector_norm(residual, dtype=torch.float64)
    return norm.square()
