"""Hadamard factors: identities, the exactness of a block step, planted and masked recovery, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import tol
from torch import Tensor

from lowrank.blocks import BlockMatrix
from lowrank.decompositions import Problem, decompose
from lowrank.decompositions.hadamard import hadamard
from lowrank.decompositions.hadamard_steps import Target, noisy_start, rebalance, root_start, sweep
from lowrank.errors import AdapterError, DecompositionError, RankError
from lowrank.executor import SerialExecutor
from lowrank.factors import Decomposition, HadamardFactors, load_factors
from lowrank.options import HadamardOptions
from lowrank.rank import RankRule

EXECUTOR = SerialExecutor()
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(m: int, n: int, r1: int, r2: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> HadamardFactors:
    shapes = [(m, r1), (r1, n), (m, r2), (r2, n)]
    return HadamardFactors(*(normal(*shape, seed=10 * seed + i, dtype=dtype) for i, shape in enumerate(shapes)))


def planted(m: int = 60, n: int = 80, r: int = 3, seed: int = 0) -> Tensor:
    """A product of two non-negative rank-r matrices, which the start from √|W| finds."""
    drawn = factors(m, n, r, r, seed).tensors().values()
    return HadamardFactors(*(factor.abs() for factor in drawn)).reconstruct()


def mask(shape: torch.Size, share: float, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share).double()


def fit(w: Tensor, rank: int, weights: Tensor | None = None, block_bytes: int | None = None, **o: Any) -> Decomposition:
    under = None if weights is None else BlockMatrix.from_tensor("p", weights, block_bytes)
    matrix = BlockMatrix.from_tensor("w", w, block_bytes)
    return decompose(matrix, method="hadamard", rule=RankRule(rank=rank), weights=under, executor=EXECUTOR, **o)


def target_of(w: Tensor, weights: Tensor | None = None, ridge: float = 0.0, block_bytes: int | None = None) -> Target:
    p = torch.ones_like(w) if weights is None else weights
    return Target(
        matrix=BlockMatrix.from_tensor("w", w, block_bytes),
        weights=None if weights is None else BlockMatrix.from_tensor("p", weights, block_bytes),
        scale=1.0,
        rows=p.double().sum(1),
        columns=p.double().sum(0),
        ridge=ridge,
        executor=EXECUTOR,
    )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))
def test_identities_of_the_factors(m: int, n: int, r1: int, r2: int) -> None:
    f, x = factors(m, n, r1, r2), normal(2, 3, n, seed=9)
    dense = (f.c1 @ f.d1) * (f.c2 @ f.d2)
    left, right = f.low_rank()
    close = {"rtol": 0.0, "atol": tol(torch.float64) * max(1.0, float(dense.abs().max()))}
    torch.testing.assert_close(f.reconstruct(), dense, **close)
    torch.testing.assert_close(left @ right, dense, **close)
    torch.testing.assert_close(f.matvec(x), x @ dense.T, rtol=0.0, atol=100 * close["atol"])
    assert left.shape == (m, r1 * r2)
    assert right.shape == (r1 * r2, n)
    assert f.num_parameters == (r1 + r2) * (m + n)


def test_matvec_by_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    f, x = factors(11, 7, 3, 3), normal(7, seed=5)
    monkeypatch.setattr("lowrank.factors.hadamard._CHUNK_ENTRIES", 14)
    torch.testing.assert_close(f.matvec(x), f.reconstruct() @ x)


def test_rank_exceeds_the_factors_and_lora_is_exact() -> None:
    f = factors(90, 80, 3, 3)
    assert int(torch.linalg.matrix_rank(f.reconstruct())) == 9
    export = f.to_lora(scaling=2.0)
    assert export.exact
    assert export.b.shape == (90, 9)
    assert relative(2.0 * export.b @ export.a, f.reconstruct()) < tol(torch.float64)
    with pytest.raises(AdapterError, match="exact rank 9 takes at least as many numbers as the matrix"):
        factors(12, 12, 3, 3).to_lora()


def test_file_round_trip(tmp_path: Path) -> None:
    f = factors(6, 5, 2, 3, dtype=torch.float32)
    f.save(tmp_path / "f.safetensors")
    found = load_factors(tmp_path / "f.safetensors")
    assert isinstance(found, HadamardFactors)
    assert found.rank == 3
    assert all(torch.equal(found.tensors()[name], factor) for name, factor in f.tensors().items())


@pytest.mark.parametrize("block_bytes", [None, 300])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.02])
def test_a_sweep_is_four_least_squares_fits(block_bytes: int | None, masked: bool, ridge: float) -> None:
    """numpy's lstsq, one row and one column at a time, finds the same matrix and the same residual."""
    w, start = normal(13, 11), factors(13, 11, 2, 2, seed=3)
    p = 0.1 + mask(w.shape, 0.5) if masked else None
    found, residual = sweep(target_of(w, p, ridge, block_bytes), start)
    want = by_numpy(w, torch.ones_like(w) if p is None else p, start, ridge)
    assert relative(found.reconstruct(), want.reconstruct()) < tol(torch.float64, cond=1e3)
    misfit = (w - want.reconstruct()).square() * (1.0 if p is None else p)
    assert residual == pytest.approx(float(misfit.sum()), rel=1e-9)


