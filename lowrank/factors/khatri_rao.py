"""Column-wise Kronecker (Khatri-Rao) products: a chain of free factors, or of low-rank ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lowrank.factors.base import StructuredFactors

#: Numbers that one slice of a batch of products may hold beside its result.
_SLICE_ENTRIES = 2**22


@dataclass(frozen=True)
class KhatriRaoFactors(StructuredFactors):
    """W = F₁ ⊙ … ⊙ F_L, cut to its first m rows: column j is f₁ⱼ ⊗ … ⊗ f_Lⱼ.

    Generically of full rank, so it has no smaller LoRA form.

    Attributes:
        factors: L matrices (m_l, n), the last one's rows running fastest.
        rows: m, at most m₁·…·m_L; what lies beyond was padding.

    Example:
        >>> b, c = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [0.0, 10.0]])
        >>> KhatriRaoFactors((b, c), 4).reconstruct()
        tensor([[ 1.,  2.],
                [ 0., 20.],
                [ 3.,  4.],
                [ 0., 40.]])
    """

    factors: tuple[Tensor, ...]
    rows: int

    kind = "khatri_rao"

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.factors[0].shape[1]

    @property
    def rank(self) -> int:
        """1: one product per column."""
        return 1

    def tensors(self) -> dict[str, Tensor]:
        named = {f"factor_{index}": factor for index, factor in enumerate(self.factors)}
        return named | {"rows": torch.tensor(self.rows)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        factors = tuple(tensors[f"factor_{index}"] for index in range(len(tensors) - 1))
        return cls(factors, int(tensors["rows"]))

    def reconstruct_rows(self, start: int, stop: int) -> Tensor:
        return khatri_rao_rows(self.factors, start, stop)

    def matvec(self, x: Tensor) -> Tensor:
        """vec(F₁ diag(x) F₂ᵀ), the chain cut in two halves F₁ and F₂, for x (..., n); returns (..., m)."""
        flat = x.reshape(-1, x.shape[-1])
        return _chain_product(self.factors, flat)[:, : self.rows].reshape(*x.shape[:-1], self.rows)

    def low_rank(self) -> None:
        return None


@dataclass(frozen=True)
class LowRankKhatriRaoFactors(StructuredFactors):
    """W = (C₁E₁) ⊙ … ⊙ (C_L E_L), cut to its first m rows.

    Attributes:
        left: C_l (m_l, r_l).
        right: E_l (r_l, n).
        rows: m, at most m₁·…·m_L; what lies beyond was padding.

    Example:
        >>> ones = (torch.ones(2, 1), torch.ones(3, 1)), (torch.ones(1, 4), torch.ones(1, 4))
        >>> factors = LowRankKhatriRaoFactors(*ones, 6)
        >>> factors.matvec(torch.ones(4))
        tensor([4., 4., 4., 4., 4., 4.])
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    rows: int

    kind = "khatri_rao_low_rank"

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.right[0].shape[1]

    @property
    def rank(self) -> int:
        """The largest r_l; a factor with fewer rows or columns holds as many as it can."""
        return max(len(right) for right in self.right)

    def tensors(self) -> dict[str, Tensor]:
        named = {f"left_{index}": left for index, left in enumerate(self.left)}
        named |= {f"right_{index}": right for index, right in enumerate(self.right)}
        return named | {"rows": torch.tensor(self.rows)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        count = len(tensors) // 2
        left = tuple(tensors[f"left_{index}"] for index in range(count))
        right = tuple(tensors[f"right_{index}"] for index in range(count))
        return cls(left, right, int(tensors["rows"]))

    def reconstruct_rows(self, start: int, stop: int) -> Tensor:
        return khatri_rao_rows([c @ e for c, e in zip(self.left, self.right)], start, stop)

    def matvec(self, x: Tensor) -> Tensor:
        """(C₁ ⊗ … ⊗ C_L)((E₁ ⊙ … ⊙ E_L) x) for x (..., n); returns (..., m)."""
        flat = x.reshape(-1, x.shape[-1])
        core = _chain_product(self.right, flat)
        for left in self.left:
            # Contracts the leading axis and appends its result, so that after L turns the order is back.
            split = core.reshape(len(flat), left.shape[1], core.shape[1] // left.shape[1])
            core = (split.transpose(1, 2) @ left.T).flatten(1)
        return core[:, : self.rows].reshape(*x.shape[:-1], self.rows)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(C₁ ⊗ … ⊗ C_L)(E₁ ⊙ … ⊙ E_L), of rank r₁·…·r_L."""
        left = self.left[0]
        for other in self.left[1:]:
            left = torch.kron(left, other)
        right = khatri_rao_rows(self.right, 0, math.prod(len(e) for e in self.right))
        return left[: self.rows].contiguous(), right


def khatri_rao_rows(factors: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Rows start:stop of F₁ ⊙ … ⊙ F_L, (stop − start, n)."""
    rows = torch.arange(start, stop)
    product = factors[-1][rows % len(factors[-1])]
    for index in range(len(factors) - 2, -1, -1):
        rows = rows // len(factors[index + 1])
        product = product.mul_(factors[index][rows % len(factors[index])])
    return product


def _chain_product(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """(F₁ ⊙ … ⊙ F_L) x for x (batch, n), a few rows of the batch at a time; returns (batch, m₁·…·m_L)."""
    half = len(factors) // 2
    sizes = [len(factor) for factor in factors]
    second = khatri_rao_rows(factors[half:], 0, math.prod(sizes[half:]))
    if half == 0:
        return x @ second.T
    first = khatri_rao_rows(factors[:half], 0, math.prod(sizes[:half]))
    step = max(1, _SLICE_ENTRIES // first.numel())
    return torch.cat([((part[:, None] * first) @ second.T).flatten(1) for part in torch.split(x, step)])
