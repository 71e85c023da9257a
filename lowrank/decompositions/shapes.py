"""How a matrix is cut for Kronecker and Khatri-Rao products: divisors, padding, refusals, shapes to compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lowrank.decompositions.regions import Region
from lowrank.errors import DecompositionError
from lowrank.factors.kronecker import kronecker_numbers
from lowrank.options import KhatriRaoOptions, KroneckerOptions


def divisors(number: int) -> list[int]:
    """All divisors, increasing.

    Example:
        >>> divisors(12)
        [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def middle_divisors(number: int) -> tuple[int, int]:
    """The two divisors nearest √number, the smaller one first.

    Example:
        >>> middle_divisors(1536)
        (32, 48)
    """
    small = max(d for d in range(1, math.isqrt(number) + 1) if number % d == 0)
    return small, number // small


@dataclass(frozen=True)
class KroneckerLayout:
    """A matrix of `size` (m, n) in m₁ × n₁ blocks of m₂ × n₂, the last ones padded with zeros.

    Attributes:
        size: (m, n).
        first: (m₁, n₁), the shape of B.
    """

    size: tuple[int, int]
    first: tuple[int, int]

    @property
    def second(self) -> tuple[int, int]:
        """(m₂, n₂), the shape of C."""
        return -(-self.size[0] // self.first[0]), -(-self.size[1] // self.first[1])

    @property
    def padded(self) -> bool:
        """Whether m₁m₂ > m or n₁n₂ > n."""
        return any(s % f for s, f in zip(self.size, self.first))

    @property
    def bound(self) -> int:
        """min(m₁n₁, m₂n₂): that many terms stand for every matrix."""
        return min(math.prod(self.first), math.prod(self.second))

    def numbers(self, rank: int, inner_rank: int | None = None) -> int:
        """Numbers that `rank` terms hold."""
        return rank * kronecker_numbers(self.first, self.second, inner_rank)

    def regions(self, count: int) -> tuple[list[Region], list[int]]:
        """The rearrangement R(A) in at most `count` row blocks, with its row offsets.

        Row (i, j) of R(A) is vec(A_ij). Where m₁ >= m₂, a block holds all j of some i, which are consecutive rows of
        A; elsewhere R(A)ᵀ is cut instead: all columns b of some rows a within the blocks, rows of A with stride m₂. A
        block so needs at most min(m₁, m₂) rows of A more than an even share.
        """
        (m1, n1), (m2, n2) = self.first, self.second
        count = min(count, max(m1, m2))
        cuts = [part * max(m1, m2) // count for part in range(count + 1)]
        regions = []
        for start, stop in pairwise(cuts):
            size = stop - start
            if self.transposed:
                runs = tuple((i * m2 + start, i * m2 + stop) for i in range(m1))
                regions.append(Region(runs, (0, n1 * n2), (m1, size, n1, n2), (1, 3, 0, 2), 2))
            else:
                rows = ((start * m2, stop * m2),)
                regions.append(Region(rows, (0, n1 * n2), (size, m2, n1, n2), (0, 2, 1, 3), 2))
        return regions, [cut * (n2 if self.transposed else n1) for cut in cuts]

    @property
    def transposed(self) -> bool:
        """Whether `regions` cuts R(A)ᵀ."""
        return self.first[0] < self.second[0]


def kronecker_layout(what: str, size: tuple[int, int], options: KroneckerOptions) -> KroneckerLayout:
    """The layout that `options.shape` asks for.

    Raises:
        DecompositionError: when the shape is larger than the matrix, or does not divide it and `padding` is "error".
    """
    assert options.shape is not None
    layout = KroneckerLayout(size, options.shape)
    if any(f > s for f, s in zip(layout.first, size)):
        raise DecompositionError(f"{what}: shape = {layout.first} is larger than the matrix. Set shape <= {size}.")
    if layout.padded and options.padding == "error":
        first, second = (", ".join(map(str, divisors(s))) for s in size)
        raise DecompositionError(
            f"{what}: shape = {layout.first} does not divide it. Allowed are m1 of {first} and n1 of {second}; "
            "or set padding = zero."
        )
    return layout


def candidate_layouts(size: tuple[int, int], rank: int = 1) -> list[KroneckerLayout]:
    """All layouts that divide the matrix, allow `rank` terms and hold fewer numbers than it, fewest numbers first.

    A matrix that no such layout fits (m and n are 1 or prime, or the rank is high) has those that hold more, so that
    the list is never empty for a rank up to `kronecker_bound`.
    """
    cuts = [(m1, n1) for m1 in divisors(size[0]) for n1 in divisors(size[1])]
    possible = [layout for layout in (KroneckerLayout(size, cut) for cut in cuts) if layout.bound >= rank]
    smaller = [layout for layout in possible if layout.numbers(rank) < math.prod(size)]
    return sorted(smaller or possible, key=lambda layout: (layout.numbers(1), layout.first))


def kronecker_bound(size: tuple[int, int], options: KroneckerOptions) -> int:
    """The largest number of terms: min(m₁n₁, m₂n₂), of the given shape or of the best one that divides W."""
    if options.shape is not None:
        return KroneckerLayout(size, options.shape).bound
    return max(layout.bound for layout in candidate_layouts(size))


def khatri_rao_rows_of(what: str, rows: int, options: KhatriRaoOptions) -> tuple[int, ...]:
    """(m₁, …, m_L) of the factors.

    Raises:
        DecompositionError: when the product is less than m, or more and `padding` is "error".
    """
    shape = options.shape or middle_divisors(rows)
    product = math.prod(shape)
    if product < rows or (product > rows and options.padding == "error"):
        allowed = ", ".join(f"({d}, {rows // d})" for d in divisors(rows))
        raise DecompositionError(
            f"{what}: shape = {tuple(shape)} gives {product} rows, the matrix has {rows}. Allowed are {allowed} and "
            f"finer products; or set padding = zero with a product >= {rows}."
        )
    return tuple(shape)


def column_regions(columns: int, shape: Sequence[int], count: int) -> tuple[list[Region], list[int]]:
    """All rows of at most `count` groups of columns, one column a row, with the column offsets."""
    count = min(count, columns)
    cuts = [part * columns // count for part in range(count + 1)]
    rows = math.prod(shape)
    regions = [Region(((0, rows),), (a, b), (rows, b - a), (1, 0), 1) for a, b in pairwise(cuts)]
    return regions, cuts


def pareto(points: Iterable[tuple[int, float]]) -> list[bool]:
    """Whether no other (numbers, error) is at least as good in both and better in one.

    Example:
        >>> pareto([(10, 0.5), (20, 0.4), (20, 0.6)])
        [True, True, False]
    """
    known = list(points)
    return [
        not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in known) for point in known
    ]
