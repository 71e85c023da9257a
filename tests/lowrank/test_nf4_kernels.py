"""NF4 in compiled C, in portable C and in torch: the bits of bitsandbytes, and products straight from the codes."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from tolerance import tol

from lowrank.errors import QuantizationError
from lowrank.kernels import build, nf4
from lowrank.linear import NF4Linear
from lowrank.quantization import quantize_nf4

needs_compiler = pytest.mark.skipif(build.kernel() is None, reason="no C compiler")
#: One entry, odd numbers, one block and its neighbours, ragged tails, more than one unit of work, several slices.
LENGTHS = [1, 2, 63, 64, 65, 127, 128, 130, 4095, 4096, 4097, 40_001, 2**20 + 66]
BLOCKS = [64, 128, 1024, 4096]


@pytest.fixture(scope="module")
def portable_c(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same source for any processor of this kind: no vector instructions beyond the common ones."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("portable") / "nf4.so"
    flags = [flag for flag in build._FLAGS if flag != "-march=native"]
    sources = [str(Path(build.__file__).parent / name) for name in ("nf4.c", "threads.c")]
    subprocess.run([compiler, *flags, *build._SHARED, "-w", "-o", str(path), *sources, "-lm"], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(params=["native", "portable C", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to run what the wrapper offers."""
    if request.param == "native" and build.kernel() is None:
        pytest.skip("no C compiler")
    if request.param == "portable C":
        library = request.getfixturevalue("portable_c")
        monkeypatch.setattr(nf4, "kernel", lambda: library)
    if request.param == "torch":
        monkeypatch.setattr(nf4, "kernel", lambda: None)
    return str(request.param)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def neighbours(values: torch.Tensor) -> torch.Tensor:
    """Each value, the next float below and the next above."""
    infinity = torch.tensor(torch.inf)
    return torch.stack([torch.nextafter(values, -infinity), values, torch.nextafter(values, infinity)])


def awkward() -> Iterator[tuple[str, torch.Tensor]]:
    """Inputs whose codes hang on one rounding."""
    tiny, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    bounds = nf4.bounds()[:15]
    for scale in (1.0, 3.0, 0.1, 7e-20, 1e-38, 1e30):
        ties = (neighbours(torch.cat([bounds, nf4.levels()])) * scale).flatten()
        yield f"ties at {scale:g}", torch.cat([torch.tensor([scale]), ties])[:64].clamp(-scale, scale)
        yield f"ties in a tail at {scale:g}", torch.cat([torch.tensor([scale]), ties]).clamp(-scale, scale)[:61]
    yield "zeros", torch.zeros(130)
    yield "negative zeros", -torch.zeros(64)
    yield "subnormal", normal(130) * tiny / 16
    yield "around the least divisor", normal(256) * 1e-38
    yield "extreme", normal(130).clamp(-1, 1) * most
    yield "one large entry", torch.cat([normal(63) * 1e-6, torch.tensor([1e6])])
    yield "a zero block between others", torch.cat([normal(64), torch.zeros(64), normal(64), torch.zeros(3)])


def test_levels_are_those_of_bitsandbytes() -> None:
    assert torch.equal(nf4.levels(), get_4bit_type("nf4", device="cpu"))


def check_bits(values: torch.Tensor, block_size: int) -> None:
    packed, state = quantize_4bit(values, blocksize=block_size, quant_type="nf4")
    ours, absmax = nf4.quantize(values, block_size)
    assert torch.equal(ours, packed)
    assert torch.equal(absmax, state.absmax)
    out = nf4.dequantize(ours, absmax, block_size, torch.full_like(values, torch.nan))
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[: len(values)].long()
    scales = state.absmax.repeat_interleave(block_size)[: len(values)]
    assert torch.equal(out, nf4.levels()[codes] * scales)
    if len(values) % 2 == 0 and block_size < 2048:  # bitsandbytes compiles another path for the rest
        assert torch.equal(out, dequantize_4bit(packed, state).view(-1))


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_bits_are_those_of_bitsandbytes(path: str, length: int, block_size: int) -> None:
    check_bits(normal(length, seed=length), block_size)


@pytest.mark.parametrize("values", [pytest.param(values, id=name) for name, values in awkward()])
def test_ties_and_extremes_are_those_of_bitsandbytes(path: str, values: torch.Tensor) -> None:
    check_bits(values, 64)


