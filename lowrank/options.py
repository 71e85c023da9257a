"""Options of every decomposition, one frozen dataclass per family, importable without torch.

They are what `decompose(..., **options)` takes and what `decompose.options` of a pipeline holds; all are part of the
result. `METHOD_OPTIONS` maps a method's name to its class.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

STRICT: dict[str, Any] = {"extra": "forbid", "use_attribute_docstrings": True}
"""How pydantic reads these dataclasses: unknown fields are errors, the text under a field is its description."""


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A method without options."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT


@dataclass(frozen=True, kw_only=True)
class RandomizedOptions:
    """Randomized subspace iteration."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    n_iter: int = 2
    """Power iterations, >= 0. 2 suits slowly decaying spectra; each adds two passes over W."""
    oversampling: int = 8
    """Columns of the sketch beyond the rank, >= 0; 8 or more."""

    def __post_init__(self) -> None:
        at_least(0, n_iter=self.n_iter, oversampling=self.oversampling)


@dataclass(frozen=True, kw_only=True)
class KrylovOptions:
    """Block Krylov."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    n_iter: int = 6
    """Steps after the first block, >= 1, each one pass over W; energy and error rules take more as they need."""
    block_size: int | None = None
    """Columns per step, >= 1; null takes a third of the rank."""
    oversampling: int = 8
    """Basis columns beyond the rank, at the least, >= 0."""

    def __post_init__(self) -> None:
        at_least(1, n_iter=self.n_iter, block_size=self.block_size)
        at_least(0, oversampling=self.oversampling)


@dataclass(frozen=True, kw_only=True)
class OnePassOptions:
    """One-pass sketch."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    oversampling: float = 2.0
    """Sketch columns per rank, >= 1: k = oversampling · r + 4, l = 2k + 1; 2 to 3."""

    def __post_init__(self) -> None:
        at_least(1, oversampling=self.oversampling)


@dataclass(frozen=True, kw_only=True)
class ALSOptions:
    """Alternating least squares."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    n_iter: int = 50
    """Most sweeps, >= 1."""
    tol: float = 1e-6
    """Stop when a sweep lowers the objective by less than this share of ‖W‖², >= 0."""
    ridge: float = 0.0
    """λ ≥ 0 of λ(‖L‖² + ‖R‖²), in units of the entries; its fixed point soft-thresholds the singular values by λ."""
    weighted_ridge: bool = True
    """Under weights, λ times the number of observed entries of the row or column (ALS-WR)."""
    nonnegative: bool = False
    """Both factors ≥ 0."""

    def __post_init__(self) -> None:
        at_least(1, n_iter=self.n_iter)
        at_least(0, tol=self.tol, ridge=self.ridge)


@dataclass(frozen=True, kw_only=True)
class HadamardOptions:
    """Hadamard product of two low-rank matrices."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    n_iter: int = 200
    """Most sweeps of every start, >= 1."""
    tol: float = 1e-6
    """Stop when sweeps lower the relative error by less than this, >= 0."""
    ridge: float = 1e-5
    """λ ≥ 0 per observed entry of a row or column, with W in units of its root mean square. Without any, dense fits can
    drift to huge factors that cancel; masked ones need about 0.001."""
    restarts: int = 0
    """Further random starts beside the one from √|W|, >= 0; the best is kept, by held-out error where there is one."""
    held_out: float = 0.0
    """Under weights: share of the observed entries held out to stop early, in [0, 0.5)."""

    def __post_init__(self) -> None:
        at_least(1, n_iter=self.n_iter)
        at_least(0, tol=self.tol, ridge=self.ridge, restarts=self.restarts, held_out=self.held_out)
        if self.held_out >= 0.5:
            raise ValueError(f"held_out = {self.held_out}. Set held_out < 0.5.")


