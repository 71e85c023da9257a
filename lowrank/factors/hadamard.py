"""The elementwise product of two low-rank matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lowrank.factors.base import StructuredFactors

#: Entries of W that `matvec` builds at a time where the expanded rank r₁r₂ would be larger than W itself.
_CHUNK_ENTRIES = 2**20


@dataclass(frozen=True)
class HadamardFactors(StructuredFactors):
    """W = (C₁D₁)∘(C₂D₂), of rank up to r₁r₂ with (r₁ + r₂)(m + n) numbers.

    Attributes:
        c1: (m, r1).
        d1: (r1, n).
        c2: (m, r2).
        d2: (r2, n).

    Example:
        >>> factors = HadamardFactors(torch.ones(2, 1), torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.ones(2, 2))
        >>> factors.reconstruct()
        tensor([[1., 2.],
                [1., 2.]])
        >>> factors.matvec(torch.tensor([1.0, 1.0]))
        tensor([3., 3.])
    """

    c1: Tensor
    d1: Tensor
    c2: Tensor
    d2: Tensor

    kind = "hadamard"

    @property
    def shape(self) -> tuple[int, int]:
        return self.c1.shape[0], self.d1.shape[1]

    @property
    def rank(self) -> int:
        return max(self.c1.shape[1], self.c2.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        return {"c1": self.c1, "d1": self.d1, "c2": self.c2, "d2": self.d2}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(**tensors)

    def reconstruct_rows(self, start: int, stop: int) -> Tensor:
        return (self.c1[start:stop] @ self.d1).mul_(self.c2[start:stop] @ self.d2)

    def matvec(self, x: Tensor) -> Tensor:
        """(C₁•C₂)((D₁⊙D₂) x) for x (..., n), or by row chunks of W where r₁r₂ >= min(m, n); returns (..., m)."""
        m, n = self.shape
        if self.c1.shape[1] * self.c2.shape[1] < min(m, n):
            left, right = self.low_rank()
            return (x @ right.T) @ left.T
        step = max(1, _CHUNK_ENTRIES // n)
        return torch.cat([x @ self.reconstruct_rows(i, i + step).T for i in range(0, m, step)], -1)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """left = C₁•C₂ (m, r₁r₂), products within a row, and right = D₁⊙D₂ (r₁r₂, n), products within a column.

        Source: the mixed-product identity (C₁D₁)∘(C₂D₂) = (C₁•C₂)(D₁⊙D₂) of the face-splitting product.
        """
        left = self.c1[:, :, None] * self.c2[:, None, :]
        right = self.d1[:, None, :] * self.d2[None, :, :]
        return left.flatten(1), right.flatten(0, 1)
