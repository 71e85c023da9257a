"""How a matrix was fitted, and how well."""

from dataclasses import dataclass

from torch import Tensor

from lowrank.factors.base import Factors


@dataclass(frozen=True)
class FitReport:
    """How a matrix was fitted, and how well.

    Attributes:
        method: registry name.
        rank: the family's own rank of the factors.
        n_iter: power iterations or sweeps that were run; 0 for a direct method.
        relative_error: ‖W − Ŵ‖_F / ‖W‖_F, measured a posteriori (over the weights where there are some); 0 for a
            zero matrix.
        explained_energy: 1 − relative_error².
        converged: whether the rank rule was met and the iteration, where there is one, came to rest.
        reason: why the method stopped, in words.
        num_parameters: numbers that the factors hold.
        history: relative error after every sweep of an alternating method, empty for the others.
        seed: of the random numbers.
        seconds: wall time; kept out of every saved factor and every hash.
    """

    method: str
    rank: int
    n_iter: int
    relative_error: float
    explained_energy: float
    converged: bool
    reason: str
    num_parameters: int
    history: tuple[float, ...]
    seed: int
    seconds: float


@dataclass(frozen=True)
class Decomposition:
    """The factors of the tensor `name`, their fit, and the leading singular values that were computed on the way
    (empty where a method computes none)."""

    name: str
    factors: Factors
    report: FitReport
    spectrum: Tensor
