"""What holds the adapters of an engine: the layers of our own model, or another engine's table of LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lowrank.adapters.base import Adapter
    from lowrank.mixing import Ready


@dataclass
class Files:
    """An adapter in the host's memory: by module its layers, and what was trained whole."""

    adapters: dict[str, Adapter]
    saved: dict[str, dict[str, Tensor]]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        tensors = [tensor for adapter in self.adapters.values() for tensor in adapter.numbers()]
        return sum(t.nbytes for t in (*tensors, *(t for named in self.saved.values() for t in named.values())))


R = TypeVar("R")


class Holder(Protocol[R]):
    """Adds and removes adapters of a running engine; one name is never in two calls at a time."""

    def ready(self, files: Files) -> R:
        """An adapter in the form that this engine takes, on its device; slow.

        Raises:
            AdapterError: the engine cannot take it.
            IndexError, ValueError, RuntimeError: its tensors do not fit each other.
        """
        ...

    def num_bytes(self, ready: R) -> int:
        """What it takes on the device."""
        ...

    def add(self, name: str, ready: R) -> None:
        """Give the engine an adapter under a name that it does not have."""
        ...

    def remove(self, name: str, keep: bool) -> Files | None:
        """Take one away that nobody uses; with `keep` in the host's memory, where that is worth something. Fast."""
        ...


@dataclass
class OnModel:
    """An adapter beside a model's layers, and the tensors that were trained whole."""

    layers: Mapping[str, Ready]
    saved: Mapping[str, Mapping[str, Tensor]]


class ModelHolder:
    """The layers of our own model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Args: model: its layers can take adapters (`lowrank.resident.make_adaptable`)."""
        from lowrank.resident import Residents

        self._model, self._residents = model, Residents(model)

    def ready(self, files: Files) -> OnModel:
        """Moved to the model's device and checked against its layers; see `Holder`."""
        device = self._model.device
        on_host = device.type == "cpu"
        moved = files.adapters if on_host else {name: own.to(device) for name, own in files.adapters.items()}
        return OnModel(self._residents.ready(moved, files.saved), files.saved)

    def num_bytes(self, ready: OnModel) -> int:
        """What layers share counts once; what was trained whole is copied."""
        from lowrank.mixing import bytes_of

        copies = sum(tensor.nbytes for named in ready.saved.values() for tensor in named.values())
        return copies + bytes_of(ready.layers.values())

    def add(self, name: str, ready: OnModel) -> None:
        """See `Holder`."""
        self._residents.add(name, ready.layers, ready.saved)

    def remove(self, name: str, keep: bool) -> Files | None:
        """See `Holder`; on a CPU nothing is kept, as the files are as near."""
        adapters, saved = self._residents.remove(name)
        if not keep or self._model.device.type == "cpu":
            return None
        for adapter in adapters.values():
            adapter.to("cpu")
        return Files(
            adapters, {module: {key: t.cpu() for key, t in copy.state_dict().items()} for module, copy in saved.items()}
        )
