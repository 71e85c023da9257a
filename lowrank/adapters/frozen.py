"""The frozen weight under an adapter, for the families whose change depends on it (DoRA, HiRA)."""

from __future__ import annotations

from torch import Tensor, nn

from lowrank.errors import AdapterError
from lowrank.linear import NF4Linear, dense_weight


def frozen_weight(base: nn.Module, shape: tuple[int, int], method: str) -> Tensor:
    """W (m, n) of a base layer, dequantized where it is quantized.

    Args:
        base: the frozen layer.
        shape: (m, n) that the adapter expects.
        method: for the message, such as `DoRA`.

    Raises:
        AdapterError: the layer does not hold all of W, as under ZeRO-3.
    """
    weight = dense_weight(base)
    if tuple(weight.shape) != shape:
        raise AdapterError(
            f"apply {method}: its base layer holds {tuple(weight.shape)} of {shape}, but {method} needs all of W. "
            "Set finetune.zero_stage <= 2 for a dense base, or quantize it (base: nf4)."
        )
    return weight


def stored_weight(base: nn.Module) -> Tensor:
    """The tensor that W lies in: another one means another W, and the same one the same W, for it is frozen."""
    stored = base.packed if isinstance(base, NF4Linear) else getattr(base, "weight", None)
    return stored if isinstance(stored, Tensor) else dense_weight(base)


def needs_weight(method: str, shape: tuple[int, int]) -> AdapterError:
    """The refusal of ΔW without W."""
    return AdapterError(
        f"compute the change of a {method} adapter ({shape[0]}x{shape[1]}): it depends on the frozen weight, and none "
        "was given. Call delta_weight(weight), or the adapted layer itself."
    )
