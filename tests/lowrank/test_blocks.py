"""Blocks: the plan, lazy reading, the products, and what is refused."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerance import tol

from lowrank.blocks import BlockMatrix, TensorSlice, load_block, plan_blocks, read_block
from lowrank.errors import CheckpointError, DecompositionError, NumericsError
from lowrank.executor import SerialExecutor
from lowrank.factors import LowRankFactors

EXECUTOR = SerialExecutor()


@settings(derandomize=True, deadline=None, max_examples=200)
@given(m=st.integers(1, 500), n=st.integers(1, 50), block_bytes=st.integers(1, 20_000))
def test_plan_covers_the_rows_in_equal_blocks_within_the_bound(m: int, n: int, block_bytes: int) -> None:
    offsets = plan_blocks((m, n), block_bytes)
    sizes = [b - a for a, b in pairwise(offsets)]
    assert (offsets[0], offsets[-1]) == (0, m)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert max(sizes) * n * 4 <= max(block_bytes, 4 * n)


def test_plan_refuses_no_bytes() -> None:
    with pytest.raises(ValueError, match="block_bytes >= 1"):
        plan_blocks((3, 3), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 11), (11, 37), (1, 5)])
@pytest.mark.parametrize("block_bytes", [None, 200, 1])
def test_products_equal_the_dense_ones(dtype: torch.dtype, shape: tuple[int, int], block_bytes: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(shape, generator=generator).to(dtype)
    w = BlockMatrix.from_tensor("w", dense, block_bytes)
    exact = dense.double()
    x = torch.randn(shape[1], 3, generator=generator, dtype=w.compute_dtype)
    y = w.matmat(x, EXECUTOR)
    close = {"rtol": tol(dtype), "atol": tol(dtype)}
    torch.testing.assert_close(y.to_tensor(EXECUTOR).double(), exact @ x.double(), **close)
    torch.testing.assert_close(
        w.rmatmat(y, EXECUTOR).double(), exact.T @ exact @ x.double(), rtol=tol(dtype), atol=1e-4
    )
    torch.testing.assert_close(w.gram(EXECUTOR), exact.T @ exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(w.row_gram(EXECUTOR), exact @ exact.T, rtol=1e-12, atol=1e-12)
    assert w.squared_norm(EXECUTOR) == pytest.approx(float(exact.square().sum()), rel=1e-12)
    left, right = torch.ones(shape[0], 2, dtype=w.compute_dtype), torch.ones(2, shape[1], dtype=w.compute_dtype)
    residual = float((exact - 2).square().sum())
    assert w.squared_residual(LowRankFactors(left, right), EXECUTOR) == pytest.approx(residual, rel=tol(dtype))


def test_stored_pieces_do_not_change_the_blocks(tmp_path: Path) -> None:
    dense = torch.randn(10, 4, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    save_file({"top": dense[:7].clone()}, tmp_path / "a.safetensors")
    save_file({"rest": dense[7:].clone()}, tmp_path / "b.safetensors")
    pieces = [
        TensorSlice(str(tmp_path / "a.safetensors"), "top", 0, 7),
        TensorSlice(str(tmp_path / "b.safetensors"), "rest", 0, 3),
    ]
    stored = BlockMatrix.from_slices("w", pieces, (10, 4), torch.bfloat16, block_bytes=64)
    held = BlockMatrix.from_tensor("w", dense, block_bytes=64)
    assert stored.row_offsets == held.row_offsets == (0, 3, 6, 10)
    assert [len(block) for block in stored.blocks] == [1, 1, 2]
    for ours, theirs in zip(stored.blocks, held.blocks):
        assert torch.equal(read_block(ours), read_block(theirs))
    assert all(isinstance(block, tuple) for block in stored.place(EXECUTOR).blocks), "several stored blocks stay lazy"


def test_a_block_is_computed_in_fp32_and_aligned() -> None:
    odd = torch.arange(33, dtype=torch.float32)[1:].reshape(8, 4)
    block = read_block(odd)
    assert torch.equal(block, odd)
    assert block.data_ptr() % 64 == 0
    assert read_block(odd.half()).dtype == torch.float32
    assert read_block(odd.double()).dtype == torch.float64


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(6, 3)}, path)
    return path


def test_a_missing_file_key_or_row_is_a_checkpoint_error(stored: Path) -> None:
    absent = str(stored.with_name("absent.safetensors"))
    for path, key, stop in ((absent, "w", 6), (str(stored), "v", 6), (str(stored), "w", 7)):
        with pytest.raises(CheckpointError, match=f"read rows 0:{stop} of {key} from"):
            load_block(TensorSlice(path, key, 0, stop), "w")


def test_a_truncated_file_is_a_checkpoint_error(stored: Path) -> None:
    stored.write_bytes(stored.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="read rows 0:6 of w"):
        load_block(TensorSlice(str(stored), "w", 0, 6), "w")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_entry_is_named(bad: float) -> None:
    block = torch.ones(4, 4)
    block[2, 1] = bad
    with pytest.raises(NumericsError, match=r"decompose layers\.3\.q: 1 of 16 entries"):
        load_block(block, "layers.3.q")


def test_pieces_must_add_up() -> None:
    with pytest.raises(CheckpointError, match="pieces hold 5 rows"):
        BlockMatrix.from_slices("w", [TensorSlice("f", "w", 0, 5)], (6, 3), torch.float32, 64)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3), "need 2 dimensions"),
        (torch.ones(0, 3), "the matrix is empty"),
        (torch.ones(2, 2, dtype=torch.int64), "floating-point"),
    ],
)
def test_what_is_not_a_matrix_is_refused(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(DecompositionError, match=message):
        BlockMatrix.from_tensor("w", tensor)
