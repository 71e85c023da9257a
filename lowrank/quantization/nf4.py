"""NF4: 4-bit codes in blocks, each block scaled by its absolute maximum, the maxima themselves in 8 bits.

The codes are those of bitsandbytes, bit for bit. On a CPU `lowrank.kernels.nf4` makes and reads them; bitsandbytes
does on other devices, and always keeps the 8-bit maxima. Weights pass through it as flat vectors: its own shapes
transpose a 1x2 matrix, and take a slow compiled path for an odd number of columns.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import QuantizationError
from lowrank.kernels import nf4 as kernels

# It warns at its import that a package of products which we do not use is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
#: Block sizes that every bitsandbytes backend has.
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
#: Absmax values per second-level block; bitsandbytes fixes it.
_NESTED_BLOCK = 256
#: dtypes that bitsandbytes writes directly; others are cast from fp32.
_NATIVE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class NF4Tensor:
    """A tensor in NF4, 4.127 bits per entry with double quantization (block size 64), 4.5 without.

    Entry i of the flattened tensor is code[q_i] · absmax[i // block_size]. With double quantization,
    absmax = code8[absmax codes] · nested_absmax[j // 256] + offset.

    Attributes:
        packed: uint8 (ceil(numel / 2), 1), two codes per byte, the first one in the high bits.
        absmax: fp32 (num_blocks,), or uint8 codes of it when `nested_absmax` is set.
        block_size: entries per block.
        shape: of the tensor.
        dtype: of the tensor that was quantized; what `dequantize` returns by default.
        nested_absmax: fp32 (ceil(num_blocks / 256),), or None without double quantization.
        offset: fp32 scalar, the mean of the true absmax; None exactly when `nested_absmax` is.

    Source: QLoRA, arXiv:2305.14314, section 3.
    """

    packed: Tensor
    absmax: Tensor
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in `dtype` (default: the one it had).

        Call `expand_absmax` once first when this runs in a loop: the bits are the same, and the 8-bit step is
        not repeated.
        """
        dtype = dtype or self.dtype
        absmax = self.expand_absmax().absmax
        if self.packed.is_cpu:
            return kernels.dequantize(self.packed, absmax, self.block_size, torch.empty(self.shape)).to(dtype)
        return self._dequantize_elsewhere(absmax, dtype)

    def _dequantize_elsewhere(self, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        numel = _numel(self.shape)
        state = QuantState(
            absmax=absmax,
            # Flat and even: the fast kernel of bitsandbytes for every shape; the pad entry is dropped below.
            shape=(numel + numel % 2,),
            blocksize=self.block_size,
            quant_type="nf4",
            dtype=dtype if dtype in _NATIVE else torch.float32,
        )
        values: Tensor = dequantize_4bit(self.packed, state).reshape(-1)
        return values[:numel].reshape(self.shape).to(dtype)

    def expand_absmax(self) -> "NF4Tensor":
        """The same tensor with fp32 `absmax`; dequantizes to identical bits, 0.37 bits per entry larger."""
        if self.nested_absmax is None:
            return self
        from bitsandbytes.functional import dequantize_blockwise

        code = _dynamic_code().to(self.absmax.device)
        absmax = dequantize_blockwise(self.absmax, absmax=self.nested_absmax, code=code, blocksize=_NESTED_BLOCK)
        return replace(self, absmax=absmax + self.offset, nested_absmax=None, offset=None)

    def to(self, device: torch.device | str) -> "NF4Tensor":
        """The same tensor on another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self._tensors().items()}
        return replace(self, **moved)

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Every tensor, as `{prefix}.{field}`, for a safetensors file; with `meta` it restores all bits."""
        return {f"{prefix}.{name}": t.contiguous() for name, t in self._tensors().items()}

    def meta(self) -> dict[str, Any]:
        """What is not a tensor, as JSON: block_size, shape, dtype."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"block_size": self.block_size, "shape": list(self.shape), "dtype": dtype}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str, meta: Mapping[str, Any]) -> "NF4Tensor":
        """Restore what `to_tensors(prefix)` and `meta()` gave, bit for bit.

        Raises:
            QuantizationError: when a tensor is missing, or sizes contradict `meta`.
        """
        found = {field: tensors.get(f"{prefix}.{field}") for field in _FIELDS}
        packed, absmax = found["packed"], found["absmax"]
        nested, offset = found["nested_absmax"], found["offset"]
        if packed is None or absmax is None or (nested is None) != (offset is None):
            missing = sorted(field for field, tensor in found.items() if tensor is None)
            raise QuantizationError(f"load NF4 {prefix}: {', '.join(missing)} missing. Run quantize again.")
        block_size, shape = int(meta["block_size"]), tuple(int(k) for k in meta["shape"])
        numel = _numel(shape)
        sizes = (packed.numel(), absmax.numel())
        expected = (-(-numel // 2), -(-numel // block_size))
        if sizes != expected:
            raise QuantizationError(
                f"load NF4 {prefix} {shape}: got (packed, absmax) sizes {sizes}, need {expected}. Run quantize again."
            )
        return cls(packed, absmax, block_size, shape, getattr(torch, str(meta["dtype"])), nested, offset)

    def _tensors(self) -> dict[str, Tensor]:
        return {field: t for field in _FIELDS if (t := getattr(self, field)) is not None}


_FIELDS = ("packed", "absmax", "nested_absmax", "offset")


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True, *, name: str = "weight") -> NF4Tensor:
    """Quantize a tensor to NF4, q_i = argmin_q |code[q] − w_i / absmax|; numel need not divide into blocks.

    Args:
        weight: any shape and floating-point dtype, finite; fp64 is rounded to fp32 first.
        block_size: entries per absmax, one of `BLOCK_SIZES`; smaller is more accurate and larger on disk.
        double_quant: store the absmax values in 8 bits (0.5 → 0.127 bits per entry at block size 64).
        name: of the tensor, for messages.

    Raises:
        QuantizationError: when the tensor is empty, holds NaN or infinity, or `block_size` is not allowed.

    Source: QLoRA, arXiv:2305.14314, section 3.

    Example:
        >>> q = quantize_nf4(torch.tensor([[-1.0, 0.0, 1.0]]), double_quant=False)
        >>> q.dequantize()
        tensor([[-1.,  0.,  1.]])
    """
    check_weight(name, weight)
    if block_size not in BLOCK_SIZES:
        raise QuantizationError(f"quantize {name}: block_size = {block_size}. Set one of {BLOCK_SIZES}.")
    values = weight.detach().reshape(-1).float()
    packed, absmax = kernels.quantize(values, block_size) if values.is_cpu else _quantize_elsewhere(values, block_size)
    quantized = NF4Tensor(packed, absmax, block_size, tuple(weight.shape), weight.dtype)
    return _compress_absmax(quantized) if double_quant else quantized


def _quantize_elsewhere(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(values, blocksize=block_size, quant_type="nf4")
    return packed, state.absmax


def _compress_absmax(quantized: NF4Tensor) -> NF4Tensor:
    from bitsandbytes.functional import quantize_blockwise

    offset = quantized.absmax.mean()
    codes, state = quantize_blockwise(quantized.absmax - offset, blocksize=_NESTED_BLOCK)
    return replace(quantized, absmax=codes, nested_absmax=state.absmax, offset=offset)


def check_weight(name: str, weight: Tensor) -> None:
    """Raise `QuantizationError` for an empty, integer or non-finite tensor."""
    what = f"quantize {name} ({'x'.join(map(str, weight.shape))}, {weight.dtype})"
    if weight.numel() == 0:
        raise QuantizationError(f"{what}: the tensor is empty. Leave it out of quantize.targets.")
    if not weight.is_floating_point():
        raise QuantizationError(f"{what}: need a floating-point dtype. Leave it out of quantize.targets.")
    low, high = torch.aminmax(weight)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise QuantizationError(
            f"{what}: NaN or infinite entries. Repair the checkpoint, or leave it out of quantize.targets."
        )


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


@cache
def _dynamic_code() -> Tensor:
    """The 8-bit table of the second level; regenerated, since bitsandbytes fixes it."""
    from bitsandbytes.functional import create_dynamic_map

    code: Tensor = create_dynamic_map()
    return code
