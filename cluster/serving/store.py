"""The adapters that a replica holds: loaded when they are asked for, leased while they are used, the oldest evicted.

A version is checked before any request sees it: plain files of bounded size, safetensors alone, for this base, of the
model's shapes, finite. On a GPU what is evicted stays in the host's memory for as long as that has room.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import ServeError
from cluster.serving.holder import Files, Holder
from cluster.serving.sources import AdapterSource, Version

logger = logging.getLogger("ray.serve.rankline")

#: Largest `adapter_config.json`, and header of `adapter_model.safetensors`.
_MAX_CONFIG_BYTES, _MAX_HEADER_BYTES = 2**20, 2**24
#: Seconds for which a refused version is not tried again.
_REFUSED_S = 30.0
_LOADERS = 2


class RefusedError(ServeError):
    """An adapter that this endpoint does not take; says why."""


class FullError(ServeError):
    """No room: everything that is held is in use."""


@dataclass
class _Entry:
    name: str
    num_bytes: int
    leases: int = 0


@dataclass(frozen=True)
class Counts:
    """What the store has done and holds; bytes are of device memory."""

    resident: int
    resident_bytes: int
    limit_bytes: int
    hits: int
    misses: int
    evictions: int
    load_seconds: float


@dataclass
class Lease:
    """The right to use an adapter by the `name` that the model's layers know (None: the bare base)."""

    name: str | None
    _release: Callable[[], None] | None = field(default=None, repr=False)

    def release(self) -> None:
        """Give it back; only the first call counts."""
        release, self._release = self._release, None
        if release is not None:
            release()


