"""The public front of every decomposition: validates once, runs the method, measures the error."""

import dataclasses
import math
import time
from typing import Any

from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lowrank.blocks import BlockMatrix, check_matrix
from lowrank.decompositions.registry import Fit, Method, Problem, find
from lowrank.errors import DecompositionError, NumericsError, RankError
from lowrank.executor import Executor
from lowrank.factors import Decomposition, Factors, FitReport
from lowrank.rank import RankRule, resolvable_share


def decompose(
    matrix: BlockMatrix,
    *,
    method: str = "randomized_svd",
    rule: RankRule | None = None,
    weights: BlockMatrix | None = None,
    seed: int = 0,
    executor: Executor,
    **options: Any,
) -> Decomposition:
    """Decompose W (m, n) by the method of that name, with the rank that `rule` asks for.

    The result depends on the values, `method`, `rule`, `seed`, the options and the blocking, and on neither the
    executor nor the number of workers: with one thread per worker it is equal bit for bit.

    Args:
        matrix: W in row blocks, any floating-point dtype; computed in fp32, or fp64 for fp64.
        method: a name in `METHODS`; `randomized_svd` for a rank well below min(m, n), `exact_svd` for the optimum.
        rule: rank, energy or error, as far as the method knows them; None for a method without a rank.
        weights: P (m, n) >= 0 in the same row blocks, 0 = missing: minimise ‖√P ∘ (W − Ŵ)‖. Entries of W under
            a zero weight are not read (they may be NaN). Only for weighted methods.
        seed: of everything random.
        executor: where the blocks are read and multiplied.
        options: the method's own, see its dataclass in `lowrank.config` (for example `n_iter`, `oversampling`).

    Returns:
        Factors in the compute dtype, the report, and the leading singular values where the method computes some.
        A zero matrix has zero factors and error 0.

    Raises:
        CheckpointError: when a stored block is missing or cut short.
        DecompositionError: when the method is unknown, the matrix is empty, an option is out of range, or the
            weights do not fit.
        RankError: when the rank exceeds the family's own bound, or the method cannot follow the rule.
        NumericsError: when an entry is NaN or infinite.

    Example:
        >>> import torch
        >>> from lowrank.executor import SerialExecutor
        >>> w = BlockMatrix.from_tensor("w", torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> d = decompose(w, method="exact_svd", rule=RankRule(rank=2), executor=SerialExecutor())
        >>> d.factors.s
        tensor([3., 2.])
        >>> round(d.report.explained_energy, 4)
        0.9286
    """
    began = time.perf_counter()
    known = find(method)
    chosen = _options(known, matrix, options)
    _validate(matrix, known, rule, chosen)
    problem = _problem(matrix, weights, known, rule or RankRule(rank=1), seed, chosen, executor)
    fit = _run(known, problem) if problem.total_energy > 0 else _zero(known, problem)
    error = _relative_error(problem, fit)
    report = FitReport(
        method=method,
        rank=fit.factors.rank,
        n_iter=fit.n_iter,
        relative_error=error,
        explained_energy=1.0 - error**2,
        converged=fit.converged,
        reason=fit.reason,
        num_parameters=fit.factors.num_parameters,
        history=fit.history,
        seed=seed,
        seconds=time.perf_counter() - began,
    )
    return Decomposition(matrix.name, fit.factors, report, fit.spectrum)


