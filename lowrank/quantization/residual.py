"""Split a weight into a 4-bit residual and a structured part: W ≈ Q + S, never worse than NF4 alone.

What S carries (L R of low rank, or a Hadamard, Kronecker or Khatri-Rao product) does not pass the 4-bit grid, and the
residual that does is smaller than W. The methods propose pairs of Q and S (`lowrank.quantization.splits`); here the
best one is kept, or plain NF4 where none is better.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import QuantizationError
from lowrank.factors import Factors, StructuredFactors
from lowrank.quantization.nf4 import NF4Tensor, check_weight, quantize_nf4
from lowrank.quantization.splits import METHODS as METHODS
from lowrank.quantization.splits import Candidate, Problem
from lowrank.quantize_options import QUANTIZE_OPTIONS


@dataclass(frozen=True)
class SplitWeight:
    """W ≈ Q + S, or W ≈ Q when there is no structured part.

    Attributes:
        name: of the tensor.
        shape: (m, n).
        residual: Q in NF4, or None where S replaces W.
        part: S in fp32, or None: `LowRankFactors` L R, or Hadamard, Kronecker or Khatri-Rao factors.
        quantization_error: ‖W − Q − S‖_F / ‖W‖_F; 0 for a zero matrix.
        plain_error: ‖W − NF4(W)‖_F / ‖W‖_F, what plain NF4 would cost; never smaller than the above, but for
            `replace`.
        fallback: whether the method was set aside for plain NF4, because it did worse on this tensor.
        packed_factors: Lᵀ (r, m) and R (r, n) in NF4, whose values `part` holds, or None.
    """

    name: str
    shape: tuple[int, int]
    residual: NF4Tensor | None
    part: StructuredFactors | None
    quantization_error: float
    plain_error: float
    fallback: bool = False
    packed_factors: tuple[NF4Tensor, NF4Tensor] | None = None

    def reconstruct(self, dtype: torch.dtype | None = None) -> Tensor:
        """Q + S, (m, n), computed in fp32; the dtype of the original weight by default, fp32 where it is gone."""
        values = torch.zeros(self.shape) if self.residual is None else self.residual.dequantize(torch.float32)
        if self.part is not None:
            values += self.part.reconstruct()
        return values.to(dtype or (torch.float32 if self.residual is None else self.residual.dtype))

    @property
    def packed_bytes(self) -> int:
        """Bytes of Q."""
        return 0 if self.residual is None else self.residual.nbytes

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factors of S as they are stored."""
        if self.packed_factors is not None:
            return sum(factor.nbytes for factor in self.packed_factors)
        return 0 if self.part is None else self.part.num_parameters * torch.float32.itemsize


def split_weight(
    name: str,
    weight: Tensor,
    factors: Factors | None,
    method: str = "qpissa",
    *,
    structured: bool = False,
    block_size: int = 64,
    double_quant: bool = True,
    max_rank: int | None = None,
    **options: Any,
) -> SplitWeight:
    """Split `weight` by the method of that name, and never do worse than plain NF4.

    Args:
        name: of the tensor, for messages.
        weight: W (m, n), any floating-point dtype, finite.
        factors: of W from `decompose`, in any form; needed by all methods but `nf4`, which ignores them.
        method: a name in `METHODS`, or `replace` (no residual).
        structured: keep S as the Hadamard, Kronecker or Khatri-Rao product that the factors are, instead of their
            low-rank form; not for `lplr` and `replace`.
        block_size: entries per absmax; see `quantize_nf4`.
        double_quant: store the absmax values in 8 bits.
        max_rank: largest rank of L R; factors whose low-rank form has a larger one are cut to the best of this rank.
        options: the method's own (`lowrank.quantize_options`), for example `n_iter`.

    Raises:
        QuantizationError: when the method or an option is unknown or out of range, factors are needed that are not
            there or do not fit, or are no product where `structured` is set, or the weight is empty or not finite.
    """
    if method not in METHODS and method != "replace":
        known = ", ".join(sorted(METHODS))
        raise QuantizationError(f"quantize {name}: unknown method {method!r}. Set quantize.method to one of: {known}.")
    check_weight(name, weight)
    quantizer = partial(quantize_nf4, block_size=block_size, double_quant=double_quant, name=name)
    chosen = None if method == "replace" else _options(name, method, options)
    problem = Problem(name, weight, factors, quantizer, max_rank, chosen, structured and method != "replace")
    return _replaced(problem) if method == "replace" else best_kept(problem, METHODS[method](problem))


def best_kept(problem: Problem, candidates: Iterable[Candidate]) -> SplitWeight:
    """The candidate of the least error, or plain NF4 where each has a larger one."""
    plain = least = _relative_error(problem.exact, problem.plain.reconstruct())
    best: Candidate | None = None
    for candidate in candidates:
        error = _relative_error(problem.exact, candidate.reconstruct())
        if error < least or (best is None and error == least):
            best, least = candidate, error
    kept = problem.plain if best is None else best
    return SplitWeight(
        name=problem.name,
        shape=_sides(problem.weight),
        residual=kept.residual,
        part=kept.part,
        quantization_error=least,
        plain_error=plain,
        fallback=best is None,
        packed_factors=kept.packed_factors,
    )


def _replaced(problem: Problem) -> SplitWeight:
    """L and R of the factors instead of W, nothing quantized; `decompose.mode: replace`, to be healed by training."""
    error = _relative_error(problem.exact, problem.start.reconstruct())
    plain = _relative_error(problem.exact, problem.plain.reconstruct())
    return SplitWeight(problem.name, _sides(problem.weight), None, problem.start, error, plain)


def _options(name: str, method: str, given: dict[str, Any]) -> Any:
    try:
        return QUANTIZE_OPTIONS[method](**given)
    except (TypeError, ValueError) as error:
        raise QuantizationError(f"quantize {name}: options of {method}: {error}") from error


def _sides(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _relative_error(exact: Tensor, approximate: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(exact, dtype=torch.float64))
    difference = float(torch.linalg.vector_norm(exact - approximate, dtype=torch.float64))
    return difference / norm if norm else difference
