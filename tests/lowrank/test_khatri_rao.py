"""Khatri-Rao products: columns against the dense SVD, planted chains, masks, the low-rank form's exact steps, LoRA."""

import math
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tensorly.tenalg import khatri_rao as khatri_rao_by_tensorly
from tolerance import tol
from torch import Tensor

import lowrank.decompositions.columns as columns
from lowrank.blocks import BlockMatrix, TensorSlice
from lowrank.decompositions import decompose
from lowrank.decompositions.shapes import middle_divisors
from lowrank.errors import AdapterError, CheckpointError, DecompositionError, RankError
from lowrank.executor import SerialExecutor
from lowrank.factors import Decomposition, KhatriRaoFactors, LowRankKhatriRaoFactors
from lowrank.rank import RankRule

EXECUTOR = SerialExecutor()
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
#: One block, a few that cut through the rows of a factor, and single rows.
BLOCKINGS = [None, 1_500, 1]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_blocking = pytest.mark.parametrize("block_bytes", BLOCKINGS)
every_method = pytest.mark.parametrize("method", ["khatri_rao", "khatri_rao_low_rank"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def product(factors: list[Tensor]) -> Tensor:
    """Column-wise Kronecker product by tensorly."""
    if len(factors) == 1:
        return factors[0]
    with tensorly.backend_context("numpy", local_threadsafe=True):
        return torch.from_numpy(khatri_rao_by_tensorly([f.double().numpy() for f in factors]))


def chain(sizes: tuple[int, ...], n: int) -> list[Tensor]:
    return [normal(size, n, seed=index) for index, size in enumerate(sizes)]


def low_rank_chain(sizes: tuple[int, ...], n: int, rank: int) -> list[Tensor]:
    return [normal(s, rank, seed=i) @ normal(rank, n, seed=10 + i) for i, s in enumerate(sizes)]


def mask(shape: torch.Size, share: float) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64) < share).double()


def run(dense: Tensor, method: str, block_bytes: int | None = None, rank: int = 2, **options: Any) -> Decomposition:
    if method == "khatri_rao_low_rank":
        options.setdefault("rule", RankRule(rank=rank))
    if options.get("weights") is not None:
        options["weights"] = BlockMatrix.from_tensor("p", options["weights"], block_bytes)
    matrix = BlockMatrix.from_tensor("w", dense, block_bytes)
    return decompose(matrix, method=method, executor=EXECUTOR, **options)


def error(dense: Tensor, found: Decomposition) -> float:
    return float((found.factors.reconstruct(torch.float64) - dense.double()).norm() / dense.double().norm())


@every_dtype
@every_blocking
@pytest.mark.parametrize("sizes", [(4, 6), (6, 4), (1, 24), (24, 1), (24,)], ids=str)
def test_every_column_is_at_its_optimum(dtype: torch.dtype, block_bytes: int | None, sizes: tuple[int, ...]) -> None:
    dense = normal(24, 30, dtype=dtype)
    tensor = dense.double().T.reshape(30, sizes[0], -1).numpy()
    s = np.linalg.svd(tensor, compute_uv=False)
    best = float(np.linalg.norm(s[:, 1:]) / np.linalg.norm(s)) if len(sizes) > 1 else 0.0
    found = run(dense, "khatri_rao", block_bytes, shape=sizes)
    assert error(dense, found) == pytest.approx(best, rel=tol(dtype), abs=tol(dtype))
    assert found.report.relative_error == pytest.approx(best, rel=100 * tol(dtype), abs=tol(dtype))
    assert found.report.converged
    assert found.report.n_iter == 0
    assert found.factors.num_parameters == sum(sizes) * 30


