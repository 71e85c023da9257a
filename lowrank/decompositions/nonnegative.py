"""Non-negative least squares by coordinate descent (HALS): every step is the exact minimum of one column."""

import torch
from torch import Tensor

from lowrank.factors import SVDFactors

#: Passes over the coordinates per half step: the products with W that precede them cost more.
_PASSES = 4


def nonnegative_step(gram: Tensor, gradient: Tensor, x: Tensor, ridge: Tensor) -> Tensor:
    """Lower xᵀ(G + λI)x/2 − bᵀx over x >= 0 for every row, one coordinate at a time.

    x_k ← max(0, x_k + g_k / (G_kk + λ)),  g = b − (G + λI) x kept up to date.

    Args:
        gram: G, (r, r) for all rows, or (rows, r, r).
        gradient: g (rows, r) at `x`.
        x: (rows, r), >= 0.
        ridge: λ >= 0, (rows,) or ().

    Returns:
        (rows, r), >= 0, no worse than `x` in any row.

    Source: HALS, Cichocki and Phan 2009 (doi:10.1587/transfun.E92.A.708), equation 20; several passes per product,
        Gillis and Glineur 2012 (arXiv:1107.5194).
    """
    x, gradient = x.clone(), gradient.clone()
    for _ in range(_PASSES):
        for k in range(x.shape[1]):
            curvature = gram[..., k, k] + ridge
            ahead = x[:, k] + torch.where(curvature > 0, gradient[:, k] / curvature, 0.0)
            change = ahead.clamp(min=0) - x[:, k]
            x[:, k] += change
            gradient -= change[:, None] * gram[..., k, :]
            gradient[:, k] -= change * ridge
    return x


def nonnegative_start(svd: SVDFactors) -> tuple[Tensor, Tensor]:
    """Left (m, r) and right (r, n) >= 0 near an SVD: of every σuvᵀ the larger of its positive and negative parts.

    Zeros are raised a little, since coordinate descent may not leave them.

    Source: NNDSVDa, Boutsidis and Gallopoulos 2008 (doi:10.1016/j.patcog.2007.09.010), section 2.
    """
    left, right = svd.balanced()
    energy = left.clamp(min=0).norm(dim=0) * right.clamp(min=0).norm(dim=1)
    opposite = left.clamp(max=0).norm(dim=0) * right.clamp(max=0).norm(dim=1)
    signs = torch.where(energy >= opposite, 1.0, -1.0).to(left.dtype)
    left, right = (left * signs).clamp(min=0), (right * signs[:, None]).clamp(min=0)
    return left + 0.01 * left.mean(), right + 0.01 * right.mean()
