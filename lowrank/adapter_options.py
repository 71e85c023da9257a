"""Options of every adapter family, one frozen dataclass each, importable without torch.

They are what `finetune.adapter.options` of a pipeline holds; all are part of the result. `ADAPTER_OPTIONS` maps a
family's name to its class.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lowrank.options import STRICT, NoOptions, at_least


@dataclass(frozen=True, kw_only=True)
class DyLoRAOptions:
    """DyLoRA."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    r_min: int = 1
    """Smallest rank that is trained, >= 1 and at most r."""
    train: Literal["nested", "frozen"] = "nested"
    """`nested` trains the first b components at every draw of b, `frozen` the b-th alone."""
    eval_rank: int | None = None
    """Rank that answers outside of training, >= 1 and at most r; null takes r."""

    def __post_init__(self) -> None:
        at_least(1, r_min=self.r_min, eval_rank=self.eval_rank)


@dataclass(frozen=True, kw_only=True)
class AdaLoRAOptions:
    """AdaLoRA; its r is the rank that every layer starts with."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    target_r: int | None = None
    """Mean rank of a layer in the end, >= 1 and at most r; null takes two thirds of r."""
    initial_steps: int = 0
    """Optimizer steps before any rank is taken away, >= 0."""
    final_steps: int = 0
    """Last optimizer steps, in which the ranks no longer change, >= 0."""
    interval: int = 1
    """Optimizer steps between two choices of the ranks, >= 1."""
    beta1: float = 0.85
    """Smoothing of the importance |w · ∂L/∂w|, in (0, 1)."""
    beta2: float = 0.85
    """Smoothing of its uncertainty, in (0, 1)."""
    orthogonal_weight: float = 0.5
    """γ ≥ 0 of γ·(‖PᵀP − I‖² + ‖QQᵀ − I‖²), averaged over all P and Q; 0 disables it."""

    def __post_init__(self) -> None:
        at_least(0, initial_steps=self.initial_steps, final_steps=self.final_steps)
        at_least(0, orthogonal_weight=self.orthogonal_weight)
        at_least(1, target_r=self.target_r, interval=self.interval)
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 < value < 1:
                raise ValueError(f"{name} = {value}. Set 0 < {name} < 1.")


@dataclass(frozen=True, kw_only=True)
class PoLAROptions:
    """PoLAR."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    landing_weight: float = 1.0
    """λ >= 0 of the pull back to orthonormal columns in the landing direction."""

    def __post_init__(self) -> None:
        at_least(0, landing_weight=self.landing_weight)


@dataclass(frozen=True, kw_only=True)
class LoRTAOptions:
    """LoRTA."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    num_heads: int | None = None
    """Heads that the output of every layer is cut into, >= 1 and a divisor of m; null takes the divisor of m below √m
    that is nearest to it."""

    def __post_init__(self) -> None:
        at_least(1, num_heads=self.num_heads)


@dataclass(frozen=True, kw_only=True)
class LoRAXSOptions:
    """LoRA-XS."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    init_std: float = 1e-5
    """Standard deviation of R at the start, >= 0."""
    n_iter: int = 4
    """Power iterations of the randomized SVD of W, >= 0."""

    def __post_init__(self) -> None:
        at_least(0, init_std=self.init_std, n_iter=self.n_iter)


@dataclass(frozen=True, kw_only=True)
class VeRAOptions:
    """VeRA."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    d_initial: float = 0.1
    """First value of every entry of d, > 0; 0.1 or less."""
    projection_prng_key: int = 0
    """Seed of the shared frozen projections, >= 0; PEFT draws the same ones from it."""

    def __post_init__(self) -> None:
        at_least(0, projection_prng_key=self.projection_prng_key)
        if not self.d_initial > 0:
            raise ValueError(f"d_initial = {self.d_initial}. Set d_initial > 0.")


#: Options of every family by its name in `lowrank.adapters.registry.FAMILIES`.
ADAPTER_OPTIONS: dict[str, type[Any]] = {
    "lora": NoOptions,
    "dora": NoOptions,
    "vera": VeRAOptions,
    "lora_fa": NoOptions,
    "lora_xs": LoRAXSOptions,
    "hira": NoOptions,
    "dylora": DyLoRAOptions,
    "lotr": NoOptions,
    "lorta": LoRTAOptions,
    "adalora": AdaLoRAOptions,
    "polar": PoLAROptions,
}

#: Families that can start from the L and R that `quantize` took out of W.
TAKES_SPLIT = frozenset({"lora"})


def options_of(method: str, given: dict[str, Any]) -> Any:
    """The options of a family with `given` filled in.

    Raises:
        TypeError: an option that the family does not have.
        ValueError: a value out of range.
    """
    return ADAPTER_OPTIONS[method](**given)