def test_a_wrong_rule_at_ties_would_be_seen() -> None:
    """The tie inputs tell `>` from `>=`: each of the 15 bounds is met exactly."""
    values = torch.cat([torch.ones(1), nf4.bounds()[:15], torch.zeros(48)])
    packed, _ = nf4.quantize(values, 64)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[1:16].long()
    assert torch.equal(codes, torch.arange(15))
    assert torch.equal(torch.searchsorted(nf4.bounds(), nf4.bounds()[:15], right=True), torch.arange(1, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_round_as_bitsandbytes_does(path: str, dtype: torch.dtype) -> None:
    weight = (normal(512, 64) * torch.logspace(-6, 3, 512)[:, None]).to(dtype)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize_nf4(weight, double_quant=False)
    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.dequantize(), dequantize_4bit(packed, state))


@needs_compiler
def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(2**21 + 34)
    results = []
    for threads in (1, 5):
        monkeypatch.setattr(nf4, "_threads", lambda *_, threads=threads: threads)
        packed, absmax = nf4.quantize(weight, 64)
        out = nf4.dequantize(packed, absmax, 64, torch.empty_like(weight))
        products = [nf4.product(normal(tokens, 1024), packed, absmax, 64, 2000) for tokens in (3, 8, 16)]
        results.append((packed, absmax, out, *products))
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize("offset", [0, 1])
def test_a_large_output_is_whole_wherever_it_lies(offset: int) -> None:
    """Beyond the caches it is written past them, which needs aligned addresses."""
    values = normal(2**23 + 37)
    packed, absmax = nf4.quantize(values, 64)
    out = torch.full((len(values) + offset,), torch.nan)[offset:]
    nf4.dequantize(packed, absmax, 64, out)
    parts = [slice(start, start + 2**21) for start in range(0, len(values), 2**21)]
    for part in parts:
        expected = torch.empty_like(values[part])
        half, blocks = packed[part.start // 2 :], absmax[part.start // 64 :]
        assert torch.equal(out[part], nf4.dequantize(half, blocks, 64, expected))


@pytest.mark.parametrize("shape", [(1, 64), (2, 64), (7, 128), (33, 192), (8, 576), (130, 1536)], ids=str)
@pytest.mark.parametrize("block_size", [64, 128, 4096])
def test_products_with_few_tokens_are_those_of_the_dense_weight(
    path: str, shape: tuple[int, int], block_size: int
) -> None:
    weight = normal(*shape)
    packed, absmax = nf4.quantize(weight.view(-1), block_size)
    dense = nf4.dequantize(packed, absmax, block_size, torch.empty(shape)).double()
    for tokens in range(1, nf4.MOST_TOKENS + 1):
        x = normal(tokens, shape[1], seed=tokens)
        y = nf4.product(x, packed, absmax, block_size, shape[0])
        if path == "torch":
            assert y is None
            continue
        assert y is not None
        exact = x.double() @ dense.T
        assert y.shape == exact.shape
        bound = tol(torch.float32) * float(exact.abs().max())
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=bound)


@needs_compiler
def test_what_has_no_compiled_product_says_so() -> None:
    packed, absmax = nf4.quantize(normal(66 * 66), 64)
    assert nf4.product(normal(1, 66), packed, absmax, 64, 66) is None
    packed, absmax = nf4.quantize(normal(64 * 64), 64)
    assert nf4.product(normal(nf4.MOST_TOKENS + 1, 64), packed, absmax, 64, 64) is None
    assert nf4.product(normal(0, 64), packed, absmax, 64, 64) is None


@needs_compiler
def test_a_strided_input_is_read_right() -> None:
    packed, absmax = nf4.quantize(normal(40 * 128), 64)
    wide = normal(6, 256)
    for tokens in (3, 6):
        view = wide[:tokens, ::2]
        y = nf4.product(view, packed, absmax, 64, 40)
        assert y is not None
        assert torch.equal(y, nf4.product(view.contiguous(), packed, absmax, 64, 40))


@pytest.mark.parametrize("shape", [(48, 64), (31, 64), (3, 5), (65, 66), (130, 192)], ids=str)
@pytest.mark.parametrize("block_size", [64, 128])
def test_a_layer_gives_the_values_and_gradients_of_its_dense_weight(
    path: str, shape: tuple[int, int], block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank.linear._PANEL", 1024)  # several panels even here
    m, n = shape
    layer = NF4Linear(quantize_nf4(normal(m, n), block_size), bias=normal(m))
    dense = layer.dense_weight()
    for lead in ((), (2,), (3, 4), (2, 20), (0,)):
        x = normal(*lead, n, seed=3).requires_grad_()
        y = layer(x)
        expected = torch.nn.functional.linear(x.detach(), dense, layer.bias)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        grad = normal(*lead, m, seed=4)
        (found,) = torch.autograd.grad(y, x, grad)
        torch.testing.assert_close(found, grad @ dense, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_layers_that_share_the_buffer_do_not_see_each_other() -> None:
    """Forward through both, backward through both: each product reads its own weight."""
    first, second = (NF4Linear(quantize_nf4(normal(128, 128, seed=seed))) for seed in (1, 2))
    x = normal(40, 128).requires_grad_()
    y = second(torch.tanh(first(x)))
    y.square().sum().backward()
    w1, w2 = first.dense_weight(), second.dense_weight()
    assert w1.data_ptr() != w2.data_ptr()
    plain = x.detach().clone().requires_grad_()
    (torch.tanh(plain @ w1.T) @ w2.T).square().sum().backward()
    assert x.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-4, atol=1e-3)


def test_a_layer_first_used_in_inference_mode_trains_later() -> None:
    layer = NF4Linear(quantize_nf4(normal(70, 66)))
    with torch.inference_mode():
        layer(normal(40, 66))
    x = normal(40, 66).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.dense_weight().sum(0).expand(40, 66), rtol=1e-4, atol=1e-4)


def test_a_second_derivative_goes_through_the_layer() -> None:
    layer = NF4Linear(quantize_nf4(normal(64, 64)))
    x = normal(40, 64).requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    dense = layer.dense_weight()
    torch.testing.assert_close(second, (2 * dense.T @ dense).sum(0).expand(40, 64), rtol=1e-4, atol=1e-3)


def test_block_sizes_that_the_kernel_has_not_are_refused() -> None:
    with pytest.raises(QuantizationError, match="block_size = 32"):
        quantize_nf4(normal(8, 8), block_size=32)
