"""AdaLoRA: ΔW = s·P·diag(e)·Q with near-orthonormal P (m, r), Q (r, n), and the budget that decides which e stay.

Source: Zhang et al., arXiv 2303.10512, eq. 3, 4 and 7-12; names, starts and the scaling α/(r + 1e-5) as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.adapter_options import AdaLoRAOptions, options_of
from lowrank.adapters.base import Adapter, Export, Layer, require_fit
from lowrank.adapters.settings import common_rank, dropout_of
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError


class AdaLoRA(Adapter):
    """ΔW = s·P·diag(e)·Q; a component that the budget took away has e = 0."""

    peft_type: ClassVar[str] = "ADALORA"
    prefix: ClassVar[str] = "lora_"
    export: ClassVar[Export] = "exact"

    def __init__(self, q: Tensor, p: Tensor, e: Tensor, scaling: float, dropout: float = 0.0) -> None:
        """Args: q: Q (r, n). p: P (m, r). e: (r, 1). scaling: s. dropout: on the input while training, in [0, 1)."""
        require_fit("AdaLoRA", Q=(q, "rn"), P=(p, "mr"), e=(e, "r1"))
        super().__init__((p.shape[0], q.shape[1]), scaling, dropout)
        self.lora_a = nn.Parameter(q)
        self.lora_b = nn.Parameter(p)
        self.lora_e = nn.Parameter(e)
        self.penalty_weight = 0.0
        """γ over the number of P and Q in the model; only `initial_all` sets it."""

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """The adapter of a model of one layer."""
        return cls.initial_all([layer], config)[layer.name]

    @classmethod
    def initial_all(cls, layers: Sequence[Layer], config: AdapterConfig) -> dict[str, Self]:
        """P, Q ~ N(0, 0.02²), e = 0.

        Raises:
            AdapterError: r > min(m, n), which has no r orthonormal columns; target_r > r; or an alpha_pattern, which
                PEFT does not follow here.
        """
        r, options, made = common_rank(config, "AdaLoRA"), options_of(config.method, config.options), {}
        target_rank(options, r)
        if config.alpha_pattern:
            raise AdapterError(
                f"initialise AdaLoRA: its layers share one alpha, got alpha_pattern {dict(config.alpha_pattern)}. "
                "Set finetune.adapter.lora_alpha instead."
            )
        for layer in layers:
            (m, n), generator = layer.shape, layer.generator(config.seed)
            if r > min(m, n):
                raise AdapterError(
                    f"initialise {layer.what}: rank {r} > {min(m, n)}. Set finetune.adapter.r <= {min(m, n)}."
                )
            q, p = torch.randn(r, n, generator=generator) * 0.02, torch.randn(m, r, generator=generator) * 0.02
            adapter = cls(q, p, torch.zeros(r, 1), _scaling(config.lora_alpha, r), config.lora_dropout)
            adapter.penalty_weight = options.orthogonal_weight / (2 * len(layers))
            made[layer.name] = adapter
        return made

    @property
    def r(self) -> int:
        """Rank, of the components taken away too."""
        return len(self.lora_e)

    def delta(self, x: Tensor) -> Tensor:
        """s·P·diag(e)·Q·x for x (..., n): (..., m)."""
        inner = F.linear(x, self.lora_a.to(x.dtype)) * self.lora_e[:, 0].to(x.dtype)
        return F.linear(inner, self.lora_b.to(x.dtype)) * self.scaling

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(s·P·diag(e), Q)."""
        return self.scaling * (self.lora_b * self.lora_e[:, 0]), self.lora_a

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """s·P·diag(e)·Q (m, n)."""
        del weight
        left, right = self.low_rank()
        return left @ right

    def penalty(self) -> Tensor | None:
        """This layer's part of γ times the mean of ‖PᵀP − I‖² and ‖QQᵀ − I‖² over all layers."""
        if not self.penalty_weight:
            return None
        grams = (self.lora_b.T @ self.lora_b, self.lora_a @ self.lora_a.T)
        eye = torch.eye(self.r, dtype=self.lora_a.dtype, device=self.lora_a.device)
        return self.penalty_weight * ((grams[0] - eye).square().sum() + (grams[1] - eye).square().sum())

    def tensors(self) -> dict[str, Tensor]:
        """Q, P and e by PEFT's names."""
        return {"lora_A": self.lora_a.detach(), "lora_B": self.lora_b.detach(), "lora_E": self.lora_e.detach()}

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """A stored triple. PEFT leaves out the components that were taken away; where none is left, one stays as zeros.

        The scaling is that of the rank at the start, as in training.
        """
        q, p, e = (tensors[f"lora_{name}"].float() for name in "ABE")
        r = int(config["init_r"])
        require_fit("AdaLoRA", Q=(q, "rn"), P=(p, "mr"), e=(e, "r1"))
        if not len(e):  # expanded: a file may name any size of what holds no numbers
            q, p, e = (torch.zeros(1, 1).expand(size) for size in ((1, q.shape[1]), (len(p), 1), (1, 1)))
        return cls(q, p, e, _scaling(float(config["lora_alpha"]), r), dropout_of(config))

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """As `peft.AdaLoraConfig` names them.

        `total_step` is the least that PEFT accepts, for it belongs to training; nothing reads it afterwards.
        """
        options: AdaLoRAOptions = options_of(config.method, config.options)
        r = common_rank(config, "AdaLoRA")
        return {
            "init_r": r,
            "target_r": target_rank(options, r),
            "tinit": options.initial_steps,
            "tfinal": options.final_steps,
            "deltaT": options.interval,
            "beta1": options.beta1,
            "beta2": options.beta2,
            "orth_reg_weight": options.orthogonal_weight,
            "total_step": options.initial_steps + options.final_steps + 1,
            "rank_pattern": None,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "fan_in_fan_out": False,
            "bias": "none",
            "init_lora_weights": True,
        }


def target_rank(options: AdaLoRAOptions, r: int) -> int:
    """The mean rank in the end of layers that start with rank r.

    Raises:
        AdapterError: it is larger than r.
    """
    target = options.target_r or max(1, 2 * r // 3)
    if target > r:
        raise AdapterError(
            f"plan AdaLoRA: target_r = {target} > r = {r}. Set finetune.adapter.options.target_r <= {r}."
        )
    return target


def _scaling(alpha: float, r: int) -> float:
    """PEFT divides by the rank plus 1e-5."""
    return alpha / (r + 1e-5)
