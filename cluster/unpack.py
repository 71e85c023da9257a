"""Trade memory for speed on a CPU: keep the quantized weights of a frozen model dequantized.

An NF4 layer dequantizes its weight at every call. Training amortises that over a batch of tokens; a decode step has
one, and evaluation calls often. The values are the same, so answers stay those of the quantized model, bit for bit.
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
    """Replace every NF4 layer by a dense one, if that takes at most half of the memory that is free.

    Args:
        model: With adapters injected, or without.
        dtype: What the model computes in.
        available_bytes: Free memory; null asks the system.

    Returns:
        Whether it was done.
    """
    from lowrank.inject import replace_module
    from lowrank.linear import NF4Linear

    packed = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, NF4Linear)]
    needed = sum(layer.in_features * layer.out_features * dtype.itemsize for _, layer in packed)
    available = _available_bytes() if available_bytes is None else available_bytes
    room = needed <= _SHARE * available
    if packed:
        verb = "kept dequantized" if room else "dequantized at every step, for want of memory"
        logger.info("%d NF4 layers are %s (%.0f MiB)", len(packed), verb, needed / 2**20)
    for name, layer in packed if room else []:
        replace_module(model, name, _dense(layer, dtype))
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
