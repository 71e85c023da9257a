"""LoKr: ΔW = s·W1 ⊗ W2 with W2 = W2a W2b of rank r, or full; and KronA, whose W2 is always full.

Row-major, (W1 ⊗ W2) x = vec(W1 X W2ᵀ) where X is x as a matrix, so that ΔW is never built. The shapes are those of
PEFT: m = up·vp and n = uq·vq, W1 (up, uq) is the small factor, W2 (vp, vq) is full where r >= max(vp, vq)/2.

A split W ≈ Q + W1 ⊗ W2 is continued with the shapes of its own factors. PEFT knows only those of its rule, so the file
loads there where `options.factor` gives the same ones, such as decompose.options.shape [4, 4] with factor 4 where 4
divides m and n; `rankline` loads any.

PEFT always scales by s = α/r. LyCORIS does not scale where both factors are full; a file with its `alpha` tensors is
taken over under PEFT's rule, the difference multiplied into W1.

Source: LyCORIS, arXiv 2309.14859, section 3; `peft.tuners.lokr`; KronA, arXiv 2212.10650, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.adapter_options import KronAOptions, LoKrOptions, options_of
from lowrank.adapters.base import Export, Layer, kaiming, matched
from lowrank.adapters.continued import divided, extended, refuse_smaller
from lowrank.adapters.file_config import pattern_value
from lowrank.adapters.products import AddedInPlace, refuse_other_names, refuse_rslora
from lowrank.adapters.settings import dropout_of, rank_of, scaling_for, scaling_from
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.factors import KroneckerFactors

_W1, _W2 = "lokr_w1", "lokr_w2"


class LoKr(AddedInPlace):
    """ΔW = s·W1 ⊗ W2, W2 = W2a W2b of rank r or full."""

    peft_type: ClassVar[str] = "LOKR"
    prefix: ClassVar[str] = "lokr_"
    takes_split: ClassVar[frozenset[str]] = frozenset({"kronecker"})

    def __init__(self, factors: Mapping[str, Tensor], r: int, scaling: float, dropout: float = 0.0) -> None:
        """Args: factors: by PEFT's names, see `_checked`. r: of the file. scaling: s. dropout: on x while training.

        Raises:
            AdapterError: the factors do not fit each other, or some are missing.
        """
        (up, uq), (vp, vq) = _checked(factors)
        super().__init__((up * vp, uq * vq), scaling, dropout)
        self._r = r
        for name in sorted(factors):
            self.register_parameter(name, nn.Parameter(factors[name]))

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """The split that `quantize` took out; without one no change: W1 = 0, or W2 = 0, by `options.init`.

        Raises:
            AdapterError: the split is no single product, or r is too small for it, or `options.decompose_both` would
                cut its W1, or `options.factor` names other shapes.
        """
        options = LoKrOptions(**config.options)
        if isinstance(layer.split, KroneckerFactors):
            if options.decompose_both:
                raise AdapterError(
                    f"initialise {layer.what}: decompose_both would cut the W1 of its split. "
                    "Set finetune.adapter.options.decompose_both: false."
                )
            return cls._continued(layer, config, layer.split, layer.split.inner_rank, options.factor)
        return cls._started(layer, config, rank_of(layer, config), options)

    @classmethod
    def _continued(
        cls, layer: Layer, config: AdapterConfig, split: KroneckerFactors, inner: int | None, factor: int
    ) -> Self:
        """s·W1 ⊗ W2 = S; W2 of low rank where the split's is (`inner`) and PEFT's rule leaves it so, else full."""
        refuse_rslora(layer, config)
        _refuse_shapes(layer, split, factor)
        (w1,), (whole,) = split.b, split.second
        least = (max(whole.shape) + 1) // 2 if inner is None else inner
        r: int = matched(config.rank_pattern, layer.name, config.r) or least
        refuse_smaller(layer, r, least)
        scaling = scaling_for(layer, config, r)
        w1, whole = divided(scaling, w1, whole)
        factors = {_W1: w1, _W2: whole}
        if split.right is not None and r < max(whole.shape) / 2:
            left, right = divided(scaling**0.5, split.c[0], split.right[0])
            parts = extended(layer, r, layer.generator(config.seed), left, right)
            factors = {_W1: w1} | dict(zip((f"{_W2}_a", f"{_W2}_b"), parts, strict=True))
        return cls(factors, r, scaling, config.lora_dropout)

    @classmethod
    def _started(cls, layer: Layer, config: AdapterConfig, r: int, options: LoKrOptions) -> Self:
        refuse_rslora(layer, config)
        (up, vp), (uq, vq) = (factorization(size, options.factor) for size in layer.shape)
        generator = layer.generator(config.seed)
        one = _factor(_W1, up, uq, r if options.decompose_both else None, generator)
        two = _factor(_W2, vp, vq, r, generator)
        # PEFT zeroes the left part of W1, LyCORIS the right part of W2.
        zero = next(iter(one)) if options.init == "peft" else list(two)[-1]
        factors = one | two
        factors[zero] = torch.zeros_like(factors[zero])
        return cls(factors, r, scaling_for(layer, config, r), config.lora_dropout)

    @property
    def r(self) -> int:
        """Rank that the file names, inner rank of W2 unless that is full."""
        return self._r

    @property
    def export(self) -> Export:
        """A LoRA of rank rank(W1)·rank(W2), unless that is no less than min(m, n), as it mostly is where W2 is full."""
        return "exact" if self._rank(_W1) * self._rank(_W2) < min(self.shape) else "truncated"

    def _rank(self, name: str) -> int:
        return min(size for part in self._parts(name) for size in part.shape)

    def _parts(self, name: str) -> list[nn.Parameter]:
        """The whole factor alone, or its left and right parts."""
        return [factor for full, factor in self.named_parameters() if full.startswith(name)]

    def w1(self) -> Tensor:
        """W1 (up, uq), multiplied out."""
        return self._whole(_W1)

    def w2(self) -> Tensor:
        """W2 (vp, vq), multiplied out."""
        return self._whole(_W2)

    def _whole(self, name: str) -> Tensor:
        parts = self._parts(name)
        return parts[0] if len(parts) == 1 else parts[0] @ parts[1]

    def delta(self, x: Tensor) -> Tensor:
        """s·vec(W1 X W2ᵀ) for x (..., n): (..., m), in the dtype of x."""
        w1 = (self.scaling * self.w1()).to(x.dtype)
        *left, last = (part.to(x.dtype) for part in self._parts(_W2))
        (up, uq), (rows, vq) = w1.shape, last.shape
        parts = x.reshape(-1, uq, vq)
        if not left and up * (uq + rows) < rows * (uq + up):
            y = F.linear(w1 @ parts, last)
        else:
            y = w1 @ F.linear(parts, last)
        if left:
            # Contiguous, because the gradient of a transposed W2a is a product on which MKL is several times slower.
            y = y.flatten(0, 1) @ left[0].T.contiguous()
        return y.reshape(*x.shape[:-1], self.shape[0])

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """s·W1 ⊗ W2 (m, n)."""
        del weight
        return torch.kron(self.scaling * self.w1(), self.w2())

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(W1ˡ ⊗ W2ˡ)(W1ʳ ⊗ W2ʳ) of rank rank(W1)·rank(W2), or None where that is no less than min(m, n)."""
        first = (self.scaling * self.w1()).detach()[None]
        left, *right = (part.detach()[None] for part in self._parts(_W2))
        return KroneckerFactors(first, left, right[0] if right else None, self.shape).low_rank()

    def kronecker(self) -> tuple[Tensor, ...]:
        """s·W1 (up, uq), and W2 (vp, vq) or its factors W2a (vp, r) and W2b (r, vq)."""
        return (self.scaling * self.w1(), *self._parts(_W2))

    def _svd(self, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """The products of the SVDs of W1 and W2: (U₁ ⊗ U₂)(Σ₁ ⊗ Σ₂)(V₁ ⊗ V₂)ᴴ, sorted.

        Source: Van Loan 2000, "The ubiquitous Kronecker product", section 1.
        """
        dtype = self.w1().dtype
        u1, s1, vh1 = torch.linalg.svd(self.w1().double() * self.scaling, full_matrices=False)
        u2, s2, vh2 = torch.linalg.svd(self.w2().double(), full_matrices=False)
        s, order = torch.outer(s1, s2).flatten().sort(descending=True)
        i, j = order[:keep] // len(s2), order[:keep] % len(s2)
        u = (u1[:, None, i] * u2[None, :, j]).flatten(0, 1)
        vh = (vh1[i][:, :, None] * vh2[j][:, None, :]).flatten(1)
        return u.to(dtype), s.to(dtype), vh.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The factors by PEFT's names."""
        return {name: factor.detach() for name, factor in self.named_parameters()}

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """The factors on disk, with the rank and the scaling that the configuration gives the module."""
        r = int(pattern_value(config, "rank_pattern", module, config["r"]))
        scaling = scaling_from(config, module, r, "alpha")
        return cls({name: part.float() for name, part in tensors.items()}, r, scaling, dropout_of(config))

    @classmethod
    def load_all(
        cls, tensors: Mapping[str, Mapping[str, Tensor]], shared: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Self]:
        """The adapters of a file; a LyCORIS `alpha` of a module says that its tensors stand under LyCORIS' scale."""
        refuse_other_names(cls, tensors, shared)
        adapters = {}
        for module, named in tensors.items():
            adapter = cls.from_tensors(module, named, config)
            if f"{module}.alpha" in shared:
                adapter.take_lycoris_scale(float(shared[f"{module}.alpha"]))
            adapters[module] = adapter
        return adapters

    @torch.no_grad()
    def take_lycoris_scale(self, alpha: float) -> None:
        """Multiply W1 so that s·W1 ⊗ W2 is what LyCORIS means by the same tensors: 1 if both are full, else α/r."""
        inner = [parts[1].shape[0] for parts in (self._parts(_W1), self._parts(_W2)) if len(parts) == 2]
        theirs = alpha / inner[0] if inner else 1.0
        self._parts(_W1)[0].mul_(theirs / self.scaling)

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """As `peft.LoKrConfig` names them, and our dropout on the input, which PEFT has not."""
        options = options_of(config.method, config.options)
        return {
            "alpha": config.lora_alpha,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "decompose_both": getattr(options, "decompose_both", False),
            "decompose_factor": options.factor,
            "init_weights": True,
            "lora_dropout": config.lora_dropout,
        }


class KronA(LoKr):
    """ΔW = s·W1 ⊗ W2, both full, W2 = 0 at the start.

    PEFT loads it as a LoKr: r is the least at which PEFT keeps W2 full, max(vp, vq)/2 rounded up, and s = α/r.
    """

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """The split that `quantize` took out, multiplied out; without one W1 Kaiming and W2 = 0.

        Raises:
            AdapterError: an explicit rank is so small that PEFT would split W2, or as for a LoKr of a split.
        """
        options = LoKrOptions(factor=KronAOptions(**config.options).factor, init="lycoris")
        if isinstance(layer.split, KroneckerFactors):
            return cls._continued(layer, config, layer.split, None, options.factor)
        least = (max(factorization(size, options.factor)[1] for size in layer.shape) + 1) // 2
        r: int = matched(config.rank_pattern, layer.name, config.r) or least
        if r < least:
            raise AdapterError(
                f"initialise {layer.what}: krona has no inner rank, but r = {r} < {least} would be one. "
                "Leave finetune.adapter.r out, or take method lokr."
            )
        return cls._started(layer, config, r, options)


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """(a, b) with a·b = size: a = `factor` where that divides; else the pair nearest the root with a <= factor, a <= b.

    Source: `peft.tuners.lokr.layer.factorization`, LyCORIS.

    Example:
        >>> factorization(128), factorization(127), factorization(128, 4), factorization(24, 5)
        ((8, 16), (1, 127), (4, 32), (4, 6))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = size if factor == -1 else factor
    a = max(a for a in range(1, int(size**0.5) + 1) if size % a == 0 and a <= largest)
    return a, size // a


def _refuse_shapes(layer: Layer, split: KroneckerFactors, factor: int) -> None:
    """Refuse a split that is no single W1 ⊗ W2 of all of W, or not of the shapes that `factor` asks for."""
    (terms, up, uq), (vp, vq) = split.b.shape, split.second.shape[1:]
    if terms != 1 or (up * vp, uq * vq) != layer.shape:
        raise AdapterError(
            f"initialise {layer.what}: its split has {terms} Kronecker products of {up}x{uq} and {vp}x{vq}; a LoKr "
            "is one, without padding. Set decompose.rank: 1 and decompose.options.padding: error."
        )
    wanted = tuple(factorization(size, factor)[0] for size in layer.shape)
    if factor != -1 and wanted != (up, uq):
        raise AdapterError(
            f"initialise {layer.what}: factor = {factor} means W1 of {wanted[0]}x{wanted[1]}, but that of its split is "
            f"{up}x{uq}. Set decompose.options.shape: [{wanted[0]}, {wanted[1]}], or leave factor out."
        )


def _factor(name: str, rows: int, columns: int, r: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    """A Kaiming factor (rows, columns), as two of rank r where r is less than half of its larger side."""
    if r is None or r >= max(rows, columns) / 2:
        return {name: kaiming(rows, columns, generator)}
    return {f"{name}_a": kaiming(rows, r, generator), f"{name}_b": kaiming(r, columns, generator)}


def _checked(factors: Mapping[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of W1 and W2, each given whole (`lokr_w1`) or as `lokr_w1_a` (rows, r) and `lokr_w1_b` (r, columns)."""
    shapes, used = [], 0
    for name in (_W1, _W2):
        parts = [factors[part] for part in ([name] if name in factors else [f"{name}_a", f"{name}_b"])]
        used += len(parts)
        fits = all(part.ndim == 2 for part in parts) and (len(parts) == 1 or parts[0].shape[1] == parts[1].shape[0])
        if not fits:
            raise AdapterError(f"LoKr factors do not fit: {name} is {[tuple(part.shape) for part in parts]}.")
        shapes.append((parts[0].shape[0], parts[-1].shape[1]))
    if used != len(factors):
        raise AdapterError(
            f"LoKr factors do not fit: got {sorted(factors)}; allowed are {_W1} and {_W2}, each whole or as _a and _b. "
            "Adapt linear layers only."
        )
    return shapes[0], shapes[1]
