"""Split a weight into a 4-bit residual and a low-rank part in full precision: W ≈ Q + L R.

A method is one function of (name, weight, factors, quantizer, max_rank) in `METHODS`. Low rank first: what L R
carries never passes the 4-bit grid, and the residual that does is smaller than W.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from lowrank.errors import AdapterError, QuantizationError
from lowrank.factors import Factors
from lowrank.quantization.nf4 import NF4Tensor, check_weight, quantize_nf4


@dataclass(frozen=True)
class SplitWeight:
    """W ≈ Q + L R, or W ≈ Q when there is no low-rank part.

    Attributes:
        name: of the tensor.
        shape: (m, n).
        residual: Q in NF4, or None where L R replaces W.
        left: L (m, r) fp32, or None.
        right: R (r, n) fp32, or None exactly when `left` is.
        quantization_error: ‖W − Q − L R‖_F / ‖W‖_F; 0 for a zero matrix.
        plain_error: ‖W − NF4(W)‖_F / ‖W‖_F, what plain NF4 would cost; never smaller than the above, but for
            `replace`.
        fallback: whether the method was set aside for plain NF4, because it did worse on this tensor.
    """

    name: str
    shape: tuple[int, int]
    residual: NF4Tensor | None
    left: Tensor | None
    right: Tensor | None
    quantization_error: float
    plain_error: float
    fallback: bool = False

    def reconstruct(self, dtype: torch.dtype | None = None) -> Tensor:
        """Q + L R, (m, n), computed in fp32; the dtype of the original weight by default, fp32 where it is gone."""
        values = torch.zeros(self.shape) if self.residual is None else self.residual.dequantize(torch.float32)
        if self.left is not None and self.right is not None:
            values = torch.addmm(values, self.left, self.right)
        return values.to(dtype or (torch.float32 if self.residual is None else self.residual.dtype))

    @property
    def packed_bytes(self) -> int:
        """Bytes of Q."""
        return 0 if self.residual is None else self.residual.nbytes


#: NF4 with the block size and absmax format already chosen.
Quantizer: TypeAlias = Callable[[Tensor], NF4Tensor]
QuantizationMethod: TypeAlias = Callable[[str, Tensor, Factors | None, Quantizer, int | None], SplitWeight]


def split_weight(
    name: str,
    weight: Tensor,
    factors: Factors | None,
    method: str = "qpissa",
    *,
    block_size: int = 64,
    double_quant: bool = True,
    max_rank: int | None = None,
) -> SplitWeight:
    """Split `weight` by the method of that name, and never do worse than plain NF4.

    Args:
        name: of the tensor, for messages.
        weight: W (m, n), any floating-point dtype, finite.
        factors: of W from `decompose`, in any form; needed by `qpissa`, ignored by `nf4`.
        method: `nf4` (no low-rank part), `qpissa`, or `replace` (no residual).
        block_size: entries per absmax; see `quantize_nf4`.
        double_quant: store the absmax values in 8 bits.
        max_rank: largest rank of L R; factors whose low-rank form has a larger one are cut to the best of this rank.

    Raises:
        QuantizationError: when the method is unknown, needs factors that are not there or do not fit, or the
            weight is empty or not finite.
    """
    if method not in _SPLITS:
        known = ", ".join(sorted(METHODS))
        raise QuantizationError(f"quantize {name}: unknown method {method!r}. Set quantize.method to one of: {known}.")
    check_weight(name, weight)
    quantizer = partial(quantize_nf4, block_size=block_size, double_quant=double_quant, name=name)
    return _SPLITS[method](name, weight, factors, quantizer, max_rank)


def nf4(
    name: str, weight: Tensor, factors: Factors | None, quantizer: Quantizer, max_rank: int | None = None
) -> SplitWeight:
    """Q = NF4(W), no low-rank part."""
    residual = quantizer(weight)
    error = _relative_error(weight.float(), residual.dequantize(torch.float32))
    return SplitWeight(name, _sides(weight), residual, None, None, error, error)


def qpissa(
    name: str, weight: Tensor, factors: Factors | None, quantizer: Quantizer, max_rank: int | None = None
) -> SplitWeight:
    """L = U√Σ, R = √Σ Vᴴ of the factors' low-rank form, Q = NF4(W − L R); plain NF4 where that is not better.

    Scale-correct for every alpha: fine-tuning sets B = L/√s and A = R/√s, so that s · B · A = L R.

    Source: PiSSA, arXiv:2404.02948, section 3.1 (QPiSSA with T = 1).
    """
    left, right = _fitting(name, weight, factors, max_rank)
    exact = weight.float()
    rest = torch.addmm(exact, left, right, alpha=-1)
    # The residual stands in for W from here on, so it keeps W's dtype on record.
    residual = replace(quantizer(rest), dtype=weight.dtype)
    plain = nf4(name, weight, None, quantizer)
    split = SplitWeight(name, _sides(weight), residual, left, right, plain.plain_error, plain.plain_error)
    error = _relative_error(exact, split.reconstruct(torch.float32))
    if error > plain.plain_error:
        return replace(plain, fallback=True)
    return replace(split, quantization_error=error)


def replace_weight(
    name: str, weight: Tensor, factors: Factors | None, quantizer: Quantizer, max_rank: int | None = None
) -> SplitWeight:
    """L and R of the factors instead of W, nothing quantized; `decompose.mode: replace`, to be healed by training."""
    left, right = _fitting(name, weight, factors, max_rank)
    error = _relative_error(weight.float(), left @ right)
    plain = nf4(name, weight, None, quantizer).plain_error
    return SplitWeight(name, _sides(weight), None, left, right, error, plain)


#: Every quantization method by the name that `quantize.method` takes.
METHODS: dict[str, QuantizationMethod] = {"nf4": nf4, "qpissa": qpissa}
#: Those, and what `decompose.mode: replace` does instead.
_SPLITS = METHODS | {"replace": replace_weight}


def _fitting(name: str, weight: Tensor, factors: Factors | None, max_rank: int | None) -> tuple[Tensor, Tensor]:
    what = f"split {name} ({'x'.join(map(str, weight.shape))}) into its factors and a rest"
    if factors is None:
        raise QuantizationError(f"{what}: no factors. Run decompose on this tensor, or set quantize.method: nf4.")
    fitted = factors.shape
    if fitted != tuple(weight.shape):
        raise QuantizationError(f"{what}: the factors are of a {fitted[0]}x{fitted[1]} matrix. Run decompose again.")
    try:
        lora = factors.to_lora(max_rank=max_rank)
    except AdapterError as error:
        raise QuantizationError(f"{what}: {error} Set quantize.max_rank, or quantize.method: nf4.") from error
    return lora.b.float(), lora.a.float()


def _sides(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _relative_error(exact: Tensor, approximate: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(exact, dtype=torch.float64))
    difference = float(torch.linalg.vector_norm(exact - approximate, dtype=torch.float64))
    return difference / norm if norm else difference
