"""Weights that are an outer product, p_ij = u_i v_j > 0: scale, fit without weights, scale back. Exact.

‖√P ∘ (W − L R)‖ = ‖D_u W D_v − (D_u L)(R D_v)‖ with D_u = diag(√u), D_v = diag(√v): row weights, column weights and
their products need no weighted sweeps.
"""

from dataclasses import dataclass, replace
from itertools import pairwise, repeat

import torch
from torch import Tensor

from lowrank.blocks import Block, read_block
from lowrank.decompositions.registry import Problem
from lowrank.factors import LowRankFactors

#: Rounding of weights that were stored as products.
_ROUNDINGS = 16


@dataclass(frozen=True)
class Flattened:
    """A weighted problem as one without weights.

    Attributes:
        problem: D_u W D_v, no weights.
        rows: (m, 1), √u.
        columns: (n,), √v.
    """

    problem: Problem
    rows: Tensor
    columns: Tensor

    def restore(self, factors: LowRankFactors) -> LowRankFactors:
        """Factors of W from those of D_u W D_v."""
        return LowRankFactors(factors.left / self.rows, factors.right / self.columns)


def flatten(problem: Problem) -> Flattened | None:
    """The problem without its weights when they are an outer product without zeros; None otherwise."""
    weights, w, executor = problem.weights, problem.matrix, problem.executor
    if weights is None:
        return None
    lows, highs, rows, columns = zip(*executor.get(executor.map(_sums, weights.blocks, label=f"weights of {w.name}")))
    if not min(lows) > 0:
        return None
    dtype = w.compute_dtype
    v = torch.stack(columns).sum(0)
    u = torch.cat(rows) / v.sum()
    parts = [(u[a:b], v) for a, b in pairwise(w.row_offsets)]
    apart = executor.get(executor.reduce(max, executor.map(_deviation, weights.blocks, parts)))
    if not apart <= _ROUNDINGS * torch.finfo(dtype).eps * max(highs):
        return None
    left, right = u.sqrt().to(dtype)[:, None], v.sqrt().to(dtype)
    scales = [left[a:b].contiguous() for a, b in pairwise(w.row_offsets)]
    blocks = executor.map(_scaled, w.blocks, scales, repeat(executor.put(right)), label=f"scale {w.name}")
    return Flattened(replace(problem, matrix=w.like(blocks, w.shape[1]), weights=None), left, right)


def _sums(weights: Block) -> tuple[float, float, Tensor, Tensor]:
    p = read_block(weights)
    return float(p.min()), float(p.max()), p.sum(1, dtype=torch.float64), p.sum(0, dtype=torch.float64)


def _deviation(weights: Block, parts: tuple[Tensor, Tensor]) -> float:
    p = read_block(weights)
    u, v = (part.to(p.dtype) for part in parts)
    return float((p - u[:, None] * v).abs().max())


def _scaled(block: Block, rows: Tensor, columns: Tensor) -> Tensor:
    return read_block(block) * read_block(rows) * read_block(columns)
