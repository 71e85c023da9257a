"""Laws that every registered decomposition keeps, whatever its family."""

import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import DTYPES, SAMPLES, SHAPE, dense, fit
from tolerance import tol

from lowrank.blocks import BlockMatrix
from lowrank.decompositions import METHODS, spectral_error
from lowrank.errors import AdapterError, DecompositionError, NumericsError, RankError
from lowrank.executor import SerialExecutor
from lowrank.factors import load_factors
from lowrank.options import METHOD_OPTIONS, RULES

every_method = pytest.mark.parametrize("method", sorted(METHODS))
every_weighted_method = pytest.mark.parametrize("method", sorted(n for n, m in METHODS.items() if m.weighted))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_blocking = pytest.mark.parametrize("block_bytes", [None, 1_000, 96])


def test_every_method_has_options_and_a_sample() -> None:
    assert {name: method.options for name, method in METHODS.items()} == METHOD_OPTIONS
    assert {name: method.rules for name, method in METHODS.items()} == RULES
    assert set(SAMPLES) == set(METHODS)


@every_method
@every_dtype
@every_blocking
def test_the_error_is_the_true_one(method: str, dtype: torch.dtype, block_bytes: int | None) -> None:
    values = dense(dtype)
    found = fit(method, values, block_bytes)
    truth = float((values.double() - found.factors.reconstruct(torch.float64)).norm() / values.double().norm())
    assert found.report.relative_error == pytest.approx(truth, rel=100 * tol(dtype), abs=tol(dtype))
    assert truth < 1
    assert found.report.explained_energy == pytest.approx(1 - found.report.relative_error**2)
    assert found.report.num_parameters == found.factors.num_parameters < 4 * values.numel()
    assert found.factors.shape == SHAPE
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in found.factors.tensors().values() if t.is_floating_point()} == {computed}  # type: ignore[attr-defined]


@every_method
@every_dtype
@every_blocking
def test_it_repeats_bit_for_bit(method: str, dtype: torch.dtype, block_bytes: int | None) -> None:
    values = dense(dtype)
    ours, again = (fit(method, values, block_bytes) for _ in range(2))
    for name, tensor in ours.factors.tensors().items():  # type: ignore[attr-defined]
        assert torch.equal(tensor, again.factors.tensors()[name]), name  # type: ignore[attr-defined]
    assert ours.report.relative_error == again.report.relative_error


@every_method
def test_blocking_changes_rounding_only(method: str) -> None:
    values = dense(torch.float64)
    whole, parts = fit(method, values), fit(method, values, 96)
    torch.testing.assert_close(whole.factors.reconstruct(), parts.factors.reconstruct(), rtol=0, atol=1e-7)


@every_method
@every_dtype
def test_products_and_rows_are_those_of_the_matrix(method: str, dtype: torch.dtype) -> None:
    factors = fit(method, dense(dtype)).factors
    whole = factors.reconstruct()
    x = torch.randn(2, 5, SHAPE[1], generator=torch.Generator().manual_seed(2), dtype=whole.dtype)
    torch.testing.assert_close(factors.matvec(x), x @ whole.T, rtol=tol(dtype), atol=tol(dtype, 10))
    torch.testing.assert_close(factors.reconstruct_rows(7, 20), whole[7:20], rtol=0, atol=tol(dtype))
    assert factors.reconstruct(torch.bfloat16).dtype == torch.bfloat16


@every_method
@every_dtype
def test_a_file_restores_every_bit(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    factors = fit(method, dense(dtype)).factors
    factors.save(tmp_path / "a")
    loaded = load_factors(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(loaded.reconstruct(), factors.reconstruct())
    assert type(loaded) is type(factors)
    assert torch.equal(pickle.loads(pickle.dumps(factors)).reconstruct(), factors.reconstruct())


@every_method
@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0])
def test_lora_is_exact_or_says_what_it_keeps(method: str, scaling: float) -> None:
    factors = fit(method, dense(torch.float64)).factors
    whole = factors.reconstruct()
    form = factors.low_rank()
    if form is not None:
        torch.testing.assert_close(form[0] @ form[1], whole, rtol=0, atol=1e-12)
    if METHODS[method].low_rank == "exact":
        lora = factors.to_lora(scaling)
        assert lora.exact
        torch.testing.assert_close(scaling * lora.b @ lora.a, whole, rtol=0, atol=1e-7)
    if METHODS[method].low_rank == "none":
        with pytest.raises(AdapterError, match="Give max_rank to truncate"):
            factors.to_lora(scaling)
    cut = factors.to_lora(scaling, max_rank=2)
    s = torch.linalg.svdvals(whole)
    kept = float((s[:2] ** 2).sum() / (s**2).sum())
    assert cut.a.shape[0] == cut.b.shape[1] <= 2
    assert cut.retained_energy == pytest.approx(kept, abs=1e-7)
    lost = float((whole - scaling * cut.b @ cut.a).norm() / whole.norm())
    assert lost == pytest.approx(math.sqrt(max(1 - kept, 0)), abs=1e-6)


