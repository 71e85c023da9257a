"""Modules that are trained whole beside an adapter: `modules_to_save`, as PEFT has them.

Every adapter has a copy of its own; the frozen module stays beside them. A copy of a tied output head is untied from
the embedding, as in PEFT.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lowrank.adapters.base import matched
from lowrank.errors import AdapterError
from lowrank.inject import AdaptedLinear, SavedModule, replace_module
from lowrank.linear import NF4Linear, ZeroLinear

#: What has no copy that could be trained: layers with an adapter, packed layers, and containers that nobody calls.
_UNFIT = (AdaptedLinear, NF4Linear, ZeroLinear, nn.ModuleList, nn.ModuleDict)


def find_modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that match, for a model that its adapters have been injected into.

    Args:
        model: the model.
        patterns: regular expressions of the end of a module's name.

    Raises:
        AdapterError: a pattern matches nothing, or a module with an adapter, a packed one, a container or one without
            parameters.
    """
    inside = [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear | SavedModule)]
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        named = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if name and not _within(name, inside) and matched({pattern: True}, name, False)
        }
        if not named:
            raise AdapterError(
                f"finetune.adapter.modules_to_save: {pattern!r} matches no module. Name modules by the end of their "
                f"names, such as {', '.join(_examples(model))}."
            )
        found |= named
    for name, module in found.items():
        whole = module.base if isinstance(module, SavedModule) else module
        unfit = [part for part in whole.modules() if isinstance(part, _UNFIT)]
        if unfit or not any(True for _ in whole.parameters()) or _within(name, list(found)):
            why = f"holds {type(unfit[0]).__name__}" if unfit else "has no parameters of its own to train"
            raise AdapterError(
                f"finetune.adapter.modules_to_save: {name} {why}. Layers with an adapter or packed weights, containers "
                "and modules inside of another saved one cannot be trained whole: take it out of modules_to_save, or "
                "out of decompose.target_modules."
            )
    return sorted(found)


def _within(name: str, others: Sequence[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def _examples(model: nn.Module) -> list[str]:
    kinds = (nn.ModuleList, nn.ModuleDict, AdaptedLinear)
    tops = [name for name, module in model.named_modules() if 0 < name.count(".") + bool(name) <= 2]
    return [name for name in tops if not isinstance(model.get_submodule(name), kinds)][:8]


def add_saved(
    model: nn.Module, adapter: str, tensors: Mapping[str, Mapping[str, Tensor] | None], active: str | None
) -> None:
    """Give `adapter` a trained copy of every module in `tensors`: module -> name -> tensor, None copies the base.

    Raises:
        AdapterError: the model has no such module, or its parameters have other names or shapes.
    """
    for name, values in tensors.items():
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise AdapterError(
                f"load adapter {adapter!r}: it holds the whole module {name!r}, which the model has not. Load it onto "
                "the model that it was trained for."
            ) from error
        if not isinstance(module, SavedModule):
            module = SavedModule(module, active)
            replace_module(model, name, module)
        module.copies[adapter] = saved_copy(name, module.base, values)


def saved_copy(name: str, base: nn.Module, values: Mapping[str, Tensor] | None) -> nn.Module:
    """A trainable copy of module `name`, with the given parameters or (None) those of the base.

    Raises:
        AdapterError: they have other names or shapes.
    """
    made = copy.deepcopy(base).requires_grad_(True)
    if values is None:
        return made
    parameters = dict(made.named_parameters())
    got = {key: tuple(value.shape) for key, value in values.items()}
    allowed = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
    if got != allowed:
        raise AdapterError(
            f"load the saved module {name}: its tensors are {got}, the model's are {allowed}. Load it onto the model "
            "that it was trained for."
        )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(values[key])
    return made
