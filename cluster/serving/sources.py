"""Where adapters come from, as one small protocol; a registry implements it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.errors import ServeError


class UnknownAdapterError(ServeError):
    """There is no adapter of that id."""


class ForeignAdapterError(ServeError):
    """The adapter is for another base."""


@dataclass(frozen=True)
class Version:
    """One immutable version of an adapter: what lies under both fields never changes.

    Attributes:
        id: that people know it by; a registry may give the id of a deleted version to another one.
        content: tells such versions apart.
    """

    id: str
    content: str = ""


class AdapterSource(Protocol):
    """Finds adapters by model id; pickled into every replica, so that `cluster` never imports a registry."""

    def model_ids(self) -> tuple[str, ...]:
        """Every model id that is known, in a stable order."""
        ...

    def resolve(self, model_id: str) -> Version:
        """What `model_id` stands for now; does not block.

        Raises:
            UnknownAdapterError: there is no such model.
            ForeignAdapterError: it is for another base.
        """
        ...

    def fetch(self, version: Version) -> Path:
        """The local directory of a version; may take as long as a download.

        Raises:
            ServeError: it cannot be had.
        """
        ...

    def discard(self, version: Version) -> None:
        """The copy that `fetch` gave is damaged: fetch it anew the next time."""
        ...

    def watch(self, moved: Callable[[Version, Version], None]) -> None:
        """Follow changes from now on; `moved` is called, on any thread, with what an id stood for and what it does."""
        ...

    def close(self) -> None:
        """Stop following."""
        ...


@dataclass(frozen=True)
class FixedSource:
    """A fixed table of model id -> directory. An id is only ever looked up in it, never made part of a path."""

    adapters: Mapping[str, str]

    def model_ids(self) -> tuple[str, ...]:
        """Every model id."""
        return tuple(self.adapters)

    def resolve(self, model_id: str) -> Version:
        """Several ids of one directory are one version, which is called by the first.

        Raises:
            UnknownAdapterError: it is not in the table.
        """
        if model_id not in self.adapters:
            raise UnknownAdapterError(f"resolve adapter {model_id!r}: not known. Known are {sorted(self.adapters)}.")
        directory = self.adapters[model_id]
        return Version(next(own for own, other in self.adapters.items() if other == directory))

    def fetch(self, version: Version) -> Path:
        """The directory."""
        return Path(self.adapters[version.id])

    def discard(self, version: Version) -> None:
        """There is no copy."""

    def watch(self, moved: Callable[[Version, Version], None]) -> None:
        """Nothing ever changes."""

    def close(self) -> None:
        """Nothing is followed."""
