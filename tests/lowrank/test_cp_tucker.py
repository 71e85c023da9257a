"""CP and Tucker of stacked matrices and convolution kernels, against tensorly, planted factors and the plain SVD."""

import itertools
from typing import Any

import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import parafac, partial_tucker
from tensorly.decomposition import tucker as tensorly_tucker
from tolerance import tol
from torch import Tensor

from lowrank.blocks import BlockMatrix
from lowrank.decompositions import decompose
from lowrank.decompositions.cp import cp_als
from lowrank.decompositions.stack import divisors
from lowrank.errors import DecompositionError, NumericsError, RankError
from lowrank.executor import SerialExecutor
from lowrank.factors import CPFactors, Decomposition, TuckerFactors
from lowrank.factors.stacked import khatri_rao, khatri_rao_rows, stack_kernel, unstack_kernel
from lowrank.rank import RankRule

EXECUTOR = SerialExecutor()
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
DEPTH, M, N = 5, 14, 11


@pytest.fixture(autouse=True)
def torch_backend() -> None:
    tl.set_backend("pytorch")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def planted_cp(shape: tuple[int, ...], rank: int, seed: int = 0) -> Tensor:
    modes = [draw(size, rank, seed=seed + j) for j, size in enumerate(shape)]
    return khatri_rao(modes).sum(1).view(shape)


def decaying(seed: int = 0, depth: int = DEPTH) -> Tensor:
    """A stack that shares its spaces: U_m diag(i^-1) C_k diag(i^-1) U_nᵀ."""
    u, v = (torch.linalg.qr(draw(size, size, seed=seed + size)).Q for size in (M, N))
    left, right = (torch.arange(1, size + 1, dtype=torch.float64) ** -1.0 for size in (M, N))
    return (u * left) @ draw(depth, M, N, seed=seed) @ (v * right).T


def run(tensor: Tensor, method: str, rank: int, block_bytes: int | None = None, **options: Any) -> Decomposition:
    """Decompose a stack (*depths, m, n)."""
    matrix = BlockMatrix.from_tensor("w", tensor.reshape(-1, tensor.shape[-1]), block_bytes)
    seed, rule = options.pop("seed", 0), RankRule(rank=rank)
    depth = options.pop("depth", tuple(tensor.shape[:-2]))
    return decompose(matrix, method=method, rule=rule, executor=EXECUTOR, seed=seed, depth=depth, **options)


def true_error(tensor: Tensor, found: Any) -> float:
    difference = tensor.double() - found.factors.tensor().double().view(tensor.shape)
    return float(difference.norm() / tensor.double().norm())


def assert_never_rises(history: tuple[float, ...], dtype: torch.dtype) -> None:
    assert all(after <= before + tol(dtype) for before, after in itertools.pairwise(history)), history


