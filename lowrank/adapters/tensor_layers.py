"""Adapters that are one low-rank tensor over many layers: LoTR (Tucker-2) and LoRTA (CP).

All layers of one shape form a group, and a group shares its factors: the same `nn.Parameter` is registered in each of
its layers, so that its gradient sums over them and a file holds it once.

| method | ΔW of layer l, projection p, over a group of shape (m, n) |
|---|---|
| lotr | s·L·M_l·R, with M_l (r, r) of this layer alone, L (m, r) and R (r, n) of the group |
| lorta | s·Σ_k C_layer[k, l]·C_projection[k, p]·(C_heads[:, k] ⊗ B[:, k])·A[:, k]ᵀ, all of the group |

Source: Bershatsky et al., LoTR, arXiv 2402.01376, eq. 5; Hounie et al., LoRTA, arXiv 2410.04060, eq. 6.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.adapter_options import LoRTAOptions, options_of
from lowrank.adapters.base import Adapter, Export, Layer, kaiming, require_fit
from lowrank.adapters.settings import common_rank, dropout_of, scaling_for, scaling_from, shapes_from
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError

Factors = dict[str, nn.Parameter]


class CrossLayer(Adapter):
    """What adapters over groups of equal-shaped layers share; `shared` names the group's factors on disk."""

    export: ClassVar[Export] = "exact"
    shared: ClassVar[tuple[str, ...]]

    def group_tensors(self) -> dict[str, Tensor]:
        """The factors of this layer's group, by the names on disk."""
        return {f"{self.prefix}{name}.{_size(self.shape)}": getattr(self, name).detach() for name in self.shared}

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """The adapter of a group of one layer."""
        return cls.initial_all([layer], config)[layer.name]

    @classmethod
    def shared_tensors(cls, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
        """The factors of all groups."""
        found: dict[str, Tensor] = {}
        for adapter in adapters.values():
            assert isinstance(adapter, CrossLayer)
            found |= adapter.group_tensors()
        return found

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """Raises: AdapterError: a layer alone has no shared factors; `load_all` is given them."""
        raise AdapterError(f"load the {cls.peft_type} adapter of {module}: its factors lie beside it. Call load_all.")

    @classmethod
    def groups_from(
        cls, shared: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[dict[str, tuple[int, int]], dict[tuple[int, int], Factors]]:
        """The stored shape of every module, and the factors of every shape as parameters."""
        shapes = shapes_from(config)
        return shapes, {
            shape: {name: nn.Parameter(shared[f"{cls.prefix}{name}.{_size(shape)}"].float()) for name in cls.shared}
            for shape in dict.fromkeys(shapes.values())
        }

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """In the names of `peft.LoraConfig`."""
        return {
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "lora_dropout": config.lora_dropout,
        }

    def delta(self, x: Tensor) -> Tensor:
        """ΔW x for x (..., n): (..., m)."""
        left, right = self.low_rank()
        return F.linear(F.linear(x, right.to(x.dtype)), left.to(x.dtype))

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """ΔW (m, n)."""
        del weight
        left, right = self.low_rank()
        return left @ right

    @abstractmethod
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """left (m, r), s included, and right (r, n)."""


class LoTR(CrossLayer):
    """ΔW = s·L·M·R, with L and R of all layers of this shape."""

    peft_type: ClassVar[str] = "LOTR"
    prefix: ClassVar[str] = "lotr_"
    shared: ClassVar[tuple[str, ...]] = ("left", "right")

    def __init__(self, core: Tensor, factors: Factors, scaling: float, dropout: float = 0.0) -> None:
        """Args: core: M (r, r). factors: `left` L (m, r) and `right` R (r, n). scaling: s. dropout: on the input."""
        require_fit("LoTR", L=(factors["left"], "mr"), M=(core, "rr"), R=(factors["right"], "rn"))
        super().__init__((factors["left"].shape[0], factors["right"].shape[1]), scaling, dropout)
        self.core = nn.Parameter(core)
        self.left, self.right = factors["left"], factors["right"]

    @classmethod
    def initial_all(cls, layers: Sequence[Layer], config: AdapterConfig) -> dict[str, Self]:
        """M = 0; L ~ N(0, 1/m) and R ~ N(0, 1/n): the columns of L and rows of R have length about 1.

        The authors draw both from N(0, 1), which makes the first steps of M √(mn) times as large.
        """
        r, groups, made = common_rank(config, "LoTR"), dict[tuple[int, int], Factors](), {}
        for layer in layers:
            (m, n), generator = layer.shape, layer.generator(config.seed)
            if layer.shape not in groups:
                left, right = (torch.randn(size, generator=generator) for size in ((m, r), (r, n)))
                groups[m, n] = {"left": nn.Parameter(left / m**0.5), "right": nn.Parameter(right / n**0.5)}
            scaling = scaling_for(layer, config, r)
            made[layer.name] = cls(torch.zeros(r, r), groups[m, n], scaling, config.lora_dropout)
        return made

    @property
    def r(self) -> int:
        """Rank."""
        return len(self.core)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(s·L·M, R)."""
        return self.scaling * (self.left @ self.core), self.right

    def tensors(self) -> dict[str, Tensor]:
        """M; L and R lie beside the layers."""
        return {"lotr_core": self.core.detach()}

    @classmethod
    def load_all(
        cls, tensors: Mapping[str, Mapping[str, Tensor]], shared: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Self]:
        """Every stored M over the factors of its group."""
        shapes, groups = cls.groups_from(shared, config)
        made = {}
        for module, named in tensors.items():
            core = named["lotr_core"].float()
            scaling = scaling_from(config, module, len(core))
            made[module] = cls(core, groups[shapes[module]], scaling, dropout_of(config))
        return made


class LoRTA(CrossLayer):
    """ΔW = s·Σ_k C_layer[k, l]·C_projection[k, p]·(C_heads[:, k] ⊗ B[:, k])·A[:, k]ᵀ."""

    peft_type: ClassVar[str] = "LORTA"
    prefix: ClassVar[str] = "lorta_"
    shared: ClassVar[tuple[str, ...]] = ("a", "b", "c_heads", "c_layer", "c_projection")

    def __init__(self, place: tuple[int, int], factors: Factors, scaling: float, dropout: float = 0.0) -> None:
        """A layer's place in its group's tensor.

        Args:
            place: (l, p), the columns of `c_layer` and `c_projection`.
            factors: `a` (n, r), `b` (m / heads, r), `c_heads` (heads, r), `c_layer` (r, layers), `c_projection`
                (r, projections).
            scaling: s.
            dropout: on the input while training, in [0, 1).
        """
        axes = {"a": "nr", "b": "mr", "c_heads": "hr", "c_layer": "rl", "c_projection": "rp"}
        require_fit("LoRTA", **{name: (factors[name], own) for name, own in axes.items()})
        if not (0 <= place[0] < factors["c_layer"].shape[1] and 0 <= place[1] < factors["c_projection"].shape[1]):
            raise AdapterError(f"LoRTA factors do not fit: there is no layer and projection {place}.")
        super().__init__((factors["c_heads"].shape[0] * factors["b"].shape[0], factors["a"].shape[0]), scaling, dropout)
        self.place = place
        self.a, self.b, self.c_heads = factors["a"], factors["b"], factors["c_heads"]
        self.c_layer, self.c_projection = factors["c_layer"], factors["c_projection"]

    @classmethod
    def initial_all(cls, layers: Sequence[Layer], config: AdapterConfig) -> dict[str, Self]:
        """B = 0, A Kaiming, and the entries of C_heads, C_layer and C_projection ~ N(0, 1).

        Raises:
            AdapterError: `num_heads` does not divide an m.
        """
        r, options = common_rank(config, "LoRTA"), options_of(config.method, config.options)
        made: dict[str, Self] = {}
        for shape in dict.fromkeys(layer.shape for layer in layers):
            group = [layer for layer in layers if layer.shape == shape]
            names = [place_of(layer.name) for layer in group]
            rows, columns = ({name: i for i, name in enumerate(dict.fromkeys(axis))} for axis in zip(*names))
            factors = cls._initial_factors(group[0], r, options, len(rows), len(columns), config.seed)
            for layer, (number, projection) in zip(group, names):
                scaling = scaling_for(layer, config, r)
                made[layer.name] = cls((rows[number], columns[projection]), factors, scaling, config.lora_dropout)
        return {layer.name: made[layer.name] for layer in layers}

    @staticmethod
    def _initial_factors(
        first: Layer, r: int, options: LoRTAOptions, num_layers: int, num_projections: int, seed: int
    ) -> Factors:
        (m, n), generator = first.shape, first.generator(seed)
        heads = options.num_heads or max(d for d in range(1, math.isqrt(m) + 1) if m % d == 0)
        if m % heads:
            raise AdapterError(f"initialise {first.what}: num_heads = {heads} does not divide {m}. Set a divisor.")
        sizes = {"c_heads": (heads, r), "c_layer": (r, num_layers), "c_projection": (r, num_projections)}
        drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        drawn |= {"a": kaiming(r, n, generator).T.contiguous(), "b": torch.zeros(m // heads, r)}
        return {name: nn.Parameter(tensor) for name, tensor in drawn.items()}

    @property
    def r(self) -> int:
        """Number of components."""
        return int(self.a.shape[1])

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(s·(C_heads ⊙ B)·diag(C_layer[:, l] ∘ C_projection[:, p]), Aᵀ), ⊙ column by column."""
        number, projection = self.place
        weights = self.scaling * self.c_layer[:, number] * self.c_projection[:, projection]
        heads = (self.c_heads[:, None] * self.b[None]).reshape(self.shape[0], -1)
        return heads * weights, self.a.T

    def tensors(self) -> dict[str, Tensor]:
        """(l, p); the factors lie beside the layers."""
        return {"lorta_place": torch.tensor(self.place)}

    @classmethod
    def load_all(
        cls, tensors: Mapping[str, Mapping[str, Tensor]], shared: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Self]:
        """Every stored place over the factors of its group."""
        shapes, groups = cls.groups_from(shared, config)
        made = {}
        for module, named in tensors.items():
            number, projection = (int(index) for index in named["lorta_place"])
            factors = groups[shapes[module]]
            scaling = scaling_from(config, module, factors["a"].shape[1])
            made[module] = cls((number, projection), factors, scaling, dropout_of(config))
        return made


def place_of(module: str) -> tuple[str, str]:
    """The number of the layer in a module's name, and the rest of the name, which is its projection.

    Example:
        >>> place_of("model.layers.3.self_attn.q_proj")
        ('3', 'model.layers.self_attn.q_proj')
    """
    parts = module.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    if number:
        parts.remove(number)
    return number, ".".join(parts)


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
