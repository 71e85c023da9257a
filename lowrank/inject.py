"""Put adapters on the target layers of a model and choose, per call, which of them speaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import ref

from torch import Tensor, nn

from lowrank.adapters.base import Adapter
from lowrank.errors import AdapterError
from lowrank.mixing import Mix, MixedLayers, Ready


class AdaptedLinear(nn.Module):
    """A frozen base layer plus named adapters, of which one (or none) is active: y = (W + ΔW) x + b.

    With a `Mix` for `active`, every row of x (rows, 1, n) or (rows, n) has its own; this is for inference alone.
    """

    def __init__(self, base: nn.Module, adapters: Mapping[str, Adapter], active: str | None) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict(dict(adapters))
        self.active: str | Mix | None = active
        self._kept: Tensor | None = None
        self._ready: dict[str, Ready] = {}
        self._mixed: MixedLayers | None = None
        self.mixers: list[ref[MixedLayers]] = []

    def forward(self, x: Tensor) -> Tensor:
        """y (..., m) for x (..., n); what the base says where the active adapter does not change this layer."""
        y: Tensor = self.base(x)
        if self.active is None or self._kept is not None:
            return y
        if isinstance(self.active, Mix):
            if self._mixed is None:
                self._mixed = MixedLayers([self], [y.shape[-1]])
            self._mixed.change(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.active)
            return y
        if self.active not in self.adapters:
            return y
        changed: Tensor = self.adapters[self.active](x, y, self.base)
        return changed

    def add(self, name: str, ready: Ready) -> None:
        """Take in an adapter; other threads may use the other ones meanwhile."""
        self._ready[name] = ready
        self.adapters[name] = ready.adapter
        self._forget(name)

    def _forget(self, name: str) -> None:
        for held in self.mixers:
            if (mixer := held()) is not None:
                mixer.forget(name)

    def remove(self, name: str) -> Adapter:
        """Give an adapter away that nobody uses."""
        adapter = self.adapters.pop(name)
        assert isinstance(adapter, Adapter)
        self._ready.pop(name, None)
        self._forget(name)
        return adapter

    def ready(self, name: str) -> Ready | None:
        """What a `Mix` needs of an adapter, made once; None where this layer has none of that name."""
        if name not in self.adapters:
            return None
        if name not in self._ready:
            adapter = self.adapters[name]
            assert isinstance(adapter, Adapter)
            self._ready[name] = Ready.of(adapter, self.base)
        return self._ready[name]

    def merge(self) -> None:
        """Add the active ΔW to a dense base, in fp32; `unmerge` gives the kept tensor back.

        Raises:
            AdapterError: the base is quantized, there is no active adapter, or it is merged already.
        """
        if not isinstance(self.base, nn.Linear) or not isinstance(self.active, str) or self._kept is not None:
            held = type(self.base).__name__ if not isinstance(self.base, nn.Linear) else "merged already or no adapter"
            raise AdapterError(f"merge an adapter: {held}. Merge one active adapter into a dense base.")
        weight = self.base.weight.detach()
        adapter = self.adapters[self.active]
        assert isinstance(adapter, Adapter)
        merged = weight.float() + adapter.delta_weight(weight.float()).detach()
        self._kept, self.base.weight = weight, nn.Parameter(merged.to(weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        if self._kept is not None:
            assert isinstance(self.base, nn.Linear)
            self.base.weight, self._kept = nn.Parameter(self._kept, requires_grad=False), None


class SavedModule(nn.Module):
    """A frozen module and its trained copies by adapter; the active adapter's copy answers, else the module itself."""

    def __init__(self, base: nn.Module, active: str | None) -> None:
        """Args: base: the frozen module. active: the adapter that speaks first."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.copies = nn.ModuleDict()
        self.active: str | Mix | None = active

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the active adapter's copy answers; with a `Mix`, row by row of the one input."""
        if isinstance(self.active, Mix):
            y = self.base(*args, **kwargs)
            for name, rows in self.active.rows.items():
                if name in self.copies:
                    y[rows] = self.copies[name](args[0][rows], *args[1:], **kwargs)
            return y
        own = self.active_copy
        return (self.base if own is None else own)(*args, **kwargs)

    @property
    def active_copy(self) -> nn.Module | None:
        """The trained copy of the active adapter, if it has one."""
        return self.copies[self.active] if isinstance(self.active, str) and self.active in self.copies else None


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Set the submodule at dotted path `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, leaf, new)


def inject(model: nn.Module, adapters: Mapping[str, Mapping[str, Adapter]], active: str | None) -> None:
    """Wrap the layer `name` of every `adapters[name][adapter_name]`; every other parameter is frozen.

    Raises:
        AdapterError: a target does not exist in the model, or has another shape.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, named in adapters.items():
        try:
            base = model.get_submodule(name)
        except AttributeError as error:
            raise AdapterError(f"inject adapter: the model has no module {name!r}. Check target_modules.") from error
        check_shapes(name, base, named)
        replace_module(model, name, AdaptedLinear(base, named, active))


def check_shapes(name: str, base: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Refuse adapters (by their names) of another shape than the layer `name` has.

    Raises:
        AdapterError: which, and both shapes.
    """
    shape = getattr(base, "out_features", None), getattr(base, "in_features", None)
    if None in shape:  # GPT-2's Conv1D, which stores the transpose
        weight = base.get_parameter("weight")
        shape = weight.shape[1], weight.shape[0]
    for adapter_name, adapter in adapters.items():
        # PEFT's VeRA files do not tell n, which is then 0 here.
        if any(size not in (0, there) for size, there in zip(adapter.shape, shape, strict=True)):
            raise AdapterError(
                f"inject adapter {adapter_name!r}: it is for a {adapter.shape[0]}x{adapter.shape[1]} layer, {name} is "
                f"{shape[0]}x{shape[1]}. Load it onto the model that it was trained for."
            )


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(name, layer) of every adapted layer, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))


def saved_modules(model: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    """(name, module) of every module that has trained copies, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SavedModule))


def speakers(model: nn.Module) -> list[AdaptedLinear | SavedModule]:
    """Everything whose `active` says which adapter answers."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear | SavedModule)]


def set_active(model: nn.Module, adapter: str | None) -> None:
    """Make `adapter` (None: the bare base) the one that every adapted layer applies.

    Raises:
        AdapterError: a layer has no adapter of that name.
    """
    for name, layer in adapted_layers(model):
        if adapter is not None and adapter not in layer.adapters:
            raise AdapterError(
                f"activate adapter {adapter!r}: layer {name} has {sorted(layer.adapters)}. Load the adapter first."
            )
        layer.active = adapter
    for _, module in saved_modules(model):
        module.active = adapter
