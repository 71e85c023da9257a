"""Alternating least squares under weights.

    minimise ‖√P ∘ (W − L R)‖² + λ Σ_i s_i ‖l_i‖² + λ Σ_j s_j ‖r_j‖²,  s = observed entries of the row or column, or 1

A half step works on the residual E = P ∘ (W − L R): every row moves by the minimiser of its own normal equations, whose
matrices come out of one product (see `weighted`). Above rank 64 it moves in groups of coordinates, so that the packed
matrices stay r·32 instead of r²/2 numbers per row. The columns' equations add over row blocks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import pairwise, repeat

import torch
from torch import Tensor

from lowrank.blocks import Block, BlockMatrix, read_block
from lowrank.decompositions.nonnegative import nonnegative_start, nonnegative_step
from lowrank.decompositions.registry import Fit, Problem
from lowrank.decompositions.weighted import NormalEquations, column_equations, pair_products
from lowrank.errors import DecompositionError
from lowrank.executor import Ref
from lowrank.factors import LowRankFactors, SVDFactors

#: Up to this rank all coordinates of a row move at once.
_WHOLE_RANK = 64
#: Coordinates that move together above it.
_GROUP = 32
#: Numbers per temporary of a slice of rows.
_SLICE_ENTRIES = 2**22
#: Components of the start that W with zeros for missing entries does not show: this share of the largest, at random.
_FILL = 1e-3


@dataclass
class Progress:
    """Objectives of a fit, sweep by sweep, and when it comes to rest."""

    total: float
    tol: float
    dtype: torch.dtype
    note: str = ""
    errors: list[float] = field(default_factory=list)
    objective: float = math.inf
    resting: bool = False

    def rest(self, error: float, penalty: float) -> bool:
        """Take in ‖√P ∘ (W − L R)‖² and the penalty after a sweep; True when the sweep gained too little to go on."""
        after = error + penalty
        slack = 100 * torch.finfo(self.dtype).eps * self.total
        assert after <= self.objective + slack, f"ALS: the objective rose from {self.objective} to {after}"
        self.resting = self.objective - after <= self.tol * self.total
        self.objective = after
        self.errors.append(math.sqrt(max(error, 0.0) / self.total))
        return self.resting

    def fit(self, factors: LowRankFactors) -> Fit:
        """The fit of these factors, with the reason why it ended."""
        ended = "a sweep gained less than tol" if self.resting else "n_iter sweeps were run before it came to rest"
        return Fit(
            factors=factors,
            n_iter=len(self.errors),
            converged=self.resting,
            reason=ended + self.note,
            history=tuple(self.errors),
        )


@dataclass(frozen=True)
class _ColumnPart:
    """Normal equations of the columns, squared error and penalty of the rows, from some row blocks."""

    equations: NormalEquations
    loss: float
    penalty: float

    def __add__(self, other: _ColumnPart) -> _ColumnPart:
        equations = self.equations + other.equations
        return _ColumnPart(equations, self.loss + other.loss, self.penalty + other.penalty)


@dataclass(frozen=True)
class _Step:
    """How coordinates move: λ, whether it counts per observed entry, and whether factors are >= 0."""

    ridge: float
    per_entry: bool
    nonnegative: bool

    def shifts(self, counts: Tensor) -> Tensor:
        """λ of every row that has so many observed entries, (rows,) fp64."""
        return self.ridge * (counts.double() if self.per_entry else torch.ones_like(counts, dtype=torch.float64))

    def move(self, equations: NormalEquations, x: Tensor, shifts: Tensor) -> Tensor:
        """The new x (rows, g), from the equations of a change of x."""
        gradient = equations.rhs - shifts[:, None].to(x.dtype) * x
        if self.nonnegative:
            return nonnegative_step(_unpacked(equations.grams, x.shape[1]), gradient, x, shifts.to(x.dtype))
        return x + NormalEquations(equations.grams, gradient).solve(shifts, torch.zeros_like(x))


def fit_weighted(problem: Problem, weights: BlockMatrix, svd: SVDFactors) -> Fit:
    """Sweeps over rows and columns from the SVD of W with zeros for what is missing."""
    w, executor, options = problem.matrix, problem.executor, problem.options
    step = _Step(options.ridge, options.weighted_ridge, options.nonnegative)
    counts = executor.map(_row_counts, weights.blocks, label=f"als {w.name}")
    seen = executor.get(executor.reduce(operator.add, executor.map(_column_counts, weights.blocks)))
    rows = torch.cat(executor.get(list(counts)))
    progress = Progress(problem.total_energy, options.tol, w.compute_dtype, _empty(problem, rows, seen))
    left, right = _start(svd, float(seen.sum()) / (w.shape[0] * w.shape[1]), problem)
    right = right * (seen > 0)
    blocks: Sequence[Ref] = [executor.put(left[a:b].contiguous()) for a, b in pairwise(w.row_offsets)]
    for _ in range(options.n_iter):
        shared = repeat(executor.put(right))
        blocks = executor.map(
            partial(_row_step, step), w.blocks, weights.blocks, blocks, counts, shared, label=f"als {w.name}"
        )
        right, error, penalty = _column_step(step, problem, blocks, counts, right, seen)
        if progress.rest(error, penalty):
            break
    left = torch.cat([read_block(block) for block in executor.get(list(blocks))])
    return progress.fit(LowRankFactors(left, right))


def _start(svd: SVDFactors, share: float, problem: Problem) -> tuple[Tensor, Tensor]:
    """L (m, r) and R (r, n), scaled up for the missing share; components that W does not show are filled at random."""
    full = SVDFactors(svd.u, svd.s / share, svd.vh)
    if problem.options.nonnegative:
        return nonnegative_start(full)
    left, right = full.balanced()
    drawn = torch.Generator().manual_seed(problem.seed)
    noise = torch.randn(right.shape, generator=drawn, dtype=torch.float64).to(right.dtype) / right.shape[1] ** 0.5
    sizes = right.norm(dim=1, keepdim=True)
    floor = _FILL * sizes.max()
    return left, torch.where(sizes > floor, right, floor * noise)


def _row_step(step: _Step, block: Block, weights: Block, left: Tensor, counts: Tensor, right: Tensor) -> Tensor:
    """The new rows of L, a slice of rows at a time."""
    values, under, basis = read_block(block), read_block(weights), read_block(right)
    groups = _groups(len(basis))
    pairs = [pair_products(basis[group]) for group in groups]
    size = max(1, _SLICE_ENTRIES // max(pairs[0].shape))
    found = []
    for low in range(0, len(values), size):
        part = slice(low, low + size)
        x, p, shifts = read_block(left)[part].clone(), under[part], step.shifts(counts[part])
        rest = p * (values[part] - x @ basis)
        for group, products in zip(groups, pairs):
            before = x[:, group]
            after = step.move(NormalEquations(p @ products, rest @ basis[group].T), before, shifts)
            if len(groups) > 1:
                rest -= p * ((after - before) @ basis[group])
            x[:, group] = after
        found.append(x * (counts[part, None] > 0))
    return torch.cat(found)


def _column_step(
    step: _Step, problem: Problem, blocks: Sequence[Ref], counts: Sequence[Ref], right: Tensor, seen: Tensor
) -> tuple[Tensor, float, float]:
    """The new R, ‖√P ∘ (W − L R)‖² with it, and the penalty of both factors."""
    assert problem.weights is not None
    w, executor, shifts = problem.matrix, problem.executor, step.shifts(seen)
    error = penalty = 0.0
    for group in _groups(len(right)):
        solve = partial(_column_part, step, group)
        shared = repeat(executor.put(right))
        parts = executor.map(solve, w.blocks, problem.weights.blocks, blocks, counts, shared, label=f"als {w.name}")
        whole: _ColumnPart = executor.get(executor.reduce(operator.add, parts))
        before = right[group].T
        after = step.move(whole.equations, before, shifts) * (seen[:, None] > 0)
        error, penalty = whole.loss - _gain(whole.equations, after - before), whole.penalty
        right = torch.cat([right[: group.start], after.T, right[group.stop :]])
    return right, error, penalty + float(shifts @ right.double().square().sum(0))


def _column_part(
    step: _Step, group: slice, block: Block, weights: Block, left: Tensor, counts: Tensor, right: Tensor
) -> _ColumnPart:
    values, under, x, basis = (read_block(part) for part in (block, weights, left, right))
    count = basis[group].shape[0]
    size = max(1, _SLICE_ENTRIES // max(values.shape[1], count * (count + 1) // 2))
    parts = []
    for low in range(0, len(values), size):
        part = slice(low, low + size)
        rest = values[part] - x[part] @ basis
        weighted = under[part] * rest
        loss = float((rest * weighted).sum(1).sum(dtype=torch.float64))
        penalty = float(step.shifts(counts[part]) @ x[part].double().square().sum(1))
        parts.append(_ColumnPart(column_equations(under[part], weighted, x[part, group]), loss, penalty))
    return reduce(operator.add, parts)


def _gain(equations: NormalEquations, change: Tensor) -> float:
    """How much a change of the columns lowers the squared error: Σ_j 2 b_jᵀd_j − d_jᵀG_j d_j."""
    products = pair_products(change.T)
    across = torch.triu_indices(change.shape[1], change.shape[1])
    counted = torch.where(across[0] == across[1], 1.0, 2.0).double()  # a packed triangle holds a ≠ b once
    curvature = (products * equations.grams).sum(0, dtype=torch.float64) @ counted
    return float(2 * (equations.rhs * change).sum(dtype=torch.float64) - curvature)


def _groups(rank: int) -> list[slice]:
    size = rank if rank <= _WHOLE_RANK else _GROUP
    return [slice(low, min(low + size, rank)) for low in range(0, rank, size)]


def _unpacked(grams: Tensor, r: int) -> Tensor:
    full = grams.new_zeros(len(grams), r, r)
    rows, columns = torch.triu_indices(r, r)
    full[:, rows, columns] = grams
    full[:, columns, rows] = grams
    return full


def _row_counts(weights: Block) -> Tensor:
    return (read_block(weights) > 0).sum(1)


def _column_counts(weights: Block) -> Tensor:
    return (read_block(weights) > 0).sum(0)


def _empty(problem: Problem, rows: Tensor, columns: Tensor) -> str:
    """What the report says of rows and columns that nothing was observed of.

    Raises:
        DecompositionError: when there are some and the ridge is 0.
    """
    found = {"rows": (rows == 0).nonzero()[:, 0], "columns": (columns == 0).nonzero()[:, 0]}
    found = {what: numbers for what, numbers in found.items() if len(numbers)}
    if not found:
        return ""
    text = " and ".join(f"{len(numbers)} {what} (first: {int(numbers[0])})" for what, numbers in found.items())
    if problem.options.ridge == 0:
        name = problem.matrix.name
        raise DecompositionError(
            f"decompose {name} by als: {text} have no observed entry, which ridge = 0 leaves undetermined. "
            "Set ridge > 0 for zeros there, or leave them out."
        )
    return f"; {text} have no observed entry: their factors are 0"
