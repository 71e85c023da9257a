"""The split methods: each proposes pairs of Q and S, one after another, and `residual.split_weight` keeps the best.

S is L R, of low rank, or a Hadamard, Kronecker or Khatri-Rao product kept as one (`Problem.structured`). It is stored
unscaled; fine-tuning divides s out of its factors, so that ΔW = S for every alpha.

| method | Q | S |
|---|---|---|
| nf4 | NF4(W) | none |
| qpissa | NF4(W − S) | the factors of W first, then those of W − Q |
| loftq | NF4(W) first, then NF4(W − S) | the factors of W − Q |
| lq_lora | NF4(W − S) | the factors of W first, then those of W − Q for every Q, until the error rises |
| lplr | NF4(W − L R) | L R alone: least squares for W − Q, each rounded to NF4 |

The factors of W − Q are SVD_r(W − Q) for L R, and for a product what its decomposition finds, of the same shapes.
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
from lowrank.factors import Factors, LowRankFactors, StructuredFactors
from lowrank.factors.base import dense_svd
from lowrank.quantization.nf4 import NF4Tensor
from lowrank.quantization.products import kept_product, refitted
from lowrank.rank import RankRule

#: Below this many ranks in the short side the dense SVD is as fast as the Krylov space.
_DENSE_BELOW = 8
#: Rounds change W − Q little: on SmolLM2 the error after five is that of exact decompositions to 1e-5 of ‖W‖.
_FOLLOWING_PASSES = 2


@dataclass(frozen=True)
class Candidate:
    """W ≈ Q + S: Q in NF4, S in fp32 or None; `packed_factors` where S is L R of NF4 values."""

    residual: NF4Tensor
    part: StructuredFactors | None = None
    packed_factors: tuple[NF4Tensor, NF4Tensor] | None = None

    def reconstruct(self) -> Tensor:
        """Q + S, fp32 (m, n)."""
        values = self.residual.dequantize(torch.float32)
        return values if self.part is None else values.add_(self.part.reconstruct())


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
        structured: whether S keeps the form of the factors; otherwise it is their low-rank form.
    """

    name: str
    weight: Tensor
    factors: Factors | None
    quantizer: Callable[[Tensor], NF4Tensor]
    max_rank: int | None
    options: Any
    structured: bool = False

    @cached_property
    def exact(self) -> Tensor:
        """W in fp32."""
        return self.weight.float()

    @cached_property
    def plain(self) -> Candidate:
        """NF4(W) alone."""
        return Candidate(self.quantizer(self.weight))

    @cached_property
    def start(self) -> StructuredFactors:
        """The factors in fp32: as they are where `structured`, else L and R of their low-rank form.

        Raises:
            QuantizationError: there are no factors, or they do not fit, or have no smaller low-rank form, or are no
                product where `structured` asks for one.
        """
        what = f"split {self.name} ({'x'.join(map(str, self.weight.shape))}) into its factors and a rest"
        if self.factors is None:
            raise QuantizationError(f"{what}: no factors. Run decompose on this tensor, or set quantize.method: nf4.")
        m, n = self.factors.shape
        if (m, n) != tuple(self.weight.shape):
            raise QuantizationError(f"{what}: the factors are of a {m}x{n} matrix. Run decompose again.")
        if self.structured:
            return kept_product(what, self.factors)
        try:
            lora = self.factors.to_lora(max_rank=self.max_rank)
        except AdapterError as error:
            raise QuantizationError(f"{what}: {error} Set quantize.max_rank, or quantize.method: nf4.") from error
        return LowRankFactors(lora.b.float(), lora.a.float())

    def rest(self, part: StructuredFactors) -> NF4Tensor:
        """NF4(W − S)."""
        # It stands in for W from here on, so it keeps W's dtype on record.
        return replace(self.quantizer(part.reconstruct().neg_().add_(self.exact)), dtype=self.weight.dtype)

    def refit(self, matrix: Tensor, last: StructuredFactors | None = None) -> StructuredFactors:
        """The factors of another matrix (m, n) in the form, and of the rank and shapes, of `start`.

        A pair is found from the `last` one, of a matrix nearly the same, in a fraction of the time.
        """
        if self.structured:
            return refitted(self.name, self.start, matrix)
        if isinstance(last, LowRankFactors):
            return LowRankFactors(*followed_pair(matrix, last.right))
        return LowRankFactors(*leading_pair(matrix, self.start.rank))

    def unexplained(self, residual: NF4Tensor) -> Tensor:
        """W − Q, fp32."""
        return self.exact - residual.dequantize(torch.float32)


