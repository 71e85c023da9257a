"""Configuration of decompose, quantize and the adapter, importable without torch.

Fields are part of the *result* (they enter a stage's key) unless annotated with `EXECUTION`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval

from lowrank.options import STRICT as STRICT

EXECUTION = "execution"
"""Annotation of a field that may change how a result is made, never what it is; it stays out of every key."""


@dataclass(frozen=True, kw_only=True)
class DecomposeConfig:
    """Decomposition of every target; set one of `rank`, `energy`, `error` and `budget` where the method has a rank."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    method: Literal[
        "randomized_svd",
        "exact_svd",
        "block_krylov",
        "one_pass",
        "als",
        "hadamard",
        "kronecker",
        "khatri_rao",
        "khatri_rao_low_rank",
        "cp",
        "tucker",
    ] = "randomized_svd"
    """Family and algorithm; `rankline methods` lists them with what each can do."""
    mode: Literal["split", "replace"] = "split"
    """`split` keeps the factors beside the quantized rest; `replace` puts them in W's place, for finetune to heal."""
    rank: Annotated[int, Ge(1)] | None = None
    """Fixed rank of every tensor, within the bound of the method (SVD: min(m, n))."""
    energy: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Smallest rank that keeps this share of ‖W‖²_F, in (0, 1]."""
    error: Annotated[float, Interval(ge=0, lt=1)] | None = None
    """Smallest rank whose relative Frobenius error is at most this, in [0, 1)."""
    budget: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Share of the targets' numbers that all factors together may hold, in (0, 1]; spectra choose every rank."""
    max_rank: Annotated[int, Ge(1)] | None = None
    """Upper bound of the rank that `energy`, `error` or `budget` choose; null disables it."""
    options: dict[str, Any] = field(default_factory=dict)
    """The method's own options, for example `n_iter` and `oversampling` of `randomized_svd`."""
    stack: Literal["layers", "projections"] | None = None
    """What `cp` and `tucker` stack: one projection over all `layers`, or the equal-shaped `projections` of a layer."""
    seed: int = 0
    """Seed of the random test matrix."""
    block_bytes: Annotated[int, Ge(1)] = 64 * 1024 * 1024
    """Rows of a tensor are cut into blocks of at most this many fp32 bytes; nothing else decides the blocking."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """`all-linear` (every linear layer but the output head), or names and regular expressions of modules."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """4-bit NormalFloat quantization of every target tensor."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    method: Literal["nf4", "qpissa", "loftq", "lq_lora", "lplr"] = "qpissa"
    """`nf4` quantizes W; `qpissa` quantizes the residual W − LR of the decomposition and keeps L and R. The others fit
    L and R to what quantizing leaves, and in turn: `loftq` from NF4(W), `lq_lora` from the decomposition; `lplr` holds
    L and R in 4 bits too. The best round is kept, and plain NF4 where none is better."""
    part: Literal["low_rank", "structured"] = "low_rank"
    """`low_rank` keeps the decomposition as a pair L, R, for `lora` and its kin. `structured` keeps a Hadamard,
    Kronecker or Khatri-Rao product as it is, for the adapter family of that form."""
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one absmax."""
    double_quant: bool = True
    """Quantize the absmax values too (about 4.13 instead of 4.5 bits a weight)."""
    max_rank: Annotated[int, Ge(1)] | None = None
    """Largest rank of the kept L and R; factors whose low-rank form is larger are cut. Null keeps them whole."""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """The method's own options, for example `n_iter` of `loftq`."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The trained low-rank adapter, in the field's usual names."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    method: Literal[
        "lora",
        "dora",
        "vera",
        "lora_fa",
        "lora_xs",
        "hira",
        "dylora",
        "lotr",
        "lorta",
        "adalora",
        "polar",
        "loha",
        "abba",
        "lokr",
        "krona",
        "lokh",
        "kradapter",
        "full",
    ] = "lora"
    """Adapter family; `rankline methods` lists them."""
    target_modules: Literal["all-linear"] | list[str] | None = field(default=None, hash=False)
    """Which of the decomposed layers get an adapter: regular expressions of the end of a module's name; null and
    `all-linear` are all. The others stay frozen as quantize left them, which needs quantize.method `nf4`."""
    r: Annotated[int, Ge(1)] | None = None
    """Rank. Null takes the rank of the split (`init: split`) per tensor, else 16 or the largest that is less."""
    lora_alpha: Annotated[float, Gt(0)] = 16.0
    """α of the scaling s = α/r, or α/√r with `use_rslora`."""
    use_rslora: bool = False
    """Rank-stabilised scaling s = α/√r (arXiv 2312.03732)."""
    rank_pattern: dict[str, Annotated[int, Ge(1)]] = field(default_factory=dict, hash=False)
    """Ranks of single modules: regular expression of the end of a module's name -> r."""
    alpha_pattern: dict[str, Annotated[float, Gt(0)]] = field(default_factory=dict, hash=False)
    """α of single modules, likewise."""
    lora_dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training; 0 disables it."""
    modules_to_save: list[str] | None = field(default=None, hash=False)
    """Modules that are trained whole beside the adapter and saved with it (`lm_head`, `norm`, `embed_tokens`): regular
    expressions of the end of a module's name; null is none. Quantized or adapted layers cannot be among them."""
    init: Literal["split", "kaiming", "gaussian", "orthogonal", "pissa", "milora", "olora"] = "split"
    """`split` starts from the part that quantize kept (at ΔW = 0 where it fell back). `kaiming` and `gaussian` start at
    ΔW = 0. `pissa`, `milora` and `olora` take their pair out of a dense base. Families that are no pair have a start of
    their own where there is no part, and read this as `kaiming`."""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """The family's own options, for example `factor` of `lokr`."""
    seed: int = 0
    """Seed of every random start."""

    def __post_init__(self) -> None:
        if self.target_modules == "all-linear":
            object.__setattr__(self, "target_modules", None)  # one key for one meaning
