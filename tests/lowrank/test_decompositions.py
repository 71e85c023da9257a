"""Laws that every registered decomposition keeps, over dtypes and blockings, against known spectra."""

import math
import operator
import pickle
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tolerance import tol
from torch import Tensor

import lowrank.decompositions.orthogonal as orthogonal
from lowrank.blocks import BlockMatrix, TensorSlice
from lowrank.decompositions import METHODS, decompose, register
from lowrank.decompositions.orthogonal import orthonormalize
from lowrank.errors import DecompositionError, NumericsError, RankError
from lowrank.executor import SerialExecutor, tree_reduce
from lowrank.factors import Decomposition
from lowrank.rank import RankRule

EXECUTOR = SerialExecutor()
SHAPES = [(240, 160), (160, 240)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
#: One block, a few, and blocks with fewer rows than the basis has columns.
BLOCKINGS = [None, 40_000, 6_000]
RANK = 8
#: Excess of the error over the optimum; two power iterations on σ_i = i^-1.
EXCESS = {"exact_svd": 1e-6, "randomized_svd": 2e-3, "block_krylov": 1e-4, "one_pass": 1.0}

SVDS = sorted(name for name, method in METHODS.items() if method.family == "svd")

ADAPTIVE = [name for name in SVDS if "error" in METHODS[name].rules]

#: Condition of the least-squares problems between W and its σ: a sketch is solved against Gaussian matrices.
COND = {"one_pass": 100.0}

every_method = pytest.mark.parametrize("method", SVDS)
every_adaptive_method = pytest.mark.parametrize("method", ADAPTIVE)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_blocking = pytest.mark.parametrize("block_bytes", BLOCKINGS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def matrix_with(spectrum: Tensor, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """U diag(spectrum) Vᵀ with random orthogonal U and V."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(k, len(spectrum), generator=generator, dtype=torch.float64)).Q for k in shape)
    return ((u * spectrum) @ v.T).to(dtype)


def power_law(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return matrix_with(torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -1.0, shape, dtype)


def run(dense: Tensor, method: str, block_bytes: int | None = None, **options: Any) -> Decomposition:
    options.setdefault("rule", RankRule(rank=RANK))
    matrix = BlockMatrix.from_tensor("w", dense, block_bytes)
    return decompose(matrix, method=method, executor=EXECUTOR, **options)


def true_error(dense: Tensor, found: Decomposition) -> float:
    f = found.factors
    difference = dense.double() - f.u.double() @ torch.diag(f.s.double()) @ f.vh.double()
    return float(difference.norm() / dense.double().norm())


@every_method
@every_dtype
@every_blocking
@every_shape
class TestLaws:
    def test_the_error_is_near_the_optimum_and_reported_truly(
        self, method: str, dtype: torch.dtype, block_bytes: int | None, shape: tuple[int, int]
    ) -> None:
        dense = power_law(shape, dtype)
        found = run(dense, method, block_bytes)
        s = torch.linalg.svdvals(dense.double())
        optimum = float(s[RANK:].norm() / s.norm())
        error = true_error(dense, found)
        assert error <= optimum * (1 + EXCESS[method])
        assert found.report.relative_error == pytest.approx(error, rel=100 * tol(dtype))
        assert found.report.explained_energy == pytest.approx(1 - error**2, rel=100 * tol(dtype))
        assert found.report.rank == found.factors.rank == RANK

    def test_factors_are_an_svd(
        self, method: str, dtype: torch.dtype, block_bytes: int | None, shape: tuple[int, int]
    ) -> None:
        f = run(power_law(shape, dtype), method, block_bytes).factors
        eye = torch.eye(RANK, dtype=f.u.dtype)
        assert f.u.dtype == f.s.dtype == f.vh.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(f.u.T @ f.u, eye, rtol=0, atol=tol(dtype))
        torch.testing.assert_close(f.vh @ f.vh.T, eye, rtol=0, atol=tol(dtype))
        assert (f.s[:-1] >= f.s[1:]).all()
        assert (f.u.gather(0, f.u.abs().argmax(0, keepdim=True)) > 0).all(), "sign convention"

    def test_blocks_and_repeats_do_not_change_the_result(
        self, method: str, dtype: torch.dtype, block_bytes: int | None, shape: tuple[int, int]
    ) -> None:
        dense = power_law(shape, dtype)
        found, again, whole = run(dense, method, block_bytes), run(dense, method, block_bytes), run(dense, method)
        for field in ("u", "s", "vh"):
            assert torch.equal(getattr(found.factors, field), getattr(again.factors, field))
        # σ_r − σ_{r+1} ≈ 0.014 here: the condition of a singular subspace is one over its gap.
        near = tol(dtype, COND.get(method, 1))
        torch.testing.assert_close(found.factors.s, whole.factors.s, rtol=near, atol=near)
        torch.testing.assert_close(
            found.factors.reconstruct(), whole.factors.reconstruct(), rtol=0, atol=tol(dtype, cond=100)
        )

    def test_a_low_rank_matrix_is_found_to_rounding(
        self, method: str, dtype: torch.dtype, block_bytes: int | None, shape: tuple[int, int]
    ) -> None:
        if dtype == torch.bfloat16:
            dtype = torch.float32  # rounding to bf16 would make the matrix full-rank
        dense = matrix_with(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64), shape, dtype)
        found = run(dense, method, block_bytes)
        eye = torch.eye(RANK, dtype=dtype)
        assert true_error(dense, found) < tol(dtype)
        assert found.report.relative_error < tol(dtype)
        torch.testing.assert_close(found.factors.u.T @ found.factors.u, eye, rtol=0, atol=tol(dtype))


@every_adaptive_method
@every_blocking
@pytest.mark.parametrize("bound", [0.5, 0.2, 1e-4, 0.0])
def test_an_error_rule_is_met_by_a_rank_near_the_least(method: str, block_bytes: int | None, bound: float) -> None:
    dense = power_law((90, 60), torch.float64)
    s = torch.linalg.svdvals(dense)
    # An impossible 0 is met at full rank, up to rounding.
    found = run(dense, method, block_bytes, rule=RankRule(error=bound))
    least = next(r for r in range(1, 61) if r == 60 or float(s[r:].norm() / s.norm()) <= bound)
    assert found.report.relative_error <= bound * (1 + 1e-9) + 1e-12
    assert least <= found.report.rank <= least + 1
    assert found.report.converged


@every_adaptive_method
@pytest.mark.parametrize("seed", range(4))
def test_an_error_bound_below_the_rounding_of_the_energy_is_met_too(method: str, seed: int) -> None:
    spectrum = 10 ** -torch.linspace(0, 20, 80, dtype=torch.float64)
    dense = matrix_with(spectrum, (200, 80), torch.float32, seed)
    found = run(dense, method, rule=RankRule(error=1e-5))
    assert true_error(dense, found) <= 1.01e-5
    assert found.report.rank < 40


@every_adaptive_method
def test_an_energy_rule_is_the_error_rule_in_other_words(method: str) -> None:
    dense = power_law((200, 300), torch.float32)
    by_energy = run(dense, method, rule=RankRule(energy=0.99))
    by_error = run(dense, method, rule=RankRule(error=math.sqrt(0.01)))
    assert by_energy.report.explained_energy >= 0.99
    assert by_energy.report.rank == by_error.report.rank > 16, "the randomized basis had to grow"


def test_a_growing_basis_keeps_what_it_found() -> None:
    dense = power_law((200, 300), torch.float32)
    ours = run(dense, "randomized_svd", rule=RankRule(error=0.1), n_iter=1)
    least = run(dense, "exact_svd", rule=RankRule(error=0.1))
    assert ours.report.n_iter > 1, "the basis had to grow"
    assert ours.report.rank <= least.report.rank + 1


@every_adaptive_method
def test_max_rank_cuts_short_and_says_so(method: str) -> None:
    found = run(power_law((90, 60), torch.float32), method, rule=RankRule(error=0.01, max_rank=5))
    assert found.report.rank == 5
    assert not found.report.converged


@every_method
@every_blocking
@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1), (5, 5)], ids=str)
def test_full_rank_of_small_shapes_is_exact(method: str, block_bytes: int | None, shape: tuple[int, int]) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    found = run(dense, method, block_bytes, rule=RankRule(rank=min(shape)))
    torch.testing.assert_close(found.factors.reconstruct(), dense, rtol=1e-5, atol=1e-5)


@every_method
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scale_does_not_matter(method: str, scale: float) -> None:
    dense = power_law((60, 50), torch.float32)
    ours, theirs = run(dense * scale, method), run(dense, method)
    torch.testing.assert_close(ours.factors.s / scale, theirs.factors.s, rtol=1e-4, atol=0)


class _ClusterLikeExecutor(SerialExecutor):
    """Pickles every call, runs the calls of a map last one first, and hands tensors over at odd addresses."""

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], label: str = "") -> list[Any]:
        calls = [pickle.dumps((fn, call)) for call in zip(*iterables)]
        return [self._call(call) for call in reversed(calls)][::-1]

    def reduce(self, fn: Callable[[Any, Any], Any], refs: Sequence[Any], label: str = "") -> Any:
        return tree_reduce(refs, lambda left, right: self._call(pickle.dumps((fn, (left, right)))))

    @staticmethod
    def _call(call: bytes) -> Any:
        fn, arguments = pickle.loads(call)
        return fn(*(_misaligned(value) if isinstance(value, Tensor) else value for value in arguments))


def _misaligned(value: Tensor) -> Tensor:
    if value.dim() == 0:
        return value
    buffer = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].reshape(value.shape)
    return buffer.copy_(value)


@every_method
def test_the_order_of_execution_and_the_storage_do_not_change_a_bit(method: str, tmp_path: Path) -> None:
    dense = power_law((90, 60), torch.bfloat16)
    save_file({"w": dense}, tmp_path / "w.safetensors")
    pieces = [TensorSlice(str(tmp_path / "w.safetensors"), "w", a, b) for a, b in ((0, 41), (41, 90))]
    stored = BlockMatrix.from_slices("w", pieces, (90, 60), torch.bfloat16, 7_000)
    ours = decompose(stored, method=method, rule=RankRule(rank=RANK), executor=_ClusterLikeExecutor()).factors
    theirs = run(dense, method, 7_000).factors
    assert all(torch.equal(getattr(ours, k), getattr(theirs, k)) for k in ("u", "s", "vh"))


@every_method
@every_shape
def test_stored_blocks_are_held_one_or_two_at_a_time(
    method: str, shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": power_law(shape, torch.float32)}, tmp_path / "w.safetensors")
    pieces = [TensorSlice(str(tmp_path / "w.safetensors"), "w", 0, shape[0])]
    stored = BlockMatrix.from_slices("w", pieces, shape, torch.float32, 2_000)
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = TensorSlice.read

    def counted(piece: TensorSlice) -> Tensor:
        nonlocal most
        block = read(piece).clone()
        alive.append(weakref.ref(block))
        most = max(most, sum(ref() is not None for ref in alive))
        return block

    monkeypatch.setattr(TensorSlice, "read", counted)
    decompose(stored, method=method, rule=RankRule(rank=RANK), executor=EXECUTOR)
    assert len(stored.blocks) > 5
    assert 1 <= most <= 2


def test_the_seed_matters_to_the_sketch_only() -> None:
    dense = power_law((200, 300), torch.float32)
    first, second = (run(dense, "randomized_svd", seed=seed) for seed in (0, 1))
    assert not torch.equal(first.factors.u, second.factors.u)
    assert first.report.relative_error == pytest.approx(second.report.relative_error, rel=1e-2)


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e12, math.inf])
@pytest.mark.parametrize("block_bytes", [None, 300])
def test_orthonormalize_holds_at_every_condition(condition: float, block_bytes: int | None) -> None:
    spectrum = torch.tensor([1.0, 0.5, 1 / condition], dtype=torch.float64)
    y = matrix_with(spectrum, (50, 3), torch.float64)
    q = orthonormalize(BlockMatrix.from_tensor("y", y, block_bytes), EXECUTOR).to_tensor(EXECUTOR)
    torch.testing.assert_close(q.T @ q, torch.eye(3, dtype=torch.float64), rtol=0, atol=tol(torch.float64))
    torch.testing.assert_close(q @ (q.T @ y), y, rtol=0, atol=tol(torch.float64))


def test_cholesky_is_left_before_it_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    tsqr = orthogonal._tsqr
    monkeypatch.setattr(orthogonal, "_tsqr", lambda y, executor: used.append(1) or tsqr(y, executor))
    for condition, expected in ((1e3, []), (5e7, [1])):
        y = matrix_with(torch.tensor([1.0, 1 / condition], dtype=torch.float64), (50, 2), torch.float64)
        orthonormalize(BlockMatrix.from_tensor("y", y), EXECUTOR)
        assert used == expected


@every_method
@every_blocking
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_is_refused_by_name(method: str, block_bytes: int | None, bad: float) -> None:
    dense = torch.ones(90, 60)
    dense[80, 3] = bad
    with pytest.raises(NumericsError, match=r"decompose w: 1 of .* NaN or infinite"):
        run(dense, method, block_bytes)


def test_messages_say_what_got_allowed_and_remedy() -> None:
    dense = torch.ones(4, 3)
    with pytest.raises(RankError, match=r"decompose w \(4x3\): rank 5 > min\(m, n\) = 3. Set decompose.rank <= 3."):
        run(dense, "exact_svd", rule=RankRule(rank=5))
    with pytest.raises(DecompositionError, match=r"unknown method 'svd'.*exact_svd, .*randomized_svd"):
        run(dense, "svd", rule=RankRule(rank=1))
    with pytest.raises(DecompositionError, match=r"n_iter = -1 < 0\. Set n_iter >= 0"):
        run(dense, "randomized_svd", rule=RankRule(rank=1), n_iter=-1)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="the name is taken"):
        register(METHODS["exact_svd"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 1, "energy": 0.5}, "exactly one"),
        ({"rank": 0}, "rank >= 1"),
        ({"energy": 0.0}, r"energy in \(0, 1\]"),
        ({"energy": 1.1}, r"energy in \(0, 1\]"),
        ({"error": 1.0}, r"error in \[0, 1\)"),
        ({"error": 0.1, "max_rank": 0}, "max_rank >= 1"),
    ],
)
def test_a_rank_rule_outside_its_range_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RankError, match=message):
        RankRule(**given)


def test_a_rank_rule_chooses_the_smallest_rank() -> None:
    s = torch.tensor([3.0, 2.0, 1.0])
    total = float(operator.mul(s, s).sum())
    assert [RankRule(energy=e).choose(s, total) for e in (9 / 14, 0.65, 13 / 14, 1.0)] == [1, 2, 2, 3]
    assert RankRule(error=0.0).choose(s, total) == 3
    assert RankRule(energy=1.0).choose(s, total + 1) == 3
    assert not RankRule(energy=1.0).met(s, total + 1)
    assert RankRule(rank=2).choose(s, total) == 2
