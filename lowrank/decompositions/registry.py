"""The one list of decomposition methods, and the types that a method takes and returns.

A method is one function `Problem -> Fit` in a file of its own family, with a frozen dataclass of options in
`lowrank.config`; `decompose` has validated its input, measures the error and writes the report, so that a method
holds the algorithm and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank.blocks import BlockMatrix
from lowrank.errors import DecompositionError
from lowrank.executor import Executor
from lowrank.factors import Factors
from lowrank.rank import RankRule


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A validated decomposition: finite, not zero, rank within the family's bound.

    Attributes:
        matrix: W, its blocks already with the executor.
        weights: P >= 0 in the same row blocks as W (0 = missing), or None; only for methods that are `weighted`.
            Entries of W where P is 0 are 0.
        rule: rank, energy or error; rank 1 for a method without a rank.
        total_energy: ‖√P ∘ W‖_F² in fp64, > 0.
        seed: of everything random.
        options: an instance of the method's own options dataclass.
        executor: where blocks are read and multiplied.
    """

    matrix: BlockMatrix
    weights: BlockMatrix | None
    rule: RankRule
    total_energy: float
    seed: int
    options: Any
    executor: Executor

    @property
    def rank(self) -> int:
        """The fixed rank that the rule asks for, for methods that take no other rule."""
        if self.rule.rank is None:
            raise DecompositionError("a method without energy and error rules got one. This is a bug.")
        return self.rule.rank


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a method found.

    Attributes:
        factors: cut to the chosen rank, in the compute dtype.
        n_iter: power iterations or sweeps that were run; 0 for a direct method.
        converged: whether the rule was met and the iteration came to rest.
        reason: why it stopped, in words.
        spectrum: singular values computed on the way, non-increasing; empty where there are none.
        history: relative error after every sweep; empty for a method that does not sweep.
        projection_energy: ‖Ŵ‖² in fp64 when Ŵ is an orthogonal projection of W, so that ‖W − Ŵ‖² = ‖W‖² − ‖Ŵ‖²;
            None otherwise, and the residual is then always computed by blocks.
    """

    factors: Factors
    n_iter: int = 0
    converged: bool = True
    reason: str = "direct"
    spectrum: Tensor = field(default_factory=lambda: torch.empty(0))
    history: tuple[float, ...] = ()
    projection_energy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """One decomposition.

    Attributes:
        name: what `decompose.method` takes.
        family: svd, als, hadamard, kronecker, khatri_rao, cp or tucker.
        fit: the algorithm.
        options: frozen dataclass of its options, every field with a default.
        zero: factors of a zero matrix of this shape and compute dtype at this rank.
        max_rank: largest rank for (shape, options), or None when the family knows no rank.
        rules: which of rank, energy and error it can follow; empty when the family knows no rank.
        weighted: whether it fits under weights (and so with missing entries).
        low_rank: whether its factors always have a low-rank form, which `quantize` and the adapter's split
            initialisation start from: "exact", "expanded" (a larger rank, exact by an identity) or "none".
        summary: one line for users.
    """

    name: str
    family: str
    fit: Callable[[Problem], Fit]
    options: type
    zero: Callable[[tuple[int, int], torch.dtype, int, Any], Factors]
    max_rank: Callable[[tuple[int, int], Any], int] | None
    rules: frozenset[str] = frozenset({"rank", "energy", "error"})
    weighted: bool = False
    low_rank: str = "exact"
    summary: str = ""


#: Every method by the name that `decompose.method` takes.
METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add `method` under its name.

    Raises:
        ValueError: when the name is taken.
    """
    if method.name in METHODS:
        raise ValueError(f"register decomposition {method.name!r}: the name is taken. Choose another one.")
    METHODS[method.name] = method


def find(name: str) -> Method:
    """The method called `name`.

    Raises:
        DecompositionError: when there is none; the message lists those that there are.
    """
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise DecompositionError(f"decompose: unknown method {name!r}. Set decompose.method to one of: {known}.")
    return METHODS[name]
