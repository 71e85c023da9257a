"""Alternating least squares against closed forms: Eckart-Young, soft thresholds, normal equations, planted factors."""

import dataclasses
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank.blocks import BlockMatrix
from lowrank.decompositions import als as als_module
from lowrank.decompositions import decompose
from lowrank.decompositions.nonnegative import nonnegative_start, nonnegative_step
from lowrank.decompositions.separable import flatten
from lowrank.decompositions.weighted import column_equations, pair_products, row_equations, solve_rows
from lowrank.errors import DecompositionError, RankError
from lowrank.executor import SerialExecutor
from lowrank.factors import Decomposition, LowRankFactors, SVDFactors
from lowrank.kernels import packed, solve_packed
from lowrank.rank import RankRule
from tests.tolerance import tol

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mask(*shape: int, share: float = 0.5, seed: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn < share).to(dtype)


def spectrum_matrix(
    m: int, n: int, s: list[float], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    u, v = torch.linalg.qr(gaussian(m, len(s))).Q, torch.linalg.qr(gaussian(n, len(s), seed=1)).Q
    return (u * torch.tensor(s, dtype=torch.float64) @ v.T).to(dtype), u, v


def fit(
    values: Tensor, rank: int = 4, weights: Tensor | None = None, block_bytes: int | None = None, **options: Any
) -> Decomposition:
    rule = options.pop("rule", None) or RankRule(rank=rank)
    p = None if weights is None else BlockMatrix.from_tensor("p", weights, block_bytes)
    w = BlockMatrix.from_tensor("w", values, block_bytes)
    return decompose(w, method="als", rule=rule, weights=p, executor=SerialExecutor(), **options)


def objective(
    w: Tensor, found: Decomposition, ridge: float, rows: Any = 1.0, columns: Any = 1.0, p: Any = 1.0
) -> float:
    left, right = found.factors.low_rank()  # type: ignore[misc]
    squares = (p * (w.double() - left.double() @ right.double()) ** 2).sum()
    penalty = (rows * left.double().square().sum(1)).sum() + (columns * right.double().square().sum(0)).sum()
    return float(squares + ridge * penalty)


# ---- weighted least squares -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_rows_solve_their_own_least_squares(dtype: torch.dtype, ridge: float) -> None:
    w, z = gaussian(13, 40, dtype=dtype), gaussian(5, 40, seed=1, dtype=dtype)
    p = mask(13, 40, dtype=dtype) * gaussian(13, 40, seed=2, dtype=dtype).abs()
    found = solve_rows(p, p * w, z, ridge)
    for i in range(13):
        root = p[i].double().sqrt()
        design = torch.cat([root[:, None] * z.double().T, ridge**0.5 * torch.eye(5, dtype=torch.float64)])
        wanted = torch.linalg.lstsq(
            design, torch.cat([root * w[i].double(), torch.zeros(5, dtype=torch.float64)])
        ).solution
        torch.testing.assert_close(found[i].double(), wanted, rtol=0, atol=tol(dtype, 100))


def test_ridge_may_differ_by_row() -> None:
    w, z, p = gaussian(6, 20), gaussian(3, 20, seed=1), mask(6, 20)
    ridges = torch.arange(1.0, 7.0, dtype=torch.float64)
    each = torch.cat([solve_rows(p[i : i + 1], (p * w)[i : i + 1], z, float(ridges[i])) for i in range(6)])
    torch.testing.assert_close(solve_rows(p, p * w, z, ridges), each, rtol=0, atol=1e-13)


def test_column_equations_add_over_row_blocks() -> None:
    w, left, p = gaussian(11, 7), gaussian(11, 3, seed=1), mask(11, 7)
    whole = row_equations(p.T, (p * w).T, left.T)
    parts = [column_equations(p[a:b], (p * w)[a:b], left[a:b]) for a, b in ((0, 4), (4, 5), (5, 11))]
    total = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(total.grams, whole.grams)
    torch.testing.assert_close(total.rhs, whole.rhs)


def test_singular_rows_never_get_worse_than_their_start() -> None:
    """Two observations, five unknowns, no ridge: any interpolant will do, and coordinates unseen stay."""
    z = torch.eye(5, dtype=torch.float64)
    p, targets, start = torch.zeros(1, 5).double(), torch.zeros(1, 5).double(), torch.full((1, 5), 7.0).double()
    p[0, :2], targets[0, :2] = 1.0, torch.tensor([3.0, 4.0]).double()
    found = solve_rows(p, targets, z, 0.0, start)
    torch.testing.assert_close(found, torch.tensor([[3.0, 4.0, 7.0, 7.0, 7.0]]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_and_batched_systems_agree(dtype: torch.dtype) -> None:
    z = gaussian(50, 9, 6)
    grams = torch.einsum("ina,inb->iab", z, z)
    rows, columns = torch.triu_indices(6, 6)
    grams[4] = 0
    upper = grams[:, rows, columns].to(dtype)
    rhs, start = gaussian(50, 6, seed=1, dtype=dtype), gaussian(50, 6, seed=2, dtype=dtype)
    shifts = torch.linspace(0.1, 1, 50, dtype=torch.float64)
    compiled = solve_packed(upper, rhs, shifts, start)
    torch.testing.assert_close(
        compiled, packed._solve_batched(upper, rhs, shifts, start), rtol=tol(dtype), atol=tol(dtype)
    )
    assert not compiled[4].any()


def test_systems_with_infinite_numbers_end() -> None:
    grams, rhs = torch.full((2, 3), float("inf")), torch.ones(2, 2)
    for solve in (solve_packed, packed._solve_batched):
        assert solve(grams, rhs, torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2)).shape == (2, 2)


def test_pair_products_are_the_upper_triangle() -> None:
    z = gaussian(3, 4)
    full = torch.einsum("aj,bj->jab", z, z)
    rows, columns = torch.triu_indices(3, 3)
    torch.testing.assert_close(pair_products(z), full[:, rows, columns])


# ---- without weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_bytes", [None, 7 * 4 * 30])
def test_plain_reaches_the_optimum(dtype: torch.dtype, block_bytes: int | None) -> None:
    w, _, _ = spectrum_matrix(50, 30, [8.0, 6, 4, 2, 1, 0.5, 0.2, 0.1], dtype)
    s = torch.linalg.svdvals(w.double())
    found = fit(w, 4, block_bytes=block_bytes, tol=0)
    optimum = float((s[4:].square().sum() / s.square().sum()).sqrt())
    assert found.report.relative_error == pytest.approx(optimum, rel=tol(dtype, 10))
    assert isinstance(found.factors, LowRankFactors)
    torch.testing.assert_close(found.spectrum[:4].double(), s[:4], rtol=tol(dtype, 10), atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ridge_soft_thresholds_the_singular_values(dtype: torch.dtype) -> None:
    w, _, _ = spectrum_matrix(40, 25, [9.0, 7, 5, 3, 1, 0.5], dtype)
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    wanted = (u * (s - 2.0).clamp(min=0))[:, :5] @ vh[:5]
    found = fit(w, 5, ridge=2.0, tol=0, block_bytes=4 * 25 * 9)
    torch.testing.assert_close(found.factors.reconstruct().double(), wanted, rtol=0, atol=tol(dtype, 10))


def test_ridge_finds_its_fixed_point_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is that point already; from the SVD itself, rotated and scaled, the sweeps must find it."""
    w, u, v = spectrum_matrix(40, 25, [9.0, 7, 5, 3])
    wanted = (u * (torch.tensor([9.0, 7, 5, 3]).double() - 2.0)) @ v.T
    start = torch.linalg.qr(gaussian(4, 4, seed=5)).Q @ torch.diag(torch.tensor([0.3, 1.0, 2.0, 3.0]).double()) @ v.T
    real = als_module._fit_plain

    def elsewhere(problem: Any, svd: SVDFactors) -> Any:
        # σ − λ is taken off again by the start's own threshold.
        return real(problem, SVDFactors(svd.u, torch.full((4,), 3.0).double(), start))

    monkeypatch.setattr(als_module, "_fit_plain", elsewhere)
    found = fit(w, 4, ridge=2.0, tol=0, n_iter=300)
    # The sweeps end when the objective, flat to second order there, no longer falls: at √ε of the entries.
    torch.testing.assert_close(found.factors.reconstruct(), wanted, rtol=0, atol=1e-7)
    assert found.report.n_iter > 5


def test_ridge_above_the_spectrum_gives_zero() -> None:
    w, _, _ = spectrum_matrix(20, 12, [3.0, 2, 1])
    found = fit(w, 2, ridge=4.0)
    assert not found.factors.reconstruct().any()
    assert found.report.relative_error == 1.0


def test_energy_and_error_rules_follow_the_svd() -> None:
    w, _, _ = spectrum_matrix(60, 50, [2.0**-k for k in range(12)])
    assert fit(w, rule=RankRule(energy=0.99)).report.rank == 4
    found = fit(w, rule=RankRule(error=0.01))
    assert found.report.relative_error <= 0.01 * (1 + 1e-9)
    assert found.report.converged


def test_history_ends_at_the_reported_error() -> None:
    w = gaussian(30, 20)
    for options in ({}, {"ridge": 1.0}, {"weights": mask(30, 20, share=0.8), "ridge": 0.1}, {"nonnegative": True}):
        found = fit(w, 3, **options)  # type: ignore[arg-type]
        assert found.report.history[-1] == pytest.approx(found.report.relative_error, rel=1e-6)
        assert len(found.report.history) == found.report.n_iter


def test_sweeps_that_ran_out_say_so() -> None:
    found = fit(gaussian(40, 30), 4, mask(40, 30), n_iter=2, tol=0, ridge=0.1)
    assert not found.report.converged
    assert "n_iter sweeps were run" in found.report.reason


# ---- weights and missing entries --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_bytes", [None, 9 * 4 * 30])
def test_missing_entries_are_completed(dtype: torch.dtype, block_bytes: int | None) -> None:
    w = gaussian(50, 3, dtype=dtype) @ gaussian(3, 30, seed=1, dtype=dtype)
    p = mask(50, 30, dtype=dtype)
    hidden = torch.where(p > 0, w, torch.nan)
    found = fit(hidden, 3, p, block_bytes, tol=0, n_iter=100)
    torch.testing.assert_close(found.factors.reconstruct(), w, rtol=0, atol=tol(dtype, 100))


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    m=st.integers(1, 24), n=st.integers(1, 24), rank=st.integers(1, 5), rows=st.integers(1, 24), seed=st.integers(0, 99)
)
def test_any_shape_reaches_a_stationary_point(m: int, n: int, rank: int, rows: int, seed: int) -> None:
    """At rest, each factor is the exact minimiser given the other, whatever shape, blocking and empty rows."""
    w, p = gaussian(m, n, seed=seed), mask(m, n, share=0.6, seed=seed + 1) * gaussian(m, n, seed=seed + 2).abs()
    if not (p * w).any():
        return
    rank = min(rank, m, n)
    found = fit(w, rank, p, rows * n * 4, ridge=0.05, tol=0, n_iter=400)
    left, right = found.factors.low_rank()  # type: ignore[misc]
    counts = (p > 0).sum(0).double()
    best = solve_rows(p.T.contiguous(), (p * w).T.contiguous(), left.T.contiguous(), 0.05 * counts)
    torch.testing.assert_close(right, best.T, rtol=0, atol=1e-6)
    assert torch.isfinite(left).all()


def test_weighted_ridge_is_alswr() -> None:
    w, p = gaussian(25, 20), mask(25, 20)
    rows, columns = (p > 0).sum(1).double(), (p > 0).sum(0).double()
    per_entry = fit(w, 3, p, ridge=0.1, tol=0, n_iter=300)
    fixed = fit(w, 3, p, ridge=0.1, weighted_ridge=False, tol=0, n_iter=300)
    counted = partial(objective, w, ridge=0.1, p=p)
    assert counted(found=per_entry, rows=rows, columns=columns) < counted(found=fixed, rows=rows, columns=columns)
    assert counted(found=fixed) < counted(found=per_entry)


def test_groups_of_coordinates_match_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank.decompositions import als_weighted

    w = gaussian(30, 6) @ gaussian(6, 24, seed=1)
    p = mask(30, 24, share=0.8)
    whole = fit(w, 6, p, ridge=0.03, tol=0, n_iter=600)
    monkeypatch.setattr(als_weighted, "_WHOLE_RANK", 3)
    monkeypatch.setattr(als_weighted, "_GROUP", 4)
    grouped = fit(w, 6, p, ridge=0.03, tol=0, n_iter=600)
    assert grouped.report.history != whole.report.history
    torch.testing.assert_close(grouped.factors.reconstruct(), whole.factors.reconstruct(), rtol=0, atol=1e-6)


def test_rank_above_the_groups_runs() -> None:
    w, p = gaussian(90, 80, dtype=torch.float32), mask(90, 80, share=0.9, dtype=torch.float32)
    found = fit(w, 70, p, ridge=0.01, n_iter=10)
    assert found.report.relative_error < 0.3
    assert list(found.report.history) == sorted(found.report.history, reverse=True)


@pytest.mark.parametrize("block_bytes", [None, 4 * 18 * 5])
def test_outer_product_weights_are_the_closed_form(block_bytes: int | None) -> None:
    w, u, v = gaussian(24, 18), gaussian(24, 1, seed=3).abs() + 0.1, gaussian(1, 18, seed=4).abs() + 0.1
    found = fit(w, 4, u * v, block_bytes, tol=0, n_iter=500)
    scaled = u.sqrt() * w * v.sqrt()
    uu, s, vh = torch.linalg.svd(scaled)
    wanted = (uu[:, :4] * s[:4]) @ vh[:4] / (u.sqrt() * v.sqrt())
    torch.testing.assert_close(found.factors.reconstruct(), wanted, rtol=0, atol=1e-5)
    assert found.report.relative_error == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-9)
    assert (
        fit(w, weights=u * v, rule=RankRule(energy=0.5)).report.rank
        == int((s.square().cumsum(0) < 0.5 * s.square().sum()).sum()) + 1
    )


def test_other_weights_are_no_outer_product() -> None:
    w, p = gaussian(12, 9), gaussian(12, 9, seed=2).abs() + 0.1
    problem = als_module.Problem(
        matrix=BlockMatrix.from_tensor("w", w),
        weights=BlockMatrix.from_tensor("p", p),
        rule=RankRule(rank=2),
        total_energy=1.0,
        seed=0,
        options=None,
        executor=SerialExecutor(),
    )
    assert flatten(problem) is None
    holes = BlockMatrix.from_tensor("p", torch.ones(12, 1).double() * mask(1, 9))
    assert flatten(dataclasses.replace(problem, weights=holes)) is None
    assert flatten(dataclasses.replace(problem, weights=None)) is None


def test_weighted_beats_the_plain_fit_under_its_weights() -> None:
    w, p = gaussian(30, 20), gaussian(30, 20, seed=5).square()
    weighted, plain = fit(w, 3, p, n_iter=100), fit(w, 3)
    assert objective(w, weighted, 0, p=p) < 0.9 * objective(w, plain, 0, p=p)


def test_rows_without_observations_are_zero_and_counted() -> None:
    w, p = gaussian(20, 15), mask(20, 15, share=0.7)
    p[[4, 9]] = 0
    p[:, 2] = 0
    found = fit(w, 2, p, ridge=0.01, block_bytes=4 * 15 * 6)
    whole = found.factors.reconstruct()
    assert not whole[[4, 9]].any()
    assert not whole[:, 2].any()
    assert "2 rows (first: 4) and 1 columns (first: 2) have no observed entry" in found.report.reason


def test_rows_without_observations_need_a_ridge() -> None:
    w, p = gaussian(20, 15), mask(20, 15, share=0.7)
    p[[4, 9]] = 0
    with pytest.raises(DecompositionError, match=r"2 rows \(first: 4\) have no observed entry.*Set ridge > 0"):
        fit(w, 2, p)


def test_fewer_observations_than_unknowns_without_ridge() -> None:
    """Singular normal matrices in most rows: no failure, no NaN, never worse."""
    w, p = gaussian(40, 30, dtype=torch.float32), mask(40, 30, share=0.15, dtype=torch.float32)
    p[:, 0] = 1
    p[0] = 1
    found = fit(w, 8, p, n_iter=30)
    assert torch.isfinite(found.factors.reconstruct()).all()
    assert list(found.report.history) == sorted(found.report.history, reverse=True)


# ---- non-negative -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_nonnegative_factors_of_a_planted_product(dtype: torch.dtype, weighted: bool) -> None:
    w = gaussian(40, 3, dtype=dtype).abs() @ gaussian(3, 30, seed=1, dtype=dtype).abs()
    p = mask(40, 30, share=0.8, dtype=dtype) if weighted else None
    found = fit(w, 3, p, nonnegative=True, n_iter=120, tol=0, block_bytes=4 * 30 * 11)
    left, right = found.factors.low_rank()  # type: ignore[misc]
    assert float(left.min()) >= 0
    assert float(right.min()) >= 0
    assert found.report.relative_error < 0.01
    slack = 1e-5 if dtype == torch.float32 else 1e-12
    assert all(b <= a + slack for a, b in pairwise(found.report.history))


def test_nonnegative_step_solves_nnls() -> None:
    from scipy.optimize import nnls

    basis, targets = gaussian(30, 5), gaussian(4, 30, seed=1)
    gram, rhs = basis.T @ basis, targets @ basis
    x = torch.zeros(4, 5).double()
    for _ in range(200):
        x = nonnegative_step(gram, rhs - x @ gram, x, torch.tensor(0.0).double())
    wanted = np.stack([nnls(basis.numpy(), row.numpy())[0] for row in targets])
    torch.testing.assert_close(x, torch.from_numpy(wanted), rtol=0, atol=1e-10)


def test_nonnegative_start_takes_the_larger_signs() -> None:
    u, v = torch.tensor([[-1.0], [-2.0], [0.5]]), torch.tensor([[-3.0, -1.0]])
    left, right = nonnegative_start(SVDFactors(u, torch.ones(1), v))
    assert left[:, 0].argmax() == 1
    assert float((left @ right)[1, 0]) == pytest.approx(6.0, rel=0.1)
    assert float(left.min()) > 0


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"ridge": 1.0}, {"nonnegative": True}, {"weights": mask(8, 6, share=0.9)}])
def test_rules_other_than_rank_need_a_plain_fit(options: dict[str, Any]) -> None:
    with pytest.raises(RankError, match=r"a bound on energy needs a fit without missing.*Set decompose.rank"):
        fit(gaussian(8, 6), rule=RankRule(energy=0.9), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ridge": -1.0}, "ridge = -1.0 < 0"), ({"n_iter": 0}, "n_iter = 0 < 1"), ({"tol": float("nan")}, "tol = nan")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DecompositionError, match=message):
        fit(gaussian(8, 6), 2, **options)
