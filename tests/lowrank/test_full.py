"""What full training promises beyond the laws of all families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_samples import layer_of
from torch import Tensor

from lowrank.adapters.full import Full
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()).Q


@pytest.mark.parametrize("shape", [(1100, 1200), (1200, 1100)])
def test_the_cut_of_a_large_change_is_the_best_one_and_knows_what_it_leaves(shape: tuple[int, int]) -> None:
    """Twelve known singular values, of which eight are kept; the whole SVD is not computed."""
    sigma = torch.tensor([2.0**-k for k in range(12)], dtype=torch.float64)
    u, v = orthonormal(shape[0], 12, 0), orthonormal(shape[1], 12, 1)
    adapter = Full(((u * sigma) @ v.T).float())
    lora = adapter.to_lora(max_rank=8)
    best = (u[:, :8] * sigma[:8]) @ v[:, :8].T
    assert (lora.a.shape, lora.b.shape, lora.exact) == ((8, shape[1]), (shape[0], 8), False)
    torch.testing.assert_close((lora.b @ lora.a).double(), best, rtol=0, atol=1e-6)
    energy = sigma.square()
    assert lora.retained_energy == pytest.approx(float(energy[:8].sum() / energy.sum()), abs=1e-6)
    assert 1 - lora.retained_energy == pytest.approx(float(energy[8:].sum() / energy.sum()), rel=0.1)


@pytest.mark.parametrize(
    "fields", [{"r": 4}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2.0}}, {"use_rslora": True}]
)
def test_a_rank_or_a_scaling_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=rf"q_proj \(24x36\): finetune.adapter.{next(iter(fields))}: .* has no rank"):
        Full.initial(layer_of((24, 36)), AdapterConfig(method="full", **fields))
