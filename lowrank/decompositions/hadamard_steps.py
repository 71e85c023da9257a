"""The moves of a Hadamard fit: exact block steps, rebalancing and starts, block by block.

With H = C₂D₂ held, row i of C₁ solves a weighted least-squares problem with weights p_i∘h_i² and targets p_i∘h_i∘w_i,
and so does column j of D₁. One task per row block solves its rows of C₁ and returns its part of the normal equations
of D₁, N·r(r+1)/2 + N·r numbers that add over blocks.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, repeat
from typing import Any

import torch
from torch import Tensor

from lowrank.blocks import Block, BlockMatrix, read_block
from lowrank.decompositions.gaussian import gaussian_rows
from lowrank.decompositions.weighted import NormalEquations, column_equations, pair_products
from lowrank.executor import Executor, Ref
from lowrank.factors import HadamardFactors

#: Entries of one row chunk: its temporaries stay in the cache of a core.
_CHUNK_ENTRIES, _CHUNK_ROWS = 2**17, 128
#: Extra columns and power steps of the subspace that a start is made from.
_OVERSAMPLING, _POWER_STEPS = 8, 3
#: Relative size of the noise that a further start puts on its all-one factor.
_NOISE = 0.1


@dataclass(frozen=True, kw_only=True)
class Target:
    """min ‖√P∘(W/s − H₁∘H₂)‖² + λ Σ_k (Σ_i p_i ‖c_k,i‖² + Σ_j p_j ‖d_k,j‖²), H_k = C_k D_k.

    Attributes:
        matrix: W.
        weights: P, or None for all ones.
        scale: s, the root mean square of W under P, so that λ has no unit.
        rows: (m,) the row sums p_i of P, fp64.
        columns: (n,) the column sums p_j of P, fp64.
        ridge: λ >= 0.
        executor: where the blocks are read.
    """

    matrix: BlockMatrix
    weights: BlockMatrix | None
    scale: float
    rows: Tensor
    columns: Tensor
    ridge: float
    executor: Executor

    @property
    def energy(self) -> float:
        """‖√P∘W/s‖² = Σ P."""
        return float(self.rows.sum())

    def map(self, fn: Any, *iterables: Any, label: str) -> list[Ref]:
        """`executor.map` of `fn` over the blocks of W and P (None without weights), and what else is given."""
        weights = repeat(None) if self.weights is None else self.weights.blocks
        return self.executor.map(fn, self.matrix.blocks, weights, *iterables, label=f"{label} {self.matrix.name}")

    def slices(self, left: Tensor) -> list[Tensor]:
        """The rows of `left` (m, ...) that belong to each block."""
        return [left[a:b].clone() for a, b in pairwise(self.matrix.row_offsets)]

    def penalty(self, f: HadamardFactors) -> float:
        """λ Σ_k (Σ_i p_i ‖c_k,i‖² + Σ_j p_j ‖d_k,j‖²)."""
        if self.ridge == 0:
            return 0.0
        left = f.c1.square().sum(1) + f.c2.square().sum(1)
        right = f.d1.square().sum(0) + f.d2.square().sum(0)
        return self.ridge * float(self.rows @ left.double() + self.columns @ right.double())


@dataclass(frozen=True)
class _Step:
    """What a row block finds: its rows of C, its part of D's equations, and its residual² with the old D."""

    left: Tensor
    equations: NormalEquations
    residual: float

    def __add__(self, other: _Step) -> _Step:
        left = torch.cat([self.left, other.left])
        return _Step(left, self.equations + other.equations, self.residual + other.residual)


def sweep(target: Target, f: HadamardFactors) -> tuple[HadamardFactors, float]:
    """C₁, D₁, C₂ and D₂ in turn, each the exact minimiser given the others; returns the residual² too."""
    c1, d1, _ = _improve(target, f.c1, f.d1, f.c2, f.d2, measured=False)
    c2, d2, residual = _improve(target, f.c2, f.d2, c1, d1, measured=True)
    return rebalance(HadamardFactors(c1, d1, c2, d2), target.rows, target.columns), residual