def _options(method: Method, matrix: BlockMatrix, given: dict[str, Any]) -> Any:
    known = {item.name for item in dataclasses.fields(method.options)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise DecompositionError(
            f"decompose {_describe(matrix)} by {method.name}: unknown options {unknown}. "
            f"Its options are: {', '.join(sorted(known)) or 'none'}."
        )
    try:
        return method.options(**given)
    except (TypeError, ValueError) as error:
        raise DecompositionError(f"decompose {_describe(matrix)} by {method.name}: {error}") from error


def _validate(matrix: BlockMatrix, method: Method, rule: RankRule | None, options: Any) -> None:
    shape = check_matrix(matrix.name, matrix.shape, matrix.dtype)
    what = f"decompose {_describe(matrix)}"
    if method.max_rank is None:
        if rule is not None:
            raise RankError(f"{what}: {method.name} has no rank. Leave out decompose.rank, energy and error.")
        return
    if rule is None:
        raise RankError(f"{what}: {method.name} needs a rank. Set decompose.rank.")
    if rule.kind not in method.rules:
        allowed = " or ".join(sorted(method.rules))
        raise RankError(f"{what}: {method.name} cannot follow a bound on {rule.kind}. Set decompose.{allowed} instead.")
    limit = method.max_rank(shape, options)
    if rule.rank is not None and rule.rank > limit:
        bound = "min(m, n)" if limit == min(shape) else f"the bound of {method.name},"
        raise RankError(f"{what}: rank {rule.rank} > {bound} = {limit}. Set decompose.rank <= {limit}.")


def _problem(
    matrix: BlockMatrix,
    weights: BlockMatrix | None,
    method: Method,
    rule: RankRule,
    seed: int,
    options: Any,
    executor: Executor,
) -> Problem:
    what = _describe(matrix)
    if weights is None:
        placed = matrix.place(executor)
        energy = placed.squared_norm(executor)
    else:
        _check_weights(matrix, weights, method)
        weights = weights.place(executor)
        placed = matrix.mask(weights, executor)
        energy = placed.weighted_squared_norm(weights, executor)
    if not math.isfinite(energy):
        raise NumericsError(f"decompose {what}: ‖W‖² overflows fp64. Scale the matrix down.")
    return Problem(
        matrix=placed,
        weights=weights,
        rule=rule,
        total_energy=energy,
        seed=seed,
        options=options,
        executor=executor,
    )


def _check_weights(matrix: BlockMatrix, weights: BlockMatrix, method: Method) -> None:
    what = f"decompose {_describe(matrix)} by {method.name}"
    if not method.weighted:
        raise DecompositionError(f"{what}: got weights, which it cannot use. Choose als, hadamard, kronecker, ...")
    if weights.shape != matrix.shape or weights.row_offsets != matrix.row_offsets:
        raise DecompositionError(
            f"{what}: the weights are {weights.shape[0]}x{weights.shape[1]} in {len(weights.blocks)} blocks, the "
            f"matrix has {len(matrix.blocks)}. Give weights of the same shape and block_bytes."
        )


def _run(method: Method, problem: Problem) -> Fit:
    try:
        return method.fit(problem)
    except LinAlgError as error:
        what = _describe(problem.matrix)
        raise NumericsError(
            f"decompose {what}: {error}. Try the other decompose.method, or scale the matrix."
        ) from error


def _relative_error(problem: Problem, fit: Fit) -> float:
    """‖W − Ŵ‖_F / ‖W‖_F: ‖W‖² − ‖Ŵ‖² where Ŵ projects W and the difference keeps enough digits, else by blocks.

    Pythagoras makes the difference exact; rounding of the factors leaves an error of a few ε·‖W‖² in it, which is
    small beside a residual² above 1e4 ε ‖W‖² (a 3 % error in fp32).
    """
    total = problem.total_energy
    if total == 0:
        return 0.0
    if fit.projection_energy is not None:
        squared = total - fit.projection_energy
        if squared >= resolvable_share(problem.matrix.compute_dtype) * total:
            return math.sqrt(squared / total)
    return math.sqrt(squared_residual(problem, fit.factors) / total)


def squared_residual(problem: Problem, factors: Factors) -> float:
    """‖√P ∘ (W − Ŵ)‖_F² in fp64, block by block."""
    return problem.matrix.squared_residual(factors, problem.executor, problem.weights)


def _zero(method: Method, problem: Problem) -> Fit:
    rule = problem.rule
    rank = rule.cap(rule.rank or 1)
    factors = method.zero(problem.matrix.shape, problem.matrix.compute_dtype, rank, problem.options)
    return Fit(factors=factors, reason="the matrix is zero")


def _describe(matrix: BlockMatrix) -> str:
    m, n = matrix.shape
    return f"{matrix.name} ({m}x{n})"
