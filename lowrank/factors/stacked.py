"""CP and Tucker forms of a tensor that is held as a matrix.

The rows of the matrix run over the leading modes of the tensor and its columns over the others, both row-major. A stack
of `d` matrices (m, n) on top of each other is the tensor (d, m, n) with two row modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from lowrank.errors import DecompositionError
from lowrank.factors.base import StructuredFactors
from lowrank.factors.svd import LowRankFactors


def khatri_rao(modes: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product of matrices (nⱼ, r), the last one running fastest; returns (Πnⱼ, r).

    Example:
        >>> khatri_rao([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])]).T
        tensor([[ 3.,  5.,  6., 10.]])
    """
    product = modes[0]
    for mode in modes[1:]:
        product = (product[:, None] * mode).reshape(-1, mode.shape[1])
    return product


def stack_kernel(kernel: Tensor) -> Tensor:
    """A convolution kernel (out, in, kh, kw, ...) as a stack of kh·kw·... matrices (out, in), for `depth=(kh, kw)`.

    Example:
        >>> stack_kernel(torch.zeros(8, 4, 3, 3)).shape
        torch.Size([72, 4])
    """
    return kernel.permute(*range(2, kernel.ndim), 0, 1).reshape(-1, kernel.shape[1])


def unstack_kernel(stack: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of `stack_kernel`: rows of kernels of spatial size (kh, kw, ...) back to (out, in, kh, kw, ...)."""
    spatial = tuple(size)
    tensor = stack.reshape(*spatial, -1, stack.shape[1])
    return tensor.permute(len(spatial), len(spatial) + 1, *range(len(spatial))).contiguous()


@dataclass(frozen=True)
class CPFactors(StructuredFactors):
    """T = Σ_r w_r · f¹_r ∘ … ∘ fᴺ_r, as the matrix KR(row modes) diag(w) KR(column modes)ᵀ.

    Attributes:
        modes: N matrices (nⱼ, r) with unit columns, in the order of the tensor's modes.
        weights: (r,), non-negative, non-increasing.
        row_modes: how many leading modes the rows of the matrix run over, in [1, N − 1].

    Example:
        >>> ones = [torch.ones(size, 1) for size in (2, 3, 4)]
        >>> factors = CPFactors(tuple(ones), torch.tensor([5.0]), row_modes=2)
        >>> factors.shape, factors.slice(0).shape, float(factors.tensor().sum())
        ((6, 4), (3, 4), 120.0)
    """

    modes: tuple[Tensor, ...]
    weights: Tensor
    row_modes: int

    kind = "cp"

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """(n¹, …, nᴺ)."""
        return tuple(mode.shape[0] for mode in self.modes)

    @property
    def shape(self) -> tuple[int, int]:
        sizes = self.tensor_shape
        return math.prod(sizes[: self.row_modes]), math.prod(sizes[self.row_modes :])

    @property
    def rank(self) -> int:
        return len(self.weights)

    def tensors(self) -> dict[str, Tensor]:
        named = {f"mode_{index}": mode for index, mode in enumerate(self.modes)}
        return named | {"weights": self.weights, "row_modes": torch.tensor(self.row_modes)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        modes = tuple(tensors[f"mode_{index}"] for index in range(len(tensors) - 2))
        return cls(modes, tensors["weights"], int(tensors["row_modes"]))

    def tensor(self) -> Tensor:
        """The tensor (n¹, …, nᴺ)."""
        return self.reconstruct().view(self.tensor_shape)

    def reconstruct_rows(self, start: int, stop: int) -> Tensor:
        return self._rows(start, stop) @ (khatri_rao(self.modes[self.row_modes :]) * self.weights).T

    def matvec(self, x: Tensor) -> Tensor:
        """Contract the column modes with x (..., n) one by one, scale, and expand the row modes; returns (..., m)."""
        rows, columns = self.modes[: self.row_modes], self.modes[self.row_modes :]
        inner = x.reshape(*x.shape[:-1], *(mode.shape[0] for mode in columns)) @ columns[-1]
        for mode in reversed(columns[:-1]):
            inner = (inner * mode).sum(-2)
        inner = inner * self.weights
        for mode in rows[:-1]:
            inner = inner[..., None, :] * mode
        return (inner @ rows[-1].T).reshape(*x.shape[:-1], self.shape[0])

    def low_rank(self) -> tuple[Tensor, Tensor]:
        root = self.weights.sqrt()
        return self._rows(0, self.shape[0]) * root, (khatri_rao(self.modes[self.row_modes :]) * root).T

    def slice(self, index: int) -> LowRankFactors:
        """Matrix number `index` of the stack, (m, n) = A diag(w ∘ c_index) Bᵀ; several leading modes count row-major.

        Raises:
            DecompositionError: when there is no such matrix.
        """
        leading = self.modes[: self.row_modes - 1]
        scale = self.weights * (khatri_rao(leading)[_checked(index, self._depth)] if leading else 1.0)
        return LowRankFactors(
            self.modes[self.row_modes - 1] * scale, khatri_rao(self.modes[self.row_modes :]).T.contiguous()
        )

    @property
    def _depth(self) -> int:
        return math.prod(self.tensor_shape[: self.row_modes - 1])

    def _rows(self, start: int, stop: int) -> Tensor:
        return khatri_rao_rows(self.modes[: self.row_modes], start, stop)


def khatri_rao_rows(modes: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Rows start:stop of `khatri_rao(modes)`, from the few slices of the first modes that hold them."""
    *leading, last = modes
    if not leading:
        return last[start:stop]
    first, end = start // len(last), -(-stop // len(last))
    above = khatri_rao(leading)[first:end]
    return khatri_rao([above, last])[start - first * len(last) : stop - first * len(last)]


@dataclass(frozen=True)
class TuckerFactors(StructuredFactors):
    """T = G ×₁ U_d ×₂ U_m ×₃ U_n: matrix k of the stack is U_m (Σ_j U_d[k, j] G_j) U_nᵀ.

    Attributes:
        core: G (d', r_m, r_n).
        row_basis: U_m (m, r_m), orthonormal columns.
        column_basis: U_n (n, r_n), orthonormal columns.
        depth_basis: U_d (d, d'), orthonormal columns; None for the identity, d' = d.

    Example:
        >>> factors = TuckerFactors(torch.ones(2, 1, 1), torch.ones(3, 1), torch.ones(4, 1))
        >>> factors.shape, factors.slice(1).reconstruct().shape
        ((6, 4), torch.Size([3, 4]))
    """

    core: Tensor
    row_basis: Tensor
    column_basis: Tensor
    depth_basis: Tensor | None = None

    kind = "tucker"

    @property
    def depth(self) -> int:
        """Number of stacked matrices."""
        return len(self.core if self.depth_basis is None else self.depth_basis)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """(d, m, n)."""
        return self.depth, len(self.row_basis), len(self.column_basis)

    @property
    def shape(self) -> tuple[int, int]:
        return self.depth * len(self.row_basis), len(self.column_basis)

    @property
    def rank(self) -> int:
        return self.column_basis.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        named = {"core": self.core, "row_basis": self.row_basis, "column_basis": self.column_basis}
        return named if self.depth_basis is None else named | {"depth_basis": self.depth_basis}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(**tensors)

    def tensor(self) -> Tensor:
        """The tensor (d, m, n)."""
        return self.reconstruct().view(self.tensor_shape)

    @cached_property
    def _cores(self) -> Tensor:
        """(d, r_m, r_n): the core of every matrix of the stack."""
        if self.depth_basis is None:
            return self.core
        return along_depth(self.depth_basis, self.core)

    def reconstruct_rows(self, start: int, stop: int) -> Tensor:
        return self._left_rows(start, stop) @ self.column_basis.T

    def matvec(self, x: Tensor) -> Tensor:
        """U_m (G_k (U_nᵀ x)) for every k, with x (..., n); returns (..., d·m)."""
        inner = torch.einsum("...b,kab->...ka", x @ self.column_basis, self._cores)
        return (inner @ self.row_basis.T).reshape(*x.shape[:-1], self.shape[0])

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self._left_rows(0, self.shape[0]), self.column_basis.T.contiguous()

    def slice(self, index: int) -> LowRankFactors:
        """Matrix number `index` of the stack, U_m G_index U_nᵀ.

        Raises:
            DecompositionError: when there is no such matrix.
        """
        core = self._cores[_checked(index, self.depth)]
        return LowRankFactors(self.row_basis @ core, self.column_basis.T.contiguous())

    def _left_rows(self, start: int, stop: int) -> Tensor:
        return stacked_rows(self.row_basis, self._cores, start, stop)


def stacked_rows(basis: Tensor, cores: Tensor, start: int, stop: int) -> Tensor:
    """Rows start:stop of the matrices basis @ cores[k] on top of each other; basis (m, a), cores (d, a, b)."""
    m = len(basis)
    first, end = start // m, -(-stop // m)
    rows = (basis @ cores[first:end]).reshape(-1, cores.shape[2])
    return rows[start - first * m : stop - first * m]


def along_depth(matrix: Tensor, core: Tensor) -> Tensor:
    """Σ_j matrix[k, j] core[j] for core (d, a, b) and matrix (e, d); returns (e, a, b)."""
    return (matrix @ core.flatten(1)).view(-1, *core.shape[1:])


def _checked(index: int, depth: int) -> int:
    if not 0 <= index < depth:
        raise DecompositionError(f"slice {index} of a stack of {depth} matrices. Allowed are 0 to {depth - 1}.")
    return index
