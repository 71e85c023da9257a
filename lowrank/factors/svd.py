"""The two plain low-rank forms: U diag(s) Vᴴ, and L R without orthonormality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from lowrank.factors.base import StructuredFactors


@dataclass(frozen=True)
class SVDFactors(StructuredFactors):
    """W = U diag(s) Vᴴ.

    Attributes:
        u: (m, r), orthonormal columns.
        s: (r,), non-negative, non-increasing.
        vh: (r, n), orthonormal rows.

    Example:
        >>> factors = SVDFactors(torch.eye(3, 2), torch.tensor([2.0, 1.0]), torch.eye(2, 4))
        >>> factors.matvec(torch.tensor([1.0, 1.0, 5.0, 5.0]))
        tensor([2., 1., 0.])
    """

    u: Tensor
    s: Tensor
    vh: Tensor

    kind = "svd"

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[0], self.vh.shape[1]

    @property
    def rank(self) -> int:
        return len(self.s)

    def tensors(self) -> dict[str, Tensor]:
        return {"u": self.u, "s": self.s, "vh": self.vh}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(**tensors)

    def reconstruct_rows(self, start: int, stop: int) -> Tensor:
        return self.u[start:stop] @ (self.s[:, None] * self.vh)

    def matvec(self, x: Tensor) -> Tensor:
        """U (s ∘ (Vᴴ x)) for x (..., n); returns (..., m)."""
        return ((x @ self.vh.T) * self.s) @ self.u.T

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.balanced()

    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.u, self.s, self.vh

    def balanced(self) -> tuple[Tensor, Tensor]:
        """left = U√S (m, r) and right = √S Vᴴ (r, n), with left @ right = U S Vᴴ and equal Grams."""
        root = self.s.sqrt()
        return self.u * root, root[:, None] * self.vh


@dataclass(frozen=True)
class LowRankFactors(StructuredFactors):
    """W = L R.

    Attributes:
        left: (m, r).
        right: (r, n).
    """

    left: Tensor
    right: Tensor

    kind = "low_rank"

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(**tensors)

    def reconstruct_rows(self, start: int, stop: int) -> Tensor:
        return self.left[start:stop] @ self.right

    def matvec(self, x: Tensor) -> Tensor:
        """L (R x) for x (..., n); returns (..., m)."""
        return (x @ self.right.T) @ self.left.T

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.left, self.right
