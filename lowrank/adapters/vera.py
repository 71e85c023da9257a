"""VeRA: ΔW = diag(b)·B·diag(d)·A, where A (r, n) and B (m, r) are random, frozen and shared by all layers.

A layer of shape (m, n) takes the first n columns of A and the first m rows of B, which are as large as the largest
layers. Trained are b (m,) and d (r,) alone; there is no α.

Source: Kopiczko et al., arXiv 2310.11454, eq. 2; draws, names and defaults as in `peft.VeraConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.adapter_options import VeRAOptions, options_of
from lowrank.adapters.base import Adapter, Export, Layer, require_fit
from lowrank.adapters.settings import common_rank, dropout_of, shapes_from
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError


class Projections(nn.Module):
    """A (r, largest n) and B (largest m, r): one module in all layers, so that they stay one storage on any device."""

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    @classmethod
    def draw(cls, m: int, n: int, r: int, key: int) -> Self:
        """U(±√(6/fan_in)), A before B from one generator: PEFT draws the same numbers from the same key."""
        generator = torch.Generator().manual_seed(key)
        a = torch.empty(r, n).uniform_(-math.sqrt(6 / n), math.sqrt(6 / n), generator=generator)
        b = torch.empty(m, r).uniform_(-math.sqrt(6 / r), math.sqrt(6 / r), generator=generator)
        return cls(a, b)


class VeRA(Adapter):
    """ΔW = diag(b)·B[:m]·diag(d)·A[:, :n]."""

    peft_type: ClassVar[str] = "VERA"
    prefix: ClassVar[str] = "vera_"
    export: ClassVar[Export] = "exact"

    def __init__(self, b: Tensor, d: Tensor, n: int, projections: Projections, dropout: float = 0.0) -> None:
        """The layer's vectors over what all layers share.

        Args:
            b: (m,).
            d: (r,).
            n: in_features; 0 where a file does not tell it, and then that of the first input.
            projections: A and B.
            dropout: on the input while training, in [0, 1).

        Raises:
            AdapterError: the projections are too small, or of another rank.
        """
        require_fit("VeRA", b=(b, "m"), d=(d, "r"))
        require_fit("VeRA", A=(projections.a, "rn"), B=(projections.b, "mr"))
        if projections.a.shape[1] < n or projections.b.shape[0] < len(b) or projections.b.shape[1] != len(d):
            raise AdapterError(
                f"VeRA projections A {tuple(projections.a.shape)} and B {tuple(projections.b.shape)} do not fit a "
                f"{len(b)}x{n} layer of rank {len(d)}; allowed are A (r, >= n) and B (>= m, r)."
            )
        super().__init__((len(b), n), 1.0, dropout)
        self.vera_lambda_b = nn.Parameter(b)
        self.vera_lambda_d = nn.Parameter(d)
        self.projections = projections

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """b = 0 and d = `d_initial`, over projections of this layer alone."""
        return cls.initial_all([layer], config)[layer.name]

    @classmethod
    def initial_all(cls, layers: Sequence[Layer], config: AdapterConfig) -> dict[str, Self]:
        """b = 0 and d = `d_initial`, over one pair of projections."""
        options: VeRAOptions = options_of(config.method, config.options)
        r, (m, n) = common_rank(config, "VeRA"), (max(layer.shape[axis] for layer in layers) for axis in (0, 1))
        shared = Projections.draw(m, n, r, options.projection_prng_key)
        return {
            layer.name: cls(
                torch.zeros(layer.shape[0]),
                torch.full((r,), options.d_initial),
                layer.shape[1],
                shared,
                config.lora_dropout,
            )
            for layer in layers
        }

    @property
    def r(self) -> int:
        """Length of d."""
        return len(self.vera_lambda_d)

    def _learn(self, n: int) -> None:
        """in_features where the file did not tell it."""
        self.shape = (self.shape[0], self.shape[1] or n)

    def _pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """This layer's part of A and of B."""
        m, n = self.shape
        if not n:
            raise AdapterError(
                f"compute the change of a VeRA adapter ({m}x?): its file does not tell in_features. Call "
                "delta_weight(weight), or the adapted layer once."
            )
        return self.projections.a[:, :n].to(dtype), self.projections.b[:m].to(dtype)

    def delta(self, x: Tensor) -> Tensor:
        """b ∘ B(d ∘ A x) for x (..., n): (..., m)."""
        self._learn(x.shape[-1])
        a, b = self._pair(x.dtype)
        inner = F.linear(x, a) * self.vera_lambda_d.to(x.dtype)
        return F.linear(inner, b) * (self.scaling * self.vera_lambda_b.to(x.dtype))

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(diag(b)·B, diag(d)·A)."""
        a, b = self._pair(self.vera_lambda_d.dtype)
        return self.scaling * self.vera_lambda_b[:, None] * b, self.vera_lambda_d[:, None] * a

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """diag(b)·B·diag(d)·A (m, n)."""
        if weight is not None:
            self._learn(weight.shape[1])
        left, right = self.low_rank()
        return left @ right

    def tensors(self) -> dict[str, Tensor]:
        """b and d by PEFT's names."""
        return {"vera_lambda_b": self.vera_lambda_b.detach(), "vera_lambda_d": self.vera_lambda_d.detach()}

    @classmethod
    def shared_tensors(cls, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
        """A and B, once (PEFT's `save_projection`)."""
        first = next(iter(adapters.values()))
        assert isinstance(first, VeRA)
        return {"vera_A": first.projections.a, "vera_B": first.projections.b}

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """Raises: AdapterError: a layer alone has no projections; `load_all` is given them."""
        raise AdapterError(f"load the VeRA adapter of {module}: its projections lie beside it. Call load_all.")

    @classmethod
    def load_all(
        cls, tensors: Mapping[str, Mapping[str, Tensor]], shared: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Self]:
        """Every layer over the stored projections; in_features by our own files, else by the first input.

        Raises:
            AdapterError: the file holds no projections (PEFT's `save_projection: false`).
        """
        if "vera_A" not in shared or "vera_B" not in shared:
            raise AdapterError(
                "load a VeRA adapter: its file holds no vera_A and vera_B. Save it with save_projection: true."
            )
        projections = Projections(shared["vera_A"].float(), shared["vera_B"].float())
        shapes, dropout = shapes_from(config), dropout_of(config, "vera_dropout")
        made = {}
        for module, named in tensors.items():
            b, d = named["vera_lambda_b"].float(), named["vera_lambda_d"].float()
            made[module] = cls(b, d, shapes.get(module, (len(b), 0))[1], projections, dropout)
        return made

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """As `peft.VeraConfig` names them."""
        options: VeRAOptions = options_of(config.method, config.options)
        return {
            "d_initial": options.d_initial,
            "projection_prng_key": options.projection_prng_key,
            "save_projection": True,
            "vera_dropout": config.lora_dropout,
            "fan_in_fan_out": False,
            "bias": "none",
            "init_weights": True,
        }
