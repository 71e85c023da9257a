"""The public front of every decomposition: validates once, runs the method, measures the error."""

import math
import time

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lowrank.blocks import BlockMatrix, check_matrix
from lowrank.decompositions.registry import Fit, Method, Problem, find
from lowrank.errors import DecompositionError, NumericsError, RankError
from lowrank.executor import Executor
from lowrank.factors import Decomposition, FitReport, SVDFactors
from lowrank.rank import RankRule, resolvable_share


def decompose(
    matrix: BlockMatrix,
    *,
    method: str = "randomized_svd",
    rule: RankRule,
    seed: int = 0,
    n_iter: int = 2,
    oversampling: int = 8,
    executor: Executor,
) -> Decomposition:
    """Decompose W (m, n) into W ≈ U diag(s) Vᴴ with the rank that `rule` asks for.

    The result depends on the values, `method`, `rule`, `seed`, `n_iter`, `oversampling` and the blocking, and
    on neither the executor nor the number of workers: with one thread per worker it is equal bit for bit.

    Args:
        matrix: W in row blocks, any floating-point dtype; computed in fp32, or fp64 for fp64.
        method: registry name: `randomized_svd` for a rank well below min(m, n), `exact_svd` for the optimum.
        rule: rank, energy or error; a fixed rank must be at most min(m, n).
        seed: of the Gaussian sketch.
        n_iter: power iterations, >= 0. 2 suits slowly decaying spectra; each adds two passes over W.
        oversampling: columns of the sketch beyond the rank, >= 0; 8 or more.
        executor: where the blocks are read and multiplied.

    Returns:
        Factors in the compute dtype with a fixed sign convention (the largest entry of each column of U is
        positive), the report, and the leading singular values. A zero matrix has zero factors and error 0.

    Raises:
        CheckpointError: when a stored block is missing or cut short.
        DecompositionError: when the method is unknown, the matrix is empty, or an option is out of range.
        RankError: when the rank exceeds min(m, n).
        NumericsError: when an entry is NaN or infinite.

    Example:
        >>> from lowrank.executor import SerialExecutor
        >>> w = BlockMatrix.from_tensor("w", torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> d = decompose(w, method="exact_svd", rule=RankRule(rank=2), executor=SerialExecutor())
        >>> d.factors.s
        tensor([3., 2.])
        >>> round(d.report.explained_energy, 4)
        0.9286
    """
    began = time.perf_counter()
    body = find(method)
    _validate(matrix, rule, n_iter, oversampling)
    placed = matrix.place(executor)
    total_energy = placed.squared_norm(executor)
    if not math.isfinite(total_energy):
        raise NumericsError(f"decompose {_describe(matrix)}: ‖W‖² overflows fp64. Scale the matrix down.")
    problem = Problem(
        matrix=placed,
        rule=rule,
        total_energy=total_energy,
        seed=seed,
        n_iter=n_iter,
        oversampling=oversampling,
        executor=executor,
    )
    fit = _run(body, problem) if total_energy > 0 else _zero(problem)
    error = _relative_error(problem, fit.factors)
    report = FitReport(
        method=method,
        rank=fit.factors.rank,
        n_iter=fit.n_iter,
        relative_error=error,
        explained_energy=1.0 - error**2,
        converged=fit.converged,
        seed=seed,
        seconds=time.perf_counter() - began,
    )
    return Decomposition(matrix.name, fit.factors, report, fit.spectrum)


def _run(body: Method, problem: Problem) -> Fit:
    try:
        return body(problem)
    except LinAlgError as error:
        what = _describe(problem.matrix)
        raise NumericsError(
            f"decompose {what}: {error}. Try the other decompose.method, or scale the matrix."
        ) from error


def _validate(matrix: BlockMatrix, rule: RankRule, n_iter: int, oversampling: int) -> None:
    limit = min(check_matrix(matrix.name, matrix.shape, matrix.dtype))
    if rule.rank is not None and rule.rank > limit:
        raise RankError(
            f"decompose {_describe(matrix)}: rank {rule.rank} > min(m, n) = {limit}. Set decompose.rank <= {limit}."
        )
    for option, value in (("n_iter", n_iter), ("oversampling", oversampling)):
        if value < 0:
            raise DecompositionError(
                f"decompose {_describe(matrix)}: {option} = {value} < 0. Set decompose.{option} >= 0."
            )


def _relative_error(problem: Problem, factors: SVDFactors) -> float:
    """‖W − U S Vᴴ‖_F / ‖W‖_F, from ‖W‖² − Σσ² where that difference keeps enough digits, else by blocks.

    W_r is a projection of W, so Pythagoras makes the difference exact; rounding of the factors leaves an
    error of a few ε·‖W‖² in it, which is small beside a residual² above 1e4 ε ‖W‖² (a 3 % error in fp32).
    """
    total = problem.total_energy
    if total == 0:
        return 0.0
    squared = total - float(factors.s.double().square().sum())
    if squared < resolvable_share(problem.matrix.compute_dtype) * total:
        left, right = factors.balanced()
        squared = problem.matrix.squared_residual(left, right, problem.executor)
    return math.sqrt(squared / total)


def _zero(problem: Problem) -> Fit:
    (m, n), dtype = problem.matrix.shape, problem.matrix.compute_dtype
    rank = problem.rule.cap(problem.rule.rank or 1)
    s = torch.zeros(rank, dtype=dtype)
    return Fit(SVDFactors(torch.eye(m, rank, dtype=dtype), s, torch.eye(rank, n, dtype=dtype)), s, 0, True)


def _describe(matrix: BlockMatrix) -> str:
    m, n = matrix.shape
    return f"{matrix.name} ({m}x{n})"
