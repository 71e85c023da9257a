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
from lowrank.decompositions.spectral import spectral_error as spectral_error
from lowrank.decompositions.svd import EXACT_SVD, RANDOMIZED_SVD
from lowrank.decompositions.tucker import TUCKER

for method in (
    EXACT_SVD,
    RANDOMIZED_SVD,
    BLOCK_KRYLOV,
    ONE_PASS,
    ALS,
    HADAMARD,
    KRONECKER,
    KHATRI_RAO,
    KHATRI_RAO_LOW_RANK,
    CP,
    TUCKER,
):
    register(method)
