"""Truncated SVD from a block Krylov space of WᵀW, one pass over W per step.

With V₀ = orth(WᵀWΩ) each step reads every row block once, gives Y_j = W V_j and WᵀY_j together, and orthonormalises the
latter against all earlier V: the products Y = W V of the whole basis are there at the end, and the SVD of Y is that of
W V Vᵀ. A narrow block and many steps beat a wide block and few at equal cost; the basis grows until the rank rule is
met, and nothing is started again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import add
from typing import Any

import torch
from torch import Tensor

from lowrank.blocks import Block, BlockMatrix, read_block
from lowrank.decompositions.gaussian import gaussian_rows
from lowrank.decompositions.orthogonal import orthonormalize, orthonormalize_block
from lowrank.decompositions.registry import Fit, Method, Problem
from lowrank.decompositions.svd import exact_svd, fix_signs, short_side, svd_fit, zero_svd
from lowrank.executor import Executor, Ref, tree_reduce
from lowrank.factors import SVDFactors
from lowrank.kernels import both_products
from lowrank.options import KrylovOptions
from lowrank.rank import resolvable_share

#: Block width of an energy or error rule, which names no rank.
_FREE_BLOCK = 24
#: Steps that an energy or error rule goes on after it is first met: Ritz values still rise, and the rank falls.
_EXTRA_STEPS = 2
#: σ_r / σ₁ down to which U = Y P Σ⁻¹ from the Gram of Y keeps enough digits in fp32 for one correction to finish.
_GRAM_RANGE = 1e-2


def block_krylov(problem: Problem) -> Fit:
    """Block Krylov SVD of n_iter + 1 blocks, or of as many as an energy or error rule takes.

    (1 + ε) spectral and Frobenius error in O(log n / √ε) products, against O(log n / ε) of subspace iteration. A basis
    of more than half of min(m, n) columns is left to `exact_svd`, which is cheaper by then.

    Source: Musco & Musco 2015 (arXiv:1504.05477), Algorithm 2; any block width reaches it: Chen et al. 2025
        (arXiv:2508.06486). Here on the short recurrence's own space with full orthogonalisation.
    """
    w, rule, options = problem.matrix, problem.rule, problem.options
    if rule.rank is None and rule.tail_share < resolvable_share(w.compute_dtype):
        return exact_svd(problem)
    wanted = rule.cap(rule.rank) if rule.rank else None
    width = options.block_size or (_FREE_BLOCK if wanted is None else _width(wanted))
    width = min(width, w.shape[0], w.shape[1])
    least = -(-((wanted or 1) + options.oversampling) // width)
    steps = max(options.n_iter + 1, least)
    if 2 * width * steps > min(w.shape):
        return exact_svd(problem)
    space = _Space(w, problem.executor, width, problem.seed)
    done = _grow(problem, space, steps)
    if not done:
        return exact_svd(problem)
    found, spectrum = _extract(problem, space)
    converged = rule.met(found.s, problem.total_energy)
    return svd_fit(found, spectrum, len(space.products) - 1, converged)


def _width(rank: int) -> int:
    """A third of the rank, in whole vector registers."""
    return max(8, -(-rank // 24) * 8)


def _grow(problem: Problem, space: "_Space", steps: int) -> bool:
    """Take steps until the rule is met for a while; False when the basis would leave half of the short side."""
    limit, extra = min(problem.matrix.shape), _EXTRA_STEPS
    while True:
        space.step()
        if len(space.products) >= steps:
            if problem.rule.rank is not None:
                return True
            if problem.rule.met(space.ritz_values(), problem.total_energy):
                extra -= 1
            if extra < 0 or _capped(problem, space):
                return True
        if 2 * (space.size + space.width) > limit:
            return False
        space.extend()


def _capped(problem: Problem, space: "_Space") -> bool:
    cap = problem.rule.max_rank
    return cap is not None and space.size >= 3 * cap + problem.options.oversampling


@dataclass
class _Space:
    """The basis V (n, size) and its products Y = W V, the latter in row blocks with the executor."""

    w: BlockMatrix
    executor: Executor
    width: int
    seed: int
    v: Tensor = field(init=False)
    products: list[list[Ref]] = field(default_factory=list)
    """Per step, per row block: Y_j = W_p V_j."""
    up: Tensor = field(init=False)
    """WᵀW V_j of the last step."""
    gram: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))

    @property
    def size(self) -> int:
        return self.v.shape[1]

    def __post_init__(self) -> None:
        """V₀ = orth(WᵀW Ω) for a standard normal Ω (n, width)."""
        dtype = self.w.compute_dtype
        self.v = gaussian_rows(0, self.w.shape[1], self.width, self.seed, dtype)
        self.v = orthonormalize_block(self._multiply()[1])

    def step(self) -> None:
        """Multiply the newest block both ways, in one pass over W."""
        products, self.up = self._multiply()
        self.products.append([self.executor.put(product) for product in products])

    def _multiply(self) -> tuple[list[Tensor], Tensor]:
        """W_p V_j per row block, and WᵀW V_j; small enough for this process to add up, which spares tasks."""
        newest = self.executor.put(self.v[:, -self.width :].contiguous())
        both = self.executor.map(_both_products, self.w.blocks, repeat(newest), label=f"krylov {self.w.name}")
        pairs: list[tuple[Tensor, Tensor]] = self.executor.get(list(both))
        return [pair[0] for pair in pairs], tree_reduce([pair[1] for pair in pairs], add)

    def extend(self) -> None:
        """Add orth((I − VVᵀ) WᵀW V_j)."""
        z = self.up
        scale = float(z.norm())
        z = z - self.v @ (self.v.T @ z)
        if float(z.norm()) <= 100 * torch.finfo(z.dtype).eps * scale:
            # Only rounding is left: the space holds the whole row space of W, and any direction serves.
            z = gaussian_rows(0, z.shape[0], self.width, self.seed, z.dtype, stream=self.size)
        z = orthonormalize_block(z)
        z = orthonormalize_block(z - self.v @ (self.v.T @ z))
        self.v = torch.cat([self.v, z], dim=1)

    def ritz_values(self) -> Tensor:
        """σ of W V, non-increasing, from the Gram of Y; only its new columns are multiplied."""
        values: Tensor = torch.linalg.eigvalsh(self.full_gram())
        return values.clamp(min=0).flip(0).sqrt()

    def full_gram(self) -> Tensor:
        """YᵀY (size, size) in fp64, grown by the columns that are new since the last call."""
        known = self.gram.shape[0]
        if known < self.size:
            parts = self.executor.map(_new_gram, *self.products, repeat(known), label=f"gram {self.w.name}")
            fresh: Tensor = self.executor.get(self.executor.reduce(add, parts))
            grown = torch.empty(self.size, self.size, dtype=torch.float64)
            grown[:known, :known] = self.gram
            grown[:, known:] = fresh
            grown[known:, :known] = fresh[:known].T
            self.gram = grown
        return self.gram

    def rotate(self, rotation: Tensor) -> BlockMatrix:
        """Y P in row blocks."""
        refs = self.executor.map(
            _rotated, *self.products, repeat(self.executor.put(rotation)), label=f"rotate {self.w.name}"
        )
        return self.w.like(refs, rotation.shape[1])


def _extract(problem: Problem, space: _Space) -> tuple[SVDFactors, Tensor]:
    """U, σ, V of W V Vᵀ cut to the rank of the rule, and all Ritz values."""
    values, vectors = torch.linalg.eigh(space.full_gram())
    ritz, vectors = values.clamp(min=0).flip(0).sqrt(), vectors.flip(1)
    rank = problem.rule.choose(ritz, problem.total_energy)
    dtype, executor = problem.matrix.compute_dtype, problem.executor
    floor = _GRAM_RANGE if dtype == torch.float32 else 1e-6
    if float(ritz[rank - 1]) >= floor * float(ritz[0]):
        rotation = vectors[:, :rank]
        y = space.rotate((rotation / ritz[:rank]).to(dtype))
        left = orthonormalize(y, executor, passes=1).to_tensor(executor)
        vh = (space.v @ rotation.to(dtype)).T
        s = ritz[:rank]
    else:
        everything = space.rotate(torch.eye(space.size, dtype=dtype))
        q = orthonormalize(everything, executor)
        core = everything.rmatmat(q, executor).double()  # Yᵀ Q
        right, s, left_h = torch.linalg.svd(core)
        left = q.matmat(left_h[:rank].T.to(dtype).contiguous(), executor).to_tensor(executor)
        vh = (space.v @ right[:, :rank].to(dtype)).T
        s, ritz = s[:rank], s
    return fix_signs(left, s.to(dtype), vh.contiguous()), ritz.to(dtype)


def _both_products(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """(W_p X, W_pᵀ W_p X)."""
    return both_products(read_block(block), read_block(x))


def _side_by_side(products: Sequence[Tensor]) -> Tensor:
    return torch.cat([read_block(product) for product in products], dim=1)


def _new_gram(*arguments: Any) -> Tensor:
    """Yᵀ Y[:, known:] of one row block, in fp64; the arguments are its Y_j, then `known`."""
    *products, known = arguments
    y = _side_by_side(products).double()
    return y.T @ y[:, known:]


def _rotated(*arguments: Any) -> Tensor:
    """Y P of one row block; the arguments are its Y_j, then P."""
    *products, rotation = arguments
    return _side_by_side(products) @ read_block(rotation)


BLOCK_KRYLOV = Method(
    name="block_krylov",
    family="svd",
    fit=block_krylov,
    options=KrylovOptions,
    zero=zero_svd,
    max_rank=short_side,
    summary="block Krylov, one pass over W per step; nearest to the optimum per product",
)