def rebalance(f: HadamardFactors, rows: Tensor, columns: Tensor) -> HadamardFactors:
    """The same matrix with the least penalty over row, column and component scalings.

    Row i: c₁ and c₂ may trade a factor, likewise column j of D₁ and D₂, and component a of C_k and D_k. Equal norms
    (for components weighted by `rows` (m,) and `columns` (n,)) are the exact minimum along each of these lines, and
    the scalings are continuous in the factors, so that extrapolation through them keeps its meaning.
    """
    c, d = torch.stack([f.c1, f.c2]), torch.stack([f.d1, f.d2])
    t = _even(*c.norm(dim=2))
    c = c * torch.stack([t, 1 / t])[:, :, None]
    t = _even(*d.norm(dim=1))
    d = d * torch.stack([t, 1 / t])[:, None, :]
    heavy = rows.sqrt().to(c.dtype)[:, None], columns.sqrt().to(c.dtype)
    t = _even((c * heavy[0]).norm(dim=1), (d * heavy[1]).norm(dim=2))
    c, d = c * t[:, None, :], d / t[:, :, None]
    return HadamardFactors(c[0], d[0], c[1], d[1])


def root_start(target: Target, rank: int, seed: int) -> HadamardFactors:
    """C₁D₁ and C₂D₂ from the leading subspaces of sign(W)∘√|W| and √|W|, whose product is W."""
    signed = _leading(target, rank, seed, _signed_root)
    return rebalance(HadamardFactors(*signed, *_leading(target, rank, seed, _root)), target.rows, target.columns)


def noisy_start(target: Target, rank: int, seed: int, stream: int) -> HadamardFactors:
    """C₁D₁ from the leading subspace of W, C₂D₂ all ones with a little noise."""
    (m, n), dtype = target.matrix.shape, target.matrix.compute_dtype
    c2 = _NOISE * gaussian_rows(0, m, rank, seed, dtype, 2 * stream)
    d2 = _NOISE * gaussian_rows(0, n, rank, seed, dtype, 2 * stream + 1).T
    c2[:, 0] += 1.0
    d2[0] += 1.0
    c1, d1 = _leading(target, rank, seed, _itself)
    return rebalance(HadamardFactors(c1, d1, c2, d2.contiguous()), target.rows, target.columns)


def _improve(
    target: Target, c: Tensor, d: Tensor, other_c: Tensor, other_d: Tensor, measured: bool
) -> tuple[Tensor, Tensor, float]:
    """C then D of one factor, with the other one held; the residual² that is left, if it is `measured`."""
    executor, ridge = target.executor, target.ridge
    shared = executor.put((d, other_d, target.scale))
    lefts = (target.slices(left) for left in (c, other_c, ridge * target.rows))
    parts = target.map(_block_step, *lefts, repeat(shared), repeat(measured), label="hadamard step")
    found: _Step = executor.get(executor.reduce(operator.add, parts))
    before = d.T.contiguous()
    after = found.equations.solve(ridge * target.columns, before)
    residual = found.residual
    if measured:
        residual -= _gain(found.equations, before, after)
    return found.left, after.T.contiguous(), max(0.0, residual)