class AdapterStore:
    """Adapters of one engine by version. Every method may be called from any thread; `lease` blocks while it loads."""

    def __init__(
        self,
        holder: Holder[Any],
        source: AdapterSource,
        base_facts: Mapping[str, Any],
        limit_bytes: int,
        host_bytes: int = 0,
    ) -> None:
        """Args:
        holder: of the engine.
        source: where versions come from.
        base_facts: what an adapter's base must be, by the names that adapters record.
        limit_bytes: of all adapters on the engine's device.
        host_bytes: of those that are kept in the host's memory when the device has no room for them.
        """
        self._holder, self._source, self._base_facts = holder, source, base_facts
        self._limit_bytes, self._host_bytes = limit_bytes, host_bytes
        self._names = (f"adapter{number}" for number in itertools.count())
        self._entries: OrderedDict[Version, _Entry] = OrderedDict()
        self._host: OrderedDict[Version, Files] = OrderedDict()
        self._loading: dict[Version, Future[None]] = {}
        self._refused: dict[Version, tuple[float, str]] = {}
        self._lock = threading.Lock()
        self._reserved = 0
        self._closed = False
        self._sizes: dict[Version, int] = {}
        self._counted = {"hits": 0, "misses": 0, "evictions": 0}
        self._load_seconds = 0.0
        self._loaders = ThreadPoolExecutor(_LOADERS, "rankline-adapters")

    def ask(self, version: Version, again: bool = False) -> Lease | Future[None]:
        """A lease of a version that is there, or its load, after which it is to be asked for once more.

        Args:
            version: of an adapter.
            again: whether this is not the first time for a request, which is counted once.

        Raises:
            RefusedError: the endpoint does not take it; its load may raise it too.
            FullError: no room for it now; its load may raise it too.
        """
        with self._lock:
            entry = self._entries.get(version)
            if not again:
                self._counted["hits" if entry is not None else "misses"] += 1
            if entry is None:
                return self._begin(version)
            entry.leases += 1
            self._entries.move_to_end(version)
            return Lease(entry.name, lambda: self._give_back(entry))

    def lease(self, version: Version) -> Lease:
        """Use a version, which is loaded if it is not there; blocks until then.

        Raises:
            RefusedError: the endpoint does not take it.
            FullError: no room for it now.
        """
        found = self.ask(version)
        while not isinstance(found, Lease):
            found.result()  # somebody else may evict it before we come to it: then once more
            found = self.ask(version, again=True)
        return found

    def follow(self, before: Version, now: Version) -> None:
        """An id stands for another version: load it beforehand, if the one before is in use here. Never raises."""
        with self._lock:
            if before not in self._entries or now in self._entries or now in self._loading:
                return
            try:
                self._begin(now).add_done_callback(_log_failure)
            except (ServeError, RuntimeError) as error:
                logger.warning("load an adapter beforehand: %s", error)

    def counts(self) -> Counts:
        """For the metrics page."""
        with self._lock:
            held = sum(entry.num_bytes for entry in self._entries.values())
            return Counts(len(self._entries), held, self._limit_bytes, **self._counted, load_seconds=self._load_seconds)

    def close(self) -> None:
        """Stop loading; from now on nothing that is not there can be had."""
        with self._lock:
            self._closed = True
        self._loaders.shutdown(wait=False)

    def _give_back(self, entry: _Entry) -> None:
        with self._lock:
            entry.leases -= 1

    def _begin(self, version: Version) -> Future[None]:
        """The running or a new load of a version; the lock is held."""
        refused = self._refused.get(version)
        if refused is not None:
            if time.monotonic() < refused[0]:
                raise RefusedError(refused[1])
            del self._refused[version]
        if self._closed:
            raise ServeError("the adapter store is closed")
        if version in self._sizes:
            self._leaving(self._sizes[version])  # raises before anything is read
        if version not in self._loading:
            self._loading[version] = self._loaders.submit(self._load, version)
        return self._loading[version]

    def _load(self, version: Version) -> None:
        began = time.monotonic()
        try:
            with self._lock:
                files = self._host.pop(version, None)
            files = files or self._read(version)
            self._attach(version, files)
        except RefusedError as error:
            with self._lock:
                # The text alone: the error holds the frames that it came through, and they the tensors.
                self._refused[version] = time.monotonic() + _REFUSED_S, str(error)
            error.__traceback__ = error.__cause__ = error.__context__ = None
            raise
        finally:
            with self._lock:
                self._loading.pop(version, None)
                self._load_seconds += time.monotonic() - began

    def _read(self, version: Version) -> Files:
        from lowrank.adapters.peft_format import load_adapter, load_saved_modules, read_config
        from lowrank.errors import AdapterError

        directory = self._source.fetch(version)
        try:
            _check_files(directory, self._limit_bytes)
            adapters = load_adapter(directory, self._base_facts)
            saved = load_saved_modules(directory) if read_config(directory).get("modules_to_save") else {}
        except (AdapterError, RefusedError) as error:
            self._source.discard(version)
            raise RefusedError(str(error).replace(str(directory), version.id)) from error
        except Exception as error:  # whatever else strange files lead to
            self._source.discard(version)
            logger.exception("load adapter %s", version.id)
            raise RefusedError(f"load adapter {version.id}: its files are damaged ({type(error).__name__}).") from error
        return Files({module: adapter.frozen() for module, adapter in adapters.items()}, saved)

    def _attach(self, version: Version, files: Files) -> None:
        """Make room, and give the engine the adapter under a name that was never used before."""
        import torch

        from lowrank.errors import AdapterError

        try:
            ready = self._holder.ready(files)
        except (AdapterError, IndexError, ValueError) as error:
            raise RefusedError(f"load adapter {version.id}: {error}") from error
        except RuntimeError as error:  # torch, where factors do not fit each other
            if isinstance(error, torch.OutOfMemoryError):
                raise FullError(f"load adapter {version.id}: the device has no memory for it now.") from error
            raise RefusedError(f"load adapter {version.id}: its tensors do not fit each other.") from error
        num_bytes = self._holder.num_bytes(ready)
        if num_bytes > self._limit_bytes:
            raise RefusedError(
                f"load adapter {version.id}: it takes {num_bytes / 2**20:.1f} MiB, and serve.adapter_mib allows "
                f"{self._limit_bytes / 2**20:.1f} MiB for all adapters together."
            )
        with self._lock:
            self._sizes[version] = num_bytes
            for gone in self._leaving(num_bytes):
                self._evict(gone)
            self._reserved += num_bytes
            name = next(self._names)
        entry = None
        try:
            self._holder.add(name, ready)
            entry = _Entry(name, num_bytes)
        except AdapterError as error:
            raise RefusedError(f"load adapter {version.id}: {error}") from error
        finally:
            with self._lock:
                self._reserved -= num_bytes
                if entry is not None:  # only now can a request find it
                    self._entries[version] = entry

    def _leaving(self, num_bytes: int) -> list[Version]:
        """What must go to make room: used least recently and not in use. The lock is held.

        Raises:
            FullError: that is not enough.
        """
        free = self._limit_bytes - self._reserved - sum(entry.num_bytes for entry in self._entries.values())
        gone = []
        for version, entry in self._entries.items():
            if free >= num_bytes:
                break
            if entry.leases == 0:
                gone.append(version)
                free += entry.num_bytes
        if free < num_bytes:
            raise FullError(
                f"load an adapter of {num_bytes / 2**20:.1f} MiB: {len(self._entries)} adapters are in use, and "
                f"serve.adapter_mib allows {self._limit_bytes / 2**20:.0f} MiB."
            )
        return gone

    def _evict(self, version: Version) -> None:
        entry = self._entries.pop(version)
        kept = self._holder.remove(entry.name, keep=entry.num_bytes <= self._host_bytes)
        self._counted["evictions"] += 1
        if kept is None:
            return
        self._host[version] = kept
        while sum(files.num_bytes for files in self._host.values()) > self._host_bytes:
            self._host.popitem(last=False)


def freeze_collector() -> None:
    """Take what exists by now out of the garbage collector's sight; for a process that has all it needs to serve.

    An adapter is made of thousands of objects. Loading some would have the collector look through all of the model's
    and the libraries' again, for a good part of a second in which every thread waits.
    """
    gc.collect()
    gc.freeze()


def _log_failure(load: Future[None]) -> None:
    if not load.cancelled() and (error := load.exception()) is not None:
        logger.warning("load an adapter beforehand: %s", error)


def _check_files(directory: Path, limit_bytes: int) -> None:
    """Refuse what is no plain file or is too large before a byte of it is parsed.

    Raises:
        RefusedError: says which file, and why.
    """
    from lowrank.adapters.peft_format import CONFIG, WEIGHTS

    for name, most in ((CONFIG, _MAX_CONFIG_BYTES), (WEIGHTS, limit_bytes)):
        try:
            descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise RefusedError(f"load adapter {directory.name}: {name}: {error.strerror}, or a link.") from error
        with os.fdopen(descriptor, "rb") as handle:
            found = os.fstat(handle.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > most:
                raise RefusedError(
                    f"load adapter {directory.name}: {name} is no plain file of at most {most} bytes "
                    f"({found.st_size} bytes)."
                )
            header = int.from_bytes(handle.read(8), "little") if name == WEIGHTS else 0
            if header > _MAX_HEADER_BYTES:
                raise RefusedError(
                    f"load adapter {directory.name}: {name} says that its header has {header} bytes; allowed are "
                    f"{_MAX_HEADER_BYTES}."
                )
