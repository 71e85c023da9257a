"""SVD factors: identities, and files that repeat byte for byte."""

from pathlib import Path

import pytest
import torch
from tolerance import tol

from lowrank.errors import AdapterError, CheckpointError
from lowrank.factors import SVDFactors


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def factors(request: pytest.FixtureRequest) -> SVDFactors:
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(k, 4, generator=generator, dtype=request.param)).Q for k in (9, 7))
    return SVDFactors(u, torch.tensor([3.0, 2.0, 0.5, 0.0], dtype=request.param), v.T.contiguous())


def test_reconstruct_matvec_and_balanced_agree(factors: SVDFactors) -> None:
    dense = factors.u @ torch.diag(factors.s) @ factors.vh
    left, right = factors.balanced()
    x = torch.ones(2, 7, dtype=dense.dtype)
    close = {"rtol": tol(dense.dtype), "atol": tol(dense.dtype)}
    torch.testing.assert_close(factors.reconstruct(), dense, **close)
    torch.testing.assert_close(factors.matvec(x), x @ dense.T, **close)
    torch.testing.assert_close(left @ right, dense, **close)
    torch.testing.assert_close(left.T @ left, right @ right.T, **close)
    assert factors.reconstruct(torch.bfloat16).dtype == torch.bfloat16
    assert factors.num_parameters == 9 * 4 + 4 + 4 * 7


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0, 16 / 64**0.5])
def test_lora_times_its_scaling_is_the_matrix(factors: SVDFactors, scaling: float) -> None:
    lora = factors.to_lora(scaling)
    a, b = lora.a, lora.b
    assert lora.exact
    assert lora.retained_energy == 1
    assert (a.shape, b.shape) == ((4, 7), (9, 4))
    dtype = factors.u.dtype
    torch.testing.assert_close(scaling * b @ a, factors.reconstruct(), rtol=tol(dtype), atol=tol(dtype))


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan")])
def test_lora_refuses_a_scaling_that_is_not_positive(factors: SVDFactors, scaling: float) -> None:
    with pytest.raises(AdapterError, match="Set lora_alpha > 0"):
        factors.to_lora(scaling)


def test_a_file_repeats_and_restores_every_bit(factors: SVDFactors, tmp_path: Path) -> None:
    factors.save(tmp_path / "a")
    loaded = SVDFactors.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for field in ("u", "s", "vh"):
        assert torch.equal(getattr(factors, field), getattr(loaded, field))


def test_a_damaged_file_is_a_checkpoint_error(factors: SVDFactors, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Run decompose again"):
        SVDFactors.load(tmp_path / "absent")
    factors.save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="Run decompose again"):
        SVDFactors.load(tmp_path / "cut")
