"""Low-rank decompositions of a `BlockMatrix`, behind one front and one registry."""

from lowrank.decompositions.als import ALS
from lowrank.decompositions.cp import CP
from lowrank.decompositions.front import decompose as decompose
from lowrank.decompositions.hadamard import HADAMARD
from lowrank.decompositions.khatri_rao import KHATRI_RAO
from lowrank.decompositions.khatri_rao_low_rank import KHATRI_RAO_LOW_RANK
from lowrank.decompositions.kronecker import KRONECKER
from lowrank.decompositions.kronecker_shapes import kronecker_shapes as kronecker_shapes
from lowrank.decompositions.krylov import BLOCK_KRYLOV
from lowrank.decompositions.ratings import fit_ratings as fit_ratings
from lowrank.decompositions.ratings_model import RatingsModel as RatingsModel
from lowrank.decompositions.ratings_model import RatingsReport as RatingsReport
from lowrank.decompositions.registry import METHODS as METHODS
from lowrank.decompositions.registry import Fit as Fit
from lowrank.decompositions.registry import Method as Method
from lowrank.decompositions.registry import Problem as Problem
from lowrank.decompositions.registry import register as register
from lowrank.decompositions.sketch import ONE_PASS
from lowrank.decompositions.svd import exact_svd, randomized_svd, short_side, zero_svd
from lowrank.decompositions.tucker import TUCKER
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
register(ALS)
register(BLOCK_KRYLOV)
register(ONE_PASS)
register(CP)
register(TUCKER)
register(HADAMARD)
register(KRONECKER)
register(KHATRI_RAO)
register(KHATRI_RAO_LOW_RANK)