class TestForms:
    def test_khatri_rao_is_column_wise_kronecker_and_rows_of_it_are_its_rows(self) -> None:
        modes = [draw(size, 3, seed=size) for size in (2, 4, 5)]
        whole = khatri_rao(modes)
        columns = [torch.kron(torch.kron(modes[0][:, r], modes[1][:, r]), modes[2][:, r]) for r in range(3)]
        torch.testing.assert_close(whole, torch.stack(columns, 1))
        for start, stop in itertools.combinations(range(41), 2):
            assert torch.equal(khatri_rao_rows(modes, start, stop), whole[start:stop])

    @pytest.mark.parametrize("row_modes", [1, 2, 3])
    def test_cp_as_a_matrix_for_every_split(self, row_modes: int) -> None:
        modes = tuple(draw(size, 3, seed=size) for size in (2, 4, 5, 3))
        factors = CPFactors(modes, draw(3).abs(), row_modes)
        tensor = torch.einsum("ar,br,cr,dr,r->abcd", *modes, factors.weights)
        matrix = tensor.reshape(factors.shape)
        x = draw(2, 7, factors.shape[1], seed=1)
        left, right = factors.low_rank()
        torch.testing.assert_close(factors.tensor(), tensor)
        torch.testing.assert_close(factors.matvec(x), x @ matrix.T)
        torch.testing.assert_close(left @ right, matrix)
        torch.testing.assert_close(factors.reconstruct_rows(1, 2), matrix[1:2])
        for k, expected in enumerate(tensor.reshape(-1, tensor.shape[row_modes - 1], factors.shape[1])):
            torch.testing.assert_close(factors.slice(k).reconstruct(), expected)

    @pytest.mark.parametrize("depth_rank", [None, 3])
    def test_tucker_as_a_matrix(self, depth_rank: int | None) -> None:
        depth_basis = None if depth_rank is None else draw(4, depth_rank, seed=9)
        factors = TuckerFactors(draw(depth_rank or 4, 2, 3), draw(5, 2, seed=1), draw(6, 3, seed=2), depth_basis)
        mixed = factors.core if depth_basis is None else torch.einsum("kj,jab->kab", depth_basis, factors.core)
        tensor = torch.einsum("kab,ma,nb->kmn", mixed, factors.row_basis, factors.column_basis)
        x = draw(2, 7, 6, seed=3)
        torch.testing.assert_close(factors.tensor(), tensor)
        torch.testing.assert_close(factors.matvec(x), x @ tensor.reshape(20, 6).T)
        torch.testing.assert_close(factors.reconstruct_rows(3, 12), tensor.reshape(20, 6)[3:12])
        assert factors.tensor_shape == (4, 5, 6)
        for k in range(4):
            torch.testing.assert_close(factors.slice(k).reconstruct(), tensor[k])

    def test_a_slice_beyond_the_stack_is_refused(self) -> None:
        for method in ("cp", "tucker"):
            with pytest.raises(DecompositionError, match=r"slice 5 of a stack of 5 matrices. Allowed are 0 to 4"):
                run(decaying(), method, 2).factors.slice(5)  # type: ignore[attr-defined]

    def test_kernels_are_stacks_of_pointwise_matrices(self) -> None:
        kernel = draw(8, 4, 3, 2)
        stack = stack_kernel(kernel)
        assert torch.equal(stack.view(3, 2, 8, 4)[1, 1], kernel[:, :, 1, 1])
        assert torch.equal(unstack_kernel(stack, (3, 2)), kernel)


