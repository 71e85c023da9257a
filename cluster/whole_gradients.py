"""Between backward and step: whole gradients of the trained parameters, whatever ZeRO made of them.

An optimiser of pairs needs A, B and their gradients whole, in fp32. They are a percent of a model, so that every rank
gathers them, computes the same directions from them, and puts back its share where DeepSpeed keeps the gradient. The
plain optimiser that DeepSpeed steps then does the rest, on any ZeRO stage, and parameters never leave their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Added to the norm that gradients are clipped by, as torch and DeepSpeed add it.
_EPSILON = 1e-6


class GradientRule(Protocol):
    """What changes whole gradients; `lowrank.optimizers.pairs.PairRule` is one, a family's own direction another."""

    def directions(
        self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], step: int, rate: float
    ) -> dict[str, Tensor]:
        """What the plain optimizer gets in place of `gradients`; called once per step, on every rank alike."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint, by names that no parameter has."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state out of a checkpoint's tensors."""
        ...


class WholeGradients:
    """Gathers, clips, redirects and puts back the gradients of an engine's trained parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], rule: GradientRule, max_norm: float) -> None:
        """Args: parameters: by name. rule: applied after clipping. max_norm: of all gradients; 0 disables clipping."""
        self.parameters, self.rule, self.max_norm = parameters, rule, max_norm

    def redirect(self, engine: Any, step: int, rate: float) -> dict[str, float]:
        """Change the gradients for `engine.step()`. All ranks call it, after the backward pass at a boundary.

        Args:
            engine: DeepSpeed's.
            step: steps taken before.
            rate: learning rate of this step.

        Returns:
            `grad_norm` before clipping, and `gathered_bytes`, what each rank received or reduced of whole tensors.
        """
        import torch

        values, of_values = whole_values(self.parameters)
        gradients, of_gradients = _whole(self.parameters)
        norm = float(torch.nn.utils.get_total_norm(gradients.values()))
        if self.max_norm:
            scale = min(1.0, self.max_norm / (norm + _EPSILON))
            gradients = {name: gradient * scale for name, gradient in gradients.items()}
        directions = self.rule.directions(values, gradients, step, rate)
        for name, parameter in self.parameters.items():
            _put(engine, parameter, directions[name])
        moved = of_values + of_gradients if engine.world_size > 1 else 0
        return {"grad_norm": norm, "gathered_bytes": moved}


def whole_values(parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], int]:
    """Whole fp32 values, on every rank, and the bytes that had to be gathered. All ranks must call it."""
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    values, gathered = {}, 0
    for name, parameter in parameters.items():
        if parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id"):
            values[name] = parameter.detach()
        else:
            values[name] = safe_get_full_fp32_param(parameter).detach()
            gathered += values[name].nbytes
    return values, gathered


def _whole(parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], int]:
    """Whole fp32 gradients, averaged over ranks, and the bytes that had to be gathered."""
    from deepspeed.utils import safe_get_full_grad

    gradients, gathered = {}, 0
    for name, parameter in parameters.items():
        gradients[name] = safe_get_full_grad(parameter).detach().float()
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            gathered += gradients[name].nbytes
    return gradients, gathered


def _put(engine: Any, parameter: Any, value: Tensor) -> None:
    """Make `value` the gradient that the next step sees."""
    from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

    from cluster.training_state import share

    if hasattr(parameter, "ds_id"):
        # The "full" setter of ZeRO-3 fails on sizes that the ranks do not divide.
        safe_set_local_grad(parameter, share(engine, parameter, value))
    elif getattr(parameter, "_hp_grad", None) is not None:
        # In bfloat16, ZeRO-1 steps this whole fp32 buffer; the setter would write to the bfloat16 gradient beside it.
        parameter._hp_grad.copy_(value)
    else:
        safe_set_full_grad(parameter, value)
