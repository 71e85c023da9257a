"""Sparse ratings against dense least squares, planted factors and the path without a compiler."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lowrank.decompositions import RatingsModel, fit_ratings
from lowrank.decompositions.ratings import plan_entries
from lowrank.errors import CheckpointError, DecompositionError, NumericsError, RankError
from lowrank.executor import SerialExecutor
from lowrank.factors import load_factors
from lowrank.kernels import build, sparse
from lowrank.kernels.sparse import HalfStep, Side, SparseRows
from tests.tolerance import tol


def random_ratings(m: int = 40, n: int = 30, share: float = 0.4, seed: int = 0, rank: int = 3) -> Any:
    rng = np.random.default_rng(seed)
    truth = 3 + rng.normal(size=(m, 1)) / 2 + rng.normal(size=(1, n)) / 2
    truth = truth + rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n)) / rank
    seen = rng.random((m, n)) < share
    rows, columns = np.nonzero(seen)
    return sp.csr_matrix((truth[seen].astype(np.float32), (rows, columns)), shape=(m, n))


def fit(ratings: Any, **options: Any) -> RatingsModel:
    return fit_ratings(ratings, **({"rank": 3, "ridge": 0.05, "executor": SerialExecutor()} | options))


def dense_row(targets: NDArray[Any], z: NDArray[Any], ridge: float, bias_ridge: float, bias: bool) -> NDArray[Any]:
    """x and b of one row by lstsq on the stacked system."""
    k = z.shape[1]
    design = np.column_stack([z, np.ones(len(z))]) if bias else z
    penalty = np.diag(np.sqrt(np.array([ridge] * k + [bias_ridge] * bias)))
    stacked = np.concatenate([targets, np.zeros(k + bias)])
    found: NDArray[Any] = np.linalg.lstsq(np.vstack([design, penalty]), stacked, rcond=None)[0]
    return found if bias else np.append(found, 0.0)


@pytest.fixture(params=["compiled", "numpy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(sparse, "kernel", lambda: None)
    elif build.kernel() is None:
        pytest.skip("no C compiler")
    return str(request.param)


# ---- the half step ----------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    rank=st.integers(1, 40),
    degree=st.integers(1, 90),
    bias=st.booleans(),
    per_entry=st.booleans(),
    iterate=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_solve_their_least_squares(
    rank: int, degree: int, bias: bool, per_entry: bool, iterate: bool, seed: int
) -> None:
    """Both ways through a row (its degree, its rank), and conjugate gradients run to the end, in both paths."""
    rng = np.random.default_rng(seed)
    z, c = rng.normal(size=(100, rank)).astype(np.float32), rng.normal(size=100).astype(np.float32)
    index = rng.permutation(100)[:degree].astype(np.int32)
    values = rng.normal(size=degree).astype(np.float32)
    rows = SparseRows(np.array([0, 0, degree]), index, values, np.array([1, 0]))
    step = HalfStep(
        mean=0.5, ridge=0.3, bias_ridge=0.7, per_entry=per_entry, bias=bias, cg_steps=60 if iterate else 0, threads=2
    )
    scale = degree if per_entry else 1
    normal = z[index].T.astype(np.float64) @ z[index] + scale * 0.3 * np.eye(rank)
    near = tol(torch.float32, float(np.linalg.cond(normal)))
    targets = values.astype(np.float64) - 0.5 - c[index]
    wanted = dense_row(targets, z[index].astype(np.float64), scale * 0.3, scale * 0.7, bias)
    loss = np.square(targets - z[index] @ wanted[:-1] - wanted[-1]).sum()
    start = Side(rng.normal(size=(2, rank)).astype(np.float32), np.zeros(2, np.float32))
    for found, squares in (step(rows, start, Side(z, c)), sparse._numpy_step(step, rows, start, Side(z, c))):
        np.testing.assert_allclose(found.factors[1], wanted[:-1], rtol=0, atol=near)
        np.testing.assert_allclose(found.biases[1], wanted[-1], rtol=0, atol=near)
        assert squares == pytest.approx(loss, rel=1e-3, abs=1e-6)
        assert not found.factors[0].any()
        assert found.biases[0] == 0


def test_few_conjugate_gradient_steps_are_the_same_in_both_paths() -> None:
    ratings = random_ratings(60, 200, 0.5)
    rng = np.random.default_rng(1)
    other = Side(rng.normal(size=(200, 24)).astype(np.float32), np.zeros(200, np.float32))
    step = HalfStep(mean=3.0, ridge=0.1, bias_ridge=0.2, per_entry=True, bias=True, cg_steps=2)
    rows = SparseRows.from_csr(ratings)
    found, loss = step(rows, None, other)
    wanted, squares = sparse._numpy_step(step, rows, Side(np.zeros((60, 24), np.float32), np.zeros(60)), other)
    np.testing.assert_allclose(found.factors, wanted.factors, atol=1e-4)
    np.testing.assert_allclose(found.biases, wanted.biases, atol=1e-4)
    assert loss == pytest.approx(squares, rel=1e-5)


# ---- whole fits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize("weighted_ridge", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_the_objective_falls_and_is_the_stated_one(path: str, solver: str, weighted_ridge: bool, biases: bool) -> None:
    ratings = random_ratings()
    model = fit(ratings, solver=solver, weighted_ridge=weighted_ridge, biases=biases, bias_ridge=0.02, n_iter=6, tol=0)
    report = model.report
    assert report is not None
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(report.objective))
    squares = model.rmse(ratings) ** 2 * ratings.nnz
    assert report.train_rmse == pytest.approx(model.rmse(ratings), rel=1e-4)
    penalty = 0.0
    for factors, b, counts in (
        (model.row_factors, model.row_biases, np.diff(ratings.indptr)),
        (model.column_factors, model.column_biases, np.diff(ratings.tocsc().indptr)),
    ):
        s = counts if weighted_ridge else 1.0
        penalty += float((s * (0.05 * np.square(factors).sum(1) + 0.02 * np.square(b))).sum())
    assert report.objective[-1] == pytest.approx(squares + penalty, rel=1e-4)
    assert biases or not (model.row_biases.any() or model.column_biases.any() or model.mean)


def test_both_paths_give_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ratings = random_ratings()
    for solver in ("cholesky", "cg"):
        compiled = fit(ratings, solver=solver, n_iter=4)
        with monkeypatch.context() as patch:
            patch.setattr(sparse, "kernel", lambda: None)
            plain = fit(ratings, solver=solver, n_iter=4)
        np.testing.assert_allclose(
            compiled.to_factors().reconstruct(), plain.to_factors().reconstruct(), rtol=0, atol=1e-4
        )


def test_planted_ratings_are_predicted() -> None:
    whole = random_ratings(120, 90, share=1.0).toarray()
    seen = random_ratings(120, 90, share=0.5)
    model = fit(seen, ridge=1e-4, n_iter=60, tol=1e-7)
    assert model.rmse(sp.csr_matrix(whole)) < 0.02


def test_solvers_agree() -> None:
    ratings = random_ratings(80, 60, share=0.5)
    exact, iterated = (fit(ratings, solver=solver, n_iter=60, tol=0) for solver in ("cholesky", "cg"))
    assert exact.report is not None
    assert iterated.report is not None
    assert exact.report.objective[-1] == pytest.approx(iterated.report.objective[-1], rel=1e-3)


def test_blocks_threads_and_format_change_nothing() -> None:
    ratings = random_ratings(50, 70)
    reference = fit(ratings, n_iter=3)
    for options in ({"block_entries": 37}, {"block_entries": 1}, {"threads": 3}, {"threads": 2, "block_entries": 200}):
        again = fit(ratings, n_iter=3, **options)
        assert np.array_equal(again.row_factors, reference.row_factors)
        assert np.array_equal(again.column_factors, reference.column_factors)
    for other in (ratings.tocsc(), ratings.tocoo(), sp.csr_array(ratings), ratings.astype(np.float64)):
        assert np.array_equal(fit(other, n_iter=3).row_factors, reference.row_factors)


def test_seed_is_the_only_chance() -> None:
    ratings = random_ratings()
    assert np.array_equal(fit(ratings, seed=3).row_factors, fit(ratings, seed=3).row_factors)
    assert not np.array_equal(fit(ratings, seed=3).row_factors, fit(ratings, seed=4).row_factors)


def test_input_is_left_alone() -> None:
    ratings = random_ratings()
    before = ratings.copy()
    fit(ratings, n_iter=2)
    assert (ratings != before).nnz == 0
    assert ratings.dtype == before.dtype


def test_explicit_zeros_are_ratings() -> None:
    """A column of zeros pulls its predictions down to them; unobserved it would fall back to the biases."""
    ratings = random_ratings(40, 20, share=1.0).tocsc()
    ratings.data[ratings.indptr[4] : ratings.indptr[5]] = 0.0
    model = fit(ratings.tocsr(), rank=5, ridge=1e-3, n_iter=30)
    assert model.report is not None
    assert model.report.empty_columns == 0
    assert np.abs(model.predict(np.arange(40), 4)).mean() < 0.05


def test_empty_rows_fall_back_to_the_biases() -> None:
    dense = random_ratings(share=0.8).toarray()
    dense[[3, 7]] = 0
    dense[:, 5] = 0
    model = fit(sp.csr_matrix(dense))
    assert model.report is not None
    assert (model.report.empty_rows, model.report.empty_columns) == (2, 1)
    assert not model.row_factors[[3, 7]].any()
    np.testing.assert_allclose(model.predict(3, np.arange(30)), model.mean + model.column_biases, rtol=1e-6)
    assert model.predict(3, 5) == pytest.approx(model.mean, rel=1e-6)


def test_bytes_per_sweep_are_both_factors_there_and_back() -> None:
    model = fit(random_ratings(40, 30), rank=3)
    assert model.report is not None
    assert model.report.bytes_per_sweep == 2 * 4 * (40 + 30) * (3 + 1)


def test_convergence_is_reported() -> None:
    ratings = random_ratings()
    rested, cut = fit(ratings, n_iter=500, tol=1e-4).report, fit(ratings, n_iter=2, tol=0).report
    assert rested is not None
    assert rested.converged
    assert rested.n_iter == len(rested.objective) < 500
    assert cut is not None
    assert not cut.converged


# ---- the model --------------------------------------------------------------------------------------------------


def test_model_returns_from_its_file(tmp_path: Path) -> None:
    model = fit(random_ratings())
    model.save(tmp_path / "model.safetensors")
    again = RatingsModel.load(tmp_path / "model.safetensors")
    rows, columns = np.arange(40)[:, None], np.arange(30)[None]
    assert np.array_equal(again.predict(rows, columns), model.predict(rows, columns))
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_model_as_low_rank_factors(tmp_path: Path) -> None:
    model = fit(random_ratings())
    factors = model.to_factors()
    assert factors.rank == 5
    grid = model.predict(np.arange(40)[:, None], np.arange(30)[None])
    np.testing.assert_allclose(factors.reconstruct(), grid, atol=1e-5)
    factors.save(tmp_path / "factors.safetensors")
    assert torch.equal(load_factors(tmp_path / "factors.safetensors").reconstruct(), factors.reconstruct())


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    fit(random_ratings()).to_factors().save(tmp_path / "factors.safetensors")
    with pytest.raises(CheckpointError, match=r"got format .*low_rank.*need rankline\.ratings\.v1"):
        RatingsModel.load(tmp_path / "factors.safetensors")
    with pytest.raises(CheckpointError, match="load ratings model"):
        RatingsModel.load(tmp_path / "none.safetensors")


def test_predictions_outside_the_matrix_are_refused() -> None:
    model = fit(random_ratings())
    with pytest.raises(IndexError, match="columns 0 to 30, the model has 0 to 29"):
        model.predict(0, [0, 30])
    with pytest.raises(DecompositionError, match="Give entries of the same rows and columns"):
        model.rmse(sp.csr_matrix((40, 30)))
    assert model.predict([], []).shape == (0,)


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 31}, RankError, r"rank 31 > min\(m, n\) = 30"),
        ({"rank": 0}, DecompositionError, "rank = 0. Set rank >= 1"),
        ({"ridge": -1.0}, DecompositionError, "ridge = -1.0. Set ridge >= 0"),
        ({"bias_ridge": float("nan")}, DecompositionError, "bias_ridge = nan"),
        ({"n_iter": 0}, DecompositionError, "n_iter = 0"),
        ({"threads": 0}, DecompositionError, "threads = 0"),
        ({"solver": "sgd"}, DecompositionError, "solver = 'sgd'. Set solver to auto, cholesky or cg"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(random_ratings(), **options)


def test_bad_ratings_are_refused() -> None:
    ratings = random_ratings()
    with pytest.raises(DecompositionError, match="need a scipy sparse matrix"):
        fit(ratings.toarray())
    with pytest.raises(DecompositionError, match="there are no ratings"):
        fit(sp.csr_matrix((4, 4)))
    for bad in (np.nan, np.inf, 1e30):
        ratings.data[:2] = bad
        with pytest.raises(NumericsError, match="2 ratings are NaN, infinite or beyond"):
            fit(ratings)


def test_empty_rows_need_a_ridge() -> None:
    dense = random_ratings(share=1.0).toarray()
    dense[[3, 7]] = 0
    with pytest.raises(DecompositionError, match=r"2 rows have no ratings \(first: 3\).*Set ridge > 0"):
        fit(sp.csr_matrix(dense), ridge=0.0)


def test_no_ridge_runs_with_full_rows() -> None:
    ratings = random_ratings(share=1.0)
    model = fit(ratings, ridge=0.0, n_iter=60, tol=0)
    assert model.rmse(ratings) < 1e-3
    assert np.isfinite(model.row_factors).all()


def test_one_row_and_one_rating() -> None:
    for ratings in (sp.csr_matrix([[4.0, 2.0, 3.0]]), sp.csr_matrix([[4.0]])):
        model = fit(ratings, rank=1, ridge=1e-3, n_iter=50)
        assert model.rmse(ratings) < 0.1


# ---- planning and building --------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=50)
@given(degrees=st.lists(st.integers(0, 9), min_size=1, max_size=30), size=st.integers(1, 40))
def test_blocks_cover_all_rows(degrees: list[int], size: int) -> None:
    indptr = np.concatenate([[0], np.cumsum(degrees)])
    if indptr[-1] == 0:
        return
    offsets = plan_entries(indptr, size)
    assert offsets[0] == 0
    assert offsets[-1] == len(degrees)
    assert all(a < b for a, b in pairwise(offsets))
    assert max(indptr[b] - indptr[a] for a, b in pairwise(offsets)) <= size + max(degrees)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a compiler that is in a hurry."""
    if build.kernel() is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("RANKLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_FLAGS", ("-O0",))
    return tmp_path / "cache"


def load_again() -> Any:
    return build.kernel.__wrapped__()


def test_the_kernel_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLINE_KERNEL", "0")
    assert load_again() is None


def test_without_a_compiler_there_is_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_again() is None


def test_a_compiler_that_fails_is_no_obstacle(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_FLAGS", ("-no-such-flag",))
    assert load_again() is None


def test_loads_that_start_together_share_one_library(fresh: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(lambda _: load_again() is not None, range(3)))
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


def test_a_damaged_or_unwritable_cache_is_no_obstacle(fresh: Path) -> None:
    fresh.write_text("a file, no directory")
    assert load_again() is not None
    fresh.unlink()
    assert load_again() is not None
    library = next(fresh.iterdir())
    library.unlink()  # a new file: this process has the old one mapped, and must not see it shrink
    library.write_bytes(b"not a library")
    assert load_again() is not None
