"""LoHA: ΔW = s·(W1a W1b)∘(W2a W2b), of rank up to r² with 2r(m + n) numbers.

It is applied by the identity (W1a W1b)∘(W2a W2b) = (W1a • W2a)(W1b ⊙ W2b), a LoRA of rank r² whose two factors are
built anew in every forward pass: (m + n) r² products, little beside the pass itself for one token and for a thousand.
Contracting few tokens without them was no faster.

Source: Hyeon-Woo et al., FedPara, arXiv 2108.06098, proposition 1; LyCORIS, arXiv 2309.14859, section 3; starts as in
`peft.tuners.loha`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowrank.adapter_options import LoHAOptions
from lowrank.adapters.base import Export, Layer, kaiming
from lowrank.adapters.continued import divided, extended
from lowrank.adapters.products import AddedInPlace, column_products, refuse_other_names, refuse_rslora, row_products
from lowrank.adapters.settings import dropout_of, rank_of, scaling_for, scaling_from
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.factors import HadamardFactors

#: Parts of ΔW that are built one after another where r² is so large that its expanded factors would be larger.
_PARTS = 16


class LoHA(AddedInPlace):
    """ΔW = s·(W1a W1b)∘(W2a W2b)."""

    peft_type: ClassVar[str] = "LOHA"
    prefix: ClassVar[str] = "hada_"
    takes_split: ClassVar[frozenset[str]] = frozenset({"hadamard"})
    names: ClassVar[tuple[str, str, str, str]] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    """The four factors on disk."""

    def __init__(
        self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], scaling: float, dropout: float = 0.0
    ) -> None:
        """Args: first: W1a (m, r1) and W1b (r1, n). second: W2a (m, r2) and W2b (r2, n). scaling: s. dropout: on x.

        Raises:
            AdapterError: the shapes do not fit each other.
        """
        (w1_a, w1_b), (w2_a, w2_b) = first, second
        shape = (w1_a.shape[0], w1_b.shape[-1])
        fits = all(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] for a, b in (first, second))
        if not fits or shape != (w2_a.shape[0], w2_b.shape[1]):
            got = ", ".join(str(tuple(part.shape)) for part in (*first, *second))
            raise AdapterError(
                f"{self.peft_type} factors do not fit: got {got}; allowed are (m, r1), (r1, n), (m, r2), (r2, n)."
            )
        super().__init__(shape, scaling, dropout)
        self.w1_a, self.w1_b, self.w2_a, self.w2_b = (nn.Parameter(part) for part in (*first, *second))

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """The split that `quantize` took out; without one no change: one factor is zero, by `options.init`.

        Raises:
            AdapterError: the rank is larger than min(m, n), or smaller than that of the split.
        """
        refuse_rslora(layer, config)
        (m, n), r = layer.shape, rank_of(layer, config)
        generator = layer.generator(config.seed)
        if isinstance(layer.split, HadamardFactors):
            scaling = scaling_for(layer, config, r)
            return cls(*from_split(layer, layer.split, (r, r), scaling, generator), scaling, config.lora_dropout)
        if LoHAOptions(**config.options).init == "lycoris":
            w1_b, w2_b = (torch.randn(r, n, generator=generator) for _ in range(2))
            first, second = (0.1 * torch.randn(m, r, generator=generator), w1_b), (torch.zeros(m, r), w2_b)
        else:
            first = kaiming(m, r, generator), kaiming(r, n, generator)
            second = kaiming(m, r, generator), torch.zeros(r, n)
        return cls(first, second, scaling_for(layer, config, r), config.lora_dropout)

    @property
    def r(self) -> int:
        """Rank of the second pair, and in a LoHA of the first one too."""
        return int(self.w2_a.shape[1])

    @property
    def export(self) -> Export:
        """A LoRA of rank r1·r2, unless that is no less than min(m, n)."""
        return "exact" if self._expanded_rank < min(self.shape) else "truncated"

    @property
    def _expanded_rank(self) -> int:
        return int(self.w1_a.shape[1] * self.w2_a.shape[1])

    def delta(self, x: Tensor) -> Tensor:
        """s·(W1a • W2a)((W1b ⊙ W2b) x) for x (..., n): (..., m), in the dtype of x."""
        factors = [part.to(x.dtype) for part in (self.scaling * self.w1_a, self.w1_b, self.w2_a, self.w2_b)]
        (m, n), rank = self.shape, self._expanded_rank
        if rank * (m + n) > m * n:
            return _by_rows(x, *factors)
        w1_a, w1_b, w2_a, w2_b = factors
        return F.linear(F.linear(x, column_products(w1_b, w2_b)), row_products(w1_a, w2_a))

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """s·(W1a W1b)∘(W2a W2b) (m, n)."""
        del weight
        return self.scaling * (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(s·W1a • W2a, W1b ⊙ W2b), or None where r1·r2 >= min(m, n)."""
        if self.export != "exact":
            return None
        return row_products(self.scaling * self.w1_a, self.w2_a), column_products(self.w1_b, self.w2_b)

    def tensors(self) -> dict[str, Tensor]:
        """The four factors by their names on disk."""
        factors = (self.w1_a, self.w1_b, self.w2_a, self.w2_b)
        return {name: factor.detach() for name, factor in zip(self.names, factors, strict=True)}

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """The factors on disk, with the scaling that the configuration gives their rank."""
        if unknown := sorted(set(tensors) - set(cls.names)):
            raise AdapterError(
                f"load {module}: got {unknown} beside {cls.names}, the form of a convolution. Adapt linear layers only."
            )
        w1_a, w1_b, w2_a, w2_b = (tensors[name].float() for name in cls.names)
        scaling = cls.stored_scaling(module, w2_a.shape[-1], config)
        return cls((w1_a, w1_b), (w2_a, w2_b), scaling, dropout_of(config))

    @classmethod
    def load_all(
        cls, tensors: Mapping[str, Mapping[str, Tensor]], shared: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Self]:
        """The adapters of a file; a LyCORIS `alpha` of a module says that its s is that over r."""
        refuse_other_names(cls, tensors, shared)
        adapters = {module: cls.from_tensors(module, named, config) for module, named in tensors.items()}
        with torch.no_grad():
            for module, adapter in adapters.items():
                if f"{module}.alpha" in shared:
                    # Saved again, the file has PEFT's scale: the difference goes into a factor.
                    adapter.w1_a.mul_(float(shared[f"{module}.alpha"]) / adapter.r / adapter.scaling)
        return adapters

    @classmethod
    def stored_scaling(cls, module: str, r: int, config: Mapping[str, Any]) -> float:
        """s of a stored layer of rank r."""
        return scaling_from(config, module, r, "alpha")

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """As `peft.LoHaConfig` names them, and our dropout on the input, which PEFT has not."""
        return {
            "alpha": config.lora_alpha,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "init_weights": True,
            "lora_dropout": config.lora_dropout,
        }


def from_split(
    layer: Layer, split: HadamardFactors, ranks: tuple[int, int], scaling: float, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Both pairs of these ranks with s·(W1a W1b)∘(W2a W2b) = (C₁D₁)∘(C₂D₂), s shared out among the four factors."""
    c1, d1, c2, d2 = divided(scaling, split.c1, split.d1, split.c2, split.d2)
    return extended(layer, ranks[0], generator, c1, d1), extended(layer, ranks[1], generator, c2, d2)


def _by_rows(x: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
    """x ((W1a W1b)∘(W2a W2b))ᵀ, some rows of the product at a time, which the backward pass builds again."""

    def part(x: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
        return F.linear(x, (w1_a @ w1_b) * (w2_a @ w2_b))

    step = -(-len(w1_a) // _PARTS)
    rows = zip(torch.split(w1_a, step), torch.split(w2_a, step), strict=True)
    parts = [
        checkpoint(part, x, one, w1_b, two, w2_b, use_reentrant=False, preserve_rng_state=False) for one, two in rows
    ]
    return torch.cat(parts, -1)
