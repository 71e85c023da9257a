"""Sums of Kronecker products, the second factors full or of low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lowrank.factors.base import StructuredFactors


@dataclass(frozen=True)
class KroneckerFactors(StructuredFactors):
    """W = Σₖ Bₖ ⊗ Cₖ, cut to its first m rows and n columns; Cₖ = Lₖ Rₖ where an inner rank is set.

    Entry (i·m₂ + a, j·n₂ + b) is Σₖ Bₖ[i, j] Cₖ[a, b].

    Attributes:
        b: (K, m₁, n₁).
        c: (K, m₂, n₂); or L (K, m₂, r) of the low-rank form.
        right: R (K, r, n₂) of the low-rank form, else None.
        size: (m, n), at most (m₁m₂, n₁n₂); what lies beyond was padding.

    Example:
        >>> swap, ones = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.ones(1, 1, 2)
        >>> KroneckerFactors(swap, ones, None, (2, 4)).reconstruct()
        tensor([[0., 0., 1., 1.],
                [1., 1., 0., 0.]])
    """

    b: Tensor
    c: Tensor
    right: Tensor | None
    size: tuple[int, int]

    kind = "kronecker"

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def rank(self) -> int:
        """K, the number of terms."""
        return self.b.shape[0]

    @property
    def inner_rank(self) -> int | None:
        """Rank of the second factors where they are kept in low rank."""
        return None if self.right is None else self.right.shape[1]

    @property
    def second(self) -> Tensor:
        """C (K, m₂, n₂)."""
        return self.c if self.right is None else self.c @ self.right

    def tensors(self) -> dict[str, Tensor]:
        named = {"b": self.b, "c": self.c, "size": torch.tensor(self.size)}
        return named if self.right is None else named | {"right": self.right}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        m, n = (int(size) for size in tensors["size"])
        return cls(tensors["b"], tensors["c"], tensors.get("right"), (m, n))

    def reconstruct_rows(self, start: int, stop: int) -> Tensor:
        c = self.second
        rows = torch.arange(start, stop)
        # Per row: Σₖ Bₖ[i, :]ᵀ Cₖ[a, :], an outer product of n₁ × n₂ numbers.
        first, then = self.b[:, rows // c.shape[1]], c[:, rows % c.shape[1]]
        whole = torch.bmm(first.permute(1, 2, 0), then.transpose(0, 1))
        return whole.reshape(stop - start, -1)[:, : self.size[1]].contiguous()

    def matvec(self, x: Tensor) -> Tensor:
        """Σₖ vec(Bₖ X Cₖᵀ) with X (n₁, n₂) = x, row-major, for x (..., n); returns (..., m)."""
        terms, m1, n1 = self.b.shape
        last = self.c if self.right is None else self.right
        n2 = last.shape[2]
        flat = x.reshape(-1, self.size[1])
        flat = torch.nn.functional.pad(flat, (0, n1 * n2 - flat.shape[1]))
        inner = flat.view(-1, 1, n1, n2) @ last.transpose(1, 2)
        if self.right is not None:
            inner = inner @ self.c.transpose(1, 2)
        # (batch, K·n₁, m₂) by (m₁, K·n₁): the sum over terms and columns of B is one product.
        stacked = self.b.transpose(0, 1).reshape(m1, terms * n1)
        y = stacked @ inner.reshape(len(flat), terms * n1, inner.shape[-1])
        return y.flatten(1)[:, : self.size[0]].reshape(*x.shape[:-1], self.size[0])

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Σₖ (Bˡₖ ⊗ Lₖ)(Bʳₖ ⊗ Rₖ) from the SVDs of Bₖ (and Cₖ), or None where that is no less than min(m, n).

        The rank is Σₖ rank(Bₖ)·rank(Cₖ).

        Source: (A ⊗ B)(C ⊗ D) = AC ⊗ BD; Van Loan 2000, "The ubiquitous Kronecker product", section 1.
        """
        pairs = [(_rank_factors(b), self._second_factors(k)) for k, b in enumerate(self.b)]
        ranks = [b[0].shape[1] * c[0].shape[1] for b, c in pairs]
        if sum(ranks) >= min(self.size) > 1:
            return None
        left = torch.cat([torch.kron(b[0], c[0]) for b, c in pairs], dim=1)
        right = torch.cat([torch.kron(b[1], c[1]) for b, c in pairs])
        return left[: self.size[0]].contiguous(), right[:, : self.size[1]].contiguous()

    def _second_factors(self, k: int) -> tuple[Tensor, Tensor]:
        if self.right is None:
            return _rank_factors(self.c[k])
        return self.c[k].contiguous(), self.right[k].contiguous()


def _rank_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """L (p, ρ) and R (ρ, q) of a matrix of numerical rank ρ >= 1."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    floor = float(s[0]) * torch.finfo(matrix.dtype).eps * max(matrix.shape)
    rank = max(1, int((s > floor).sum()))
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, root[:, None] * vh[:rank]
    return left.to(matrix.dtype).contiguous(), right.to(matrix.dtype).contiguous()


def kronecker_numbers(first: tuple[int, int], second: tuple[int, int], inner_rank: int | None = None) -> int:
    """Numbers that one term Bₖ ⊗ Cₖ holds.

    Example:
        >>> kronecker_numbers((4, 4), (8, 8)), kronecker_numbers((4, 4), (8, 8), inner_rank=1)
        (80, 32)
    """
    inner = math.prod(second) if inner_rank is None else inner_rank * sum(second)
    return math.prod(first) + inner