class TestCP:
    @pytest.mark.parametrize("shape", [(5, 14, 11), (12, 9, 3, 3), (3, 4, 5, 6, 2), (9, 7)], ids=str)
    def test_every_sweep_is_tensorlys(self, shape: tuple[int, ...]) -> None:
        tensor, rank = planted_cp(shape, 4) + draw(*shape, seed=50), 3
        init = [draw(size, rank, seed=90 + size) for size in shape]
        start = (torch.ones(rank, dtype=torch.float64), [factor.clone() for factor in init])
        _, theirs = parafac(tensor, rank, n_iter_max=30, init=start, tol=0, return_errors=True)
        ours = cp_als(tensor, rank, n_iter=30, tol=0, init=init, extrapolate=False)
        expected = [float(error) for error in theirs]
        sweeps = min(len(expected), len(ours.history))
        assert sweeps >= 20, "both go on until rounding alone moves the error"
        assert ours.history[:sweeps] == pytest.approx(expected[:sweeps], rel=1e-9)

    @pytest.mark.parametrize("block_bytes", [None, 500, 1])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_stack_in_blocks_is_the_same_algorithm(self, block_bytes: int | None, dtype: torch.dtype) -> None:
        tensor = decaying().to(dtype)
        options: dict[str, Any] = {"extrapolate": False, "n_iter": 12, "tol": 0}
        found = run(tensor, "cp", 4, block_bytes, start="random", seed=3, **options)
        whole = cp_als(tensor, 4, seed=3, **options)
        assert found.report.history == pytest.approx(whole.history, abs=tol(dtype, cond=100))
        assert found.report.relative_error == pytest.approx(true_error(tensor, found), rel=100 * tol(dtype))
        assert found.report.history[-1] == pytest.approx(found.report.relative_error, abs=tol(dtype))
        assert_never_rises(found.report.history, dtype)

    @pytest.mark.parametrize("extrapolate", [False, True])
    @pytest.mark.parametrize("start", ["compressed", "random"])
    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_planted_factors_come_back(self, start: str, extrapolate: bool, dtype: torch.dtype) -> None:
        shape = (6, 20, 17)
        modes = [draw(size, 3, seed=size) for size in shape]
        tensor = khatri_rao(modes).sum(1).view(shape).to(dtype)
        found = run(tensor, "cp", 3, 900, start=start, extrapolate=extrapolate, n_iter=400, tol=0)
        assert found.report.relative_error < tol(dtype, cond=10)
        assert_never_rises(found.report.history, dtype)
        for got, truth in zip(found.factors.modes, modes):  # type: ignore[attr-defined]
            cosines = (got.double().T @ (truth / truth.norm(dim=0))).abs()
            torch.testing.assert_close(cosines.max(0).values, torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)

    def test_extrapolation_and_a_compressed_start_save_sweeps(self) -> None:
        tensor = planted_cp((6, 40, 30), 4) + 0.5 * draw(6, 40, 30, seed=8)
        plain = run(tensor, "cp", 4, start="random", extrapolate=False, tol=1e-10, n_iter=500).report
        ahead = run(tensor, "cp", 4, start="random", tol=1e-10, n_iter=500).report
        near = run(tensor, "cp", 4, extrapolate=False, tol=1e-10, n_iter=500).report
        assert all(report.converged for report in (plain, ahead, near))
        assert "less than 1e-10" in plain.reason
        assert ahead.relative_error == pytest.approx(plain.relative_error, abs=1e-6)
        assert near.relative_error == pytest.approx(plain.relative_error, abs=1e-6)
        assert near.n_iter < plain.n_iter
        assert near.history[0] < plain.history[0]

    def test_one_matrix_alone_is_its_svd(self) -> None:
        matrix = decaying(depth=1)
        s = torch.linalg.svdvals(matrix[0])
        found = run(matrix, "cp", 4, n_iter=1000, tol=1e-13)
        assert found.report.relative_error == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-4)

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_a_rank_beyond_every_mode_and_equal_columns_stay_finite(self, dtype: torch.dtype) -> None:
        tensor = draw(3, 4, 5, dtype=dtype)
        found = run(tensor, "cp", 12, n_iter=300, tol=0)
        assert found.report.relative_error < 1e-2
        equal = [draw(size, 1, seed=size, dtype=dtype).repeat(1, 6) for size in (3, 4, 5)]
        fit = cp_als(tensor, 6, init=equal, n_iter=20, tol=0)
        for factors in (found.factors, fit.factors):
            assert all(torch.isfinite(part).all() for part in factors.tensors().values())  # type: ignore[attr-defined]
        assert_never_rises(fit.history, dtype)

    def test_weights_are_sorted_and_columns_unit(self) -> None:
        factors: Any = run(decaying(), "cp", 5).factors
        assert (factors.weights[:-1] >= factors.weights[1:]).all()
        for mode in factors.modes:
            torch.testing.assert_close(mode.norm(dim=0), torch.ones(5, dtype=torch.float64))

    def test_the_bound_of_the_rank(self) -> None:
        with pytest.raises(RankError, match=r"w \(70x11\): rank 56 > the bound of cp, = 55"):
            run(draw(5, 14, 11), "cp", 56)

    def test_the_driver_never_holds_the_matrix(self) -> None:
        class Watched(SerialExecutor):
            largest = 0

            def get(self, refs: Any) -> Any:
                for value in refs if isinstance(refs, list) else [refs]:
                    Watched.largest = max(Watched.largest, value.numel() if isinstance(value, Tensor) else 0)
                return refs

        matrix = BlockMatrix.from_tensor("w", draw(400, 60), 10_000)
        for method in ("cp", "tucker"):
            decompose(matrix, method=method, rule=RankRule(rank=3), executor=Watched(), depth=10, n_iter=3)
        assert 0 < Watched.largest <= 10 * 60

    @pytest.mark.parametrize(
        ("init", "shape", "rank", "message"),
        [
            (None, (3, 4, 5), 0, r"tensor \(3x4x5\) by cp: rank 0. Set 1 <= rank <= 12"),
            (None, (3, 4, 5), 13, r"rank 13. Set 1 <= rank <= 12"),
            (None, (3,), 1, r"need at least two modes"),
            (None, (3, 0, 2), 1, r"no empty one"),
            ([(3, 2), (4, 1)], (3, 4), 2, r"init has shapes \[\(3, 2\), \(4, 1\)\]. Give \[\(3, 2\), \(4, 2\)\]"),
        ],
    )
    def test_bad_tensors_are_refused(self, init: Any, shape: tuple[int, ...], rank: int, message: str) -> None:
        with pytest.raises(DecompositionError, match=message):
            cp_als(torch.ones(shape), rank, init=None if init is None else [torch.ones(s) for s in init])

    def test_zero_and_non_finite_tensors(self) -> None:
        fit = cp_als(torch.zeros(3, 4, 5), 2)
        assert float(fit.factors.reconstruct().abs().sum()) == 0
        assert fit.reason == "the tensor is zero"
        tensor = torch.ones(3, 4, 5)
        tensor[1, 2, 3] = float("nan")
        with pytest.raises(NumericsError, match="1 of 60 entries"):
            cp_als(tensor, 2)

    @pytest.mark.parametrize("method", ["cp", "tucker"])
    def test_a_product_that_overflows_is_an_error(self, method: str) -> None:
        with pytest.raises(NumericsError, match="Scale the matrix down"):
            run(torch.full((2, 30, 30), 3e38), method, 2)


