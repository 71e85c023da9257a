"""One small problem per registered decomposition, for the laws that all of them keep."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank.blocks import BlockMatrix
from lowrank.decompositions import METHODS, decompose
from lowrank.executor import Executor, SerialExecutor
from lowrank.factors import Decomposition
from lowrank.rank import RankRule

SHAPE = (36, 24)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@dataclass(frozen=True)
class Sample:
    """How a method is asked in the laws."""

    rank: int | None = 3
    options: dict[str, Any] = field(default_factory=dict)


SAMPLES = {
    "exact_svd": Sample(),
    "randomized_svd": Sample(options={"oversampling": 4}),
    "block_krylov": Sample(options={"n_iter": 2, "block_size": 3, "oversampling": 2}),
    "one_pass": Sample(),
    "als": Sample(options={"n_iter": 8}),
    "hadamard": Sample(rank=2, options={"n_iter": 8}),
    "kronecker": Sample(rank=2, options={"shape": (6, 4)}),
    "khatri_rao": Sample(rank=None, options={"shape": (6, 6)}),
    "khatri_rao_low_rank": Sample(rank=2, options={"shape": (6, 6), "n_iter": 8}),
    "cp": Sample(options={"depth": 3, "n_iter": 8}),
    "tucker": Sample(options={"depth": 3, "n_iter": 8}),
}


def dense(dtype: torch.dtype = torch.float32, shape: tuple[int, int] = SHAPE, seed: int = 0) -> Tensor:
    """A matrix with a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(shape)
    u, v = (torch.linalg.qr(torch.randn(k, rank, generator=generator, dtype=torch.float64)).Q for k in shape)
    return ((u * torch.arange(1, rank + 1, dtype=torch.float64) ** -1.0) @ v.T).to(dtype)


def fit(
    method: str,
    values: Tensor,
    block_bytes: int | None = None,
    executor: Executor | None = None,
    rank: int | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> Decomposition:
    """Decompose as the method's sample says, but for what is given."""
    sample = SAMPLES[method]
    rank = rank or sample.rank
    return decompose(
        BlockMatrix.from_tensor("w", values, block_bytes),
        method=method,
        rule=None if METHODS[method].max_rank is None else RankRule(rank=rank),
        weights=None if weights is None else BlockMatrix.from_tensor("p", weights, block_bytes),
        seed=1,
        executor=executor or SerialExecutor(),
        **(sample.options | options),
    )
