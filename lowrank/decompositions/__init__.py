"""Low-rank decompositions of a `BlockMatrix`, behind one front and one registry."""

from lowrank.decompositions.front import decompose as decompose
from lowrank.decompositions.registry import METHODS as METHODS
from lowrank.decompositions.registry import Fit as Fit
from lowrank.decompositions.registry import Method as Method
from lowrank.decompositions.registry import Problem as Problem
from lowrank.decompositions.registry import register as register
from lowrank.decompositions.svd import exact_svd, randomized_svd

register("exact_svd", exact_svd)
register("randomized_svd", randomized_svd)
