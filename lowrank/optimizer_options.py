"""Options of every optimiser, one frozen dataclass each, importable without torch.

They are what `finetune.optimizer_options` of a pipeline holds; all are part of the result. `OPTIMIZER_OPTIONS` maps an
optimiser's name to its class, `PAIR_FAMILIES` names the adapters that the optimisers of pairs can train.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lowrank.config import AdapterConfig
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


@dataclass(frozen=True, kw_only=True)
class GaLoreOptions:
    """GaLore: moments of projected gradients. Its decays are `betas`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    rank: int = 128
    """r >= 1 of the projection; matrices with a side of at most r are stepped by plain AdamW."""
    update_proj_gap: int = 200
    """T >= 1, optimizer steps between two projections."""
    scale: float = 0.25
    """α > 0: what the projected steps are multiplied by."""
    proj_type: Literal["std", "left", "right"] = "std"
    """Which side of G (m, n) is projected: `left` keeps moments (r, n), `right` (m, r), `std` whichever is smaller."""
    n_iter: int = 2
    """Power iterations of the randomized SVD of G, >= 0; where 2(r + 8) > min(m, n) the SVD is exact. 2 find a subspace
    with 94% of the best one's energy in a Gaussian 512x1024 matrix at r = 128, and more where the spectrum decays."""

    def __post_init__(self) -> None:
        at_least(1, rank=self.rank, update_proj_gap=self.update_proj_gap)
        at_least(0, n_iter=self.n_iter)
        if not self.scale > 0:
            raise ValueError(f"scale = {self.scale}. Set scale > 0.")


#: Options of every optimiser by its name in `lowrank.optimizers.registry.OPTIMIZERS`.
OPTIMIZER_OPTIONS: dict[str, type[Any]] = {
    "adamw": NoOptions,
    "lora_plus": LoRAPlusOptions,
    "riemannian": RiemannianOptions,
    "reflora": RefLoRAOptions,
    "altlora": AltLoRAOptions,
    "lora_rite": LoRARITEOptions,
    "galore": GaLoreOptions,
}

#: Families whose every trained matrix has a side of r.
_SIDES_OF_R = frozenset({"lora", "dora", "lora_fa", "lora_xs", "hira", "dylora", "adalora", "loha"})

#: Adapter families that train a pair A, B with ΔW = s·B·A and nothing else; the optimisers of pairs need one.
PAIR_FAMILIES = frozenset({"lora"})


def optimizer_problem(optimizer: str, options: Mapping[str, Any], adapter: AdapterConfig) -> str | None:
    """Why `optimizer` with these options cannot train `adapter`, or None where it can or only shapes could tell.

    Example:
        >>> optimizer_problem("galore", {"rank": 4}, AdapterConfig(method="full")) is None
        True
        >>> optimizer_problem("galore", {"rank": 4}, AdapterConfig(method="vera"))
        "'galore' projects matrices, and 'vera' trains vectors. Set the optimizer to 'adamw'."
    """
    return _galore_problem(options, adapter) if optimizer == "galore" else pair_problem(optimizer, adapter.method)


def _galore_problem(options: Mapping[str, Any], adapter: AdapterConfig) -> str | None:
    family, rank = adapter.method, options.get("rank", GaLoreOptions.rank)
    if family == "vera":
        return "'galore' projects matrices, and 'vera' trains vectors. Set the optimizer to 'adamw'."
    if family == "polar":
        return "'galore' would undo the landing steps that keep X and Y of 'polar' orthonormal. Set it to 'adamw'."
    if family not in _SIDES_OF_R or adapter.r is None or not isinstance(rank, int):
        return None
    largest = max(adapter.r, *adapter.rank_pattern.values()) if adapter.rank_pattern else adapter.r
    if largest > rank:
        return None
    return (
        f"'galore' of rank {rank} projects nothing of {family!r} adapters of rank {largest}, and would be 'adamw'. Set "
        f"it to that, optimizer_options.rank below {largest}, or the method to 'full'."
    )


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
