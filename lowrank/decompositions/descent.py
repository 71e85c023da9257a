"""The stop rule of the fits that alternate exact minimisers: every sweep may only lower the error."""

from dataclasses import dataclass, field

import torch

#: Rounding of a measured relative error, in units of its own size and of ε.
_SLACK, _FLOOR = 1e-4, 100.0


@dataclass
class Descent:
    """Watches the relative error fall sweep by sweep.

    Attributes:
        n_iter: most sweeps.
        tol: rest is a sweep that lowers the relative error by less than this.
        dtype: of the computation; its ε is the error that counts as exact.
        history: relative error after every sweep so far.
    """

    n_iter: int
    tol: float
    dtype: torch.dtype
    history: list[float] = field(default_factory=list)

    def add(self, error: float) -> bool:
        """Note the error after a sweep; whether to stop."""
        eps = torch.finfo(self.dtype).eps
        last = self.history[-1] if self.history else float("inf")
        assert error <= last * (1 + _SLACK) + _FLOOR * eps, f"a sweep raised the relative error from {last} to {error}"
        self.history.append(error)
        return last - error < self.tol or error <= eps or len(self.history) >= self.n_iter

    @property
    def converged(self) -> bool:
        """Whether the last sweep was at rest."""
        if len(self.history) < 2:
            return bool(self.history) and self.history[-1] <= torch.finfo(self.dtype).eps
        return self.history[-2] - self.history[-1] < self.tol or self.history[-1] <= torch.finfo(self.dtype).eps

    @property
    def reason(self) -> str:
        """Why it stopped, in words."""
        if self.converged:
            return f"a sweep lowered the relative error by less than {self.tol:g}"
        return f"n_iter = {self.n_iter} sweeps ended before the error came to rest"
