"""The contract of an adapter family, and what all of them share: scaling, patterns, LoRA export, parameter counts.

A family is one subclass of `Adapter` in a file of its own and one line in `registry.py`. It says how its parameters
start (`initial`), what they do to an input (`delta`) and to a weight (`delta_weight`), under which names they lie on
disk (`tensors`, `from_tensors`), and which low-rank matrix they are, if they are one (`low_rank`).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.factors import LoRAExport, StructuredFactors
from lowrank.factors.base import factored_svd
from lowrank.kernels.grouped import Pair

Export = Literal["exact", "truncated", "merge-only"]


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer that is about to get an adapter.

    Attributes:
        name: of the module.
        shape: (m, n) = (out_features, in_features).
        index: position among all targets; every random draw depends on the configured seed and this alone.
        weight: gives W (m, n) in fp32 as the frozen layer holds it (dequantized); called only where a family needs it.
        split: the part S (m, n) that was taken out of the weight before it was quantized, fp32, or None.
    """

    name: str
    shape: tuple[int, int]
    index: int = 0
    weight: Callable[[], Tensor] = lambda: torch.empty(0)
    split: StructuredFactors | None = None

    @property
    def what(self) -> str:
        """Name and size, for messages."""
        return f"the adapter of {self.name} ({self.shape[0]}x{self.shape[1]})"

    def generator(self, seed: int) -> torch.Generator:
        """The random numbers of this layer."""
        return torch.Generator().manual_seed(seed * 1_000_003 + self.index)


