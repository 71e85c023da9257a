"""NF4 and the low-rank split: bits, sizes, and never worse than plain NF4."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file

from lowrank.blocks import BlockMatrix
from lowrank.decompositions import decompose
from lowrank.errors import QuantizationError
from lowrank.executor import SerialExecutor
from lowrank.factors import LowRankFactors, SVDFactors
from lowrank.quantization import METHODS, NF4Tensor, quantize_nf4, split_weight
from lowrank.rank import RankRule

#: Whole blocks, ragged tails, odd columns, odd numel, one row, one pair (which bitsandbytes transposes), one entry.
SHAPES = [(64, 64), (65, 66), (7, 33), (3, 5), (1, 130), (300, 64), (2, 1), (1, 2), (1, 1), (5,)]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
either_absmax = pytest.mark.parametrize("double_quant", [True, False])


def gaussian(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def power_law(m: int, n: int) -> torch.Tensor:
    u, v = (torch.linalg.qr(gaussian((k, min(m, n)), seed=k)).Q for k in (m, n))
    return (u * torch.arange(1, min(m, n) + 1) ** -0.6) @ v.T


def factors_of(weight: torch.Tensor, rank: int) -> SVDFactors:
    matrix = BlockMatrix.from_tensor("w", weight)
    return decompose(matrix, method="exact_svd", rule=RankRule(rank=rank), executor=SerialExecutor()).factors


@every_shape
@either_absmax
def test_codes_and_values_are_those_of_bitsandbytes(shape: tuple[int, ...], double_quant: bool) -> None:
    weight = gaussian(shape)
    ours = quantize_nf4(weight, double_quant=double_quant)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.absmax, state.absmax)
    assert ours.dequantize().shape == weight.shape
    assert torch.equal(ours.dequantize().flatten(), dequantize_4bit(packed, state).flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dequantize_returns_the_dtype_it_had_or_is_asked_for(dtype: torch.dtype) -> None:
    quantized = quantize_nf4(gaussian((8, 64), dtype))
    assert quantized.dtype == quantized.dequantize().dtype == dtype
    assert quantized.dequantize(torch.float32).dtype == torch.float32


@every_shape
@either_absmax
def test_a_file_restores_every_bit(shape: tuple[int, ...], double_quant: bool, tmp_path: Path) -> None:
    quantized = quantize_nf4(gaussian(shape, torch.bfloat16), double_quant=double_quant)
    save_file(quantized.to_tensors("a.b"), tmp_path / "q")
    meta = json.loads(json.dumps(quantized.meta()))
    restored = NF4Tensor.from_tensors(load_file(tmp_path / "q"), "a.b", meta)
    for field in fields(NF4Tensor):
        ours, theirs = getattr(quantized, field.name), getattr(restored, field.name)
        same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        assert same, field.name
    assert torch.equal(restored.dequantize(), quantized.dequantize())


@every_shape
def test_expanding_absmax_keeps_every_bit(shape: tuple[int, ...]) -> None:
    quantized = quantize_nf4(gaussian(shape))
    expanded = quantized.expand_absmax()
    assert expanded.absmax.dtype == torch.float32
    assert expanded.nested_absmax is None
    assert torch.equal(expanded.dequantize(), quantized.dequantize())
    assert expanded.expand_absmax() is expanded


@every_shape
def test_no_shape_takes_the_compiled_path_of_bitsandbytes(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # seconds of torch.compile per shape, for an odd number of columns
    monkeypatch.setattr("bitsandbytes.backends.default.ops._dequantize_4bit_compute", None)
    assert quantize_nf4(gaussian(shape)).dequantize().shape == shape


def test_double_quantization_takes_4_127_bits_and_plain_4_5() -> None:
    weight = gaussian((1024, 1024))
    assert quantize_nf4(weight, double_quant=False).nbytes * 8 / weight.numel() == 4.5
    assert quantize_nf4(weight).nbytes * 8 / weight.numel() == pytest.approx(4.127, abs=1e-3)


def test_the_error_on_gaussian_weights_is_the_known_one() -> None:
    error = split_weight("w", gaussian((1024, 1024)), None, "nf4").quantization_error
    assert error == pytest.approx(0.092, abs=0.002)


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("kind", ["power_law", "gaussian", "zero", "low_rank", "tiny"])
def test_qpissa_is_never_worse_than_plain_nf4_and_reports_truly(kind: str, rank: int) -> None:
    weight = {
        "power_law": power_law(96, 80),
        "gaussian": gaussian((96, 80)),
        "zero": torch.zeros(96, 80),
        "low_rank": gaussian((96, 4)) @ gaussian((4, 80), seed=1),
        "tiny": power_law(96, 80) * 1e-12,
    }[kind]
    split = split_weight("w", weight, factors_of(weight, rank), "qpissa")
    plain = quantize_nf4(weight).dequantize()
    norm = float(weight.double().norm()) or 1.0
    assert split.plain_error == pytest.approx(float((weight - plain).double().norm()) / norm, rel=1e-5)
    error = float((weight - split.reconstruct()).double().norm()) / norm
    assert split.quantization_error == pytest.approx(error, rel=1e-5, abs=1e-12)
    assert split.quantization_error <= split.plain_error
    assert split.fallback == (split.part is None)


def test_qpissa_halves_the_error_on_a_decaying_spectrum() -> None:
    weight = power_law(256, 256)
    split = split_weight("w", weight, factors_of(weight, 32), "qpissa")
    assert not split.fallback
    assert split.quantization_error < 0.7 * split.plain_error


def test_qpissa_starts_where_the_adapter_puts_it_for_every_alpha() -> None:
    weight = power_law(96, 80)
    factors = factors_of(weight, 8)
    split = split_weight("w", weight, factors, "qpissa")
    assert isinstance(split.part, LowRankFactors)
    for scaling in (0.5, 2.0, 32 / 8**0.5):
        lora = split.part.to_lora(scaling)
        a, b = lora.a, lora.b
        start = split.residual.dequantize() + scaling * b @ a
        torch.testing.assert_close(start, split.reconstruct(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_split_uses_the_grid_it_is_given(method: str) -> None:
    weight = power_law(96, 80)
    split = split_weight("w", weight, factors_of(weight, 8), method, block_size=128, double_quant=False)
    assert split.residual.block_size == 128
    assert split.residual.nested_absmax is None
    plain = quantize_nf4(weight, 128, False).dequantize()
    assert split.plain_error == pytest.approx(float((weight - plain).norm() / weight.norm()), rel=1e-5)


def test_qpissa_falls_back_when_the_factors_hurt() -> None:
    weight = gaussian((64, 64))
    wrong = factors_of(100 * gaussian((64, 64), seed=9), 8)
    split = split_weight("w", weight, wrong, "qpissa")
    assert split.fallback
    assert split.part is None
    assert split.quantization_error == split.plain_error
    assert torch.equal(split.residual.packed, quantize_nf4(weight).packed)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_split_keeps_the_dtype_of_the_weight(method: str) -> None:
    weight = power_law(96, 80).to(torch.bfloat16)
    split = split_weight("w", weight, factors_of(weight, 8), method)
    assert split.residual.dtype == torch.bfloat16
    assert split.reconstruct().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.empty(0, 4), "the tensor is empty"),
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinite"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or infinite"),
        (torch.ones(2, 2, dtype=torch.int8), "floating-point"),
    ],
)
def test_what_cannot_be_quantized_is_refused_by_name(weight: torch.Tensor, message: str) -> None:
    for call in (lambda: quantize_nf4(weight, name="q_proj"), lambda: split_weight("q_proj", weight, None)):
        with pytest.raises(QuantizationError, match=f"quantize q_proj.*{message}"):
            call()


def test_messages_of_options_and_damaged_tensors() -> None:
    weight = gaussian((8, 8))
    with pytest.raises(QuantizationError, match="block_size = 60"):
        quantize_nf4(weight, block_size=60)
    with pytest.raises(QuantizationError, match=r"unknown method 'qlora'.*loftq, lplr, lq_lora, nf4, qpissa"):
        split_weight("w", weight, None, "qlora")
    with pytest.raises(QuantizationError, match="no factors"):
        split_weight("w", weight, None, "qpissa")
    with pytest.raises(QuantizationError, match="factors are of a 9x8 matrix"):
        split_weight("w", weight, factors_of(gaussian((9, 8)), 2), "qpissa")
    quantized = quantize_nf4(weight)
    tensors, meta = quantized.to_tensors("w"), quantized.meta()
    with pytest.raises(QuantizationError, match="load NF4 w: offset missing"):
        NF4Tensor.from_tensors({k: t for k, t in tensors.items() if k != "w.offset"}, "w", meta)
    with pytest.raises(QuantizationError, match=r"load NF4 w .*sizes"):
        NF4Tensor.from_tensors(tensors, "w", {**meta, "shape": [9, 8]})
