"""NF4 codes of fp32 values, values of codes, and products with few tokens straight from the codes.

Compiled where a compiler is there; the torch path gives the same codes and values, bit for bit. Both are those of
bitsandbytes on a CPU: code = number of midpoints below w · (1 / absmax), in the last, shorter block below w / absmax.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from lowrank.kernels.build import kernel

#: Values of the 16 codes (QLoRA, arXiv:2305.14314, appendix E).
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
#: Most tokens that `product` multiplies; beyond, dequantizing once and a plain product win.
MOST_TOKENS = 16
#: Columns that are decoded together: rows of another length have no compiled product.
CHUNK = 64
#: Smallest divisor of a block, as bitsandbytes has it.
_LEAST = 1e-38
#: Entries that make another thread worth its start, to quantize or dequantize them and to multiply tokens by them.
_ENTRIES_PER_THREAD, _PRODUCTS_PER_THREAD = 2**20, 2**17
#: Entries that the torch path holds as codes at a time.
_SLICE = 2**20


def quantize(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """NF4 codes and block maxima of `values`.

    Args:
        values: (numel,) fp32 on the CPU, contiguous, finite, not empty.
        block_size: entries per block, a multiple of 64 that divides 4096.

    Returns:
        packed uint8 (ceil(numel / 2), 1), the first code of a byte in its high bits, and absmax fp32
        (ceil(numel / block_size),).
    """
    numel, compiled = values.numel(), kernel()
    packed = torch.empty(-(-numel // 2), 1, dtype=torch.uint8)
    absmax = torch.empty(-(-numel // block_size))
    if compiled is None:
        _quantize_sliced(values, block_size, packed.view(-1), absmax)
        return packed, absmax
    addresses = map(_address, (values, bounds(), packed, absmax))
    compiled.quantize_nf4(*_integers(numel, block_size), *addresses, _threads(numel))
    return packed, absmax


def dequantize(packed: Tensor, absmax: Tensor, block_size: int, out: Tensor) -> Tensor:
    """level[code_i] · absmax[i // block_size] into `out`.

    Args:
        packed: uint8, (ceil(numel / 2), 1) or flat, on the CPU.
        absmax: fp32 (ceil(numel / block_size),).
        block_size: entries per block, a multiple of 64 that divides 4096.
        out: fp32, contiguous, of numel entries; overwritten and returned.
    """
    numel, compiled = out.numel(), kernel()
    if compiled is None:
        _dequantize_sliced(packed.view(-1), absmax, block_size, out.view(-1))
        return out
    addresses = map(_address, (packed, absmax, levels(), out))
    compiled.dequantize_nf4(*_integers(numel, block_size), *addresses, _threads(numel))
    return out


def product(x: Tensor, packed: Tensor, absmax: Tensor, block_size: int, m: int) -> Tensor | None:
    """y = x Wᵀ without a dense W, or None where no compiled product fits: more than 16 tokens, n % 64, no compiler.

    Args:
        x: (tokens, n) fp32 on the CPU.
        packed: uint8, codes of W (m, n) row by row.
        absmax: fp32, its block maxima.
        block_size: entries per block, a multiple of 64.
        m: rows of W.

    Returns:
        (tokens, m) fp32; the bits do not depend on the number of threads.
    """
    tokens, n = x.shape
    compiled = kernel() if 0 < tokens <= MOST_TOKENS and n % CHUNK == 0 else None
    if compiled is None:
        return None
    held, y = x.contiguous(), torch.empty(tokens, m)
    threads = _threads(m * n, _PRODUCTS_PER_THREAD)
    addresses = map(_address, (held, packed, absmax, levels(), y))
    return None if compiled.product_nf4(*_integers(tokens, m, n, block_size), *addresses, threads) else y


@cache
def levels() -> Tensor:
    """Values of the codes, fp32 (16,)."""
    return torch.tensor(LEVELS)


@cache
def bounds() -> Tensor:
    """Midpoints between neighbouring levels, fp32 (15,), padded to 16 for the compiled path."""
    found = levels()
    return torch.cat([(found[:-1] + found[1:]) / 2, torch.full((1,), torch.inf)])


def _quantize_sliced(values: Tensor, block_size: int, packed: Tensor, absmax: Tensor) -> None:
    numel = values.numel()
    full = numel - numel % block_size
    for start in range(0, full, _SLICE):
        stop = min(start + _SLICE, full)
        blocks = values[start:stop].view(-1, block_size)
        most = torch.amax(blocks.abs(), 1, out=absmax[start // block_size : stop // block_size])
        _pack((blocks * (1.0 / most.clamp(min=_LEAST))[:, None]).view(-1), packed[start // 2 : stop // 2])
    if full < numel:
        rest = values[full:]
        absmax[-1] = rest.abs().amax().clamp(min=_LEAST)
        _pack(torch.nn.functional.pad(rest / absmax[-1], (0, numel % 2)), packed[full // 2 :])


def _pack(scaled: Tensor, packed: Tensor) -> None:
    codes = torch.zeros(len(scaled), dtype=torch.uint8)
    for bound in bounds()[:-1]:
        codes += scaled > bound
    torch.bitwise_or(codes[::2] << 4, codes[1::2], out=packed)


def _dequantize_sliced(packed: Tensor, absmax: Tensor, block_size: int, out: Tensor) -> None:
    for start in range(0, len(out), _SLICE):
        part = out[start : start + _SLICE]
        codes = packed[start // 2 : (start + len(part) + 1) // 2].int()
        values = levels()[torch.stack([codes >> 4, codes & 15], 1)].view(-1)[: len(part)]
        scales = absmax[start // block_size : -(-(start + len(part)) // block_size)].repeat_interleave(block_size)
        torch.mul(values, scales[: len(part)], out=part)


def _threads(entries: int, per_thread: int = _ENTRIES_PER_THREAD) -> int:
    return max(1, min(torch.get_num_threads(), entries // per_thread))


def _integers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
