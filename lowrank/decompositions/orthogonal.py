"""Orthonormal bases of tall matrices in row blocks: CholeskyQR2, and TSQR where that loses its footing.

The Grams and triangular solves are in fp64 whatever the dtype of the blocks: they are small beside the
products with W, and push the breakdown of CholeskyQR from condition 1e3 to 1e7.
"""

from itertools import repeat

import torch
from torch import Tensor

from lowrank.blocks import BlockMatrix, read_block
from lowrank.executor import Executor

#: Largest condition estimate for which one fp64 Cholesky leaves an O(1)-conditioned basis.
_MAX_CONDITION = 1e7
#: The same for a basis that is not corrected again: orthonormal to 1e-8 and 1e-12.
_LOCAL_CONDITION = {torch.float32: 1e4, torch.float64: 1e2}


def orthonormalize(y: BlockMatrix, executor: Executor, passes: int = 2) -> BlockMatrix:
    """An orthonormal basis Q of the columns of Y, in the same row blocks.

    Twice: R = chol(YᵀY), Y ← Y R⁻¹ (CholeskyQR2, one l×l all-reduce each). When Y is so ill-conditioned that
    this would fail, TSQR; its Q has orthonormal columns even for a rank-deficient Y.

    Args:
        y: (m, l) with m >= l, fp32 or fp64.
        executor: where the blocks live.
        passes: 2, or 1 for a Y that is nearly orthonormal already.

    Returns:
        Q (m, l) in the dtype of `y`; QᵀQ = I to rounding.

    Source: CholeskyQR2, Fukaya et al. 2014 (doi:10.1109/ScalA.2014.11), Algorithm 3; TSQR, Demmel et al. 2012
        (arXiv:0808.2664), section 3.
    """
    q = y
    for _ in range(passes):
        r = _cholesky(q.gram(executor))
        if r is None:
            return _tsqr(y, executor)
        refs = executor.map(_solve, q.blocks, repeat(executor.put(r)), label=f"orthonormalize {y.name}")
        q = q.like(refs, y.shape[1])
    return q


def orthonormalize_columns(z: Tensor) -> Tensor:
    """Householder QR in fp64 of one local matrix (n, l), n >= l; returns Q in the dtype of `z`."""
    q: Tensor = torch.linalg.qr(z.double()).Q
    return q.to(z.dtype)


def orthonormalize_block(z: Tensor) -> Tensor:
    """An orthonormal basis of a few columns of one local matrix, in the dtype of `z`.

    One fp64 CholeskyQR where the condition allows that it ends at the rounding of `z`, else Householder QR.
    """
    wide = z.double()
    r = _cholesky(wide.T @ wide, _LOCAL_CONDITION[z.dtype])
    if r is None:
        return orthonormalize_columns(z)
    q: Tensor = torch.linalg.solve_triangular(r, wide, upper=True, left=False)
    return q.to(z.dtype).contiguous()


def _cholesky(gram: Tensor, limit: float = _MAX_CONDITION) -> Tensor | None:
    """Upper R with RᵀR = gram, or None when the Gram is too near singular to trust."""
    r: Tensor
    r, info = torch.linalg.cholesky_ex(gram, upper=True)
    pivots = r.diagonal().abs()
    # `not <` rather than `>=`: a NaN pivot must not pass.
    if int(info) != 0 or not float(pivots.max()) < limit * float(pivots.min()):
        return None
    return r


def _tsqr(y: BlockMatrix, executor: Executor) -> BlockMatrix:
    """Q of Y = QR: a QR per block, one QR of the stacked R's, and its rows multiplied back."""
    pairs = executor.map(_block_qr, y.blocks, label=f"tsqr {y.name}")
    rs: list[Tensor] = executor.get(executor.map(_second, pairs, label=f"tsqr {y.name}"))
    stacked = torch.linalg.qr(torch.cat(rs)).Q.split([len(r) for r in rs])
    refs = executor.map(_times_first, pairs, stacked, label=f"tsqr {y.name}")
    return y.like(refs, y.shape[1])


def _solve(block: Tensor, r: Tensor) -> Tensor:
    q: Tensor = torch.linalg.solve_triangular(read_block(r), read_block(block).double(), upper=True, left=False)
    return q.to(block.dtype).contiguous()


def _block_qr(block: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    q, r = torch.linalg.qr(read_block(block).double())
    return q, r, block.dtype


def _second(pair: tuple[Tensor, Tensor, torch.dtype]) -> Tensor:
    return pair[1]


def _times_first(pair: tuple[Tensor, Tensor, torch.dtype], right: Tensor) -> Tensor:
    return (read_block(pair[0]) @ read_block(right)).to(pair[2])
