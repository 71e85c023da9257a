"""Give a model that is in use another adapter, and take one away: what a server needs beside `inject`.

Adding and removing change dictionaries of layers, an entry each, and never the modules themselves, so that another
thread may run the model meanwhile, as long as it does not use the adapter in question.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lowrank.adapters.base import Adapter
from lowrank.errors import AdapterError
from lowrank.inject import (
    AdaptedLinear,
    SavedModule,
    adapted_layers,
    check_shapes,
    replace_module,
    saved_modules,
)
from lowrank.mixing import Ready
from lowrank.saved_modules import saved_copy


def make_adaptable(model: nn.Module, linears: Collection[str], saved: Collection[str] = ()) -> None:
    """Let the linear layers take adapters, and the modules `saved` copies of themselves.

    Args:
        model: with adapters, or without.
        linears: names of layers; those inside of a module in `saved` are left out.
        saved: names of modules.

    Raises:
        AdapterError: there is no module of a name.
    """
    for name in saved:
        module = _module(model, name)
        if not isinstance(module, SavedModule):
            replace_module(model, name, SavedModule(module, None))
    whole = [name for name, _ in saved_modules(model)]
    for name in linears:
        if any(name == own or name.startswith(f"{own}.") for own in whole):
            continue
        module = _module(model, name)
        if not isinstance(module, AdaptedLinear):
            replace_module(model, name, AdaptedLinear(module, {}, None))


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise AdapterError(f"prepare {name!r} for adapters: the model has no such module.") from error


class Residents:
    """The adapters of a model in use: adds and removes them by name."""

    def __init__(self, model: nn.Module) -> None:
        """Args: model: as `make_adaptable` left it."""
        self._layers, self._wholes = dict(adapted_layers(model)), dict(saved_modules(model))

    def ready(self, adapters: Mapping[str, Adapter], saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Ready]:
        """An adapter made ready, if the model can take it.

        Args:
            adapters: by module; the other layers stay bare.
            saved: modules that were trained whole: module -> name -> tensor.

        Raises:
            AdapterError: a module is not there, has another shape, or can take no copy.
        """
        for module, adapter in adapters.items():
            if module not in self._layers:
                raise AdapterError(
                    f"add adapter: the model has no linear layer {module!r}. Load it onto its own model."
                )
            check_shapes(module, self._layers[module].base, {"": adapter})
        missing = sorted(set(saved) - set(self._wholes))
        if missing:
            raise AdapterError(
                f"add adapter: it brings trained copies of {', '.join(missing)}, for which this model was not "
                "prepared. Deploy the endpoint anew with this adapter among those that it starts with."
            )
        for module, named in saved.items():
            saved_copy(module, self._wholes[module].base, named)
        return {module: Ready.of(adapter, self._layers[module].base) for module, adapter in adapters.items()}

    def add(self, name: str, adapters: Mapping[str, Ready], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give the model an adapter that is `ready`, under a name that none of it has."""
        for module, named in saved.items():
            made = saved_copy(module, self._wholes[module].base, named)
            self._wholes[module].copies[name] = made.requires_grad_(False).eval()
        for module, ready in adapters.items():
            self._layers[module].add(name, ready)

    def remove(self, name: str) -> tuple[dict[str, Adapter], dict[str, nn.Module]]:
        """Take an adapter away: its layers and its trained copies by module; nothing where there is none."""
        adapters = {module: layer.remove(name) for module, layer in self._layers.items() if name in layer.adapters}
        held = [(module, whole) for module, whole in self._wholes.items() if name in whole.copies]
        return adapters, {module: whole.copies.pop(name) for module, whole in held}
