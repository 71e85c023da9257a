"""Hadamard, Kronecker and Khatri-Rao products as the structured part of a split, kept in their own form.

The decomposition that made the factors fits them again to what quantizing leaves, with the same shapes and ranks.
"""

from typing import Any

from torch import Tensor

from lowrank.blocks import BlockMatrix
from lowrank.decompositions import METHODS, decompose
from lowrank.errors import QuantizationError
from lowrank.executor import SerialExecutor
from lowrank.factors import (
    Factors,
    HadamardFactors,
    KhatriRaoFactors,
    KroneckerFactors,
    LowRankKhatriRaoFactors,
    StructuredFactors,
)
from lowrank.rank import RankRule

#: Forms that a split can keep; each has the name of its decomposition.
PRODUCTS: tuple[type[StructuredFactors], ...] = (
    HadamardFactors,
    KroneckerFactors,
    KhatriRaoFactors,
    LowRankKhatriRaoFactors,
)


def kept_product(what: str, factors: Factors) -> StructuredFactors:
    """The product in fp32, in its own form.

    Raises:
        QuantizationError: the factors are of another form.
    """
    if not isinstance(factors, PRODUCTS):
        known = ", ".join(form.kind for form in PRODUCTS)
        raise QuantizationError(
            f"{what}: {type(factors).__name__} are no product that a split keeps; it keeps the forms {known}. "
            "Set quantize.part: low_rank, or another decompose.method."
        )
    named = factors.tensors().items()
    return type(factors).from_tensors({name: t.float() if t.is_floating_point() else t for name, t in named})


def refitted(name: str, like: StructuredFactors, matrix: Tensor) -> StructuredFactors:
    """What the decomposition of the form of `like` finds for `matrix` (m, n), with the shapes and ranks of `like`."""
    block = BlockMatrix.from_tensor(f"the rest of {name}", matrix)
    rule = None if METHODS[like.kind].max_rank is None else RankRule(rank=like.rank)
    found = decompose(block, method=like.kind, rule=rule, executor=SerialExecutor(), **_shape_options(like))
    return kept_product(name, found.factors)


def _shape_options(like: StructuredFactors) -> dict[str, Any]:
    if isinstance(like, KroneckerFactors):
        return {"shape": tuple(like.b.shape[1:]), "inner_rank": like.inner_rank, "padding": "zero"}
    if isinstance(like, KhatriRaoFactors):
        return {"shape": tuple(len(factor) for factor in like.factors), "padding": "zero"}
    if isinstance(like, LowRankKhatriRaoFactors):
        return {"shape": tuple(len(left) for left in like.left), "padding": "zero"}
    return {}