@dataclass(frozen=True, kw_only=True)
class KroneckerOptions:
    """Sum of Kronecker products."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    shape: tuple[int, int] | None = None
    """(m₁, n₁) of the first factors; null compares the shapes that divide W and takes one (`kronecker_shapes`)."""
    inner_rank: int | None = None
    """Rank of the second factors (the LoKr form), >= 1; null leaves them full."""
    solver: Literal["svd", "als"] = "svd"
    """Randomized SVD of the rearrangement, or alternating least squares; weights and an inner rank always alternate."""
    n_iter: int = 50
    """Most sweeps where the fit alternates, >= 1."""
    tol: float = 1e-6
    """Stop when a sweep lowers the relative error by less than this, >= 0."""
    padding: Literal["error", "zero"] = "error"
    """What to do with a matrix that `shape` does not divide: refuse it, or pad with zeros (under weights, with missing
    entries) and cut again."""

    def __post_init__(self) -> None:
        at_least(1, n_iter=self.n_iter, inner_rank=self.inner_rank)
        at_least(1, shape=None if self.shape is None else min(self.shape))
        at_least(0, tol=self.tol)


@dataclass(frozen=True, kw_only=True)
class KhatriRaoOptions:
    """Column-wise Kronecker (Khatri-Rao) products."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    shape: tuple[int, ...] | None = None
    """Rows (m₁, …, m_L) of the factors, with m₁·…·m_L = m; null takes the two divisors nearest √m."""
    n_iter: int = 50
    """Most sweeps where the fit alternates, >= 1."""
    tol: float = 1e-6
    """Stop when a sweep lowers the relative error by less than this, >= 0."""
    padding: Literal["error", "zero"] = "error"
    """What to do when m₁·…·m_L > m: refuse it, or pad with zeros (missing entries under weights) and cut again."""

    def __post_init__(self) -> None:
        at_least(1, n_iter=self.n_iter, shape=None if self.shape is None else min(self.shape, default=0))
        at_least(0, tol=self.tol)


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """What CP and Tucker of matrices stacked along further modes share."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    depth: int | tuple[int, ...] = 1
    """Number of matrices that are stacked on top of each other in W, >= 1; it divides m. Several numbers are the
    lengths of as many modes, row-major: (kh, kw) for a convolution kernel that was stacked by `stack_kernel`."""
    n_iter: int = 50
    """Most sweeps, >= 1."""
    tol: float = 1e-6
    """Stop when a sweep lowers the relative error by less than this, >= 0."""

    def __post_init__(self) -> None:
        at_least(1, depth=min(self.depths, default=0), n_iter=self.n_iter)
        at_least(0, tol=self.tol)

    @property
    def depths(self) -> tuple[int, ...]:
        """`depth` as lengths of modes."""
        return (self.depth,) if isinstance(self.depth, int) else tuple(self.depth)


@dataclass(frozen=True, kw_only=True)
class CPOptions(StackOptions):
    """CP by alternating least squares."""

    start: Literal["compressed", "random"] = "compressed"
    """First factors: CP of the matrices projected on their leading row and column spaces, or random ones."""
    extrapolate: bool = True
    """Start a sweep beyond the last one along the last step, and take the step back where that raised the error."""


@dataclass(frozen=True, kw_only=True)
class TuckerOptions(StackOptions):
    """Tucker by higher-order orthogonal iteration."""

    depth_rank: int | None = None
    """Rank of the depth mode, >= 1 and at most the depth; null leaves that mode full."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, depth_rank=self.depth_rank)


def at_least(bound: float, **values: float | None) -> None:
    """Refuse values below `bound`; None is not a value.

    Raises:
        ValueError: naming the option, what was got and what is allowed.
    """
    for name, value in values.items():
        if value is not None and not value >= bound:
            raise ValueError(f"{name} = {value} < {bound:g}. Set {name} >= {bound:g}.")


#: Every decomposition by the name that `decompose.method` takes, with its options.
METHOD_OPTIONS: dict[str, type] = {
    "exact_svd": NoOptions,
    "randomized_svd": RandomizedOptions,
    "block_krylov": KrylovOptions,
    "one_pass": OnePassOptions,
    "als": ALSOptions,
    "hadamard": HadamardOptions,
    "kronecker": KroneckerOptions,
    "khatri_rao": KhatriRaoOptions,
    "khatri_rao_low_rank": KhatriRaoOptions,
    "cp": CPOptions,
    "tucker": TuckerOptions,
}

_ANY = frozenset({"rank", "energy", "error"})
_FIXED = frozenset({"rank"})

#: Which of rank, energy and error every method can follow; none for a family that knows no rank.
RULES: dict[str, frozenset[str]] = {
    "exact_svd": _ANY,
    "randomized_svd": _ANY,
    "block_krylov": _ANY,
    "one_pass": _FIXED,
    "als": _ANY,
    "hadamard": _FIXED,
    "kronecker": _ANY,
    "khatri_rao": frozenset(),
    "khatri_rao_low_rank": _FIXED,
    "cp": _FIXED,
    "tucker": _FIXED,
}

#: Methods of plain rank r(m + n), whose ranks a budget over the whole model can choose from spectra.
BUDGETED = frozenset({"exact_svd", "randomized_svd", "block_krylov", "one_pass", "als"})
