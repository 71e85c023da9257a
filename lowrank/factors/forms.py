"""Every form of factors, imported once, so that a file of any of them can be opened."""

import lowrank.factors.hadamard
import lowrank.factors.khatri_rao
import lowrank.factors.kronecker
import lowrank.factors.stacked
import lowrank.factors.svd  # noqa: F401
