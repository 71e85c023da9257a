"""Every form of factors, imported once, so that a file of any of them can be opened."""

import lowrank.factors.svd  # noqa: F401
