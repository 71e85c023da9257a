"""Every optimiser by name. A new one is a class, a line here, and its options in `lowrank.optimizer_options`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lowrank.optimizer_options import OPTIMIZER_OPTIONS
from lowrank.optimizers.altlora import AltLoRA
from lowrank.optimizers.base import Optimizer
from lowrank.optimizers.galore import GaLore, GaLoreRule
from lowrank.optimizers.lora_rite import LoRARITE
from lowrank.optimizers.pairs import PairRule
from lowrank.optimizers.preconditioned import LoRAPlus, RefLoRA, Riemannian

#: Name -> what makes the optimiser from its options and AdamW's two decays.
OPTIMIZERS: dict[str, Callable[[Any, tuple[float, float]], Optimizer]] = {
    "adamw": lambda options, betas: Optimizer(),
    "lora_plus": LoRAPlus,
    "riemannian": Riemannian,
    "reflora": RefLoRA,
    "altlora": AltLoRA,
    "lora_rite": LoRARITE,
    "galore": GaLore,
}


def make_optimizer(name: str, options: dict[str, Any], betas: tuple[float, float] = (0.9, 0.999)) -> Optimizer:
    """The optimiser `name`.

    Args:
        name: a key of `OPTIMIZERS`.
        options: fields of its class in `OPTIMIZER_OPTIONS`.
        betas: decays of the first and second moment, in [0, 1).

    Raises:
        KeyError: there is no such optimiser.
        TypeError: an option that it does not have.
        ValueError: an option out of range.
    """
    return OPTIMIZERS[name](OPTIMIZER_OPTIONS[name](**options), betas)


def rule_of(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> PairRule | GaLoreRule | None:
    """What applies the optimiser to all trained parameters, or None where it leaves gradients as they are.

    Args:
        optimizer: from `make_optimizer`.
        parameters: all that train, as `module:name`; only names and shapes are read.

    Raises:
        AdapterError: parameters that the optimiser cannot step, or none that it would step unlike AdamW.
    """
    if isinstance(optimizer, GaLore):
        return GaLoreRule(optimizer, parameters)
    return PairRule(optimizer, parameters) if optimizer.redirects else None
