"""The contract of factors, and what every form of them shares: files, LoRA export, rows on demand.

A form is one dataclass of tensors that names its `kind`, says how its rows, its products and its low-rank form come
about, and gets everything else here. `FORMS` is filled by `StructuredFactors.__init_subclass__`, so that a file opens
as the form that wrote it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from lowrank.errors import AdapterError, CheckpointError

_PREFIX, _VERSION = "rankline.", ".v1"


@dataclass(frozen=True)
class LoRAExport:
    """LoRA matrices that stand for a matrix W: scaling · b @ a ≈ W.

    Attributes:
        a: (r, n).
        b: (m, r).
        retained_energy: ‖scaling · b a‖² / ‖W‖² in [0, 1]; 1 when nothing was cut (also for W = 0).
        exact: whether nothing was cut.
    """

    a: Tensor
    b: Tensor
    retained_energy: float
    exact: bool


class Factors(Protocol):
    """A matrix (m, n) held as a few small ones."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix that they stand for."""
        ...

    @property
    def rank(self) -> int:
        """The family's own rank: columns of one factor pair, or number of terms."""
        ...

    @property
    def num_parameters(self) -> int:
        """Numbers that the factors hold."""
        ...

    def reconstruct(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (m, n) that the factors stand for; `dtype=None` keeps the dtype of the factors."""
        ...

    def reconstruct_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of `reconstruct`, (stop − start, n), without the others."""
        ...

    def matvec(self, x: Tensor) -> Tensor:
        """W x for x (..., n), without building W; returns (..., m)."""
        ...

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """left (m, R) and right (R, n) with left @ right = W exactly, or None when only R = min(m, n) would do."""
        ...

    def to_lora(self, scaling: float = 1.0, max_rank: int | None = None) -> LoRAExport:
        """LoRA matrices a (r, n) and b (m, r) with scaling · b @ a = W, or its best rank-`max_rank` approximation."""
        ...

    def save(self, path: str | Path) -> None:
        """Write the factors as safetensors; the same factors give the same bytes."""
        ...


class StructuredFactors(ABC):
    """What the forms share. A subclass is a frozen dataclass whose fields are tensors, or say how to read them."""

    kind: ClassVar[str]
    """Name of the form in files, e.g. `kronecker`."""

    FORMS: ClassVar[dict[str, type[StructuredFactors]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        StructuredFactors.FORMS[cls.kind] = cls

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """The family's own rank."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that a file must hold, by name; integers (shapes, flags) as int64 tensors."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The inverse of `tensors`. Raises: KeyError, ValueError or TypeError on foreign content."""

    @abstractmethod
    def reconstruct_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of the matrix, in the dtype of the factors."""

    @abstractmethod
    def matvec(self, x: Tensor) -> Tensor:
        """W x for x (..., n); returns (..., m)."""

    @abstractmethod
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """left (m, R) and right (R, n) with left @ right = W exactly, or None."""

    @property
    def num_parameters(self) -> int:
        """Numbers that the factors hold; integers that describe them are not counted."""
        return sum(t.numel() for t in self.tensors().values() if t.is_floating_point())

    def reconstruct(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (m, n), computed in the dtype of the factors and cast to `dtype` at the end."""
        whole = self.reconstruct_rows(0, self.shape[0])
        return whole.to(dtype or whole.dtype)

    def to_lora(self, scaling: float = 1.0, max_rank: int | None = None) -> LoRAExport:
        """LoRA matrices with scaling · b @ a = W and equal Grams of both: b = U√(S/scaling), a = √(S/scaling) Vᴴ.

        Args:
            scaling: the adapter's s = lora_alpha / r (or / √r), > 0. Dividing by it keeps the product right for
                every alpha; leaving it out is a well-known LoftQ bug.
            max_rank: cut to the best approximation of at most this rank, >= 1. Without it the export is exact, or
                refused when expanding the form to it would take at least as many numbers as W itself.

        Raises:
            AdapterError: when `scaling` or `max_rank` is out of range, or the form has no smaller exact LoRA and
                `max_rank` is not given.

        Source: LoRA forms of Hadamard, Khatri-Rao and Kronecker products by the mixed-product identities; the cut
            is Eckart-Young, done on the small factors (QR of both, SVD of R_B R_Aᵀ).
        """
        what = f"export {self.kind} factors ({'x'.join(map(str, self.shape))}) to LoRA"
        if not scaling > 0:
            raise AdapterError(f"{what}: scaling = {scaling}. Set lora_alpha > 0.")
        if max_rank is not None and max_rank < 1:
            raise AdapterError(f"{what}: max_rank = {max_rank}. Set max_rank >= 1.")
        (m, n), form = self.shape, self.low_rank()
        natural = min(m, n) if form is None else form[0].shape[1]
        if max_rank is None and natural != self.rank and natural * (m + n) >= m * n:
            raise AdapterError(
                f"{what}: the exact rank {natural} takes at least as many numbers as the matrix. "
                "Give max_rank to truncate, or merge the factors into the base."
            )
        u, s, vh = self._svd()
        keep = min(len(s), max_rank or len(s))
        energy = s.double().square()
        total = float(energy.sum())
        root = (s[:keep] / scaling).sqrt()
        retained = float(energy[:keep].sum()) / total if total else 1.0
        exact = keep >= natural or retained == 1.0
        return LoRAExport((root[:, None] * vh[:keep]).contiguous(), (u[:, :keep] * root).contiguous(), retained, exact)

    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        form = self.low_rank()
        return dense_svd(self.reconstruct()) if form is None else factored_svd(*form)

    def save(self, path: str | Path) -> None:
        """Write the factors as safetensors; the same factors give the same bytes."""
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        # One metadata key: with several, safetensors does not fix their order, and so not the bytes of the file.
        save_file(tensors, str(path), {"format": f"{_PREFIX}{self.kind}{_VERSION}"})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` of this form wrote, bit for bit.

        Raises:
            CheckpointError: when the file is missing, damaged or holds another form.
        """
        found = load_factors(path)
        if not isinstance(found, cls):
            raise CheckpointError(f"load factors {path}: got {found.kind}, need {cls.kind}. Run decompose again.")
        return found


def load_factors(path: str | Path) -> StructuredFactors:
    """Read factors of any form, bit for bit.

    Raises:
        CheckpointError: when the file is missing, damaged or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    import lowrank.factors.forms  # noqa: F401 (fills FORMS)

    try:
        with safe_open(str(path), framework="pt") as file:
            written = str((file.metadata() or {}).get("format", ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"load factors {path}: {error}. Run decompose again.") from error
    form = StructuredFactors.FORMS.get(written.removeprefix(_PREFIX).removesuffix(_VERSION))
    if form is None:
        known = ", ".join(sorted(StructuredFactors.FORMS))
        raise CheckpointError(f"load factors {path}: got format {written!r}, known are {known}. Run decompose again.")
    try:
        return form.from_tensors(tensors)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"load factors {path}: got {sorted(tensors)}, which are not {form.kind} factors. Run decompose again."
        ) from error


def factored_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), s (k,), Vᴴ (k, n) of left (m, R) @ right (R, n), k = min(m, n, R), never building the product.

    O((m + n) R²): QR of both factors, SVD of the R×R core in fp64.
    """
    qb, rb = torch.linalg.qr(left.double())
    qa, ra = torch.linalg.qr(right.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return (qb @ u).to(left.dtype), s.to(left.dtype), (vh @ qa.T).to(left.dtype)


def dense_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, Vᴴ of a dense matrix from the fp64 Gram of its short side; small σ are good to 1e-8 · σ₁."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, uh = dense_svd(matrix.T)
        return uh.T, s, v.T
    values = matrix.double()
    squares, vectors = torch.linalg.eigh(values @ values.T)
    s, u = squares.clamp(min=0).flip(0).sqrt(), vectors.flip(1)
    floor = max(float(s[0]) * math.sqrt(torch.finfo(torch.float64).eps), torch.finfo(torch.float64).tiny)
    vh = (u.T @ values) / s.clamp(min=floor)[:, None]
    return u.to(matrix.dtype), s.to(matrix.dtype), vh.to(matrix.dtype)