class Adapter(nn.Module, ABC):
    """The trained change of one frozen layer: W x becomes (W + ΔW) x."""

    peft_type: ClassVar[str]
    """`peft_type` on disk: PEFT's where PEFT has the family, else our own."""
    prefix: ClassVar[str]
    """What every tensor name on disk starts with, such as `lora_`; PEFT finds a family's tensors by it."""
    takes_split: ClassVar[frozenset[str]] = frozenset()
    """Forms of the part that `quantize` took out of W from which it can start: kinds of factors."""

    def __init__(self, shape: tuple[int, int], scaling: float, dropout: float = 0.0) -> None:
        """Args: shape: (m, n). scaling: s. dropout: on the input while training, in [0, 1)."""
        super().__init__()
        self.shape: tuple[int, int]
        self.scaling: float
        self.dropout: float
        # What a module does with an attribute takes as long as the rest of a layer of a loaded adapter.
        self.__dict__.update(shape=shape, scaling=scaling, dropout=dropout)

    @property
    @abstractmethod
    def r(self) -> int:
        """Rank."""

    @property
    @abstractmethod
    def export(self) -> Export:
        """Whether ΔW is a LoRA exactly, after a cut, or can only be merged; a class attribute where it never varies."""

    # ---- what a family says -------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """The adapter of `layer` before training."""

    @abstractmethod
    def delta(self, x: Tensor) -> Tensor:
        """ΔW x for x (..., n), without building ΔW: (..., m) in the dtype of x."""

    @abstractmethod
    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """ΔW (m, n), for tests and merges; `weight` is the frozen W, which only some families need."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything a file must hold, detached, by the names on disk."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """The inverse of `tensors`; `config` is the directory's `adapter_config.json`. Raises KeyError for a lack."""

    @classmethod
    @abstractmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """The family's own entries of `adapter_config.json`; those of patterns and targets are common."""

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """left (m, R) and right (R, n) with left @ right = ΔW exactly, s included; None where R would be min(m, n)."""
        return None

    def pair(self) -> Pair | None:
        """`low_rank`, detached, for inference."""
        form = self.low_rank()
        return None if form is None else Pair(form[1].detach().contiguous(), form[0].detach().T)

    def gain_and_low_rank(self, base: nn.Module) -> tuple[Tensor, Tensor, Tensor] | None:
        """g (m,), left (m, R), right (R, n) with W + ΔW = diag(g)·W + left @ right over a frozen `base`, or None.

        For inference alone, and only where ΔW is not of low rank itself.
        """
        del base
        return None

    def kronecker(self) -> tuple[Tensor, ...] | None:
        """W1 with s, and W2 whole or as two factors, where ΔW = W1 ⊗ W2 exactly; None where it is no such product."""
        return None

    # ---- what they share ----------------------------------------------------------------------------------------

    @classmethod
    def initial_all(cls, layers: Sequence[Layer], config: AdapterConfig) -> dict[str, Self]:
        """The adapters of all layers; families whose layers share parameters override it."""
        return {layer.name: cls.initial(layer, config) for layer in layers}

    @classmethod
    def load_all(
        cls, tensors: Mapping[str, Mapping[str, Tensor]], shared: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Self]:
        """The adapters of a file: module -> name -> tensor, beside the tensors that belong to no module."""
        del shared
        return {module: cls.from_tensors(module, named, config) for module, named in tensors.items()}

    @classmethod
    def shared_tensors(cls, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
        """What all layers share and a file must hold once, by the names on disk."""
        del adapters
        return {}

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """The layer's output: `y` = W x + b of the frozen `base`, changed by ΔW x; (..., m)."""
        del base
        return y + self.delta(self.dropped(x))

    def dropped(self, x: Tensor) -> Tensor:
        """x after the input dropout."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def penalty(self) -> Tensor | None:
        """A term to add to the training loss (the orthogonality of AdaLoRA), or None."""
        return None

    def numbers(self) -> list[Tensor]:
        """Its parameters and buffers."""
        if self._modules:
            return [*self.parameters(), *self.buffers()]
        # What `parameters` walks through takes longer than all else of loading an adapter of hundreds of layers.
        return [own for own in (*self._parameters.values(), *self._buffers.values()) if own is not None]

    def frozen(self) -> Self:
        """Itself, from now on for inference alone."""
        for tensor in self.numbers():
            tensor.requires_grad_(False)
        if self._modules:
            return self.eval()
        self.training = False
        return self

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def to_lora(self, max_rank: int | None = None) -> LoRAExport:
        """b (m, r) and a (r, n) with b @ a = ΔW (scaling 1, that is lora_alpha = r), or its best rank-`max_rank` cut.

        Args:
            max_rank: largest rank of the export, >= 1. Without it the export is exact or refused.

        Raises:
            AdapterError: ΔW is no low-rank matrix (and the family is merge-only or `max_rank` is not given).

        Source: Eckart-Young on the small factors, `lowrank.factors.base.factored_svd`.
        """
        what = f"export a {self.peft_type} adapter ({self.shape[0]}x{self.shape[1]}) to LoRA"
        if max_rank is not None and max_rank < 1:
            raise AdapterError(f"{what}: max_rank = {max_rank}. Set max_rank >= 1.")
        with torch.no_grad():
            form = self.low_rank()
            if form is not None and (max_rank is None or form[0].shape[1] <= max_rank):
                return LoRAExport(form[1].detach().contiguous(), form[0].detach().contiguous(), 1.0, True)
            if max_rank is None or self.export == "merge-only":
                raise AdapterError(
                    f"{what}: its change is no matrix of small rank. "
                    + ("Merge it into the base." if self.export == "merge-only" else "Give max_rank to cut it.")
                )
            return cut(*(self._svd(max_rank) if form is None else factored_svd(*form)), max_rank)

    def _svd(self, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """U, s, Vᴴ of ΔW where there is no low-rank form: all of s, and at least `keep` singular vectors."""
        del keep
        u, s, vh = torch.linalg.svd(self.delta_weight().double(), full_matrices=False)
        return u.float(), s.float(), vh.float()


def cut(u: Tensor, s: Tensor, vh: Tensor, max_rank: int) -> LoRAExport:
    """The best LoRA of rank `max_rank` of U diag(s) Vᴴ, both factors with equal Grams."""
    keep = min(len(s), max_rank)
    energy, root = s.double().square(), s[:keep].sqrt()
    total = float(energy.sum())
    retained = float(energy[:keep].sum()) / total if total else 1.0
    a, b = (root[:, None] * vh[:keep]).contiguous(), (u[:, :keep] * root).contiguous()
    return LoRAExport(a, b, retained, keep == len(s))


def scaling_of(alpha: float, r: int, use_rslora: bool) -> float:
    """s = α/r, or α/√r with rank-stabilised scaling."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def matched(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key of `pattern` that matches the end of the module's name, as in PEFT; else `default`."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """U(−1/√columns, 1/√columns) of (rows, columns): Kaiming with a = √5, as `nn.Linear` and PEFT start."""
    bound = 1.0 / math.sqrt(columns)
    return torch.rand(rows, columns, generator=generator) * (2 * bound) - bound


def require_fit(family: str, **factors: tuple[Tensor, str]) -> None:
    """Refuse factors that do not fit each other: a letter stands for an axis, and the same letter for the same size.

    Raises:
        AdapterError: says the shapes, and those that are allowed.
    """
    sizes = {"1": 1}
    fits = all(
        tensor.ndim == len(axes) and all(sizes.setdefault(axis, size) == size for axis, size in zip(axes, tensor.shape))
        for tensor, axes in factors.values()
    )
    if not fits:
        got = ", ".join(f"{name} is {tuple(tensor.shape)}" for name, (tensor, _) in factors.items())
        allowed = ", ".join(f"{name} ({', '.join(axes)})" for name, (_, axes) in factors.items())
        raise AdapterError(f"{family} factors do not fit: {got}; allowed are {allowed}.")


def check_finite(layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """All tensors at once, as there may be hundreds: layer -> name -> tensor.

    Raises:
        AdapterError: a tensor holds NaN or infinity.
    """
    named = [
        (f"{layer}.{name}".removeprefix("."), tensor if tensor.dtype.itemsize > 1 else tensor.float())
        for layer, tensors in layers.items()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel()
    ]
    if not named:
        return
    if all(bool(torch.isfinite(end)) for end in torch.cat([tensor.reshape(-1) for _, tensor in named]).aminmax()):
        return
    wrong = next(name for name, tensor in named if not bool(torch.isfinite(tensor).all()))
    raise AdapterError(f"{wrong} holds NaN or infinity. Train it again with a lower learning_rate.")
