"""Errors a user of `lowrank` can meet. Every one is a `LowRankError` and pickles across processes.

LowRankError
├── CheckpointError       a checkpoint that cannot be read, or that is refused
├── DecompositionError    a matrix that cannot be decomposed as asked
│   ├── RankError         a rank outside [1, min(m, n)]
│   └── NumericsError     non-finite input, or a factorisation that lost its footing
├── QuantizationError     a weight that cannot be quantized, or packed bytes that do not fit
└── AdapterError          an adapter that does not fit its base
"""


class LowRankError(Exception):
    """Base of every error of this package; the message says what, got, allowed and remedy."""


class CheckpointError(LowRankError):
    """A checkpoint is missing, damaged, of an unknown format, or refused (pickles)."""


class DecompositionError(LowRankError):
    """A matrix cannot be decomposed as asked."""


class RankError(DecompositionError):
    """A rank lies outside what the matrix and the method allow."""


class NumericsError(DecompositionError):
    """The input holds NaN or infinity, or an orthogonalisation failed beyond repair."""


class QuantizationError(LowRankError):
    """A weight cannot be quantized, or packed bytes do not fit their description."""


class AdapterError(LowRankError):
    """An adapter does not fit the base that it was given."""
