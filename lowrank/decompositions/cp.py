"""CP of stacked matrices and of N-way tensors by alternating least squares on a dimension tree.

T ≈ Σ_r w_r · f¹_r ∘ … ∘ fᴺ_r. As a matrix, whose rows run over the leading modes and whose columns over the others,
W ≈ KR(rows) diag(w) KR(columns)ᵀ. One product Y = W KR(columns) serves the updates of all row modes, and one
Z = Wᵀ KR(rows) those of all column modes: two passes over W per sweep, whatever the number of modes, with the iterates
of the textbook algorithm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank.blocks import BlockMatrix, compute_dtype
from lowrank.decompositions.registry import Fit, Method, Problem
from lowrank.decompositions.stack import Stack, check_depth, relative_squared_error, rows_of_one, stack_of
from lowrank.decompositions.tucker import compress
from lowrank.errors import DecompositionError, RankError
from lowrank.executor import SerialExecutor
from lowrank.factors import CPFactors
from lowrank.factors.stacked import khatri_rao, khatri_rao_rows
from lowrank.options import CPOptions

#: Sweeps on the compressed stack, each far cheaper than one on the whole.
_CORE_SWEEPS = 50
#: The compressed stack has this share of columns beyond the rank.
_MARGIN = 1.5
#: Extrapolation: first step, and its growth after a sweep that helped and cut after one that did not.
_STEP, _GROWTH, _CUT = 0.5, 1.1, 0.5


@dataclass(frozen=True)
class _State:
    """A model: unit columns and weights, and its squared error relative to ‖T‖²."""

    modes: tuple[Tensor, ...]
    weights: Tensor
    error: float = math.inf


def cp(problem: Problem) -> Fit:
    """CP of rank r of a stack of d matrices (m, n): matrix k ≈ A diag(w ∘ c_k) Bᵀ.

    Each factor in turn solves its normal equations F (∗ Grams of the others) = MTTKRP in fp64, so the error never
    rises. A start from the compressed stack (CANDELINC) costs about as much as a few sweeps.

    Source: Kolda and Bader 2009 (doi:10.1137/07070111X), Figure 3.3; dimension tree, Phan, Tichavský and Cichocki 2013
        (doi:10.1109/TSP.2013.2269903); extrapolation with restart, Mitchell, Ye and De Sterck 2020 (arXiv:1810.05846).
    """
    stack, options = stack_of(problem), problem.options
    core = _core_of(stack, problem) if options.start == "compressed" else None
    shape = (*stack.row_shape, problem.matrix.shape[1])
    start = core or _random_modes(shape, problem.rank, problem.seed, problem.matrix.compute_dtype)
    tensor = _Tensor(stack, (shape[-1],), problem.total_energy)
    return _fit(tensor, start, options)


def cp_als(
    tensor: Tensor,
    rank: int,
    *,
    n_iter: int = 50,
    tol: float = 1e-6,
    init: Sequence[Tensor] | None = None,
    extrapolate: bool = True,
    seed: int = 0,
) -> Fit:
    """CP of an N-way tensor in this process, such as a convolution kernel (out, in, kh, kw).

    Args:
        tensor: (n¹, …, nᴺ), N >= 2, finite; computed in fp32, or fp64 for fp64.
        rank: r >= 1, at most the product of all sizes but the largest.
        n_iter: most sweeps, >= 1.
        tol: stop when a sweep lowers the relative error by less than this, >= 0.
        init: first factors (nⱼ, r); None draws them from `seed`.
        extrapolate: start a sweep beyond the last one along the last step, and take it back where it raised the error.
        seed: of the random start.

    Returns:
        A fit with `CPFactors`, whose matrix form splits the modes where both sides are smallest.

    Raises:
        DecompositionError: when the tensor has fewer than two modes, or `init` does not fit it.
        RankError: when the rank is out of range.
        NumericsError: when an entry is NaN or infinite.

    Example:
        >>> a, b, c = (torch.arange(1.0, size + 1)[:, None] for size in (2, 3, 4))
        >>> fit = cp_als(torch.einsum("ir,jr,kr->ijk", a, b, c), rank=1)
        >>> fit.factors.tensor()[1, 2, 3].round()
        tensor(24.)
    """
    shape, options = tuple(tensor.shape), CPOptions(n_iter=n_iter, tol=tol, extrapolate=extrapolate)
    _check_tensor(shape, rank, init)
    split = min(range(1, len(shape)), key=lambda k: max(math.prod(shape[:k]), math.prod(shape[k:])))
    matrix = BlockMatrix.from_tensor("tensor", tensor.reshape(math.prod(shape[:split]), -1))
    executor = SerialExecutor()
    matrix = matrix.place(executor)
    energy, dtype = matrix.squared_norm(executor), compute_dtype(tensor.dtype)
    start = _random_modes(shape, rank, seed, dtype) if init is None else tuple(f.to(dtype) for f in init)
    if energy == 0:
        return Fit(factors=_zero_factors(shape, rank, dtype, split), reason="the tensor is zero")
    return _fit(_Tensor(Stack(matrix, shape[: split - 1], executor), shape[split:], energy), start, options)


@dataclass(frozen=True)
class _Tensor:
    """T: row modes as a stack in blocks, column modes whole in every block, and ‖T‖²."""

    stack: Stack
    column_shape: tuple[int, ...]
    energy: float

    @property
    def row_modes(self) -> int:
        return len(self.stack.row_shape)

    def multiply(self, modes: Sequence[Tensor]) -> BlockMatrix:
        """Y = W KR(column modes)."""
        return self.stack.multiply(khatri_rao(modes[self.row_modes :]))

    def multiply_transposed(self, modes: Sequence[Tensor]) -> Tensor:
        """Z = Wᵀ KR(row modes)."""
        return self.stack.multiply_transposed(_model_rows, tuple(modes[: self.row_modes]))


def _fit(tensor: _Tensor, start: Sequence[Tensor], options: CPOptions) -> Fit:
    state, history, converged = _sweeps(tensor, _normalized(start), options)
    order = state.weights.argsort(descending=True, stable=True)
    dtype = start[0].dtype
    modes = tuple(mode[:, order].contiguous() for mode in state.modes)
    return Fit(
        factors=CPFactors(modes, state.weights[order].to(dtype), tensor.row_modes),
        n_iter=len(history),
        converged=converged,
        reason=f"a sweep lowered the error by less than {options.tol:g}" if converged else "n_iter sweeps were run",
        history=tuple(history),
    )


def _sweeps(tensor: _Tensor, start: _State, options: CPOptions) -> tuple[_State, list[float], bool]:
    """Alternate until a sweep gains less than `tol`; the error never rises from one accepted state to the next."""
    best, before, step = start, None, _STEP
    history: list[float] = []
    for _ in range(options.n_iter):
        ahead = before is not None and options.extrapolate
        found = _sweep(tensor, _extrapolate(best, before, step) if ahead and before else best)
        if ahead and not found.error <= best.error:
            before, step = None, step * _CUT
            history.append(math.sqrt(best.error))
            continue
        assert found.error <= best.error + _slack(found), (found.error, best.error)
        gain = math.sqrt(best.error) - math.sqrt(found.error)
        step = min(step * _GROWTH, 1.0) if ahead else step
        best, before = found, best if best is not start else None
        history.append(math.sqrt(best.error))
        if gain < options.tol:
            return best, history, True
    return best, history, False


def _slack(state: _State) -> float:
    """Rounding of a squared error relative to ‖T‖²."""
    return 100 * torch.finfo(state.modes[0].dtype).eps


def _sweep(tensor: _Tensor, state: _State) -> _State:
    """Update every mode once, in order."""
    y = tensor.multiply(state.modes)
    stack, split = tensor.stack, tensor.row_modes
    if split > 1:
        sums = stack.sum_over_rows(y, state.modes[split - 1])
        for j in range(split - 1):
            state = _update(state, j, _contract(sums, state.modes[: split - 1], j))
    scale = khatri_rao(state.modes[: split - 1]) if split > 1 else torch.ones_like(state.modes[0][:1])
    state = _update(state, split - 1, stack.sum_over_depth(y, scale.contiguous()))
    z = tensor.multiply_transposed(state.modes)
    for j in range(split, len(state.modes)):
        mttkrp = _contract(z, state.modes[split:], j - split)
        state = _update(state, j, mttkrp)
    return replace(state, error=_squared_error(tensor, state, mttkrp))


def _update(state: _State, j: int, mttkrp: Tensor) -> _State:
    """The exact minimiser over mode j, as a step from its present value.

    F ← F + (M − F V)(V + μI)⁻¹, V the Hadamard product of the other Grams, whose diagonal is 1. In directions that V
    does not resolve (collinear components) F stays as it is, so that μ at rounding level keeps the error from rising.
    """
    modes = state.modes
    v = _other_grams(modes, j)
    # Well below the unit diagonal and above the rounding of the MTTKRP squared; at 1e-13 Cholesky itself is still safe.
    shift = max(0.01 * torch.finfo(modes[j].dtype).eps, 1e-13)
    factor = torch.linalg.cholesky(v + shift * torch.eye(len(v), dtype=v.dtype))
    present = modes[j].double() * state.weights
    new = present + torch.cholesky_solve((mttkrp.double() - present @ v).T, factor).T
    weights = torch.linalg.vector_norm(new, dim=0)
    unit = torch.where(weights > 0, new / weights.clamp(min=torch.finfo(weights.dtype).tiny), modes[j].double())
    return _State((*modes[:j], unit.to(modes[j].dtype), *modes[j + 1 :]), weights)


def _other_grams(modes: Sequence[Tensor], j: int) -> Tensor:
    r = modes[0].shape[1]
    product = torch.ones(r, r, dtype=torch.float64)
    for mode in (*modes[:j], *modes[j + 1 :]):
        wide = mode.double()
        product = product * (wide.T @ wide)
    return product


def _squared_error(tensor: _Tensor, state: _State, mttkrp: Tensor) -> float:
    """‖T − T̂‖² / ‖T‖² from the last MTTKRP and the Grams; by blocks where the difference would lose its digits."""
    last = state.modes[-1].double() * state.weights
    inner = float((mttkrp.double() * last).sum())
    norm = float((_other_grams(state.modes, len(state.modes) - 1) * (last.T @ last)).sum())
    share = (tensor.energy - 2 * inner + norm) / tensor.energy
    factors = CPFactors(state.modes, state.weights.to(state.modes[0].dtype), tensor.row_modes)
    return relative_squared_error(tensor.stack, share, factors, tensor.energy)


def _contract(z: Tensor, modes: Sequence[Tensor], j: int) -> Tensor:
    """Σ over all modes but j of z (Πn, r) times their factors; returns (nⱼ, r) in fp64."""
    value = z.double().reshape(*(len(mode) for mode in modes), -1)
    for i in reversed(range(len(modes))):
        if i != j:
            factor = modes[i].double()
            value = (value * (factor[:, None] if j > i else factor)).sum(i)
    return value


def _model_rows(start: int, stop: int, *modes: Tensor) -> Tensor:
    return khatri_rao_rows(modes, start, stop)


def _extrapolate(now: _State, before: _State, step: float) -> _State:
    """The model beyond `now` on the line from `before`, factor by factor; the weights ride on the last one."""
    modes = [new + step * (new - old) for new, old in zip(now.modes[:-1], before.modes)]
    new, old = now.modes[-1] * now.weights, before.modes[-1] * before.weights
    return _normalized([*modes, (new + step * (new - old)).to(now.modes[-1].dtype)])


def _normalized(modes: Sequence[Tensor]) -> _State:
    """Unit columns, their norms in the weights."""
    norms = [torch.linalg.vector_norm(mode.double(), dim=0) for mode in modes]
    tiny = torch.finfo(torch.float64).tiny
    units = tuple((mode / norm.clamp(min=tiny)).to(mode.dtype) for mode, norm in zip(modes, norms))
    return _State(units, torch.stack(norms).prod(0))


def _random_modes(shape: Sequence[int], rank: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in shape]
    return tuple(factor.to(dtype) for factor in drawn)


def _core_of(stack: Stack, problem: Problem) -> tuple[Tensor, ...] | None:
    """First factors from CP of U_mᵀ W_k U_n, expanded again; None when compressing would not make it smaller."""
    m, n = stack.rows, stack.matrix.shape[1]
    size = math.ceil(_MARGIN * problem.rank)
    if 2 * size >= max(m, n):
        return None
    rank, dtype = problem.rank, problem.matrix.compute_dtype
    core, row_basis, column_basis = compress(stack, (min(size, m), min(size, n)), problem.seed)
    small = BlockMatrix.from_tensor("core", core.reshape(-1, core.shape[2]))
    tensor = _Tensor(
        Stack(small, stack.depths, SerialExecutor()), (core.shape[2],), float(core.double().square().sum())
    )
    start = _random_modes((*stack.depths, *core.shape[1:]), rank, problem.seed, dtype)
    state, _, _ = _sweeps(tensor, _normalized(start), replace(problem.options, n_iter=_CORE_SWEEPS))
    *depths, a, b = state.modes
    return *depths, row_basis @ a, column_basis @ (b * state.weights.to(dtype))


def _zero_factors(shape: Sequence[int], rank: int, dtype: torch.dtype, row_modes: int) -> CPFactors:
    modes = tuple(torch.eye(size, rank, dtype=dtype) for size in shape)
    return CPFactors(modes, torch.zeros(rank, dtype=dtype), row_modes)


def zero_cp(shape: tuple[int, int], dtype: torch.dtype, rank: int, options: Any) -> CPFactors:
    """Factors of a zero stack: weights 0."""
    check_depth("a zero matrix", shape, options)
    sizes = (*options.depths, rows_of_one(shape, options), shape[1])
    return _zero_factors(sizes, rank, dtype, len(sizes) - 1)


def cp_bound(shape: tuple[int, int], options: Any) -> int:
    """The rank at which CP is exact: every matrix of the stack by its SVD, or every fibre on its own."""
    m, n = rows_of_one(shape, options), shape[1]
    depth: int = math.prod(options.depths)
    return min(depth * min(m, n), m * n)


def _check_tensor(shape: tuple[int, ...], rank: int, init: Sequence[Tensor] | None) -> None:
    what = f"decompose a tensor ({'x'.join(map(str, shape))}) by cp"
    if len(shape) < 2 or min(shape) < 1:
        raise DecompositionError(f"{what}: need at least two modes and no empty one. Reshape it.")
    bound = math.prod(shape) // max(shape)
    if not 1 <= rank <= bound:
        raise RankError(f"{what}: rank {rank}. Set 1 <= rank <= {bound}.")
    if init is not None and [tuple(f.shape) for f in init] != [(size, rank) for size in shape]:
        got = [tuple(f.shape) for f in init]
        raise DecompositionError(f"{what}: init has shapes {got}. Give {[(size, rank) for size in shape]}.")


CP = Method(
    name="cp",
    family="cp",
    fit=cp,
    options=CPOptions,
    zero=zero_cp,
    max_rank=cp_bound,
    rules=frozenset({"rank"}),
    summary="sum of rank-one terms of a stack of matrices; they share row and column factors",
)
