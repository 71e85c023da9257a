"""Sums of Kronecker products: planted terms, the dense SVD of the rearrangement, masks, shapes, padding, LoRA."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerance import tol
from torch import Tensor

from lowrank.blocks import BlockMatrix, TensorSlice
from lowrank.decompositions import decompose, kronecker_shapes
from lowrank.decompositions.rearranged import rearrange
from lowrank.decompositions.shapes import KroneckerLayout, divisors
from lowrank.errors import AdapterError, DecompositionError, RankError
from lowrank.executor import SerialExecutor
from lowrank.factors import Decomposition, KroneckerFactors
from lowrank.rank import RankRule

EXECUTOR = SerialExecutor()
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
#: One block, a few that cut through blocks A_ij, and single rows.
BLOCKINGS = [None, 1_500, 1]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_blocking = pytest.mark.parametrize("block_bytes", BLOCKINGS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def planted(
    first: tuple[int, int], second: tuple[int, int], terms: int, inner: int | None = None, seed: int = 0
) -> Tensor:
    """Σ Bₖ ⊗ Cₖ by torch.kron, with Cₖ of rank `inner`."""
    b = normal(terms, *first, seed=seed)
    c = normal(terms, *second, seed=seed + 1)
    if inner is not None:
        c = normal(terms, second[0], inner, seed=seed + 1) @ normal(terms, inner, second[1], seed=seed + 2)
    return sum((torch.kron(left, right) for left, right in zip(b, c)), torch.zeros(()))


def mask(shape: torch.Size, share: float, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) < share).double()


def rearranged_by_numpy(w: Tensor, first: tuple[int, int]) -> np.ndarray:
    """R(W) block by block."""
    (m1, n1), (m, n) = first, w.shape
    blocks = [np.hsplit(rows, n1) for rows in np.vsplit(w.double().numpy(), m1)]
    assert blocks[0][0].shape == (m // m1, n // n1)
    return np.stack([block.reshape(-1) for row in blocks for block in row])


def run(dense: Tensor, rank: int = 1, block_bytes: int | None = None, **options: Any) -> Decomposition:
    options.setdefault("rule", RankRule(rank=rank))
    if options.get("weights") is not None:
        options["weights"] = BlockMatrix.from_tensor("p", options["weights"], block_bytes)
    matrix = BlockMatrix.from_tensor("w", dense, block_bytes)
    return decompose(matrix, method="kronecker", executor=EXECUTOR, **options)


def error(dense: Tensor, found: Decomposition) -> float:
    return float((found.factors.reconstruct(torch.float64) - dense.double()).norm() / dense.double().norm())


@every_dtype
@every_blocking
@pytest.mark.parametrize("first", [(4, 6), (12, 2), (2, 3), (1, 10), (24, 1)], ids=str)
@pytest.mark.parametrize("solver", ["svd", "als"])
def test_the_error_is_that_of_the_dense_svd_of_the_rearrangement(
    dtype: torch.dtype, block_bytes: int | None, first: tuple[int, int], solver: str
) -> None:
    dense = (planted(first, (24 // first[0], 30 // first[1]), 2) + 0.01 * normal(24, 30, seed=7)).to(dtype)
    rank = min(2, KroneckerLayout((24, 30), first).bound)
    s = np.linalg.svd(rearranged_by_numpy(dense, first), compute_uv=False)
    best = float(np.linalg.norm(s[rank:]) / np.linalg.norm(s))
    found = run(dense, rank, block_bytes, shape=first, solver=solver)
    assert error(dense, found) == pytest.approx(best, rel=1e-4, abs=tol(dtype))
    assert found.report.relative_error == pytest.approx(error(dense, found), rel=1e-4, abs=tol(dtype))
    assert found.report.converged
    assert found.factors.rank == rank
    if solver == "svd":
        np.testing.assert_allclose(found.spectrum[:rank].numpy(), s[:rank], rtol=1e-5)


@every_dtype
@every_blocking
def test_planted_terms_are_found_to_rounding(dtype: torch.dtype, block_bytes: int | None) -> None:
    compute = torch.float32 if dtype == torch.bfloat16 else dtype  # rounding to bf16 would add terms
    dense = planted((4, 6), (6, 5), 3).to(compute)
    found = run(dense, 3, block_bytes, shape=(4, 6))
    assert error(dense, found) < tol(compute)
    assert found.factors.num_parameters == 3 * (24 + 30)


@every_blocking
@pytest.mark.parametrize("first", [(4, 3), (2, 5), (1, 1), (24, 30), (3, 15)], ids=str)
def test_the_rearrangement_is_that_of_its_definition(block_bytes: int | None, first: tuple[int, int]) -> None:
    dense = normal(24, 30)
    layout = KroneckerLayout((24, 30), first)
    found = rearrange(BlockMatrix.from_tensor("w", dense, block_bytes), layout, EXECUTOR)
    whole = found.to_tensor(EXECUTOR)
    expected = torch.from_numpy(rearranged_by_numpy(dense, first))
    assert torch.equal(whole.T if layout.transposed else whole, expected)
    assert found.row_offsets[-1] == whole.shape[0]


def test_stored_blocks_are_rearranged_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = planted((4, 6), (6, 5), 2) + 0.1 * normal(24, 30, seed=5)
    save_file({"w": dense}, tmp_path / "w.safetensors")
    pieces = [TensorSlice(str(tmp_path / "w.safetensors"), "w", a, b) for a, b in ((0, 7), (7, 24))]
    stored = BlockMatrix.from_slices("w", pieces, (24, 30), torch.float64, 700)
    read: list[int] = []
    original = TensorSlice.read

    def counted(piece: TensorSlice) -> Tensor:
        read.append(piece.stop - piece.start)
        return original(piece)

    monkeypatch.setattr(TensorSlice, "read", counted)
    for first in ((4, 6), (2, 5)):
        lazy = rearrange(stored, KroneckerLayout((24, 30), first), EXECUTOR)
        assert not read, "rearranging stored blocks reads nothing"
        assert len(lazy.blocks) == len(stored.blocks) > 3
        found = decompose(stored, method="kronecker", rule=RankRule(rank=2), shape=first, executor=EXECUTOR)
        ours = run(dense, 2, 700, shape=first)
        assert torch.equal(found.factors.b, ours.factors.b)
        assert max(read) < 24, "no task reads the whole matrix"
        read.clear()


@pytest.mark.parametrize("rule", [RankRule(error=0.3), RankRule(energy=0.9)], ids=["error", "energy"])
def test_energy_and_error_rules_follow_the_spectrum_of_the_rearrangement(rule: RankRule) -> None:
    dense = normal(24, 30)
    s = np.linalg.svd(rearranged_by_numpy(dense, (4, 6)), compute_uv=False)
    tails = [float(np.sum(s[k:] ** 2) / np.sum(s**2)) for k in range(len(s) + 1)]
    least = next(k for k, tail in enumerate(tails) if tail <= rule.tail_share)
    found = run(dense, rule=rule, shape=(4, 6))
    assert found.report.rank == least
    assert found.report.relative_error**2 <= rule.tail_share * (1 + 1e-9)


@every_blocking
@pytest.mark.parametrize("terms", [1, 2])
def test_missing_entries_are_recovered(block_bytes: int | None, terms: int) -> None:
    dense = planted((6, 5), (5, 8), terms)
    observed = mask(dense.shape, 0.5)
    hidden = torch.where(observed > 0, dense, torch.nan)
    found = run(hidden, terms, block_bytes, weights=observed, shape=(6, 5), n_iter=400, tol=0.0)
    assert error(dense, found) < 1e-9
    assert found.report.relative_error < 1e-10


def test_one_masked_term_is_the_closed_form() -> None:
    """B_ij = ⟨P_ij∘A_ij, C⟩ / ⟨P_ij, C∘C⟩ and C = ΣB_ij(P_ij∘A_ij) ⊘ ΣB_ij²P_ij, both at rest."""
    dense, weights = normal(12, 20), normal(12, 20, seed=1).square() * mask(torch.Size((12, 20)), 0.8)
    found = run(dense, weights=weights, shape=(4, 5), n_iter=5000, tol=0.0).factors
    r, p = (torch.from_numpy(rearranged_by_numpy(t, (4, 5))) for t in (dense, weights))
    b, c = found.b.reshape(-1), found.c.reshape(-1)
    torch.testing.assert_close(b, (p * r) @ c / (p @ c.square()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(c, (p * r).T @ b / (p.T @ b.square()), rtol=1e-6, atol=1e-6)


@every_blocking
@every_dtype
def test_a_low_rank_second_factor_is_recovered(dtype: torch.dtype, block_bytes: int | None) -> None:
    compute = torch.float32 if dtype == torch.bfloat16 else dtype
    dense = planted((4, 6), (8, 5), 1, inner=2).to(compute)
    found = run(dense, 1, block_bytes, shape=(4, 6), inner_rank=2)
    assert error(dense, found) < tol(compute)
    assert found.factors.inner_rank == 2
    assert found.factors.num_parameters == 24 + 2 * (8 + 5)


def test_the_inner_step_is_the_constrained_minimiser() -> None:
    """At rest C = SVD_r(C*) with C* = Σ B_ij A_ij / ‖B‖², and B_ij = ⟨A_ij, C⟩ / ‖C‖²."""
    dense = planted((4, 6), (8, 5), 1) + 0.3 * normal(32, 30, seed=4)
    found = run(dense, shape=(4, 6), inner_rank=2, n_iter=2000, tol=0.0).factors
    r = torch.from_numpy(rearranged_by_numpy(dense, (4, 6)))
    b, c = found.b.reshape(-1), found.second.reshape(-1)
    free = (r.T @ b / b.square().sum()).view(8, 5)
    u, s, vh = torch.linalg.svd(free)
    torch.testing.assert_close(found.second[0], u[:, :2] @ torch.diag(s[:2]) @ vh[:2], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(b, r @ c / c.square().sum(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
def test_several_low_rank_terms_under_weights_come_near_the_plant(weighted: bool) -> None:
    dense = planted((8, 6), (6, 7), 2, inner=2)
    weights = mask(dense.shape, 0.7) if weighted else None
    found = run(dense, 2, weights=weights, shape=(8, 6), inner_rank=2, n_iter=500, tol=1e-9)
    assert error(dense, found) < 1e-5


@every_dtype
@pytest.mark.parametrize("options", [{"solver": "als"}, {"inner_rank": 2}, {"weights": 0.6}], ids=str)
def test_every_sweep_lowers_the_error(dtype: torch.dtype, options: dict[str, Any]) -> None:
    dense = normal(24, 30, dtype=dtype)
    options = {k: mask(dense.shape, v) if k == "weights" else v for k, v in options.items()}
    found = run(dense, 3, shape=(4, 6), n_iter=12, tol=0.0, **options)
    history = found.report.history
    assert len(history) == found.report.n_iter
    assert all(after <= before * (1 + 10 * tol(dtype)) for before, after in pairwise(history))
    assert history[-1] == pytest.approx(found.report.relative_error, rel=1e-5)


def test_weights_matter_where_they_should() -> None:
    dense = normal(24, 30)
    weights = torch.ones(24, 30, dtype=torch.float64)
    even, plain = run(dense, 2, weights=weights, shape=(4, 6), tol=1e-12), run(dense, 2, shape=(4, 6))
    assert error(dense, even) == pytest.approx(error(dense, plain), rel=1e-3)
    weights[:, :10] = 100
    heavy = run(dense, 2, weights=weights, shape=(4, 6), n_iter=200).factors.reconstruct()
    light = plain.factors.reconstruct()
    assert (heavy - dense)[:, :10].norm() < (light - dense)[:, :10].norm()


def test_a_block_with_nothing_observed_is_zero_and_counted() -> None:
    dense, weights = planted((4, 6), (6, 5), 1), torch.ones(24, 30, dtype=torch.float64)
    weights[:6, :5] = 0
    found = run(dense, weights=weights, shape=(4, 6))
    assert float(found.factors.b[0, 0, 0]) == 0
    assert "1 entries of every first and 0 of every second factor have nothing observed" in found.report.reason


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("first", "terms"), [((4, 6), 2), ((8, 2), 1), ((2, 2), 1)], ids=str)
def test_the_planted_shape_is_chosen(first: tuple[int, int], terms: int, seed: int) -> None:
    dense = planted(first, (32 // first[0], 36 // first[1]), terms, seed=10 * seed)
    dense = dense + 0.05 * dense.std() * normal(32, 36, seed=99 + seed)
    found = run(dense.float(), terms)
    assert found.factors.b.shape[1:] == first
    assert f"shape {first} of " in found.report.reason
    assert "Pareto" in found.report.reason


@pytest.mark.parametrize("inner_rank", [None, 1])
def test_the_table_of_shapes_bounds_the_dense_optimum(inner_rank: int | None) -> None:
    dense = normal(12, 20)
    table = kronecker_shapes(BlockMatrix.from_tensor("w", dense), rank=2, inner_rank=inner_rank, executor=EXECUTOR)
    assert len({shape.first for shape in table}) == len(table) > 10
    for shape in table:
        s = np.linalg.svd(rearranged_by_numpy(dense, shape.first), compute_uv=False)
        best = float(np.linalg.norm(s[shape.rank :]) / np.linalg.norm(s))
        assert shape.relative_error >= best * (1 - 1e-9)
        if inner_rank is None:
            assert shape.relative_error <= 1.02 * best
        assert shape.num_parameters == KroneckerLayout((12, 20), shape.first).numbers(shape.rank, inner_rank)
    numbers = [shape.num_parameters for shape in table]
    assert numbers == sorted(numbers)
    front = [shape for shape in table if shape.pareto]
    assert all(a.relative_error > b.relative_error for a, b in pairwise(front))
    assert front[0].num_parameters == numbers[0]


@given(m=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 5), data=st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_any_divisor_and_blocking_fits_and_any_other_is_padded(m: int, n: int, seed: int, data: st.DataObject) -> None:
    first = data.draw(st.tuples(st.integers(1, m), st.integers(1, n)))
    block_bytes = data.draw(st.sampled_from([None, 400, 1]))
    dense = normal(m, n, seed=seed)
    layout = KroneckerLayout((m, n), first)
    rank = data.draw(st.integers(1, layout.bound))
    found = run(dense, rank, block_bytes, shape=first, padding="zero")
    padded = torch.nn.functional.pad(dense, (0, first[1] * layout.second[1] - n, 0, first[0] * layout.second[0] - m))
    s = np.linalg.svd(rearranged_by_numpy(padded, first), compute_uv=False)
    best = float(np.linalg.norm(s[rank:]) / np.linalg.norm(s))
    assert found.factors.reconstruct().shape == (m, n)
    assert error(dense, found) <= best * 1.05 + 1e-7
    assert found.report.relative_error == pytest.approx(error(dense, found), abs=1e-7)
    x = normal(3, n, seed=1)
    torch.testing.assert_close(found.factors.matvec(x), x @ found.factors.reconstruct().T)


def test_padding_under_weights_is_missing_not_zero() -> None:
    dense = planted((4, 6), (6, 5), 1)[:22, :28].contiguous()
    everything = torch.ones(22, 28, dtype=torch.float64)
    found = run(dense, weights=everything, shape=(4, 6), padding="zero", n_iter=300, tol=0.0)
    assert error(dense, found) < 1e-9


def test_what_does_not_divide_is_refused_with_the_divisors() -> None:
    message = r"decompose w \(24x30\) by kronecker: shape = \(5, 6\) does not divide it\. Allowed are m1 of 1, 2, 3, 4"
    with pytest.raises(DecompositionError, match=message + r".* n1 of 1, 2, 3, 5, 6, .*padding = zero"):
        run(normal(24, 30), shape=(5, 6))
    with pytest.raises(DecompositionError, match=r"a zero matrix \(24x30\).*does not divide"):
        run(torch.zeros(24, 30), shape=(5, 6))
    with pytest.raises(DecompositionError, match="is larger than the matrix"):
        run(normal(24, 30), shape=(48, 6))


def test_ranks_and_rules_out_of_reach_are_refused() -> None:
    dense = normal(24, 30)
    with pytest.raises(RankError, match=r"rank 25 > .* = 24\. Set decompose.rank <= 24"):
        run(dense, 25, shape=(4, 6))
    with pytest.raises(RankError, match=r"inner_rank = 6 > min\(m2, n2\) = 5 .*Set inner_rank <= 5"):
        run(dense, shape=(4, 6), inner_rank=6)
    for options in ({"inner_rank": 2}, {"solver": "als"}, {"weights": torch.ones(24, 30)}):
        with pytest.raises(RankError, match=r"cannot follow a bound on error\. Set decompose.rank"):
            run(dense, shape=(4, 6), rule=RankRule(error=0.1), **options)
    for bad, text in (({"shape": (0, 3)}, "shape = 0 < 1"), ({"inner_rank": 0}, "inner_rank = 0 < 1")):
        with pytest.raises(DecompositionError, match=text):
            run(dense, **bad)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1), (7, 11), (1, 7)], ids=str)
@pytest.mark.parametrize("inner_rank", [None, 1])
def test_small_and_prime_shapes_find_a_layout_of_their_own(shape: tuple[int, int], inner_rank: int | None) -> None:
    dense = normal(*shape, dtype=torch.float32)
    found = run(dense, inner_rank=inner_rank)
    assert found.factors.reconstruct().isfinite().all()
    assert found.report.relative_error == pytest.approx(error(dense, found), abs=1e-6)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("options", [{}, {"inner_rank": 2}, {"weights": True}], ids=str)
def test_scale_does_not_matter(scale: float, options: dict[str, Any]) -> None:
    dense = normal(24, 30, dtype=torch.float32)
    options = {k: mask(dense.shape, 0.7) if k == "weights" else v for k, v in options.items()}
    ours, theirs = run(dense * scale, 2, shape=(4, 6), **options), run(dense, 2, shape=(4, 6), **options)
    assert ours.report.relative_error == pytest.approx(theirs.report.relative_error, rel=1e-4)


@pytest.mark.parametrize("inner_rank", [None, 2])
def test_lora_is_exact_at_the_least_rank_and_refused_above(inner_rank: int | None) -> None:
    """LoKr: W1 ⊗ (W2a W2b) has rank(W1) · r, here 2 · 2 of at most 24."""
    b = normal(1, 4, 2) @ normal(1, 2, 3, seed=1)
    left, right = normal(1, 6, 2, seed=2), normal(1, 2, 10, seed=3)
    if inner_rank is None:
        factors = KroneckerFactors(b, left @ right, None, (24, 30))
    else:
        factors = KroneckerFactors(b, left, right, (24, 30))
    dense = torch.kron(b[0], (left @ right)[0])
    torch.testing.assert_close(factors.reconstruct(), dense)
    form = factors.low_rank()
    assert form is not None
    assert form[0].shape == (24, 4)
    lora = factors.to_lora(0.5)
    assert lora.exact
    torch.testing.assert_close(0.5 * lora.b @ lora.a, dense)
    full = KroneckerFactors(normal(2, 4, 6), normal(2, 6, 5, seed=1), None, (24, 30))
    assert full.low_rank() is None
    with pytest.raises(AdapterError, match="Give max_rank"):
        full.to_lora()
    assert full.to_lora(max_rank=3).retained_energy < 1


@pytest.mark.parametrize("inner_rank", [None, 2])
def test_rows_products_and_files_agree_with_torch_kron(inner_rank: int | None, tmp_path: Path) -> None:
    b, c = normal(3, 4, 6), normal(3, 6, 5, seed=1)
    right = None
    if inner_rank is not None:
        c, right = normal(3, 6, 2, seed=1), normal(3, 2, 5, seed=2)
    factors = KroneckerFactors(b, c, right, (23, 29))
    dense = sum(torch.kron(x, y) for x, y in zip(b, factors.second))[:23, :29]
    torch.testing.assert_close(factors.reconstruct(), dense)
    torch.testing.assert_close(factors.reconstruct_rows(5, 17), dense[5:17])
    for batch in ((), (2,), (2, 3), (0,)):
        x = normal(*batch, 29, seed=4)
        torch.testing.assert_close(factors.matvec(x), x @ dense.T)
    factors.save(tmp_path / "f")
    loaded = KroneckerFactors.load(tmp_path / "f")
    assert torch.equal(loaded.reconstruct(), factors.reconstruct())
    assert loaded.inner_rank == inner_rank
    assert loaded.num_parameters == factors.num_parameters == 72 + (90 if right is None else 66)


def test_divisors_divide() -> None:
    for number in (1, 2, 12, 49, 576, 1536):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
    assert math.prod(divisors(6)) == 36
