"""Exact singular values of a weight, and what they say about it before anyone chooses a rank."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lowrank.blocks import BlockMatrix
from lowrank.errors import NumericsError
from lowrank.executor import Executor

#: Rows of the long side that are widened to fp64 at a time.
_PIECE = 2048


def singular_values(name: str, matrix: Tensor) -> Tensor:
    """σ (min(m, n),) in fp64, non-increasing, from the fp64 Gram of the short side.

    Values below 1e-8 σ₁ are rounding: squaring the matrix halves its digits.

    Args:
        name: of the tensor, for errors.
        matrix: (m, n), any floating-point dtype.

    Raises:
        NumericsError: when an entry is NaN or infinite.

    Example:
        >>> singular_values("w", torch.diag(torch.tensor([1.0, 3.0, 2.0])))
        tensor([3., 2., 1.], dtype=torch.float64)
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for piece in torch.split(tall, _PIECE):
        wide = piece.double()
        gram += wide.T @ wide
    if not bool(torch.isfinite(gram).all()):
        count = int((~torch.isfinite(matrix)).sum())
        raise NumericsError(
            f"singular values of {name}: {count} of {matrix.numel()} entries are NaN or infinite, or their squares "
            "overflow. Repair the checkpoint."
        )
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.clamp(min=0).flip(0).sqrt()


def stored_singular_values(matrix: BlockMatrix, executor: Executor) -> Tensor:
    """`singular_values` of a matrix in row blocks, (min(m, n),) in fp64; the Gram is summed over the blocks.

    Raises:
        NumericsError: when an entry is NaN or infinite.
    """
    matrix.squared_norm(executor)  # refuses non-finite entries by name
    wide = matrix.shape[0] < matrix.shape[1]
    squares: Tensor = torch.linalg.eigvalsh(matrix.row_gram(executor) if wide else matrix.gram(executor))
    return squares.clamp(min=0).flip(0).sqrt()


def stable_rank(sigma: Tensor) -> float:
    """‖W‖_F² / ‖W‖₂², between 1 and the rank; 0 for a zero matrix.

    Example:
        >>> stable_rank(torch.ones(7))
        7.0
    """
    squares = sigma.double().square()
    return float(squares.sum() / squares[0]) if float(squares[0]) > 0 else 0.0


def energy_curve(sigma: Tensor) -> Tensor:
    """Share of ‖W‖_F² that rank 0, 1, …, k explains, (k + 1,) in fp64; all 1 for a zero matrix.

    Example:
        >>> energy_curve(torch.tensor([2.0, 1.0, 1.0, 0.0]))
        tensor([0.0000, 0.6667, 0.8333, 1.0000, 1.0000], dtype=torch.float64)
    """
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), sigma.double().square().cumsum(0)])
    return sums / sums[-1] if float(sums[-1]) > 0 else torch.ones_like(sums)


def ranks_for(sigma: Tensor, shares: Iterable[float]) -> list[int]:
    """The smallest rank that explains each share of ‖W‖_F², shares in [0, 1].

    Example:
        >>> ranks_for(torch.tensor([2.0, 1.0, 1.0, 0.0]), [0.5, 0.8, 1.0])
        [1, 2, 3]
    """
    curve = energy_curve(sigma)
    # The slack is the rounding of the sums.
    return [int((curve < share * (1 - 1e-12)).sum()) for share in shares]
