"""Trade memory for speed on a CPU: keep the quantized weights of a served model dequantized.

An NF4 layer dequantizes its weight at every call. Training amortises that over a batch of tokens; a decode step has
one, and on a CPU it then takes four to five times as long as with dense weights (SmolLM2-135M, one thread). The
values are the same ones, so answers stay those of the quantized model.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowrank.linear import NF4Linear

logger = logging.getLogger("ray.serve.rankline")

_CGROUP = Path("/sys/fs/cgroup")
_SHARE = 0.5


def unpack_if_room(model: nn.Module, dtype: torch.dtype, available_bytes: int | None = None) -> bool:
    """Replace every NF4 base layer by a dense one, if that takes at most half of the memory that is free.

    Args:
        model: With adapters injected.
        dtype: What the model computes in.
        available_bytes: Free memory; null asks the system.

    Returns:
        Whether it was done.
    """
    from lowrank.inject import adapted_layers
    from lowrank.linear import NF4Linear

    packed = [(layer, layer.base) for _, layer in adapted_layers(model) if isinstance(layer.base, NF4Linear)]
    needed = sum(base.in_features * base.out_features * dtype.itemsize for _, base in packed)
    available = _available_bytes() if available_bytes is None else available_bytes
    room = needed <= _SHARE * available
    if packed:
        verb = "kept dequantized" if room else "dequantized at every step, for want of memory"
        logger.info("%d NF4 layers are %s (%.0f MiB)", len(packed), verb, needed / 2**20)
    for layer, base in packed if room else []:
        layer.base = _dense(base, dtype)
    return bool(packed) and room


def _dense(layer: NF4Linear, dtype: torch.dtype) -> nn.Linear:
    from torch import nn

    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(layer.dense_weight(dtype), requires_grad=False)
    if layer.bias is not None:
        dense.bias = layer.bias
    return dense


def _available_bytes() -> int:
    """Free memory of this machine or of its container, whichever is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)
