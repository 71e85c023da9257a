"""Adapters straight from MLflow's registry, as the serving room wants them.

`name` is the version that holds the pipeline's alias (the newest where nobody holds it), `name@alias` the one that
holds that alias, `name:version` always the same. Only versions of the served base are taken. Moving an alias in MLflow
changes what is served with the next look at the registry, a few seconds later; requests that are running stay where
they are.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.durable import sync
from cluster.errors import ServeError
from cluster.serving.sources import ForeignAdapterError, UnknownAdapterError, Version
from pipelines.errors import ArtifactError, TrackingError
from pipelines.tracking import ListedModel, ListedVersion, RegistryReader

logger = logging.getLogger("ray.serve.rankline")

#: What reading a registry raises; the second where a disk refused.
_UNREADABLE = (TrackingError, ArtifactError)
#: Looks at a registry that another client is writing to, until its aliases and its versions agree.
_LOOKS = 3


@dataclass(frozen=True)
class Canary:
    """A share (0 to 1) of the requests for a bare name goes to the version that holds `alias`, if any does."""

    alias: str
    share: float


@dataclass(frozen=True)
class _Table:
    """What the registry said last."""

    ids: Mapping[str, Version] = field(default_factory=dict)
    foreign: Mapping[str, str] = field(default_factory=dict)
    canaries: Mapping[str, Version] = field(default_factory=dict)
    listed: Mapping[Version, ListedVersion] = field(default_factory=dict)


class RegistrySource:
    """An `AdapterSource` over a registry; pickles as its settings, and reads the registry when it is first asked."""

    def __init__(
        self,
        uri: str,
        cache: Path,
        base_facts: Mapping[str, Any],
        alias: str,
        canary: Canary | None = None,
        refresh_s: float = 3.0,
        reserved: str = "",
        most_bytes: int = 2**30,
    ) -> None:
        """Args:
        uri: MLflow's tracking and registry URI.
        cache: directory for copies of versions.
        base_facts: of the served base: `base`, `base_sha256` and `split_key`.
        alias: that a bare name stands for.
        canary: null sends nothing elsewhere.
        refresh_s: seconds between looks at the registry.
        reserved: a model id that is not the registry's to give: the base's.
        most_bytes: of a file that is copied.
        """
        self._uri, self._cache, self._base_facts = uri, cache, dict(base_facts)
        self._alias, self._canary, self._refresh_s = alias, canary, refresh_s
        self._reserved, self._most_bytes = reserved, most_bytes
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._reader: RegistryReader | None = None
        self._versions: dict[str, tuple[int, list[ListedVersion]]] = {}
        self._table: _Table | None = None
        self._closed = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_uri", "_cache", "_base_facts", "_alias", "_canary", "_refresh_s", "_reserved", "_most_bytes")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def model_ids(self) -> tuple[str, ...]:
        """Names first, then names with aliases and versions."""
        return tuple(self._known().ids)

    def resolve(self, model_id: str) -> Version:
        """What an id stands for by the last look at the registry.

        Raises:
            ForeignAdapterError: it is an adapter for another base.
            UnknownAdapterError: there is no such model.
        """
        table = self._known()
        canary = table.canaries.get(model_id)
        if canary is not None and self._canary is not None and random.random() < self._canary.share:
            return canary
        if model_id in table.ids:
            return table.ids[model_id]
        if model_id in table.foreign:
            raise ForeignAdapterError(f"{model_id}: {table.foreign[model_id]}")
        raise UnknownAdapterError(f"resolve adapter {model_id!r}: the registry has no such model for this base.")

    def fetch(self, version: Version) -> Path:
        """A copy of a version's two files; its directory is made of a hash, never of a name.

        Raises:
            ServeError: the registry or its artifacts cannot be read.
        """
        from lowrank.adapters.peft_format import CONFIG, WEIGHTS

        listed = self._known().listed.get(version)
        if listed is None:
            raise ServeError(f"fetch {version.id}: the registry has it no more.")
        target = self._copy_of(version)
        if target.is_dir():
            return target
        self._cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=self._cache))
        try:
            for file in (CONFIG, WEIGHTS):
                self._registry().download(listed, f"adapter/{file}", temporary, self._most_bytes)
                sync(temporary / file)
            temporary.rename(target)
        except (*_UNREADABLE, OSError) as error:
            if not target.is_dir():  # else somebody else was first
                raise ServeError(f"fetch {version.id}: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _copy_of(self, version: Version) -> Path:
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", version.id)[:40]
        digest = hashlib.sha256(f"{self._uri} {version.id} {version.content}".encode()).hexdigest()
        return self._cache / f"{name}-{digest[:16]}"

    def discard(self, version: Version) -> None:
        """Remove the copy of a version."""
        shutil.rmtree(self._copy_of(version), ignore_errors=True)

    def watch(self, moved: Callable[[Version, Version], None]) -> None:
        """Look at the registry every few seconds from now on."""
        threading.Thread(target=self._follow, args=(moved,), name="rankline-registry", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _follow(self, moved: Callable[[Version, Version], None]) -> None:
        while not self._closed.wait(self._refresh_s):
            before = self._table or _Table()
            try:
                self.refresh()
                now = self._table or _Table()
                changed = {(before.ids[i], now.ids[i]) for i in now.ids if before.ids.get(i, now.ids[i]) != now.ids[i]}
                for old, new in changed:
                    logger.info("what was %s is %s now", old.id, new.id)
                    moved(old, new)
            except _UNREADABLE as error:
                logger.warning("the registry cannot be read; what was known is served on: %s", error)
            except Exception:  # whatever it was, aliases must be followed on
                logger.exception("a look at the registry failed; what was known is served on")

    def _known(self) -> _Table:
        if self._table is None:
            try:
                self.refresh()
            except _UNREADABLE as error:
                raise ServeError(f"read the model registry: {error}") from error
        assert self._table is not None
        return self._table

    def _registry(self) -> RegistryReader:
        if self._reader is None:
            self._reader = RegistryReader(self._uri)
        return self._reader

    def refresh(self) -> None:
        """Look at the registry now; versions are read again only of models that changed.

        Raises:
            TrackingError: it cannot be read.
        """
        with self._lock:
            for _ in range(_LOOKS):
                models = self._registry().models()
                self._versions = {model.name: self._versions_of(model) for model in models}
                if all(_whole(model, self._versions[model.name][1]) for model in models):
                    break
            self._table = self._tabulate(models)

    def _versions_of(self, model: ListedModel) -> tuple[int, list[ListedVersion]]:
        before = self._versions.get(model.name)
        if before is not None and before[0] == model.updated_ms and _whole(model, before[1]):
            return before
        return model.updated_ms, self._registry().versions(model.name)

    def _tabulate(self, models: list[ListedModel]) -> _Table:
        names: dict[str, Version] = {}
        others: dict[str, Version] = {}
        foreign: dict[str, str] = {}
        canaries: dict[str, Version] = {}
        known: dict[Version, ListedVersion] = {}
        for model in sorted(models, key=lambda model: model.name):
            if "@" in model.name or model.name == self._reserved:
                continue  # it would stand for something else
            own: dict[str, Version] = {}
            for listed in sorted(self._versions[model.name][1], key=lambda listed: int(listed.version)):
                version = Version(f"{model.name}:{listed.version}", _digest(listed))
                if reason := self._foreign(listed):
                    foreign[version.id] = reason
                else:
                    own[listed.version] = others[version.id] = version
                    known[version] = listed
            aliases = {alias: own[held] for alias, held in model.aliases.items() if held in own}
            others |= {f"{model.name}@{alias}": version for alias, version in aliases.items()}
            holder = model.aliases.get(self._alias) or next(reversed(own), None)
            if holder in own:
                names[model.name] = own[holder]
            elif self._versions[model.name][1]:
                shown = f"{model.name}:{holder or self._versions[model.name][1][0].version}"
                foreign[model.name] = f"it stands for {shown}: {foreign.get(shown, 'there is no such version.')}"
            if self._canary is not None and self._canary.alias in aliases and model.name in names:
                canaries[model.name] = aliases[self._canary.alias]
        return _Table({**names, **others}, foreign, canaries, known)

    def _foreign(self, listed: ListedVersion) -> str:
        """Why a version is not for the served base; empty if it is."""
        if listed.status != "READY":
            return f"its registration is {listed.status}."
        compared = {"base_sha256": "rankline.base_sha256"}
        if self._base_facts.get("base") != "dense":
            compared["split_key"] = "rankline.key.quantize"
        for fact, tag in compared.items():
            theirs, ours = listed.tags.get(tag), self._base_facts.get(fact)
            if theirs is None:
                return f"it has no tag {tag}: register it by `rankline run`."
            if ours is not None and theirs != ours:
                return f"it was trained over another base ({tag} is {theirs}, served is {ours})."
        return ""


def _whole(model: ListedModel, versions: list[ListedVersion]) -> bool:
    """Whether every alias holds a version that is known.

    MLflow reads a model, its aliases and its versions by a statement each, so that another client may write between.
    """
    return set(model.aliases.values()) <= {listed.version for listed in versions}


def _digest(listed: ListedVersion) -> str:
    """What tells a version from another one that had its name and number before."""
    return hashlib.sha256(f"{listed.source} {listed.run_id}".encode()).hexdigest()[:16]
