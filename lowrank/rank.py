"""How many singular values to keep: a fixed rank, a share of the energy, or a bound on the error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.errors import RankError


@dataclass(frozen=True, kw_only=True)
class RankRule:
    """The smallest r that meets exactly one of `rank`, `energy` and `error`, and never more than `max_rank`.

    energy:  Σ_{i≤r} σᵢ² ≥ energy · ‖W‖_F²
    error:   ‖W − W_r‖_F ≤ error · ‖W‖_F, that is energy = 1 − error²

    Args:
        rank: fixed rank, at least 1.
        energy: share of ‖W‖_F² to explain, in (0, 1].
        error: bound on the relative Frobenius error, in [0, 1).
        max_rank: cap for `energy` and `error`, at least 1; None leaves min(m, n).

    Raises:
        RankError: when not exactly one rule is given, or a value lies outside its range.

    Example:
        >>> RankRule(energy=0.9).choose(torch.tensor([3.0, 2.0, 1.0]), total_energy=14.0)
        2
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    max_rank: int | None = None

    def __post_init__(self) -> None:
        given = {k: getattr(self, k) for k in ("rank", "energy", "error") if getattr(self, k) is not None}
        if len(given) != 1:
            raise RankError(f"rank rule: got {given or 'nothing'}. Set exactly one of rank, energy and error.")
        _require(self.rank is None or self.rank >= 1, f"rank = {self.rank}", "rank >= 1")
        _require(self.energy is None or 0 < self.energy <= 1, f"energy = {self.energy}", "energy in (0, 1]")
        _require(self.error is None or 0 <= self.error < 1, f"error = {self.error}", "error in [0, 1)")
        _require(self.max_rank is None or self.max_rank >= 1, f"max_rank = {self.max_rank}", "max_rank >= 1")

    @property
    def kind(self) -> str:
        """Which of `rank`, `energy` and `error` is set."""
        return next(name for name in ("rank", "energy", "error") if getattr(self, name) is not None)

    def choose(self, s: Tensor, total_energy: float) -> int:
        """The rank to keep of the singular values `s`.

        Args:
            s: (k,) non-increasing, k >= 1, the leading singular values.
            total_energy: ‖W‖_F², of all singular values.

        Returns:
            The smallest rank in [1, k] that meets the rule; k, or `max_rank`, when none does (see `met`).
        """
        if self.rank is not None:
            return self.cap(min(self.rank, len(s)))
        tail = total_energy - s.double().square().cumsum(0)
        enough = tail <= self._allowed_tail(total_energy)
        first = int(enough.int().argmax()) + 1 if bool(enough.any()) else len(s)
        return self.cap(first)

    def met(self, s: Tensor, total_energy: float) -> bool:
        """Whether keeping all of `s` meets the rule; a fixed rank is met by as many values."""
        if self.rank is not None:
            return len(s) >= self.cap(self.rank)
        return total_energy - float(s.double().square().sum()) <= self._allowed_tail(total_energy)

    def cap(self, rank: int) -> int:
        """`rank`, or `max_rank` when that is smaller."""
        return rank if self.max_rank is None else min(rank, self.max_rank)

    @property
    def tail_share(self) -> float:
        """Share of ‖W‖_F² that an energy or error rule lets go; 1 for a fixed rank."""
        if self.error is not None:
            return self.error**2
        return 1.0 - (self.energy or 0.0)

    def _allowed_tail(self, total_energy: float) -> float:
        """Energy that may be left out; the slack is the rounding of the sum itself."""
        return total_energy * (self.tail_share + 4 * torch.finfo(torch.float64).eps)


def resolvable_share(dtype: torch.dtype) -> float:
    """Smallest share of ‖W‖_F² that ‖W‖² − Σσ² still resolves when the factors are in `dtype`.

    Rounding of the factors leaves a few ε‖W‖² in the difference; 1e4 ε (a 3 % error in fp32) keeps four
    digits.
    """
    return 1e4 * torch.finfo(dtype).eps


def _require(condition: bool, got: str, allowed: str) -> None:
    if not condition:
        raise RankError(f"rank rule: got {got}. Set {allowed}.")
