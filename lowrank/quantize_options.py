"""Options of every quantization method, one frozen dataclass each, importable without torch.

They are what `split_weight(..., **options)` takes and what `quantize.options` of a pipeline holds; all are part of the
result. `QUANTIZE_OPTIONS` maps a method's name to its class.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank.options import STRICT, NoOptions, at_least


@dataclass(frozen=True, kw_only=True)
class QPiSSAOptions:
    """Low rank first."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    n_iter: int | None = None
    """Times that the rest is quantized, >= 1; between them L and R are fitted to what Q leaves. The best is kept.
    Null is 5 for a pair L, R, and 1 for a kept product, which every further round decomposes from the beginning."""

    def __post_init__(self) -> None:
        at_least(1, n_iter=self.n_iter)


@dataclass(frozen=True, kw_only=True)
class LoftQOptions:
    """Quantized first."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    n_iter: int = 5
    """Rounds of Q and then L and R, >= 1. More are not always better: the best is kept."""

    def __post_init__(self) -> None:
        at_least(1, n_iter=self.n_iter)


@dataclass(frozen=True, kw_only=True)
class LQLoRAOptions:
    """Alternating until the error rises."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    n_iter: int = 20
    """Most rounds, >= 1; it ends before where a round raised the error."""

    def __post_init__(self) -> None:
        at_least(1, n_iter=self.n_iter)


@dataclass(frozen=True, kw_only=True)
class LPLROptions:
    """L and R in 4 bits as well."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    n_iter: int = 5
    """Rounds of L, R and then Q, >= 1; the best is kept."""

    def __post_init__(self) -> None:
        at_least(1, n_iter=self.n_iter)


#: Options of every method by its name in `lowrank.quantization.METHODS`.
QUANTIZE_OPTIONS: dict[str, type[Any]] = {
    "nf4": NoOptions,
    "qpissa": QPiSSAOptions,
    "loftq": LoftQOptions,
    "lq_lora": LQLoRAOptions,
    "lplr": LPLROptions,
}
