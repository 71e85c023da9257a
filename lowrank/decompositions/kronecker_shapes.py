"""Which m₁ × n₁ to take for W ≈ Σₖ Bₖ ⊗ Cₖ: error against numbers over the divisors, from spectra of R(W) alone."""

import math
from dataclasses import dataclass

import torch

from lowrank.blocks import BlockMatrix
from lowrank.decompositions.rearranged import nearest, rearrange, sides
from lowrank.decompositions.shapes import KroneckerLayout, candidate_layouts, pareto
from lowrank.executor import Executor
from lowrank.options import KrylovOptions
from lowrank.rank import RankRule, resolvable_share

#: Entries of all rearrangements together that a comparison may go through, and the fewest shapes it looks at.
_WORK, _FEWEST = 2**27, 16
#: Passes over R(W) per shape and least columns of each: enough to rank shapes, about 1 % above the optimum.
_PASSES, _WIDTH = 3, 8


@dataclass(frozen=True)
class KroneckerShape:
    """One way to cut W, and what a fit of that shape costs.

    Attributes:
        first: (m₁, n₁), the shape of B.
        second: (m₂, n₂), the shape of C.
        rank: number of terms that are compared.
        num_parameters: numbers that they hold.
        relative_error: ‖W − Ŵ‖_F / ‖W‖_F of a quick fit, at least that of the best one.
        pareto: whether no other shape has both fewer numbers and a smaller error.
    """

    first: tuple[int, int]
    second: tuple[int, int]
    rank: int
    num_parameters: int
    relative_error: float
    pareto: bool = False


def kronecker_shapes(
    matrix: BlockMatrix,
    *,
    rank: int,
    inner_rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    executor: Executor,
) -> list[KroneckerShape]:
    """Compare the shapes that divide W (m, n) by error and numbers.

    Each costs three passes over a rearrangement of W. A large matrix has only those shapes compared that hold the
    fewest numbers: as many as have 2²⁷ entries together, and at least 16.

    Args:
        matrix: W in row blocks.
        rank: number of terms K, >= 1; fewer where a shape allows fewer.
        inner_rank: rank of the second factors, >= 1; fewer where a shape allows fewer. None leaves them full.
        energy: ‖W‖_F² where the caller knows it.
        seed: of the sketches.
        executor: where the blocks are read.

    Returns:
        By numbers, then error; the Pareto front is marked.

    Example:
        >>> from lowrank.executor import SerialExecutor
        >>> w = torch.kron(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.ones(2, 3))
        >>> best = kronecker_shapes(BlockMatrix.from_tensor("w", w), rank=1, executor=SerialExecutor())[0]
        >>> best.first, best.num_parameters, best.relative_error < 1e-3
        ((2, 2), 10, True)
    """
    placed = matrix if energy is not None else matrix.place(executor)
    total = placed.squared_norm(executor) if energy is None else energy
    layouts = candidate_layouts(matrix.shape, min(rank, _largest_bound(matrix.shape)))
    layouts = layouts[: max(_FEWEST, _WORK // math.prod(matrix.shape))]
    found = [_probe(placed, layout, rank, inner_rank, total, seed, executor) for layout in layouts]
    front = pareto((shape.num_parameters, shape.relative_error) for shape in found)
    marked = [KroneckerShape(**(vars(shape) | {"pareto": best})) for shape, best in zip(found, front)]
    return sorted(marked, key=lambda shape: (shape.num_parameters, shape.relative_error))


def choose_shape(shapes: list[KroneckerShape], size: tuple[int, int], dtype: torch.dtype) -> KroneckerShape:
    """The shape of the least N ln(error²) + numbers · ln N, N = m·n: more numbers only where the error repays them.

    Errors below what the dtype resolves count as equal, so that of two exact shapes the smaller one is taken.

    Source: Bayesian information criterion, Schwarz 1978 (doi:10.1214/aos/1176344136).
    """
    entries, floor = math.prod(size), resolvable_share(dtype) / 100

    def cost(shape: KroneckerShape) -> float:
        return entries * math.log(max(shape.relative_error**2, floor)) + shape.num_parameters * math.log(entries)

    return min(shapes, key=cost)


def summary(shapes: list[KroneckerShape], chosen: KroneckerShape, most: int = 6) -> str:
    """The choice and the Pareto front in one line, thinned to `most` points."""
    front = [shape for shape in shapes if shape.pareto]
    step = -(-len(front) // most)
    points = ", ".join(f"{s.first} {s.num_parameters}: {s.relative_error:.3f}" for s in front[::step])
    return f"; shape {chosen.first} of {len(shapes)} compared, shape, numbers and error of the Pareto front: {points}"


def _largest_bound(size: tuple[int, int]) -> int:
    return max(layout.bound for layout in candidate_layouts(size))


def _probe(
    matrix: BlockMatrix,
    layout: KroneckerLayout,
    rank: int,
    inner_rank: int | None,
    total: float,
    seed: int,
    executor: Executor,
) -> KroneckerShape:
    terms = min(rank, layout.bound)
    inner = None if inner_rank is None else min(inner_rank, *layout.second)
    probe = KrylovOptions(n_iter=_PASSES - 1, block_size=max(_WIDTH, terms))
    fit = nearest(rearrange(matrix, layout, executor), RankRule(rank=terms), total, seed, executor, probe)
    _, c, s = sides(fit, layout)
    kept = s.double().square()
    if inner is not None:
        # With orthonormal vec(Bₖ), cutting Cₖ loses just the energy that is cut.
        cut = torch.linalg.svdvals(c.reshape(terms, *layout.second).double())[:, :inner]
        kept = kept * cut.square().sum(1)
    left_over = max(0.0, 1.0 - float(kept.sum()) / total)
    return KroneckerShape(layout.first, layout.second, terms, layout.numbers(terms, inner), math.sqrt(left_over))