SplitMethod: TypeAlias = Callable[[Problem], Iterator[Candidate]]


def nf4(problem: Problem) -> Iterator[Candidate]:
    """Q = NF4(W), no other part."""
    yield problem.plain


def qpissa(problem: Problem) -> Iterator[Candidate]:
    """S first, Q = NF4(W − S) after it; further rounds fit S to W − Q.

    Source: PiSSA, arXiv:2404.02948, section 3.1 and algorithm 1 (QPiSSA-T), for any S.
    """
    part = problem.start
    residual = problem.rest(part)
    yield Candidate(residual, part)
    rounds = problem.options.n_iter or (1 if problem.structured else 5)
    for _ in range(rounds - 1):
        part = problem.refit(problem.unexplained(residual), last=part)
        residual = problem.rest(part)
        yield Candidate(residual, part)


def loftq(problem: Problem) -> Iterator[Candidate]:
    """Q = NF4(W) first, then S fitted to W − Q (SVD_r for L R), and in turn; the rank is that of the factors.

    Source: LoftQ, arXiv:2310.08659, algorithm 1, for any S.
    """
    residual, part = problem.plain.residual, None
    for _ in range(problem.options.n_iter):
        part = problem.refit(problem.unexplained(residual), last=part)
        yield Candidate(residual, part)
        residual = problem.rest(part)


def lq_lora(problem: Problem) -> Iterator[Candidate]:
    """Q = NF4(W − S) and S fitted to W − Q (SVD_r for L R) in turn, until the error rises; the last step is the fit.

    Source: LQ-LoRA, arXiv:2311.12023, algorithm 1, without Fisher weights, for any S.
    """
    part = problem.start
    least = float("inf")
    for _ in range(problem.options.n_iter):
        residual = problem.rest(part)
        part = problem.refit(problem.unexplained(residual), last=part)
        candidate = Candidate(residual, part)
        yield candidate
        error = float(torch.linalg.vector_norm(problem.exact - candidate.reconstruct(), dtype=torch.float64))
        if error >= least:
            return
        least = error


def lplr(problem: Problem) -> Iterator[Candidate]:
    """L = NF4((W − Q) R⁺), R = NF4(L⁺ (W − Q)), Q = NF4(W − L R) in turn: everything in 4 bits, S of low rank.

    Lᵀ is what is quantized, so that a block holds entries of one column: columns differ in size, rows hardly do.

    Source: LPLR, arXiv:2310.11028, algorithm 1 (its alternating form); the residual and Lᵀ, CALDERA, arXiv:2405.18886.
    """
    start, target = problem.start, problem.exact
    if not isinstance(start, LowRankFactors):
        raise QuantizationError(
            f"split {problem.name}: lplr rounds a pair L, R to 4 bits, and got {start.kind} factors. "
            "Set quantize.part: low_rank, or quantize.method: qpissa."
        )
    right = start.right
    for _ in range(problem.options.n_iter):
        packed_left = problem.quantizer((target @ torch.linalg.pinv(right)).T)
        left = packed_left.dequantize().T.contiguous()
        packed_right = problem.quantizer(torch.linalg.pinv(left) @ target)
        right = packed_right.dequantize()
        part = LowRankFactors(left, right)
        residual = problem.rest(part)
        yield Candidate(residual, part, (packed_left, packed_right))
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


def followed_pair(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """L (m, r) and R (r, n) like `leading_pair`'s, by subspace iteration from the rows of another R.

    Each pass is a sweep of alternating least squares, so that the fit is never worse than with that R.
    """
    basis = torch.linalg.qr(right.T).Q
    for _ in range(_FOLLOWING_PASSES):
        columns = torch.linalg.qr(matrix @ basis).Q
        basis, core = torch.linalg.qr(matrix.T @ columns)
    u, s, vh = torch.linalg.svd(core.T)
    root = s.sqrt()
    return columns @ u * root, root[:, None] * (vh @ basis.T)