def _block_step(
    block: Block, weights: Block | None, left: Tensor, other_left: Tensor, ridge: Tensor, shared: Any, measured: bool
) -> _Step:
    right, other_right = (read_block(d) for d in shared[:2])
    values, left, other_left = read_block(block), read_block(left), read_block(other_left)
    under, inverse = None if weights is None else read_block(weights), 1.0 / shared[2]
    pairs, lefts, residual = pair_products(right), [], 0.0
    total: NormalEquations | None = None
    step = max(_CHUNK_ROWS, _CHUNK_ENTRIES // values.shape[1])
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        other = other_left[rows] @ other_right
        targets = (other * values[rows]).mul_(inverse)
        quadratic = other.square()
        if under is not None:
            targets.mul_(under[rows])
            quadratic.mul_(under[rows])
        found = NormalEquations(quadratic @ pairs, targets @ right.T).solve(ridge[rows], left[rows])
        if measured:
            misfit = (found @ right).mul_(other).sub_(values[rows], alpha=inverse)
            residual += _squared_sum(misfit if under is None else misfit.mul_(under[rows].sqrt()))
        part = column_equations(quadratic, targets, found)
        total = part if total is None else total + part
        lefts.append(found)
    assert total is not None
    return _Step(torch.cat(lefts), total, residual)


def _squared_sum(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dim=1).double().square().sum())


def _gain(equations: NormalEquations, before: Tensor, after: Tensor) -> float:
    """How much Σ_i x_iᵀ G_i x_i − 2 b_iᵀ x_i, the squared error up to a constant, falls; differences first, in fp64."""
    r = before.shape[1]
    twice = torch.full((r, r), 2.0, dtype=torch.float64).fill_diagonal_(1.0)[tuple(torch.triu_indices(r, r))]
    pairs = pair_products(before.T.double()) - pair_products(after.T.double())
    square = (equations.grams * pairs).sum(0) @ twice
    return float(square - 2 * (equations.rhs * (before.double() - after)).sum())


def _even(a: Tensor, b: Tensor) -> Tensor:
    """t with t·a = b/t, and 1 where there is none."""
    ratio = (b.double() / a.double()).sqrt()
    return torch.where((a > 0) & (b > 0), ratio, 1.0).to(a.dtype)


def _leading(target: Target, rank: int, seed: int, view: Any) -> tuple[Tensor, Tensor]:
    """C (m, r) and D (r, n) from the leading right subspace of view(W), by subspace iteration without a copy of W."""
    executor, n = target.executor, target.matrix.shape[1]
    size = min(rank + _OVERSAMPLING, n)
    basis = gaussian_rows(0, n, size, seed, target.matrix.compute_dtype)
    for _ in range(_POWER_STEPS):
        shared = executor.put(basis)
        parts = target.map(partial(_gram_product, view, target.scale), repeat(shared), label="hadamard start")
        basis = torch.linalg.qr(executor.get(executor.reduce(operator.add, parts))).Q
    shared = executor.put(basis.contiguous())
    found = target.map(partial(_product, view, target.scale), repeat(shared), label="hadamard start")
    u, s, vh = torch.linalg.svd(torch.cat(executor.get(found)).double(), full_matrices=False)
    # Unit rows of D, not √S on both sides: a component with σ = 0 stays within reach of the first C-step.
    c, d = u[:, :rank] * s[:rank], vh[:rank] @ basis.T.double()
    return c.to(basis.dtype), d.to(basis.dtype)


def _gram_product(view: Any, scale: float, block: Block, weights: Block | None, basis: Tensor) -> Tensor:
    seen = _filled(view, scale, block, weights)
    return ((seen @ read_block(basis)).T @ seen).T.contiguous()


def _product(view: Any, scale: float, block: Block, weights: Block | None, basis: Tensor) -> Tensor:
    return _filled(view, scale, block, weights) @ read_block(basis)


def _filled(view: Any, scale: float, block: Block, weights: Block | None) -> Tensor:
    """view(W/s), with the mean of the observed entries of its row in place of every missing one."""
    seen: Tensor = view(read_block(block) / scale)
    if weights is None:
        return seen
    observed = read_block(weights) > 0
    count = observed.sum(1, keepdim=True).clamp(min=1)
    mean = (seen * observed).sum(1, keepdim=True) / count
    return torch.where(observed, seen, mean)


def _signed_root(values: Tensor) -> Tensor:
    return values.abs().sqrt_().copysign_(values)


def _root(values: Tensor) -> Tensor:
    return values.abs().sqrt_()


def _itself(values: Tensor) -> Tensor:
    return values