@every_method
@every_blocking
def test_the_spectral_error_is_estimated_from_below(method: str, block_bytes: int | None) -> None:
    values = dense(torch.float64)
    factors = fit(method, values, block_bytes).factors
    matrix = BlockMatrix.from_tensor("w", values, block_bytes)
    truth = float(torch.linalg.matrix_norm(values - factors.reconstruct(), ord=2))
    assert 0.9 * truth <= spectral_error(matrix, factors, SerialExecutor()) <= truth * (1 + 1e-9)


@every_method
def test_a_sweep_never_makes_it_worse(method: str) -> None:
    report = fit(method, dense(torch.float64)).report
    assert all(after <= before + 1e-9 for before, after in zip(report.history, report.history[1:]))
    if report.history:
        assert report.history[-1] == pytest.approx(report.relative_error, rel=1e-6, abs=1e-9)
    assert report.reason


@every_method
@every_blocking
def test_a_zero_matrix_has_zero_factors_and_reaches_no_method(
    method: str, block_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = replace(METHODS[method], fit=lambda problem: pytest.fail("a method may divide by ‖W‖"))
    monkeypatch.setitem(METHODS, method, untouched)
    found = fit(method, torch.zeros(SHAPE), block_bytes)
    assert found.report.relative_error == 0
    assert found.report.reason == "the matrix is zero"
    assert found.factors.shape == SHAPE
    assert not found.factors.reconstruct().any()


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_blocking
def test_non_finite_input_is_refused_by_name(method: str, bad: float, block_bytes: int | None) -> None:
    values = dense()
    values[30, 3] = bad
    with pytest.raises(NumericsError, match=r"decompose w: 1 of .* NaN or infinite"):
        fit(method, values, block_bytes)


@every_method
@pytest.mark.parametrize("values", [torch.zeros(0, 4), torch.ones(3, 3, dtype=torch.int64), torch.ones(4)], ids=str)
def test_what_is_no_matrix_of_floats_is_refused(method: str, values: torch.Tensor) -> None:
    with pytest.raises(DecompositionError, match=r"empty|floating-point|2 dimensions"):
        fit(method, values)


@every_method
def test_a_rank_above_the_bound_is_refused(method: str) -> None:
    if METHODS[method].max_rank is None:
        return
    with pytest.raises(RankError, match=r"decompose w \(36x24\): rank 100000 > .* = \d+\. Set decompose\.rank <= \d+"):
        fit(method, dense(), rank=100_000)


@every_method
def test_an_unknown_option_is_refused(method: str) -> None:
    with pytest.raises(DecompositionError, match=r"unknown options \['colour'\]"):
        fit(method, dense(), colour="red")


@every_method
def test_weights_of_another_shape_or_for_another_method_are_refused(method: str) -> None:
    with pytest.raises(DecompositionError, match=r"got weights, which it cannot use|the weights are 4x4"):
        fit(method, dense(), weights=torch.ones(4, 4))
    if METHODS[method].weighted:
        with pytest.raises(NumericsError, match="a weight is negative"):
            fit(method, dense(), weights=-torch.ones(SHAPE))


@every_weighted_method
@every_blocking
def test_missing_entries_are_not_read(method: str, block_bytes: int | None) -> None:
    values, mask = dense(torch.float64), torch.ones(SHAPE, dtype=torch.float64)
    mask[::3, ::2] = 0
    holes = torch.where(mask > 0, values, float("nan"))
    options = {"ridge": 1e-3} if "ridge" in METHOD_OPTIONS[method].__dataclass_fields__ else {}
    ours, theirs = (fit(method, v, block_bytes, weights=mask, **options) for v in (holes, values))
    assert torch.equal(ours.factors.reconstruct(), theirs.factors.reconstruct())
    error = (mask.sqrt() * (values - ours.factors.reconstruct())).norm() / (mask.sqrt() * values).norm()
    assert ours.report.relative_error == pytest.approx(float(error), rel=1e-9)
    assert error < 1


@every_weighted_method
def test_equal_weights_are_no_weights(method: str) -> None:
    """The same minimum: as good as without weights, whatever the path there."""
    values = dense(torch.float64)
    plain, weighted = fit(method, values), fit(method, values, weights=torch.ones(SHAPE, dtype=torch.float64))
    assert weighted.report.relative_error <= plain.report.relative_error * 1.05 + 1e-9
