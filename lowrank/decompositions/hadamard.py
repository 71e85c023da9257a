"""The Hadamard product of two low-rank matrices, W ≈ (C₁D₁)∘(C₂D₂), by exact block steps with extrapolation.

Its rank can reach r² with the numbers of an SVD of rank 2r. Every factor is an exact weighted least-squares problem
with the other three held (`hadamard_steps`), so that each sweep lowers the objective. Plain sweeps creep along
valleys; each one here starts from a point beyond the last step, and one that would raise the objective is thrown away.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, repeat

import torch
from torch import Tensor

from lowrank.blocks import Block, BlockMatrix, read_block
from lowrank.decompositions.gaussian import gaussian_rows
from lowrank.decompositions.hadamard_steps import Target, noisy_start, root_start, sweep
from lowrank.decompositions.registry import Fit, Method, Problem
from lowrank.decompositions.svd import short_side
from lowrank.errors import DecompositionError
from lowrank.executor import Executor
from lowrank.factors import HadamardFactors
from lowrank.options import HadamardOptions

#: Extrapolation S + β(S − S′): β at first and after a discarded sweep, its growth, and its largest value.
_BETA, _GROWTH, _MOST = 0.5, 1.05, 1.0
#: Sweeps in a row below `tol`, or without a better held-out error, that end a fit.
_PATIENCE, _HELD_OUT_PATIENCE = 3, 20
#: Relative error of one entry of H₁∘H₂ in roundings, for the assertion that a sweep only raises the error by those.
_SLACK = 16.0
_STUCK = "rounding hides what a sweep still gains"
#: Streams of the seed: noise of the starts takes small ones.
_HELD_OUT_STREAM = 2**19


@dataclass(frozen=True, kw_only=True)
class _Descent:
    """Where one start ended: normalised factors, its objective and held-out error (or inf), and how it went."""

    factors: HadamardFactors
    objective: float
    held_out: float
    history: tuple[float, ...]
    converged: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class _HeldOut:
    """Observed entries that no step sees: V = P where they are, else 0, and ‖√V∘W‖²."""

    matrix: BlockMatrix
    weights: BlockMatrix
    energy: float
    scale: float
    executor: Executor

    def error(self, factors: HadamardFactors) -> float:
        natural = _rescaled(factors, self.scale)
        return math.sqrt(self.matrix.squared_residual(natural, self.executor, self.weights) / self.energy)


def hadamard(problem: Problem) -> Fit:
    """Hadamard factors with r₁ = r₂ = r, dense or under weights, from the best of 1 + `restarts` starts.

        min ‖√P∘(W − (C₁D₁)∘(C₂D₂))‖_F² + λ Σ_k (Σ_i p_i ‖c_k,i‖² + Σ_j p_j ‖d_k,j‖²)

    with W in units of its root mean square in the penalty, and p_i, p_j the row and column sums of P (ALS-WR). The
    first start is sign(W)∘√|W| and √|W| cut to rank r; further ones are W cut to rank r beside ones with noise. The
    problem is not convex: the optimum is not guaranteed, but no accepted sweep raises the objective.

    With `held_out`, that share of the observed entries chooses when to stop and which start to keep, and the factors
    are those of the sweep that predicted it best. It is not used where it would leave nothing on either side.

    Raises:
        DecompositionError: when a row or column has nothing observed and λ = 0, or `held_out` > 0 without weights.

    Source: block steps, Wertz, Vandaele, Gillis 2025 (arXiv:2504.13633); the problem, Ciaperoni, Gionis, Mannila 2024;
        extrapolation with restarts as in Ang, Gillis 2019 (arXiv:1805.06604), section 3.
    """
    options: HadamardOptions = problem.options
    target, missing = _target(problem)
    held_out = None
    if options.held_out > 0:
        target, held_out = _split(problem, target)
    runs = [
        _descend(target, start, options, held_out) for start in _starts(target, problem.rank, problem.seed, options)
    ]
    best = min(runs, key=lambda run: (run.held_out, run.objective))
    return Fit(
        factors=_rescaled(best.factors, target.scale),
        n_iter=len(best.history),
        converged=best.converged,
        reason=best.reason + missing,
        history=best.history,
    )


def zero_hadamard(shape: tuple[int, int], dtype: torch.dtype, rank: int, options: HadamardOptions) -> HadamardFactors:
    """Zero factors of a zero matrix (m, n)."""
    (m, n), new = shape, partial(torch.zeros, dtype=dtype)
    return HadamardFactors(new(m, rank), new(rank, n), new(m, rank), new(rank, n))


def _starts(target: Target, rank: int, seed: int, options: HadamardOptions) -> Iterator[HadamardFactors]:
    yield root_start(target, rank, seed)
    for stream in range(1, options.restarts + 1):
        yield noisy_start(target, rank, seed, stream)


def _descend(target: Target, start: HadamardFactors, options: HadamardOptions, held_out: _HeldOut | None) -> _Descent:
    """Sweep from `start` until the error rests, the held-out error has passed its least, or `n_iter` is reached."""
    current, previous, beta = start, None, _BETA
    objective, kept, kept_error, kept_at = math.inf, start, math.inf, 0
    history: list[float] = []
    resting, converged, reason = 0, False, f"reached n_iter = {options.n_iter}"
    for count in range(1, options.n_iter + 1):
        trial = current if previous is None else _beyond(current, previous, beta)
        found, residual = sweep(target, trial)
        lowered = residual + target.penalty(found)
        if lowered > objective:
            history.append(history[-1])
            if previous is None:
                _assert_rounding(target, found, objective, lowered)
                converged, reason = resting > 0, _STUCK
                break
            previous, beta = None, _BETA
            continue
        gain = (math.sqrt(objective) - math.sqrt(lowered)) / math.sqrt(target.energy)
        previous, current, objective, beta = current, found, lowered, min(_MOST, beta * _GROWTH)
        history.append(math.sqrt(residual / target.energy))
        error = math.inf if held_out is None else held_out.error(current)
        if held_out is None or error < kept_error:
            kept, kept_error, kept_at = current, error, count
        resting = resting + 1 if gain < options.tol else 0
        if count - kept_at >= _HELD_OUT_PATIENCE:
            converged, reason = True, f"the held-out error was least at sweep {kept_at}"
            break
        if resting == _PATIENCE:
            converged, reason = True, f"{_PATIENCE} sweeps lowered the relative error by less than {options.tol:g}"
            break
    return _Descent(
        factors=kept,
        objective=objective,
        held_out=kept_error,
        history=tuple(history),
        converged=converged,
        reason=reason,
    )


def _beyond(current: HadamardFactors, previous: HadamardFactors, beta: float) -> HadamardFactors:
    """S + β(S − S′), factor by factor."""
    before = previous.tensors()
    return HadamardFactors(**{name: s.add(s - before[name], alpha=beta) for name, s in current.tensors().items()})


def _assert_rounding(target: Target, f: HadamardFactors, before: float, after: float) -> None:
    """A rise must be rounding: of H₁∘H₂, relative to the bound ‖|C₁||D₁|∘|C₂||D₂|‖ that cancelling terms can reach."""
    rows = (f.c1.double().norm(dim=1) * f.c2.double().norm(dim=1)).norm()
    columns = (f.d1.double().norm(dim=0) * f.d2.double().norm(dim=0)).norm()
    lost = _SLACK * torch.finfo(target.matrix.compute_dtype).eps * float(rows * columns + math.sqrt(target.energy))
    bound = lost * (2 * math.sqrt(before) + lost)
    assert after - before <= bound, (
        f"an exact sweep raised {before:g} by {after - before:g} > {bound:g}. This is a bug."
    )


def _target(problem: Problem) -> tuple[Target, str]:
    """The normalised problem, and what to say of rows and columns without observations."""
    w, weights, ridge = problem.matrix, problem.weights, problem.options.ridge
    if weights is None:
        if problem.options.held_out > 0:
            raise DecompositionError(
                f"decompose {w.name} by hadamard: held_out = {problem.options.held_out} without weights. Set held_out "
                "= 0, or give weights that say what is observed."
            )
        rows, columns = (torch.full((k,), float(w.shape[0] * w.shape[1] // k), dtype=torch.float64) for k in w.shape)
    else:
        rows, columns = _sums(weights, problem.executor)
    empty = int((rows == 0).sum()), int((columns == 0).sum())
    missing = f"; {empty[0]} rows and {empty[1]} columns have nothing observed and zero factors" if any(empty) else ""
    if missing and ridge == 0:
        raise DecompositionError(
            f"decompose {w.name} ({w.shape[0]}x{w.shape[1]}) by hadamard: {empty[0]} rows and {empty[1]} columns have "
            "nothing observed. Set ridge > 0, or leave them out."
        )
    scale = math.sqrt(problem.total_energy / float(rows.sum()))
    target = Target(
        matrix=w, weights=weights, scale=scale, rows=rows, columns=columns, ridge=ridge, executor=problem.executor
    )
    return target, missing


def _split(problem: Problem, target: Target) -> tuple[Target, _HeldOut | None]:
    """Take `held_out` of the observed entries out of the target, drawn by row and seed whatever the blocking."""
    w, executor, whole = target.matrix, target.executor, target.weights
    assert whole is not None
    draw = partial(_keep_or_not, problem.options.held_out, problem.seed)
    spans = list(pairwise(w.row_offsets))
    sides = [
        whole.like(executor.map(draw, whole.blocks, spans, repeat(keep), label=f"hold out {w.name}"), w.shape[1])
        for keep in (True, False)
    ]
    energies = [w.weighted_squared_norm(side, executor) for side in sides]
    if min(energies) == 0:
        return target, None
    rows, columns = _sums(sides[0], executor)
    scale = math.sqrt(energies[0] / float(rows.sum()))
    held_out = _HeldOut(matrix=w, weights=sides[1], energy=energies[1], scale=scale, executor=executor)
    return replace(target, weights=sides[0], scale=scale, rows=rows, columns=columns), held_out


def _keep_or_not(share: float, seed: int, weights: Block, span: tuple[int, int], keep: bool) -> Tensor:
    values = read_block(weights)
    draws = gaussian_rows(*span, values.shape[1], seed, torch.float64, _HELD_OUT_STREAM)
    below = draws < torch.special.ndtri(torch.tensor(share, dtype=torch.float64))
    return torch.where(below, 0.0, values) if keep else torch.where(below, values, 0.0)


def _sums(weights: BlockMatrix, executor: Executor) -> tuple[Tensor, Tensor]:
    """Row sums (m,) and column sums (n,) of P in fp64."""
    parts = executor.map(_block_sums, weights.blocks, label=f"weights {weights.name}")
    rows: Tensor
    rows, columns = executor.get(executor.reduce(_join_sums, parts))
    return rows, columns


def _block_sums(weights: Block) -> tuple[Tensor, Tensor]:
    values = read_block(weights)
    return values.sum(1, dtype=torch.float64), values.sum(0, dtype=torch.float64)


def _join_sums(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([a[0], b[0]]), operator.add(a[1], b[1])


def _rescaled(f: HadamardFactors, scale: float) -> HadamardFactors:
    """Factors of s·(C₁D₁)∘(C₂D₂): s^¼ on each."""
    return HadamardFactors(**{name: factor * scale**0.25 for name, factor in f.tensors().items()})


HADAMARD = Method(
    name="hadamard",
    family="hadamard",
    fit=hadamard,
    options=HadamardOptions,
    zero=zero_hadamard,
    max_rank=short_side,
    rules=frozenset({"rank"}),
    weighted=True,
    low_rank="expanded",
    summary="elementwise product of two rank-r matrices: rank up to r² with the numbers of rank 2r",
)
