"""Between backward and step: whole gradients of the trained parameters, whatever ZeRO made of them.

An optimiser of pairs needs A, B and their gradients whole, in fp32. They are a percent of a model, so that every rank
gathers them, computes the same directions from them, and puts back its share where DeepSpeed keeps the gradient. The
plain optimiser that DeepSpeed steps then does the rest, on any ZeRO stage, and parameters never leave their place.
In bfloat16 DeepSpeed keeps gradients, and so directions, in bfloat16, unless `finetune.deepspeed` sets its
`data_types.grad_accum_dtype` to fp32; the parameters that are stepped, and all moments, are fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Added to the norm that gradients are clipped by, as torch and DeepSpeed add it.
_EPSILON = 1e-6
#: What the names of the observer's tensors start with in a checkpoint.
_OBSERVER = "observer/"


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


class StepObserver(Protocol):
    """What looks at whole parameters after every step and may change some, as AdaLoRA's budget of ranks does."""

    def observe(
        self, step: int, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Parameters to put back, by name; called on every rank alike.

        Args:
            step: steps taken before this one.
            parameters: whole, after the step; may be changed in place where they are given back.
            gradients: whole, of the step: clipped, but not redirected.
        """
        ...

    def state(self) -> Mapping[str, Tensor]:
        """State for a checkpoint."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave, as fp32 tensors."""
        ...


class WholeGradients:
    """Gathers, clips, redirects and puts back the gradients of an engine's trained parameters."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rules: Sequence[GradientRule],
        observer: StepObserver | None,
        max_norm: float,
    ) -> None:
        """Nothing is gathered before the first step.

        Args:
            parameters: the trained ones by name.
            rules: applied one after another, after clipping.
            observer: told of every step.
            max_norm: largest norm of all gradients together; 0 disables clipping.
        """
        self.parameters, self.rules, self.observer, self.max_norm = parameters, rules, observer, max_norm
        self._clipped: Mapping[str, Tensor] = {}

    def redirect(self, engine: Any, step: int, rate: float) -> dict[str, float]:
        """Change the gradients for `engine.step()`. All ranks call it, after the backward pass at a boundary.

        Args:
            engine: DeepSpeed's.
            step: steps taken before.
            rate: learning rate of this step.

        Returns:
            `grad_norm` before clipping, `gathered_bytes`, the size of what had to be gathered from several ranks, and
            `moment_bytes`, what the rules keep of their own on every rank.
        """
        import torch

        values, of_values = whole_values(self.parameters) if self.rules else ({}, 0)
        gradients, of_gradients = _whole(self.parameters)
        norm = float(torch.nn.utils.get_total_norm(gradients.values()))
        if self.max_norm:
            scale = min(1.0, self.max_norm / (norm + _EPSILON))
            gradients = {name: gradient * scale for name, gradient in gradients.items()}
        # Without ZeRO they are the parameters' own, which are about to be overwritten and then dropped.
        self._clipped = {name: gradient.clone() for name, gradient in gradients.items()} if self.observer else {}
        for rule in self.rules:
            gradients = rule.directions(values, gradients, step, rate)
        for name, parameter in self.parameters.items():
            _put_gradient(engine, parameter, gradients[name])
        moved = of_values + of_gradients if engine.world_size > 1 else 0
        kept = sum(tensor.nbytes for rule in self.rules for tensor in rule.tensors().values())
        return {"grad_norm": norm, "gathered_bytes": moved, "moment_bytes": kept}

    def stepped(self, engine: Any, step: int) -> None:
        """Tell the observer of the step that `redirect` was called for. All ranks call it, after `engine.step()`."""
        if self.observer is None:
            return
        values, _ = whole_values(self.parameters)
        changed = self.observer.observe(step, values, self._clipped)
        for name, value in changed.items():
            _put_value(engine, self.parameters[name], value)

    def state(self) -> dict[str, Tensor]:
        """What rules and observer need to go on, for a checkpoint."""
        found = {name: tensor for rule in self.rules for name, tensor in rule.tensors().items()}
        if self.observer is not None:
            found |= {_OBSERVER + name: tensor for name, tensor in self.observer.state().items()}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state out of a checkpoint's tensors."""
        for rule in self.rules:
            rule.load(tensors)
        if self.observer is not None:
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(_OBSERVER)}
            self.observer.load_state({name.removeprefix(_OBSERVER): tensor for name, tensor in own.items()})


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


def _put_gradient(engine: Any, parameter: Any, value: Tensor) -> None:
    """Make `value` the gradient that the next step sees."""
    from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

    from cluster.training_state import share

    if hasattr(parameter, "ds_id"):
        # The "full" setter of ZeRO-3 fails on sizes that the ranks do not divide.
        safe_set_local_grad(parameter, share(engine, parameter, value))
    elif getattr(parameter, "_hp_grad", None) is not None:
        # ZeRO-1 over bfloat16 that accumulates in fp32 steps this whole buffer; the setter would write to the bfloat16
        # gradient beside it.
        parameter._hp_grad.copy_(value.reshape(parameter._hp_grad.shape))
    else:
        safe_set_full_grad(parameter, value)


def _put_value(engine: Any, parameter: Any, value: Tensor) -> None:
    """Set a parameter between steps: what the optimizer steps, and what the next forward pass reads."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    from cluster.training_state import share

    if hasattr(parameter, "ds_id"):
        local = share(engine, parameter, value)
        safe_set_local_fp32_param(parameter, local)
        parameter.ds_tensor.data.copy_(local)
    elif hasattr(parameter, "_hp_mapping"):
        safe_set_full_fp32_param(parameter, value)
    if parameter.shape == value.shape:  # under ZeRO-3 only what it keeps whole
        parameter.data.copy_(value)
