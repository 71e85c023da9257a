"""The split methods: each proposes pairs of Q and L R, one after another, and `residual.split_weight` keeps the best.

L and R are stored unscaled; fine-tuning divides them by √s (`lowrank.adapters.pairs`), so that s · B · A = L R for
every alpha.

| method | Q | L and R |
|---|---|---|
| nf4 | NF4(W) | none |
| qpissa | NF4(W − L R) | the factors of W first, then those of W − Q |
| loftq | NF4(W) first, then NF4(W − L R) | SVD_r(W − Q) |
| lq_lora | NF4(W − L R) | the factors of W first, then SVD_r(W − Q) of every Q, until the error rises |
| lplr | NF4(W − L R) | least squares for W − Q, each rounded to NF4 |
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lowrank.blocks import BlockMatrix
from lowrank.decompositions import decompose
from lowrank.errors import AdapterError, QuantizationError
from lowrank.executor import SerialExecutor
from lowrank.factors import Factors
from lowrank.factors.base import dense_svd
from lowrank.quantization.nf4 import NF4Tensor
from lowrank.rank import RankRule

#: Below this many ranks in the short side the dense SVD is as fast as the Krylov space.
_DENSE_BELOW = 8


@dataclass(frozen=True)
class Candidate:
    """W ≈ Q + L R: Q in NF4, L (m, r) and R (r, n) fp32 or both None; `packed_factors` where those are NF4 values."""

    residual: NF4Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    packed_factors: tuple[NF4Tensor, NF4Tensor] | None = None

    def reconstruct(self) -> Tensor:
        """Q + L R, fp32 (m, n)."""
        values = self.residual.dequantize(torch.float32)
        if self.left is not None and self.right is not None:
            values.addmm_(self.left, self.right)
        return values


@dataclass(frozen=True)
class Problem:
    """What a split method is given.

    Attributes:
        name: of the tensor, for messages.
        weight: W (m, n), any floating-point dtype, finite.
        factors: of W from `decompose`, in any form, or None.
        quantizer: NF4 with the block size and absmax format already chosen.
        max_rank: largest rank of L R; factors of a larger one are cut to the best of this rank.
        options: of the method.
    """

    name: str
    weight: Tensor
    factors: Factors | None
    quantizer: Callable[[Tensor], NF4Tensor]
    max_rank: int | None
    options: Any

    @cached_property
    def exact(self) -> Tensor:
        """W in fp32."""
        return self.weight.float()

    @cached_property
    def plain(self) -> Candidate:
        """NF4(W) alone."""
        return Candidate(self.quantizer(self.weight))

    @cached_property
    def start(self) -> tuple[Tensor, Tensor]:
        """L and R of the factors' low-rank form, fp32.

        Raises:
            QuantizationError: there are no factors, or they do not fit, or have no smaller low-rank form.
        """
        what = f"split {self.name} ({'x'.join(map(str, self.weight.shape))}) into its factors and a rest"
        if self.factors is None:
            raise QuantizationError(f"{what}: no factors. Run decompose on this tensor, or set quantize.method: nf4.")
        m, n = self.factors.shape
        if (m, n) != tuple(self.weight.shape):
            raise QuantizationError(f"{what}: the factors are of a {m}x{n} matrix. Run decompose again.")
        try:
            lora = self.factors.to_lora(max_rank=self.max_rank)
        except AdapterError as error:
            raise QuantizationError(f"{what}: {error} Set quantize.max_rank, or quantize.method: nf4.") from error
        return lora.b.float(), lora.a.float()

    def rest(self, left: Tensor, right: Tensor) -> NF4Tensor:
        """NF4(W − L R)."""
        # It stands in for W from here on, so it keeps W's dtype on record.
        return replace(self.quantizer(torch.addmm(self.exact, left, right, alpha=-1)), dtype=self.weight.dtype)

    def unexplained(self, residual: NF4Tensor) -> Tensor:
        """W − Q, fp32."""
        return self.exact - residual.dequantize(torch.float32)


SplitMethod: TypeAlias = Callable[[Problem], Iterator[Candidate]]


def nf4(problem: Problem) -> Iterator[Candidate]:
    """Q = NF4(W), no low-rank part."""
    yield problem.plain


def qpissa(problem: Problem) -> Iterator[Candidate]:
    """L R first, Q = NF4(W − L R) after it; further rounds fit L R to W − Q.

    Source: PiSSA, arXiv:2404.02948, section 3.1 and algorithm 1 (QPiSSA-T).
    """
    left, right = problem.start
    residual = problem.rest(left, right)
    yield Candidate(residual, left, right)
    for _ in range(problem.options.n_iter - 1):
        left, right = leading_pair(problem.unexplained(residual), left.shape[1])
        residual = problem.rest(left, right)
        yield Candidate(residual, left, right)


def loftq(problem: Problem) -> Iterator[Candidate]:
    """Q = NF4(W) first, then L R = SVD_r(W − Q), and in turn; the rank is that of the factors.

    Source: LoftQ, arXiv:2310.08659, algorithm 1.
    """
    rank, residual = problem.start[0].shape[1], problem.plain.residual
    for _ in range(problem.options.n_iter):
        left, right = leading_pair(problem.unexplained(residual), rank)
        yield Candidate(residual, left, right)
        residual = problem.rest(left, right)


def lq_lora(problem: Problem) -> Iterator[Candidate]:
    """Q = NF4(W − L R) and L R = SVD_r(W − Q) in turn, until the error rises; the last step is the SVD.

    Source: LQ-LoRA, arXiv:2311.12023, algorithm 1, without Fisher weights.
    """
    left, right = problem.start
    least = float("inf")
    for _ in range(problem.options.n_iter):
        residual = problem.rest(left, right)
        left, right = leading_pair(problem.unexplained(residual), left.shape[1])
        candidate = Candidate(residual, left, right)
        yield candidate
        error = float(torch.linalg.vector_norm(problem.exact - candidate.reconstruct(), dtype=torch.float64))
        if error >= least:
            return
        least = error


def lplr(problem: Problem) -> Iterator[Candidate]:
    """L = NF4((W − Q) R⁺), R = NF4(L⁺ (W − Q)), Q = NF4(W − L R) in turn: everything in 4 bits.

    Lᵀ is what is quantized, so that a block holds entries of one column: columns differ in size, rows hardly do.

    Source: LPLR, arXiv:2310.11028, algorithm 1 (its alternating form); the residual and Lᵀ, CALDERA, arXiv:2405.18886.
    """
    right, target = problem.start[1], problem.exact
    for _ in range(problem.options.n_iter):
        packed_left = problem.quantizer((target @ torch.linalg.pinv(right)).T)
        left = packed_left.dequantize().T.contiguous()
        packed_right = problem.quantizer(torch.linalg.pinv(left) @ target)
        right = packed_right.dequantize()
        residual = problem.rest(left, right)
        yield Candidate(residual, left, right, (packed_left, packed_right))
        target = problem.unexplained(residual)


#: Every quantization method by the name that `quantize.method` takes.
METHODS: dict[str, SplitMethod] = {"nf4": nf4, "qpissa": qpissa, "loftq": loftq, "lq_lora": lq_lora, "lplr": lplr}


def leading_pair(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L (m, r) = U√Σ and R (r, n) = √Σ Vᴴ of the best approximation of this rank, fp32."""
    if _DENSE_BELOW * rank >= min(matrix.shape):
        u, s, vh = dense_svd(matrix)
        root = s[:rank].sqrt()
        return u[:, :rank] * root, root[:, None] * vh[:rank]
    block = BlockMatrix.from_tensor("rest", matrix)
    found = decompose(block, method="block_krylov", rule=RankRule(rank=rank), executor=SerialExecutor()).factors
    lora = found.to_lora()
    return lora.b, lora.a
