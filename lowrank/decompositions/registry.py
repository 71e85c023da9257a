"""The one list of decomposition methods, and the types that a method takes and returns.

A method is one function `Problem -> Fit` in a file of its own family; `decompose` has validated its input,
measures the error and writes the report, so that a method holds the algorithm and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from lowrank.blocks import BlockMatrix
from lowrank.errors import DecompositionError
from lowrank.executor import Executor
from lowrank.factors import SVDFactors
from lowrank.rank import RankRule


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A validated decomposition: finite, not zero, rank within min(m, n).

    `total_energy` is ‖W‖_F² in fp64; `n_iter` and `oversampling` steer iterative methods and are free to be
    ignored.
    """

    matrix: BlockMatrix
    rule: RankRule
    total_energy: float
    seed: int
    n_iter: int
    oversampling: int
    executor: Executor


@dataclass(frozen=True)
class Fit:
    """Factors cut to the chosen rank, the singular values computed on the way, and the power iterations
    run."""

    factors: SVDFactors
    spectrum: Tensor
    n_iter: int
    converged: bool


Method: TypeAlias = Callable[[Problem], Fit]

#: Every method by the name that `decompose.method` takes.
METHODS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Add `method` under `name`.

    Raises:
        ValueError: when the name is taken.
    """
    if name in METHODS:
        raise ValueError(f"register decomposition {name!r}: the name is taken. Choose another one.")
    METHODS[name] = method


def find(name: str) -> Method:
    """The method called `name`.

    Raises:
        DecompositionError: when there is none; the message lists those that there are.
    """
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise DecompositionError(f"decompose: unknown method {name!r}. Set decompose.method to one of: {known}.")
    return METHODS[name]
