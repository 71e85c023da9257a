"""Low-rank decompositions of a `BlockMatrix`, behind one front and one registry."""

from lowrank.decompositions.front import decompose as decompose
from lowrank.decompositions.registry import METHODS as METHODS
from lowrank.decompositions.registry import Fit as Fit
from lowrank.decompositions.registry import Method as Method
from lowrank.decompositions.registry import Problem as Problem
from lowrank.decompositions.registry import register as register
from lowrank.decompositions.svd import exact_svd, randomized_svd, short_side, zero_svd
from lowrank.options import NoOptions, RandomizedOptions

register(
    Method(
        name="exact_svd",
        family="svd",
        fit=exact_svd,
        options=NoOptions,
        zero=zero_svd,
        max_rank=short_side,
        summary="the optimum; LAPACK, or the fp64 Gram of the short side",
    )
)
register(
    Method(
        name="randomized_svd",
        family="svd",
        fit=randomized_svd,
        options=RandomizedOptions,
        zero=zero_svd,
        max_rank=short_side,
        summary="subspace iteration with CholeskyQR2; for a rank well below min(m, n)",
    )
)
