"""What a decomposition returns: the factors, how well they fit, and the leading spectrum."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lowrank.errors import AdapterError, CheckpointError

#: The only metadata key: with several, safetensors does not fix their order, and so not the bytes of the
#: file.
_FORMAT = {"format": "rankline.svd.v1"}


class Factors(Protocol):
    """A matrix (m, n) held as a few small ones."""

    def reconstruct(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (m, n) that the factors stand for; `dtype=None` keeps the dtype of the factors."""
        ...

    def matvec(self, x: Tensor) -> Tensor:
        """W x for x (..., n), without building W; returns (..., m)."""
        ...

    @property
    def num_parameters(self) -> int:
        """Numbers that the factors hold."""
        ...

    def to_lora(self, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
        """LoRA matrices a (r, n) and b (m, r) with scaling · b @ a = W."""
        ...

    def save(self, path: str | Path) -> None:
        """Write the factors as safetensors; the same factors give the same bytes."""
        ...


@dataclass(frozen=True)
class SVDFactors:
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

    @property
    def rank(self) -> int:
        return len(self.s)

    @property
    def num_parameters(self) -> int:
        return self.u.numel() + self.s.numel() + self.vh.numel()

    def reconstruct(self, dtype: torch.dtype | None = None) -> Tensor:
        """U diag(s) Vᴴ, (m, n), computed in the dtype of the factors and cast to `dtype` at the end."""
        return (self.u @ (self.s[:, None] * self.vh)).to(dtype or self.u.dtype)

    def matvec(self, x: Tensor) -> Tensor:
        """U (s ∘ (Vᴴ x)) for x (..., n); returns (..., m)."""
        return ((x @ self.vh.T) * self.s) @ self.u.T

    def balanced(self) -> tuple[Tensor, Tensor]:
        """left = U√S (m, r) and right = √S Vᴴ (r, n), with left @ right = U S Vᴴ and equal Grams."""
        root = self.s.sqrt()
        return self.u * root, root[:, None] * self.vh

    def to_lora(self, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
        """LoRA matrices whose scaled product is U S Vᴴ: b = U√(S/scaling), a = √(S/scaling) Vᴴ.

        Args:
            scaling: the adapter's s = lora_alpha / r (or / √r), > 0. Dividing by it keeps the initial product
                right for every alpha; leaving it out is the LoftQ bug of `methods.md`, finding 2.

        Returns:
            a (r, n) and b (m, r).

        Raises:
            AdapterError: when `scaling` is not positive.

        Source: PiSSA, arXiv:2404.02948, equations 3 and 4 (there with scaling = 1).
        """
        if not scaling > 0:
            raise AdapterError(f"export rank {self.rank} to LoRA: scaling = {scaling}. Set lora_alpha > 0.")
        root = (self.s / scaling).sqrt()
        return root[:, None] * self.vh, self.u * root

    def save(self, path: str | Path) -> None:
        from safetensors.torch import save_file

        tensors = {"u": self.u, "s": self.s, "vh": self.vh}
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, str(path), _FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> "SVDFactors":
        """Read what `save` wrote, bit for bit.

        Raises:
            CheckpointError: when the file is missing, damaged or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(str(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"load factors {path}: {error}. Run decompose again.") from error
        if set(tensors) != {"u", "s", "vh"}:
            raise CheckpointError(f"load factors {path}: got {sorted(tensors)}, need s, u, vh. Run decompose again.")
        return cls(tensors["u"], tensors["s"], tensors["vh"])


@dataclass(frozen=True)
class FitReport:
    """How a matrix was fitted, and how well.

    Attributes:
        method: registry name.
        rank: r of the factors.
        n_iter: power iterations that were run; 0 for a direct method.
        relative_error: ‖W − W_r‖_F / ‖W‖_F, measured a posteriori; 0 for a zero matrix.
        explained_energy: 1 − relative_error².
        converged: whether the rank rule was met (False when `max_rank` cut it short).
        seed: of the random sketch.
        seconds: wall time; kept out of every saved factor and every hash.
    """

    method: str
    rank: int
    n_iter: int
    relative_error: float
    explained_energy: float
    converged: bool
    seed: int
    seconds: float


@dataclass(frozen=True)
class Decomposition:
    """The factors of the tensor `name`, their fit, and the leading singular values that were computed (k >=
    r)."""

    name: str
    factors: SVDFactors
    report: FitReport
    spectrum: Tensor
