"""What single adapter families want of the training loop beside `Adapter.penalty`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.whole_gradients import GradientRule, StepObserver

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank.config import AdapterConfig


@dataclass(frozen=True)
class Hooks:
    """What a family adds to a step."""

    rule: GradientRule | None = None
    """Directions of its own."""
    observer: StepObserver | None = None
    """What looks on, and may change parameters after the step."""


class Landing:
    """PoLAR: X and Y take the landing direction in place of their gradient; Θ keeps its own."""

    def __init__(self, weight: float) -> None:
        """Args: weight: λ >= 0 of the pull back to orthonormal columns."""
        self.weight = weight

    def directions(
        self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], step: int, rate: float
    ) -> dict[str, Tensor]:
        """The gradients with those of X and Y redirected."""
        from lowrank.adapters.polar import PoLAR, landing

        del step, rate
        return {
            name: landing(parameters[name], gradient, self.weight)
            if name.rpartition(":")[2] in PoLAR.orthonormal
            else gradient
            for name, gradient in gradients.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """No state."""


def _adalora(config: AdapterConfig, total_steps: int) -> Hooks:
    from lowrank.adapter_options import options_of
    from lowrank.adapters.rank_budget import RankBudget
    from lowrank.adapters.settings import DEFAULT_RANK

    return Hooks(observer=RankBudget(config.r or DEFAULT_RANK, options_of("adalora", config.options), total_steps))


def _polar(config: AdapterConfig, total_steps: int) -> Hooks:
    from lowrank.adapter_options import options_of

    del total_steps
    return Hooks(rule=Landing(options_of("polar", config.options).landing_weight))


#: Hooks by the family's name, for a configuration and a number of optimizer steps.
FAMILY_HOOKS: dict[str, Callable[[AdapterConfig, int], Hooks]] = {"adalora": _adalora, "polar": _polar}


def hooks_of(config: AdapterConfig, total_steps: int) -> Hooks:
    """The hooks of the configured family for a training of so many optimizer steps; most have none.

    Raises:
        AdapterError: the family's schedule does not fit into these steps.
    """
    make = FAMILY_HOOKS.get(config.method)
    return Hooks() if make is None else make(config, total_steps)
