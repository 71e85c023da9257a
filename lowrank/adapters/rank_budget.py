"""Which components of an AdaLoRA stay: importance of every one, and a budget that falls with the cube of time.

Source: Zhang et al., arXiv 2303.10512, eq. 7-12 and algorithm 1; steps as `peft.tuners.adalora.RankAllocator` counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank.adapter_options import AdaLoRAOptions
from lowrank.adapters.adalora import target_rank
from lowrank.errors import AdapterError

_KINDS = ("lora_a", "lora_b", "lora_e")


class RankBudget:
    """Watches training and sets the least important e of all layers together to 0.

    It knows tensors by name only, `<module>:lora_a` (r, n), `<module>:lora_b` (m, r) and `<module>:lora_e` (r, 1), as
    `cluster.training_state.trained_tensors` names them, so that whoever shards parameters can hand in whole ones.

    Example:
        >>> budget = RankBudget(4, AdaLoRAOptions(target_r=2), total_steps=10)
        >>> [budget.share(step) for step in (0, 5, 10)]
        [1.0, 0.125, 0.0]
    """

    def __init__(self, r: int, options: AdaLoRAOptions, total_steps: int) -> None:
        """A budget over a whole training.

        Args:
            r: rank that every layer starts with.
            options: of the adapter.
            total_steps: optimizer steps of the training.

        Raises:
            AdapterError: no step is left between the initial and the final ones, or target_r > r.
        """
        if options.initial_steps >= total_steps - options.final_steps:
            raise AdapterError(
                f"plan AdaLoRA: initial_steps = {options.initial_steps} and final_steps = {options.final_steps} leave "
                f"none of {total_steps} steps. Set their sum < {total_steps}."
            )
        self.r, self.target = r, target_rank(options, r)
        self.options, self.total_steps = options, total_steps
        self._importance: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    @property
    def last_change(self) -> int:
        """The step at which the ranks are chosen for the last time."""
        return self.total_steps - self.options.final_steps

    def share(self, step: int) -> float:
        """How much of the surplus r − target_r stays at a step, in [0, 1]: 1, then (1 − t)³, then 0."""
        passed = (step - self.options.initial_steps) / (self.last_change - self.options.initial_steps)
        return (1.0 - min(max(passed, 0.0), 1.0)) ** 3

    def observe(
        self, step: int, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Take in one optimizer step, and set to 0 what the budget no longer pays for.

        Args:
            step: its number, counted from 0; every rank must call with the same tensors.
            parameters: whole parameters after the step, by name; e is changed in place.
            gradients: whole gradients of the step, by the same names.

        Returns:
            Every e that was changed; a caller that handed in copies puts these back in place.
        """
        options = self.options
        with torch.no_grad():
            if step < self.last_change:
                self._update(parameters, gradients)
            due = options.initial_steps < step < self.last_change and step % options.interval == 0
            if due or (step >= self.last_change and (step == self.last_change or not self._kept)):
                self._kept = self._choose(step)
            elif step < self.last_change:
                return {}
            for name, kept in self._kept.items():
                parameters[name].masked_fill_(~kept.to(parameters[name].device), 0.0)
        return {name: parameters[name] for name in self._kept}

    def _update(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Moving means of I = |w · ∂L/∂w| and of its distance to its own mean (eq. 8-10)."""
        beta1, beta2 = self.options.beta1, self.options.beta2
        for name in gradients:
            if name.rpartition(":")[2] not in _KINDS:
                continue
            seen = (parameters[name] * gradients[name]).abs()
            mean = beta1 * self._importance.get(name, torch.zeros_like(seen)) + (1 - beta1) * seen
            spread = beta2 * self._uncertainty.get(name, torch.zeros_like(seen)) + (1 - beta2) * (seen - mean).abs()
            self._importance[name], self._uncertainty[name] = mean, spread

    def _choose(self, step: int) -> dict[str, Tensor]:
        """For every e, which components stay (r, 1): those above the threshold over all layers."""
        scores = self.scores()
        ordered = torch.cat([score.flatten() for score in scores.values()]).sort().values
        surplus = len(scores) * (self.r - self.target)
        dropped = len(ordered) - int(surplus * self.share(step) + len(scores) * self.target)
        if dropped <= 0:
            return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        return {name: score > ordered[dropped - 1] for name, score in scores.items()}

    def scores(self) -> dict[str, Tensor]:
        """Importance of every component by the name of its e, (r, 1): eq. 7 with Ī·Ū for the importance of an entry."""
        entries = {name: self._importance[name] * self._uncertainty[name] for name in self._importance}
        found = {}
        for name, of_e in entries.items():
            module, _, kind = name.rpartition(":")
            if kind == "lora_e":
                of_a, of_b = entries[f"{module}:lora_a"].mean(1), entries[f"{module}:lora_b"].mean(0)
                found[name] = of_e + (of_a + of_b)[:, None]
        return found

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, by name."""
        named = {"importance": self._importance, "uncertainty": self._uncertainty, "kept": self._kept}
        return {f"{kind}/{name}": tensor for kind, tensors in named.items() for name, tensor in tensors.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        named: dict[str, dict[str, Tensor]] = {"importance": {}, "uncertainty": {}, "kept": {}}
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            named[kind][name] = tensor
        self._importance, self._uncertainty = named["importance"], named["uncertainty"]
        self._kept = {name: tensor.bool() for name, tensor in named["kept"].items()}
