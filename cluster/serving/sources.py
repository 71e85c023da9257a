"""Where the files of an adapter come from, as one small protocol; a registry implements it elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from cluster.errors import ServeError


class AdapterSource(Protocol):
    """Resolves model ids; injected into the service, so that `cluster` never imports a registry."""

    def model_ids(self) -> tuple[str, ...]:
        """Every model id that can be resolved, in a stable order."""
        ...

    def resolve(self, model_id: str) -> Path:
        """The immutable local directory of one version of `model_id`.

        A new version is a new directory: what lies under a path that was once returned never changes.

        Raises:
            ServeError: there is no such model.
        """
        ...


class FixedSource:
    """A fixed table of model ids. An id is only ever looked up in it, never made part of a path."""

    def __init__(self, adapters: Mapping[str, str]) -> None:
        self._adapters = dict(adapters)

    def model_ids(self) -> tuple[str, ...]:
        """Every model id."""
        return tuple(self._adapters)

    def resolve(self, model_id: str) -> Path:
        """The directory of `model_id`.

        Raises:
            ServeError: it is not in the table.
        """
        if model_id not in self._adapters:
            raise ServeError(f"resolve adapter {model_id!r}: not known. Known are {sorted(self._adapters)}.")
        return Path(self._adapters[model_id])