def by_numpy(w: Tensor, p: Tensor, f: HadamardFactors, ridge: float) -> HadamardFactors:
    c, d = [f.c1.numpy(), f.c2.numpy()], [f.d1.numpy(), f.d2.numpy()]
    values, weights = w.numpy(), p.numpy()
    for k in (0, 1):
        other = c[1 - k] @ d[1 - k]
        c[k] = np.stack([solved(values[i], weights[i], other[i], d[k], ridge) for i in range(len(values))])
        d[k] = np.stack(
            [solved(values[:, j], weights[:, j], other[:, j], c[k].T, ridge) for j in range(values.shape[1])], 1
        )
    return HadamardFactors(*(torch.from_numpy(x) for x in (c[0], d[0], c[1], d[1])))


def solved(a: Any, p: Any, other: Any, basis: Any, ridge: float) -> Any:
    design = (np.sqrt(p) * other)[:, None] * basis.T
    r = basis.shape[0]
    stacked = np.vstack([design, np.sqrt(ridge * p.sum()) * np.eye(r)])
    return np.linalg.lstsq(stacked, np.concatenate([np.sqrt(p) * a, np.zeros(r)]), rcond=None)[0]


def test_rebalancing_keeps_the_matrix_and_lowers_the_penalty() -> None:
    f, target = factors(9, 7, 2, 2), target_of(normal(9, 7), ridge=0.1)
    f = replace(f, c1=f.c1 * torch.logspace(-3, 3, 9)[:, None], d2=f.d2 * 50.0)
    f.c2[4] = 0.0
    even = rebalance(f, target.rows, target.columns)
    assert relative(even.reconstruct(), f.reconstruct()) < tol(torch.float64)
    assert target.penalty(even) < 0.1 * target.penalty(f)
    again = rebalance(even, target.rows, target.columns)
    assert target.penalty(again) <= target.penalty(even) * (1 + 1e-12)


