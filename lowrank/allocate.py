"""Ranks for a whole model from spectra alone: where does one more number, byte or microsecond buy the most energy?

Minimise Σ_ℓ w_ℓ Σ_{i > r_ℓ} σ²_{ℓ,i} under Σ_ℓ cost_ℓ(r_ℓ) ≤ budget. Kept energy is concave in the rank, and the costs
here are linear or convex, so the Lagrangian picks for a price λ every step whose gain per cost, w σ²_{ℓ,r+1}/(m + n)
for parameters, exceeds λ. Taking steps in falling order of that ratio walks through all those optima.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lowrank.errors import RankError

#: Relative differences of gains below this are rounding of their sums.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Spectrum:
    """What the allocator knows of a matrix.

    Attributes:
        name: of the tensor.
        shape: (m, n).
        sigma: (k,) non-increasing, k <= min(m, n); all singular values, or the leading ones with `energy`.
        energy: ‖W‖_F²; None takes Σσ².
        importance: weight of its squared error, > 0. 1 counts absolute errors, 1/‖W‖_F² relative ones.
    """

    name: str
    shape: tuple[int, int]
    sigma: Tensor
    energy: float | None = None
    importance: float = 1.0

    @property
    def total_energy(self) -> float:
        """‖W‖_F²."""
        return float(self.sigma.double().square().sum()) if self.energy is None else self.energy


@dataclass(frozen=True)
class Roofline:
    """What a machine can do, and the work that it is given.

    Attributes:
        flops: peak, per second.
        bandwidth: of memory, bytes per second.
        batch: columns of x in y = L(R x): rows of activations that are multiplied together.
        bytes_per_number: of weights and activations.
    """

    flops: float
    bandwidth: float
    batch: int = 1
    bytes_per_number: float = 4.0

    def dense(self, shape: tuple[int, int]) -> float:
        """Seconds of y = W x, max(flops / peak, bytes / bandwidth)."""
        m, n = shape
        moved = (m * n + (m + n) * self.batch) * self.bytes_per_number
        return max(2 * m * n * self.batch / self.flops, moved / self.bandwidth)

    def factored(self, shape: tuple[int, int], rank: int) -> float:
        """Seconds of y = L (R x), the sum of both products; convex in the rank.

        Example:
            >>> machine = Roofline(flops=1e11, bandwidth=2e10)
            >>> round(machine.dense((1000, 1000)) / machine.factored((1000, 1000), 100), 2)
            4.96
        """
        m, n = shape
        return self.dense((rank, n)) + self.dense((m, rank)) if rank else 0.0


@dataclass(frozen=True)
class Allocation:
    """Ranks under a budget, and the errors that the spectra predict for truncated SVDs.

    Attributes:
        ranks: by tensor.
        spent: cost of the ranks, in the unit of the budget.
        budget: what was allowed.
        errors: predicted ‖W − W_r‖_F / ‖W‖_F by tensor.
        relative_error: √(Σ w ‖W − W_r‖² / Σ w ‖W‖²) over all tensors.
        best_error: no ranks within the bounds and the budget have a smaller `relative_error` than this; the two are
            equal where the budget ends with a whole step, and at most one step apart.
    """

    ranks: dict[str, int]
    spent: float
    budget: float
    errors: dict[str, float] = field(repr=False)
    relative_error: float
    best_error: float


@dataclass(frozen=True, kw_only=True)
class RankBounds:
    """Which ranks a tensor may get.

    Attributes:
        min_rank: for all, or by name (absent: 1); >= 0.
        max_rank: for all, or by name; absent or None: as long as the factors are smaller than the matrix, mn/(m + n).
        multiple: ranks are multiples of this, >= 1; bounds round inwards.
    """

    min_rank: int | Mapping[str, int] = 1
    max_rank: int | Mapping[str, int] | None = None
    multiple: int = 1

    def levels(self, spectrum: Spectrum) -> range:
        """The ranks that the tensor may get.

        Raises:
            RankError: when there is none.
        """
        (m, n), step = spectrum.shape, self.multiple
        given = self.max_rank.get(spectrum.name) if isinstance(self.max_rank, Mapping) else self.max_rank
        high = min(len(spectrum.sigma), max(1, m * n // (m + n)) if given is None else given)
        low = self.min_rank.get(spectrum.name, 1) if isinstance(self.min_rank, Mapping) else self.min_rank
        what = f"allocate a rank to {spectrum.name} ({m}x{n})"
        if step < 1 or low < 0:
            raise RankError(f"{what}: multiple = {step}, min_rank = {low}. Set multiple >= 1 and min_rank >= 0.")
        first, last = -(-low // step) * step, high // step * step
        if first > last:
            raise RankError(
                f"{what}: no multiple of {step} lies in [{low}, {high}]. Lower min_rank or multiple, or raise max_rank."
            )
        return range(first, last + 1, step)


def allocate_parameters(spectra: Sequence[Spectrum], budget: float, bounds: RankBounds | None = None) -> Allocation:
    """Ranks whose factors hold at most `budget` numbers, Σ r (m + n).

    Args:
        spectra: one per tensor, at least one, names distinct.
        budget: numbers in all factors together.
        bounds: of the ranks.

    Returns:
        The ranks. For equal shapes they are optimal; else within one step of the optimum, see `best_error`.

    Raises:
        RankError: when the least ranks exceed the budget, or a bound or a spectrum is out of range.

    Example:
        >>> flat = Spectrum("flat", (8, 8), torch.ones(8))
        >>> steep = Spectrum("steep", (8, 8), torch.tensor([9.0, 3.0, 1.5, 0.5, 0.1, 0.0, 0.0, 0.0]))
        >>> allocate_parameters([flat, steep], budget=5 * 16).ranks
        {'flat': 2, 'steep': 3}
    """
    return _allocate(spectra, budget, bounds, lambda shape, rank: rank * (shape[0] + shape[1]), "numbers")


def allocate_bytes(
    spectra: Sequence[Spectrum], budget: float, bounds: RankBounds | None = None, *, bytes_per_number: float = 2.0
) -> Allocation:
    """Ranks whose factors take at most `budget` bytes; as `allocate_parameters`.

    Args:
        spectra: one per tensor.
        budget: bytes of all factors together.
        bounds: of the ranks.
        bytes_per_number: 4 for fp32, 2 for bf16, 0.5 and a little for packed 4-bit factors.

    Raises:
        RankError: as `allocate_parameters`.
    """
    return _allocate(
        spectra, budget, bounds, lambda shape, rank: bytes_per_number * rank * (shape[0] + shape[1]), "bytes"
    )


def allocate_latency(
    spectra: Sequence[Spectrum], budget: float, machine: Roofline, bounds: RankBounds | None = None
) -> Allocation:
    """Ranks whose products y = L(Rx), one after the other, take at most `budget` seconds on a roofline.

    Args:
        spectra: one per tensor.
        budget: seconds for all tensors together.
        machine: peak, bandwidth and batch size, measured or from a data sheet.
        bounds: of the ranks.

    Raises:
        RankError: as `allocate_parameters`.

    Source: roofline model, Williams, Waterman and Patterson 2009 (doi:10.1145/1498765.1498785).
    """
    return _allocate(spectra, budget, bounds, machine.factored, "seconds")


@dataclass(frozen=True)
class _Step:
    """Raising one tensor to its next rank."""

    tensor: int
    rank: int
    gain: float
    cost: float

    @property
    def ratio(self) -> float:
        """Gain per cost."""
        return self.gain / self.cost


def _allocate(
    spectra: Sequence[Spectrum],
    budget: float,
    bounds: RankBounds | None,
    cost: Callable[[tuple[int, int], int], float],
    unit: str,
) -> Allocation:
    _check(spectra)
    levels = [(bounds or RankBounds()).levels(spectrum) for spectrum in spectra]
    ranks = [allowed[0] for allowed in levels]
    spent = sum(cost(spectrum.shape, rank) for spectrum, rank in zip(spectra, ranks))
    if not spent <= budget:
        raise RankError(
            f"allocate ranks to {len(spectra)} tensors: the least ranks take {spent:g} {unit}, the budget is "
            f"{budget:g}. Raise the budget to at least {spent:g}, or lower min_rank."
        )
    kept = [_kept_energy(spectrum) for spectrum in spectra]
    total = sum(spectrum.importance * spectrum.total_energy for spectrum in spectra)
    lost = total - sum(s.importance * k[r] for s, k, r in zip(spectra, kept, ranks))
    ranks, spent, gained, bound = _take(_steps(spectra, levels, kept, cost), ranks, spent, budget)
    return Allocation(
        ranks={spectrum.name: rank for spectrum, rank in zip(spectra, ranks)},
        spent=spent,
        budget=budget,
        errors={s.name: _root(s.total_energy - k[r], s.total_energy) for s, k, r in zip(spectra, kept, ranks)},
        relative_error=_root(lost - gained, total),
        best_error=_root(lost - bound, total),
    )


def _steps(
    spectra: Sequence[Spectrum],
    levels: Sequence[range],
    kept: Sequence[list[float]],
    cost: Callable[[tuple[int, int], int], float],
) -> list[_Step]:
    """Every possible step, by falling gain per cost; the steps of one tensor stay in order."""
    steps = []
    for index, (spectrum, allowed) in enumerate(zip(spectra, levels)):
        own: list[_Step] = []
        for low, high in pairwise(allowed):
            gain = spectrum.importance * (kept[index][high] - kept[index][low])
            step = _Step(index, high, gain, cost(spectrum.shape, high) - cost(spectrum.shape, low))
            # A step that is worth more than the one below it (the fixed cost of a product at rank 0) joins it.
            while own and step.ratio > own[-1].ratio * (1 + _ROUNDING):
                below = own.pop()
                step = _Step(index, high, step.gain + below.gain, step.cost + below.cost)
            own.append(step)
        # Rounding must not put a step before the one that it builds on.
        ratios = accumulate((step.ratio for step in own), min)
        steps += [(-ratio, step) for ratio, step in zip(ratios, own)]
    steps.sort(key=lambda pair: pair[0])
    return [step for _, step in steps]


def _take(
    steps: Sequence[_Step], ranks: Sequence[int], spent: float, budget: float
) -> tuple[list[int], float, float, float]:
    """Take steps while they fit: ranks, cost, gain, and a bound on the gain of any choice.

    The bound is the Lagrangian's: all steps up to the first that does not fit, and of that one the share that does.
    """
    taken, gained, bound = list(ranks), 0.0, -1.0
    closed: set[int] = set()
    slack = 1e-12 * abs(budget)
    for step in steps:
        if step.tensor in closed:
            continue
        if spent + step.cost <= budget + slack:
            taken[step.tensor], spent, gained = step.rank, spent + step.cost, gained + step.gain
            continue
        if bound < 0:
            bound = gained + step.gain * (budget - spent) / step.cost
        closed.add(step.tensor)
    return taken, spent, gained, max(bound, gained)


def _kept_energy(spectrum: Spectrum) -> list[float]:
    """Σ_{i ≤ r} σᵢ² for r = 0, 1, …, k."""
    sums: list[float] = spectrum.sigma.double().square().cumsum(0).tolist()
    return [0.0, *sums]


def _root(part: float, whole: float) -> float:
    return math.sqrt(max(0.0, part) / whole) if whole > 0 else 0.0


def _check(spectra: Sequence[Spectrum]) -> None:
    if not spectra:
        raise RankError("allocate ranks: got no spectra. Give at least one.")
    names = [spectrum.name for spectrum in spectra]
    if len(set(names)) < len(names):
        raise RankError(
            f"allocate ranks: names repeat, such as {max(names, key=names.count)}. Give each tensor its own."
        )
    for spectrum in spectra:
        sigma, (m, n) = spectrum.sigma, spectrum.shape
        what = f"allocate a rank to {spectrum.name} ({m}x{n})"
        if sigma.ndim != 1 or not 1 <= len(sigma) <= min(m, n):
            raise RankError(f"{what}: got {list(sigma.shape)} singular values. Give 1 to {min(m, n)} in one vector.")
        if not bool(torch.isfinite(sigma).all()) or bool((sigma < 0).any()) or bool((sigma.diff() > 0).any()):
            raise RankError(f"{what}: its singular values must be finite, >= 0 and non-increasing.")
        if not 0 < spectrum.importance < math.inf:
            raise RankError(f"{what}: importance = {spectrum.importance}. Set a finite importance > 0.")