class TestTucker:
    @pytest.mark.parametrize("block_bytes", [None, 500, 1])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("depth_rank", [None, 2])
    def test_the_error_is_tensorlys(self, block_bytes: int | None, dtype: torch.dtype, depth_rank: int | None) -> None:
        tensor, rank = decaying().to(dtype), 4
        wide = tensor.double()
        if depth_rank is None:
            (core, bases), _ = partial_tucker(wide, rank=[rank, rank], modes=[1, 2], tol=1e-14, n_iter_max=500)
        else:
            core, bases = tensorly_tucker(wide, rank=[depth_rank, rank, rank], tol=1e-14, n_iter_max=500)
        optimum = float((1 - core.norm() ** 2 / wide.norm() ** 2).sqrt())
        found = run(tensor, "tucker", rank, block_bytes, depth_rank=depth_rank, n_iter=200, tol=1e-9)
        assert found.report.relative_error == pytest.approx(true_error(tensor, found), rel=100 * tol(dtype))
        assert found.report.relative_error == pytest.approx(optimum, rel=1e-5)
        assert found.report.history[-1] == pytest.approx(found.report.relative_error, abs=tol(dtype, cond=10))
        assert_never_rises(found.report.history, dtype)
        assert len(bases) == (2 if depth_rank is None else 3)

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_bases_are_orthonormal_and_planted_spaces_come_back(self, dtype: torch.dtype) -> None:
        tensor = (draw(20, 3, seed=1) @ draw(6, 3, 3) @ draw(3, 17, seed=2)).to(dtype)
        found = run(tensor, "tucker", 3, 700)
        factors: Any = found.factors
        eye = torch.eye(3, dtype=dtype)
        assert found.report.relative_error < tol(dtype)
        torch.testing.assert_close(factors.row_basis.T @ factors.row_basis, eye, rtol=0, atol=tol(dtype))
        torch.testing.assert_close(factors.column_basis.T @ factors.column_basis, eye, rtol=0, atol=tol(dtype))
        assert factors.num_parameters == 6 * 9 + 20 * 3 + 17 * 3

    def test_one_matrix_alone_is_its_svd(self) -> None:
        matrix = decaying(depth=1)
        s = torch.linalg.svdvals(matrix[0])
        found = run(matrix, "tucker", 4, n_iter=500, tol=1e-14)
        assert found.report.relative_error == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-8)

    def test_full_ranks_are_exact_and_ranks_are_bounded(self) -> None:
        tensor = draw(4, 9, 7)
        assert run(tensor[:, :7], "tucker", 7, 300).report.relative_error < tol(torch.float64)
        assert run(tensor[:, :7], "tucker", 7, 300, depth_rank=4).report.relative_error < tol(torch.float64)
        with pytest.raises(RankError, match=r"rank 8 > min\(m, n\) = 7"):
            run(tensor, "tucker", 8)
        with pytest.raises(RankError, match=r"w \(36x7\) by tucker: depth_rank 5 > depth = 4. Set depth_rank <= 4"):
            run(tensor, "tucker", 2, depth_rank=5)

    def test_a_kernel_compresses_its_channels(self) -> None:
        kernel = torch.einsum("or,is,rshw->oihw", draw(12, 3, seed=1), draw(8, 3, seed=2), draw(3, 3, 3, 3, seed=3))
        found = run(stack_kernel(kernel).view(3, 3, 12, 8), "tucker", 3)
        assert found.report.relative_error < tol(torch.float64)
        torch.testing.assert_close(unstack_kernel(found.factors.reconstruct(), (3, 3)), kernel)