def test_starts_are_as_good_as_they_say() -> None:
    w = planted(seed=4)
    target = target_of(w)
    u, s, vh = torch.linalg.svd(w)
    cut = relative((u[:, :3] * s[:3]) @ vh[:3], w)
    assert relative(noisy_start(target, 3, seed=0, stream=1).reconstruct(), w) < cut + 0.2
    exact = normal(9, 1).abs() @ normal(1, 8, seed=1).abs() * torch.sign(normal(9, 1, seed=2) @ normal(1, 8, seed=3))
    assert relative(root_start(target_of(exact), 1, seed=0).reconstruct(), exact) < tol(torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_bytes", [None, 4_000])
def test_planted_factors_are_found(dtype: torch.dtype, block_bytes: int | None) -> None:
    w = planted().to(dtype)
    found = fit(w, 3, block_bytes=block_bytes, ridge=0.0, n_iter=300)
    stored = relative(w, planted())
    assert found.report.relative_error < 2e-5 + stored
    assert found.report.converged
    assert "lowered the relative error by less" in found.report.reason
    assert found.factors.tensors()["c1"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("ridge", [0.0, 1e-5])
def test_beats_an_svd_of_as_many_numbers_where_signs_are_random(ridge: float) -> None:
    """Independent Gaussian entries: 0.47 against 0.61 is the published picture."""
    w = normal(64, 64)
    s = torch.linalg.svdvals(w)
    svd = float((s[16:].square().sum() / s.square().sum()).sqrt())
    assert fit(w, 8, ridge=ridge).report.relative_error < 0.78 * svd


def test_default_start_beats_random_factors() -> None:
    w = planted(seed=1)
    problem = Problem(
        matrix=BlockMatrix.from_tensor("w", w),
        weights=None,
        rule=RankRule(rank=3),
        total_energy=float(w.square().sum()),
        seed=0,
        options=HadamardOptions(n_iter=30),
        executor=EXECUTOR,
    )
    ours = hadamard(problem).history[-1]
    f, target = factors(60, 80, 3, 3, seed=7), target_of(w)
    for _ in range(30):
        f, residual = sweep(target, f)
    assert ours < 0.5 * float(residual / w.square().sum()) ** 0.5


def test_no_sweep_raises_the_error_and_history_ends_at_the_report() -> None:
    report = fit(normal(40, 30), 4, ridge=0.0, n_iter=60).report
    assert all(b <= a for a, b in zip(report.history, report.history[1:]))
    assert report.history[-1] == pytest.approx(report.relative_error, abs=1e-9)
    assert len(report.history) == report.n_iter
    short = fit(normal(40, 30), 4, n_iter=2).report
    assert not short.converged
    assert short.reason == "reached n_iter = 2"


def test_extrapolation_reaches_lower_than_plain_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(60, 50, seed=2)
    ours = fit(w, 5, n_iter=60).report.relative_error
    monkeypatch.setattr("lowrank.decompositions.hadamard._BETA", 0.0)
    monkeypatch.setattr("lowrank.decompositions.hadamard._MOST", 0.0)
    assert ours < fit(w, 5, n_iter=60).report.relative_error


def test_missing_entries_are_filled() -> None:
    w = planted()
    seen = mask(w.shape, 0.5)
    found = fit(torch.where(seen > 0, w, torch.nan), 3, seen, n_iter=300, block_bytes=5_000)
    unseen = (found.factors.reconstruct() - w)[seen == 0].norm() / w[seen == 0].norm()
    assert float(unseen) < 2e-3
    assert found.report.relative_error < 1e-3


def test_weights_scale_out() -> None:
    w, p = normal(20, 15), 0.2 + mask(torch.Size((20, 15)), 0.5)
    one, other = (fit(w, 3, c * p, ridge=1e-3).factors.reconstruct() for c in (1.0, 64.0))
    assert relative(one, other) < 1e-8


@pytest.mark.parametrize("exponent", [-100, 100])
def test_units_scale_out(exponent: int) -> None:
    """A power of two changes no mantissa, so the two fits take the same path, far from the middle of fp32."""
    w, scale = normal(20, 15).float(), 2.0**exponent
    scaled = fit(w * scale, 3).factors.reconstruct() / scale
    assert relative(scaled, fit(w, 3).factors.reconstruct()) < tol(torch.float32)


def test_held_out_entries_choose_when_to_stop() -> None:
    """A noisy matrix with few observations: the fit on all sweeps learns the noise, the early one less of it."""
    w = planted(40, 50, 2) / planted(40, 50, 2).square().mean().sqrt()
    noisy, seen = w + 0.3 * normal(40, 50, seed=8), mask(w.shape, 0.4)
    errors = {}
    for share in (0.0, 0.2):
        found = fit(noisy, 4, seen, held_out=share, ridge=1e-4, n_iter=200)
        errors[share] = relative(found.factors.reconstruct(), w)
    assert errors[0.2] < 0.7 * errors[0.0]
    assert "held-out error was least at sweep" in found.report.reason
    assert found.report.converged


def test_held_out_entries_do_not_depend_on_blocks() -> None:
    w, seen = planted(seed=2), mask(torch.Size((60, 80)), 0.6)
    first, second = (
        fit(w, 3, seen, held_out=0.2, ridge=1e-3, block_bytes=size, n_iter=15).factors.reconstruct()
        for size in (None, 2_000)
    )
    assert relative(first, second) < 1e-6


def test_restarts_keep_the_best() -> None:
    w = factors(60, 80, 2, 2, seed=1).reconstruct()
    single, more = (fit(w, 2, restarts=k, ridge=0.0).report.relative_error for k in (0, 6))
    assert more <= single
    assert more == fit(w, 2, restarts=6, ridge=0.0).report.relative_error


def test_rows_and_columns_without_observations() -> None:
    w, seen = planted(), torch.ones(60, 80)
    seen[3], seen[:, :2] = 0.0, 0.0
    with pytest.raises(
        DecompositionError, match=r"w \(60x80\) by hadamard: 1 rows and 2 columns have nothing observed"
    ):
        fit(w, 3, seen, ridge=0.0)
    found = fit(w, 3, seen, ridge=1e-4)
    matrix = found.factors.reconstruct()
    assert not matrix[3].any()
    assert not matrix[:, :2].any()
    assert "1 rows and 2 columns have nothing observed" in found.report.reason


@pytest.mark.parametrize(
    ("options", "rule", "error", "message"),
    [
        ({}, RankRule(rank=31), RankError, r"rank 31 > min\(m, n\) = 30"),
        ({}, RankRule(energy=0.9), RankError, "cannot follow a bound on energy"),
        ({"held_out": 0.1}, RankRule(rank=2), DecompositionError, "held_out = 0.1 without weights"),
        ({"held_out": 0.5}, RankRule(rank=2), DecompositionError, "Set held_out < 0.5"),
        ({"ridge": -1.0}, RankRule(rank=2), DecompositionError, "ridge = -1.0"),
        ({"lam": 1.0}, RankRule(rank=2), DecompositionError, "unknown options"),
    ],
)
def test_refusals(options: dict[str, Any], rule: RankRule, error: type[Exception], message: str) -> None:
    matrix = BlockMatrix.from_tensor("w", normal(40, 30))
    with pytest.raises(error, match=message):
        decompose(matrix, method="hadamard", rule=rule, executor=EXECUTOR, **options)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (5, 5)])
def test_smallest_shapes(shape: tuple[int, int]) -> None:
    found = fit(normal(*shape).float(), min(shape), ridge=0.0)
    assert found.report.relative_error < tol(torch.float32)


def test_constant_and_partly_zero_matrices() -> None:
    assert fit(torch.full((7, 5), -3.0), 3, ridge=0.0).report.relative_error < tol(torch.float32)
    w = torch.cat([torch.zeros(3, 8), normal(5, 8).float()])
    found = fit(w, 4, ridge=0.0)
    assert found.report.relative_error < 1e-3
    assert not found.factors.reconstruct()[:3].any()
