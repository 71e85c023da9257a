"""Options of every adapter family, one frozen dataclass each, importable without torch.

They are what `finetune.adapter.options` of a pipeline holds; all are part of the result. `ADAPTER_OPTIONS` maps a
family's name to its class.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lowrank.config import AdapterConfig
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


@dataclass(frozen=True, kw_only=True)
class LoHAOptions:
    """LoHA."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    init: Literal["peft", "lycoris"] = "peft"
    """Start at ΔW = 0. `peft`: W2b = 0, the others Kaiming. `lycoris`: W2a = 0, W1a ~ N(0, 0.01), others N(0, 1)."""


@dataclass(frozen=True, kw_only=True)
class ABBAOptions:
    """ABBA."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    r1: int | None = None
    """Rank of the pair that starts as the SVD of W, >= 1; null takes r."""
    alpha1: float | None = None
    """α₁ > 0 of the scaling √α₁·√α₂, where α₂ is `lora_alpha`; null takes α₂."""

    def __post_init__(self) -> None:
        at_least(1, r1=self.r1)
        if self.alpha1 is not None and not self.alpha1 > 0:
            raise ValueError(f"alpha1 = {self.alpha1}. Set alpha1 > 0.")


@dataclass(frozen=True, kw_only=True)
class KronAOptions:
    """KronA."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    factor: int = -1
    """Rows and columns of W1, as near to this as divisors of m and n allow, >= 2; -1 takes those nearest the roots."""

    def __post_init__(self) -> None:
        if self.factor != -1:
            at_least(2, factor=self.factor)


@dataclass(frozen=True, kw_only=True)
class LoKrOptions(KronAOptions):
    """LoKr."""

    decompose_both: bool = False
    """W1 of low rank too, where r is less than half of its larger side."""
    init: Literal["peft", "lycoris"] = "peft"
    """Start at ΔW = 0. `peft`: W1 (or W1a) = 0, the others Kaiming. `lycoris`: W2 (or W2b) = 0, the others Kaiming."""


@dataclass(frozen=True, kw_only=True)
class LoKHOptions:
    """LoKH."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    form: Literal["low-rank", "chain"] = "low-rank"
    """`low-rank`: two factors of rank r, a LoRA of rank r². `chain`: free factors, of full rank, merge-only."""
    num_factors: int = 2
    """Factors of a chain, 2 to 4, where `shape` is null; `low-rank` takes 2."""
    shape: tuple[int, ...] | None = None
    """Rows (p₁, …, p_L) of the factors, >= 2 each, with product max(m, n); null takes the divisors nearest its root."""
    trim: bool = False
    """Allow rows whose product is above max(m, n), and leave out what is beyond; a null `shape` then takes roots."""

    def __post_init__(self) -> None:
        at_least(2, num_factors=self.num_factors, shape=None if self.shape is None else min(self.shape, default=0))
        count = self.num_factors if self.shape is None else len(self.shape)
        most = 2 if self.form == "low-rank" else 4
        if not 2 <= count <= most:
            raise ValueError(f"{count} factors of the form {self.form!r}. Set num_factors (or a shape of) 2 to {most}.")


@dataclass(frozen=True, kw_only=True)
class KRAdapterOptions:
    """KRAdapter."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    scale: float = 1.0
    """s > 0; `alpha_pattern` changes it for single modules, `lora_alpha` is not used."""

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale = {self.scale}. Set scale > 0.")


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
    "loha": LoHAOptions,
    "abba": ABBAOptions,
    "lokr": LoKrOptions,
    "krona": KronAOptions,
    "lokh": LoKHOptions,
    "kradapter": KRAdapterOptions,
    "full": NoOptions,
}

#: Families that can start from the L and R that `quantize` took out of W.
TAKES_SPLIT = frozenset({"lora", "dora", "dylora", "lora_fa"})


def options_of(method: str, given: dict[str, Any]) -> Any:
    """The options of a family with `given` filled in.

    Raises:
        TypeError: an option that the family does not have.
        ValueError: a value out of range.
    """
    return ADAPTER_OPTIONS[method](**given)


def full_problem(config: AdapterConfig) -> str | None:
    """The first field of `config` that a dense ΔW has no use for, and why; None where there is none.

    Example:
        >>> full_problem(AdapterConfig(method="full")) is None
        True
        >>> full_problem(AdapterConfig(method="full", r=8))
        "r: 8 with method 'full', whose dense ΔW has no rank and no scaling. Leave it out."
    """
    for name, unset in (("r", None), ("rank_pattern", {}), ("alpha_pattern", {}), ("use_rslora", False)):
        if (value := getattr(config, name)) != unset:
            return f"{name}: {value} with method 'full', whose dense ΔW has no rank and no scaling. Leave it out."
    return None