@pytest.mark.parametrize("method", ["cp", "tucker"])
class TestBoth:
    def test_a_depth_that_does_not_divide_is_refused(self, method: str) -> None:
        message = r"decompose w \(70x11\): depth = 4 does not divide its 70 rows. .* \[1, 2, 5, 7, 10, 14, 35, 70\]"
        with pytest.raises(DecompositionError, match=message):
            run(draw(5, 14, 11), method, 2, depth=4)
        with pytest.raises(DecompositionError, match="does not divide its 70 rows"):
            run(torch.zeros(5, 14, 11), method, 2, depth=4)
        with pytest.raises(DecompositionError, match="depth = 0 < 1"):
            run(draw(5, 14, 11), method, 2, depth=0)
        with pytest.raises(DecompositionError, match="depth = 0 < 1"):
            run(draw(5, 14, 11), method, 2, depth=())

    def test_a_kernel_by_its_spatial_modes(self, method: str) -> None:
        kernel = planted_cp((3, 3, 10, 8), 2)
        found = run(kernel, method, 2, 200, n_iter=300)
        assert found.report.relative_error < 1e-6
        assert found.factors.shape == (90, 8)

    def test_stacked_layers_share_what_they_have_in_common(self, method: str) -> None:
        """Fewer numbers than an SVD of every matrix at about the same error."""
        common = draw(20, 4, seed=1) @ (draw(8, 4, 1, seed=2) * draw(4, 16, seed=3))
        tensor = common + 0.01 * draw(8, 20, 16, seed=4)
        found = run(tensor, method, 4)
        assert found.report.relative_error < 0.02
        assert found.report.num_parameters < 8 * 4 * (20 + 16) / 3

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(
        shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 8)),
        rank=st.integers(1, 6),
        block_bytes=st.integers(1, 400),
        dtype=st.sampled_from(DTYPES),
    )
    def test_any_shape_rank_and_blocking(
        self, method: str, shape: tuple[int, int, int], rank: int, block_bytes: int, dtype: torch.dtype
    ) -> None:
        d, m, n = shape
        rank = min(rank, min(m, n) if method == "tucker" else min(d * min(m, n), m * n))
        tensor = draw(*shape, seed=rank, dtype=dtype)
        found = run(tensor, method, rank, block_bytes, n_iter=15)
        assert found.report.relative_error == pytest.approx(true_error(tensor, found), rel=1e-3, abs=tol(dtype))
        assert found.report.relative_error <= 1 + tol(dtype)
        assert found.report.rank == rank
        assert_never_rises(found.report.history, dtype)


def test_divisors() -> None:
    for m in range(1, 200):
        assert divisors(m) == [k for k in range(1, m + 1) if m % k == 0]