@every_dtype
@every_blocking
@pytest.mark.parametrize("sizes", [(4, 6), (3, 2, 4), (2, 2, 3, 2)], ids=str)
def test_a_planted_chain_is_found_to_rounding(
    dtype: torch.dtype, block_bytes: int | None, sizes: tuple[int, ...]
) -> None:
    compute = torch.float32 if dtype == torch.bfloat16 else dtype  # rounding to bf16 would leave the model
    dense = product(chain(sizes, 30)).to(compute)
    found = run(dense, "khatri_rao", block_bytes, shape=sizes)
    assert error(dense, found) < tol(compute)
    for ours, theirs in zip(found.factors.factors, chain(sizes, 30)):
        cosine = torch.nn.functional.cosine_similarity(ours.double(), theirs, dim=0)
        torch.testing.assert_close(cosine.abs(), torch.ones(30, dtype=torch.float64), rtol=0, atol=tol(compute))


def test_a_longer_chain_is_a_fixed_point_of_every_exact_step() -> None:
    dense = product(chain((3, 2, 4), 30)) + 0.3 * normal(24, 30, seed=7)
    f = run(dense, "khatri_rao", shape=(3, 2, 4), n_iter=3000, tol=0.0).factors.factors
    tensor = dense.view(3, 2, 4, 30)
    norms = [factor.square().sum(0) for factor in f]
    first = torch.einsum("pqrj,qj,rj->pj", tensor, f[1], f[2]) / (norms[1] * norms[2])
    last = torch.einsum("pqrj,pj,qj->rj", tensor, f[0], f[1]) / (norms[0] * norms[1])
    torch.testing.assert_close(f[0], first, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(f[2], last, rtol=1e-6, atol=1e-6)


def test_chunks_of_columns_do_not_change_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = normal(24, 30)
    whole = run(dense, "khatri_rao", shape=(4, 6))
    monkeypatch.setattr(columns, "_CHUNK_ENTRIES", 24 * 7)
    parts = run(dense, "khatri_rao", shape=(4, 6))
    torch.testing.assert_close(parts.factors.reconstruct(), whole.factors.reconstruct())


@every_blocking
@pytest.mark.parametrize("sizes", [(16, 20), (6, 8, 7)], ids=str)
def test_missing_entries_of_a_chain_are_recovered(block_bytes: int | None, sizes: tuple[int, ...]) -> None:
    dense = product([factor.abs() + 0.5 for factor in chain(sizes, 12)])
    observed = mask(dense.shape, 0.6)
    hidden = torch.where(observed > 0, dense, torch.nan)
    found = run(hidden, "khatri_rao", block_bytes, weights=observed, shape=sizes, n_iter=300, tol=0.0)
    assert error(dense, found) < 1e-9
    assert found.report.relative_error < 1e-10


def test_a_masked_column_is_the_closed_form() -> None:
    """b_j[p] = Σ_q P A c_q / Σ_q P c_q², and c likewise, at rest."""
    dense, weights = normal(24, 10), normal(24, 10, seed=1).square() * mask(torch.Size((24, 10)), 0.9)
    b, c = run(dense, "khatri_rao", weights=weights, shape=(4, 6), n_iter=5000, tol=0.0).factors.factors
    a, p = dense.view(4, 6, 10), weights.view(4, 6, 10)
    torch.testing.assert_close(
        b, torch.einsum("pqj,qj->pj", p * a, c) / torch.einsum("pqj,qj->pj", p, c.square()), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        c, torch.einsum("pqj,pj->qj", p * a, b) / torch.einsum("pqj,pj->qj", p, b.square()), rtol=1e-5, atol=1e-5
    )


def test_an_entry_with_nothing_observed_is_zero_and_counted() -> None:
    dense, weights = product(chain((4, 6), 10)), torch.ones(24, 10, dtype=torch.float64)
    weights[6:12, 3] = 0
    weights[:, 5] = 0
    found = run(dense, "khatri_rao", weights=weights, shape=(4, 6))
    assert float(found.factors.factors[0][1, 3]) == 0
    assert not found.factors.reconstruct()[:, 5].any()
    assert "11 entries of factors have nothing observed" in found.report.reason


@every_dtype
@every_blocking
@pytest.mark.parametrize("sizes", [(4, 6), (3, 2, 4)], ids=str)
def test_planted_low_rank_factors_are_found_to_rounding(
    dtype: torch.dtype, block_bytes: int | None, sizes: tuple[int, ...]
) -> None:
    compute = torch.float32 if dtype == torch.bfloat16 else dtype
    dense = product(low_rank_chain(sizes, 30, 2)).to(compute)
    found = run(dense, "khatri_rao_low_rank", block_bytes, shape=sizes)
    assert error(dense, found) < tol(compute)
    assert found.report.rank == 2
    assert found.factors.num_parameters == 2 * (sum(sizes) + len(sizes) * 30)


def test_the_low_rank_step_is_the_column_weighted_svd() -> None:
    """At rest U = SVD_r(TD)D⁻¹ with t_j = A_j v_j / ‖v_j‖² and D = diag(‖v_j‖), for both factors."""
    dense = product(low_rank_chain((4, 6), 30, 2)) + 0.5 * normal(24, 30, seed=5)
    found = run(dense, "khatri_rao_low_rank", shape=(4, 6), n_iter=5000, tol=0.0).factors
    u, v = (left @ right for left, right in zip(found.left, found.right))
    tensor = dense.view(4, 6, 30)
    for ours, other, spec in ((u, v, "pqj,qj->pj"), (v, u, "pqj,pj->qj")):
        d = other.norm(dim=0)
        left, s, right = torch.linalg.svd(torch.einsum(spec, tensor, other) / d, full_matrices=False)
        expected = left[:, :2] @ torch.diag(s[:2]) @ right[:2] / d
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@every_blocking
def test_missing_entries_of_the_low_rank_form_are_recovered(block_bytes: int | None) -> None:
    dense = product([factor + 4 for factor in low_rank_chain((8, 10), 30, 1)])
    observed = mask(dense.shape, 0.6)
    hidden = torch.where(observed > 0, dense, torch.nan)
    found = run(hidden, "khatri_rao_low_rank", block_bytes, weights=observed, shape=(8, 10), n_iter=1000, tol=0.0)
    assert error(dense, found) < 1e-8
    assert found.report.relative_error < 1e-9


@every_method
@every_dtype
@pytest.mark.parametrize("sizes", [(4, 6), (3, 2, 4)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_sweep_lowers_the_error(method: str, dtype: torch.dtype, sizes: tuple[int, ...], weighted: bool) -> None:
    dense = normal(24, 30, dtype=dtype)
    weights = mask(dense.shape, 0.6) if weighted else None
    found = run(dense, method, shape=sizes, weights=weights, n_iter=12, tol=0.0)
    history = found.report.history
    if method == "khatri_rao" and len(sizes) == 2 and not weighted:
        assert history == ()
        return
    assert 1 < len(history) == found.report.n_iter <= 12
    assert all(after <= before * (1 + 10 * tol(dtype)) for before, after in pairwise(history))
    assert history[-1] == pytest.approx(found.report.relative_error, rel=1e-5)


def test_full_rank_factors_are_no_worse_than_the_chain() -> None:
    dense = normal(24, 30)
    free, cut = run(dense, "khatri_rao", shape=(4, 6)), run(dense, "khatri_rao_low_rank", rank=6, shape=(4, 6))
    assert cut.report.relative_error == pytest.approx(free.report.relative_error, rel=1e-9)
    assert [left.shape[1] for left in cut.factors.left] == [4, 6]
    assert cut.report.rank == 6


@every_method
def test_stored_columns_are_read_alone(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = product(low_rank_chain((4, 6), 30, 2)).float() + 0.1 * normal(24, 30, seed=5).float()
    save_file({"w": dense}, tmp_path / "w.safetensors")
    pieces = [TensorSlice(str(tmp_path / "w.safetensors"), "w", a, b) for a, b in ((0, 7), (7, 24))]
    stored = BlockMatrix.from_slices("w", pieces, (24, 30), torch.float32, 700)
    rule = RankRule(rank=2) if method == "khatri_rao_low_rank" else None
    found = decompose(stored, method=method, rule=rule, shape=(4, 6), executor=EXECUTOR)
    ours = run(dense, method, 700, shape=(4, 6))
    assert torch.equal(found.factors.reconstruct(), ours.factors.reconstruct())
    whole: list[TensorSlice] = []
    read = TensorSlice.read
    monkeypatch.setattr(TensorSlice, "read", lambda piece: whole.append(piece) or read(piece))
    decompose(stored, method=method, rule=rule, shape=(4, 6), executor=EXECUTOR)
    rows = sum(piece.stop - piece.start for piece in whole)
    passes = 2 if method == "khatri_rao_low_rank" else 1
    assert rows == passes * 24, "whole rows are read for ‖W‖ and, where the fit is no projection, for the residual"


def test_a_cut_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": normal(24, 30)}, path)
    stored = BlockMatrix.from_slices("w", [TensorSlice(str(path), "v", 0, 24)], (24, 30), torch.float64, 700)
    with pytest.raises(CheckpointError, match="Download or shard the checkpoint again"):
        decompose(stored, method="khatri_rao", executor=EXECUTOR)


@given(m=st.integers(1, 40), n=st.integers(1, 12), data=st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_any_shape_and_blocking_fits(m: int, n: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, m))
    sizes = (first, -(-m // first))
    block_bytes = data.draw(st.sampled_from([None, 200, 1]))
    dense = normal(m, n, seed=m)
    padded = torch.nn.functional.pad(dense, (0, 0, 0, sizes[0] * sizes[1] - m))
    s = np.linalg.svd(padded.T.reshape(n, *sizes).numpy(), compute_uv=False)
    best = float(np.linalg.norm(s[:, 1:]) / np.linalg.norm(s))
    free = run(dense, "khatri_rao", block_bytes, shape=sizes, padding="zero")
    rank = data.draw(st.integers(1, min(max(sizes), n)))
    cut = run(dense, "khatri_rao_low_rank", block_bytes, rank, shape=sizes, padding="zero", n_iter=5)
    assert error(dense, free) <= best + 1e-12
    for found in (free, cut):
        assert found.factors.reconstruct().shape == (m, n)
        assert found.report.relative_error == pytest.approx(error(dense, found), abs=1e-7)
        x = normal(3, n, seed=1)
        torch.testing.assert_close(found.factors.matvec(x), x @ found.factors.reconstruct().T)


def test_padding_under_weights_is_missing_not_zero() -> None:
    dense = product(chain((4, 6), 10))[:22].contiguous()
    found = run(dense, "khatri_rao", weights=torch.ones(22, 10), shape=(4, 6), padding="zero", n_iter=300, tol=0.0)
    assert error(dense, found) < 1e-9


@every_method
def test_rows_that_do_not_fit_are_refused_with_the_divisors(method: str) -> None:
    message = r"decompose w \(24x30\) by .*: shape = \(5, 5\) gives 25 rows, the matrix has 24\. .*\(4, 6\), \(6, 4\)"
    with pytest.raises(DecompositionError, match=message + r".*padding = zero"):
        run(normal(24, 30), method, shape=(5, 5))
    with pytest.raises(DecompositionError, match="product >= 24"):
        run(normal(24, 30), method, shape=(2, 5), padding="zero")
    with pytest.raises(DecompositionError, match="a zero matrix"):
        run(torch.zeros(24, 30), method, shape=(5, 5))
    with pytest.raises(DecompositionError, match="shape = 0 < 1"):
        run(normal(24, 30), method, shape=(0, 5))


def test_ranks_out_of_reach_are_refused() -> None:
    with pytest.raises(RankError, match=r"rank 7 > .* = 6\. Set decompose.rank <= 6"):
        run(normal(24, 30), "khatri_rao_low_rank", rank=7)
    with pytest.raises(RankError, match="has no rank"):
        run(normal(24, 30), "khatri_rao", rule=RankRule(rank=1))


@pytest.mark.parametrize(("number", "middle"), [(1, (1, 1)), (7, (1, 7)), (24, (4, 6)), (576, (24, 24))])
def test_the_default_shape_is_the_middle(number: int, middle: tuple[int, int]) -> None:
    assert middle_divisors(number) == middle
    found = run(normal(number, 3), "khatri_rao")
    assert tuple(len(factor) for factor in found.factors.factors) == middle


@every_method
@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("weighted", [False, True])
def test_scale_does_not_matter(method: str, scale: float, weighted: bool) -> None:
    dense = normal(24, 30, dtype=torch.float32)
    weights = mask(dense.shape, 0.8) if weighted else None
    options: dict[str, Any] = {"shape": (4, 6), "weights": weights, "n_iter": 10, "tol": 0.0}
    ours, theirs = run(dense * scale, method, **options), run(dense, method, **options)
    assert ours.report.relative_error == pytest.approx(theirs.report.relative_error, rel=1e-4)


def test_the_low_rank_form_is_lora_and_the_chain_is_not() -> None:
    """LoKH: (B1 A1) ⊙ (B2 A2) = (B1 ⊗ B2)(A1 ⊙ A2), rank r1 r2."""
    left, right = (normal(6, 2), normal(8, 3, seed=1)), (normal(2, 50, seed=2), normal(3, 50, seed=3))
    factors = LowRankKhatriRaoFactors(left, right, 47)
    dense = product([c @ e for c, e in zip(left, right)])[:47]
    assert factors.low_rank()[0].shape == (47, 6)
    lora = factors.to_lora(2.0)
    assert lora.exact
    torch.testing.assert_close(2.0 * lora.b @ lora.a, dense)
    free = KhatriRaoFactors(tuple(chain((6, 8), 50)), 48)
    assert free.low_rank() is None
    with pytest.raises(AdapterError, match="Give max_rank"):
        free.to_lora()


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (2, 3, 4), (2, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("rank", [None, 2])
def test_rows_products_and_files_agree_with_tensorly(sizes: tuple[int, ...], rank: int | None, tmp_path: Path) -> None:
    m = math.prod(sizes) - 1
    factors: KhatriRaoFactors | LowRankKhatriRaoFactors
    if rank is None:
        free = chain(sizes, 9)
        factors = KhatriRaoFactors(tuple(free), m)
    else:
        left = [normal(s, rank, seed=i) for i, s in enumerate(sizes)]
        right = [normal(rank, 9, seed=10 + i) for i in range(len(sizes))]
        free = [c @ e for c, e in zip(left, right)]
        factors = LowRankKhatriRaoFactors(tuple(left), tuple(right), m)
    dense = product(free)[:m]
    torch.testing.assert_close(factors.reconstruct(), dense)
    torch.testing.assert_close(factors.reconstruct_rows(2, m - 1), dense[2 : m - 1])
    for batch in ((), (2,), (2, 3), (0,)):
        x = normal(*batch, 9, seed=4)
        torch.testing.assert_close(factors.matvec(x), x @ dense.T)
    factors.save(tmp_path / "f")
    loaded = type(factors).load(tmp_path / "f")
    assert torch.equal(loaded.reconstruct(), factors.reconstruct())
    assert factors.num_parameters == reduce(lambda total, t: total + t.numel(), factors.tensors().values(), 0) - 1


def test_a_batch_is_multiplied_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    import lowrank.factors.khatri_rao as form

    factors, x = KhatriRaoFactors(tuple(chain((4, 6), 9)), 24), normal(11, 9)
    whole = factors.matvec(x)
    monkeypatch.setattr(form, "_SLICE_ENTRIES", 100)
    torch.testing.assert_close(factors.matvec(x), whole)
