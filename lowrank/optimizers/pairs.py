"""An optimiser over all pairs of a model: whole gradients by parameter name in, directions by name out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from lowrank.errors import AdapterError
from lowrank.optimizers.base import Optimizer, Pair, State, load_states, state_tensors

A, B = "lora_a", "lora_b"


def is_b(name: str) -> bool:
    """Whether a parameter, named `module:name`, is the B of a pair."""
    return name.rpartition(":")[2] == B


class PairRule:
    """Applies an optimiser to every pair and keeps the moments of each.

    Parameters are named `module:name`; a module's `lora_a` and `lora_b` are a pair. Other parameters keep their
    gradient where AdamW is the plain optimiser.
    """

    def __init__(self, optimizer: Optimizer, names: Iterable[str]) -> None:
        """Args: optimizer: with `redirects`. names: of all trained parameters.

        Raises:
            AdapterError: there is no pair, or a parameter outside of pairs would be left to plain SGD.
        """
        found = set(names)
        self.optimizer = optimizer
        self.modules = sorted(name.rpartition(":")[0] for name in found if is_b(name))
        self.modules = [module for module in self.modules if f"{module}:{A}" in found]
        rest = found - {f"{module}:{part}" for module in self.modules for part in (A, B)}
        if not self.modules or (rest and optimizer.plain == "SGD"):
            raise AdapterError(
                f"train with {type(optimizer).__name__}: {len(self.modules)} pairs A, B and {len(rest)} other "
                f"parameters ({', '.join(sorted(rest)[:3])}); it steps pairs only. Use AdamW."
            )
        self._states: dict[str, State] = {module: {} for module in self.modules}

    def directions(
        self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], step: int, rate: float
    ) -> dict[str, Tensor]:
        """What the plain optimiser gets in place of `gradients`; moves the moments on by one step.

        Args:
            parameters: whole tensors by name, fp32 or fp64.
            gradients: theirs, clipped already.
            step: steps taken before.
            rate: learning rate of this step.
        """
        found = dict(gradients)
        for module, state in self._states.items():
            a, b = f"{module}:{A}", f"{module}:{B}"
            pair = Pair(parameters[a], parameters[b], gradients[a], gradients[b])
            found[a], found[b] = self.optimizer.directions(pair, state, step, rate)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All moments as `module:optimizer.name`, for a checkpoint."""
        return state_tensors(self._states)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the moments of a checkpoint, which may hold other tensors too."""
        load_states(self._states, tensors)
