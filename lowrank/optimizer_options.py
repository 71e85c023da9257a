"""Options of every optimiser, one frozen dataclass each, importable without torch.

They are what `finetune.optimizer_options` of a pipeline holds; all are part of the result. `OPTIMIZER_OPTIONS` maps an
optimiser's name to its class, `PAIR_FAMILIES` names the adapters that the optimisers of pairs can train.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank.options import STRICT, NoOptions, at_least


@dataclass(frozen=True, kw_only=True)
class LoRAPlusOptions:
    """LoRA+: two learning rates."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    lr_ratio: float = 16.0
    """λ ≥ 1 of η_B = λ·η_A; `learning_rate` is η_A, so that half of the usual one is a good start."""

    def __post_init__(self) -> None:
        at_least(1, lr_ratio=self.lr_ratio)


@dataclass(frozen=True, kw_only=True)
class RiemannianOptions:
    """Riemannian (scaled) gradients."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    damping: float = 1e-2
    """Added to the diagonal of BᵀB and AAᵀ, relative to the mean of that diagonal, >= 0."""
    floor: float = 1e-4
    """Added to the diagonal as it is, >= 0: bounds the step while a factor is nearly 0, as B is where LoRA starts."""

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping, floor=self.floor)


@dataclass(frozen=True, kw_only=True)
class RefLoRAOptions:
    """RefLoRA: gradients of the balanced pair."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    damping: float = 1e-4
    """Added to the diagonal of BᵀB and AAᵀ, relative to the mean of that diagonal, >= 0."""
    floor: float = 1e-4
    """Added to the diagonal as it is, >= 0."""
    warmup_steps: int = 0
    """First steps that leave the gradients as they are, >= 0; about 100 where training starts from B = 0."""

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping, floor=self.floor, warmup_steps=self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class AltLoRAOptions:
    """AltLoRA: alternating projections, with a momentum that follows the factors. Its β is `betas[0]`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    damping: float = 1e-4
    """Added to the diagonal of BᵀB and AAᵀ, relative to the mean of that diagonal, >= 0."""
    floor: float = 1e-3
    """Added to the diagonal as it is, >= 0: bounds the step while a factor is nearly 0, as B is where LoRA starts."""

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping, floor=self.floor)


@dataclass(frozen=True, kw_only=True)
class LoRARITEOptions:
    """LoRA-RITE: Adam's moments in bases that do not depend on the factors. Its decays are `betas`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    epsilon: float = 1e-6
    """Added to the root of the second moment, >= 0, in units of the gradient of ΔW."""

    def __post_init__(self) -> None:
        at_least(0, epsilon=self.epsilon)


#: Options of every optimiser by its name in `lowrank.optimizers.registry.OPTIMIZERS`.
OPTIMIZER_OPTIONS: dict[str, type[Any]] = {
    "adamw": NoOptions,
    "lora_plus": LoRAPlusOptions,
    "riemannian": RiemannianOptions,
    "reflora": RefLoRAOptions,
    "altlora": AltLoRAOptions,
    "lora_rite": LoRARITEOptions,
}

#: Adapter families that train a pair A, B with ΔW = s·B·A and nothing else; all optimisers but AdamW need one.
PAIR_FAMILIES = frozenset({"lora"})


def pair_problem(optimizer: str, family: str) -> str | None:
    """Why `optimizer` cannot train `family`, or None where it can.

    Example:
        >>> pair_problem("adamw", "loha") is None, pair_problem("riemannian", "lora") is None
        (True, True)
        >>> pair_problem("riemannian", "loha") is None
        False
    """
    if optimizer == "adamw" or family in PAIR_FAMILIES:
        return None
    return (
        f"{optimizer!r} steps pairs A, B with ΔW = s·B·A, which {family!r} does not train. Allowed are adapters of "
        f"method {', '.join(sorted(PAIR_FAMILIES))}; set the optimizer to 'adamw', or the method to one of them."
    )
