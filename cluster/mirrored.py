"""Durable units on an object store: payload first, under its sha256; then one PUT that commits the unit.

    PREFIX/.../payload/<unit>/<sha256>       files of a unit, by content: two writers of it can never mix
    PREFIX/.../commits/<unit>.json           a unit's manifest and its sidecar in one object: there, or not committed
    PREFIX/.../ledger/<process>-<n>.jsonl    the ledger: an object per process and 64 KiB, written over as it grows

Below `root` each node keeps a mirror with the layout of a local store: units that it has made or read, whole and
verified. What is committed is asked of the object store alone; a mirror may be empty, or gone. A store has no rename
and no O_EXCL, so of two processes that make a unit at the same moment the last PUT counts, and its payload is whole;
one that comes later sees the first. Cost of a unit: two looks, a PUT per file, one for its commit, one for the ledger.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.durable import (
    MANIFEST,
    SIDECAR,
    UnitRecord,
    UnitStore,
    can_be_named,
    parse_record,
    whole_sidecar,
    write_atomic,
    write_json,
)
from cluster.errors import DamagedError
from cluster.objects import AGAIN, Mirror
from lowrank.reading import parse_json, read_json, shown

#: An object of the ledger grows no further than this.
_BATCH_BYTES = 64 * 1024
#: Requests at a time where many small objects are read.
_AT_ONCE = 16
#: Which batch each ledger of this process has come to.
_newest_batch: dict[tuple[Path, str], int] = {}


@cache
def _process(_pid: int) -> str:
    """A name that no other process ever has: ids come again, on other machines and after a restart."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class MirroredUnits(UnitStore):
    """The units of one stage in an object store, mirrored below `root`."""

    mirror: Mirror

    @property
    def local(self) -> UnitStore:
        """The mirror as a store of its own."""
        return UnitStore(self.root)

    def commit_path(self, unit: str) -> Path:
        """What the object that commits a unit is mirrored by."""
        return self.root / "commits" / f"{unit}.json"

    def payload(self, unit: str, digest: str) -> Path:
        """What the object of a unit's file is mirrored by."""
        return self.root / "payload" / unit / digest

    def where(self, unit: str) -> str:
        """The URI of a unit's commit."""
        return self.mirror.url(self.commit_path(unit))

    def is_committed(self, unit: str) -> bool:
        """Whether the unit's commit is in the object store.

        Raises:
            StorageError: nobody can tell.
        """
        return self.mirror.size(self.commit_path(unit)) is not None

    def committed(self, units: Iterable[str]) -> set[str]:
        """Those of them that are there, in one list.

        Raises:
            StorageError: nobody can tell.
        """
        return set(units) & set(self.all_committed())

    def all_committed(self) -> list[str]:
        """Every unit that is there, in one list.

        Raises:
            StorageError: nobody can tell.
        """
        return sorted(name.removesuffix(".json") for name in self.mirror.names(self.root / "commits"))

    def _place(self, whole: Path, unit: str) -> None:
        """Upload a whole directory, its commit last; then it becomes part of the mirror."""
        record = self.local_record(whole)
        for file, digest in record.files.items():
            self.mirror.put(self.payload(unit, digest), whole / file)
        if self.is_committed(unit):
            raise FileExistsError(self.where(unit))  # the other one's is as good: ours is surplus
        sidecar = whole_sidecar(_json_or_none(whole / SIDECAR))
        commit = json.dumps({"unit": asdict(record), "sidecar": sidecar}, indent=2, sort_keys=True).encode()
        self.mirror.put(self.commit_path(unit), commit)
        write_atomic(self.commit_path(unit), commit)
        self._keep(whole, unit)

    @staticmethod
    def local_record(directory: Path) -> UnitRecord:
        """The record in a unit's directory.

        Raises:
            FileNotFoundError, ValueError: it is not there, or damaged.
        """
        return parse_record(directory / MANIFEST, partial(read_json, directory / MANIFEST))

    def _keep(self, whole: Path, unit: str) -> None:
        """Put a whole directory in the place of what the mirror has of a unit, unless that is equal: it may be read."""
        if self.local.is_committed(unit):
            with contextlib.suppress(FileNotFoundError, ValueError):
                if self.local.read(unit).sha256 == self.local_record(whole).sha256:
                    return
            self.local.discard(unit)
        self.local.path(unit).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process of this node was first
            try:
                self.local._place(whole, unit)
            except OSError as error:
                if self.local.is_committed(unit):
                    raise FileExistsError(unit) from error
                raise

    def _commit_object(self, unit: str, fresh: bool) -> tuple[UnitRecord, dict[str, Any]]:
        """Record and sidecar of a unit, from the mirror or, if `fresh` or absent there, from the object store."""
        path = self.commit_path(unit)
        data = None if fresh or not path.is_file() else path.read_bytes()
        if data is None:
            data = self.mirror.get(path, written_once=True)
            write_atomic(path, data)
        sidecar: list[Any] = []

        def read() -> Any:
            found = parse_json(data)
            sidecar.append(found.get("sidecar"))
            return found["unit"]

        try:
            record = parse_record(self.where(unit), read)
        except (ValueError, AttributeError) as error:
            path.unlink(missing_ok=True)
            if not fresh:  # the mirror's copy may be the damaged one
                return self._commit_object(unit, fresh=True)
            raise ValueError(str(error)) from error
        return record, whole_sidecar(sidecar[0])

    def read(self, unit: str, verify: bool = False) -> UnitRecord:
        """The record of a committed unit; `verify` re-hashes what the mirror has of it.

        What only the object store has is verified as it is fetched.

        Raises:
            FileNotFoundError: not committed. ValueError: damaged. StorageError: the store refuses.
        """
        if self.local.is_committed(unit):
            return self.local.read(unit, verify)
        return self._commit_object(unit, fresh=False)[0]

    def bring(self, units: Iterable[str]) -> None:
        """Have the records of units in the mirror, many at a time.

        Raises:
            StorageError: the store refuses. FileNotFoundError: a unit is not committed.
        """
        missing = [unit for unit in units if not self.commit_path(unit).is_file()]
        if missing:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(partial(self._commit_object, fresh=True), missing))

    def sidecar(self, unit: str) -> dict[str, Any]:
        """Who made the unit, where, and at what cost."""
        try:
            return self._commit_object(unit, fresh=False)[1]
        except (ValueError, FileNotFoundError):
            return whole_sidecar(None)

    def fetch(self, unit: str) -> Path:
        """The directory of a unit in the mirror, brought there and verified where it is not, or is another one.

        Raises:
            DamagedError: it is not committed, or an object is damaged; the message names it.
            StorageError: the store refuses.
        """
        record = self._sound(unit)
        with contextlib.suppress(FileNotFoundError, ValueError):
            if self.local.read(unit).sha256 == record.sha256:
                return self.path(unit)
        temporary = self.root / "tmp" / f"{unit}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        temporary.mkdir(parents=True)
        try:
            for file, digest in record.files.items():
                self._pull(unit, digest, temporary / file)
            write_json(temporary / MANIFEST, asdict(record))
            (temporary / SIDECAR).write_text(json.dumps(self.sidecar(unit)))
            self._keep(temporary, unit)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return self.path(unit)

    def file(self, unit: str, name: str) -> Path:
        """One file of a unit, on this machine: of the mirror, or brought alone.

        Raises:
            DamagedError, StorageError: as `fetch`.
        """
        if (self.path(unit) / name).is_file():
            return self.path(unit) / name
        kept = self.object_of(unit, name)
        if not kept.is_file():
            self._pull(unit, kept.name, kept)
        return kept

    def object_of(self, unit: str, name: str) -> Path:
        """What the object is mirrored by that holds one file of a unit.

        Raises:
            DamagedError: the unit is not committed, or has no such file. StorageError: the store refuses.
        """
        files = self._sound(unit, fresh=False).files
        if name not in files:
            raise DamagedError(f"read {self.where(unit)}: it has no file {shown(name)}. {AGAIN}")
        return self.payload(unit, files[name])

    def _sound(self, unit: str, fresh: bool = True) -> UnitRecord:
        try:
            record = self._commit_object(unit, fresh)[0]
        except FileNotFoundError as error:
            raise DamagedError(f"read {self.where(unit)}: it is not there. {AGAIN}") from error
        except ValueError as error:
            raise DamagedError(f"read {self.where(unit)}: {error}. {AGAIN}") from error
        for file, digest in record.files.items():
            inside = can_be_named(file) and not {"..", "/"} & set(PurePosixPath(file).parts)
            if not inside or not can_be_named(digest) or "/" in digest or digest.startswith("."):
                raise DamagedError(f"read {self.where(unit)}: it names the file {shown(file)}. {AGAIN}")
        return record

    def _pull(self, unit: str, digest: str, target: Path) -> None:
        payload = self.payload(unit, digest)
        try:
            self.mirror.pull(payload, target, digest)
        except FileNotFoundError as error:
            raise DamagedError(f"read {self.mirror.url(payload)}: it is not there. {AGAIN}") from error

    def hash_again(self, unit: str) -> list[int]:
        """Sizes of a unit's files, hashed as they lie in the object store.

        Raises:
            ValueError: an object is damaged or gone; the message names it. StorageError: the store refuses.
        """
        sizes = []
        try:
            for digest in self._sound(unit).files.values():
                found, size = self.mirror.digest(self.payload(unit, digest))
                if found != digest:
                    where = self.mirror.url(self.payload(unit, digest))
                    raise ValueError(f"{where} is damaged: its sha256 does not match")
                sizes.append(size)
        except DamagedError as error:
            raise ValueError(str(error).removesuffix(f" {AGAIN}")) from error
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename} is missing") from error
        return sizes

    def forget(self, unit: str) -> bool:
        """Drop what the mirror has of a unit."""
        self.local.discard(unit)
        self.commit_path(unit).unlink(missing_ok=True)
        shutil.rmtree(self.root / "payload" / unit, ignore_errors=True)
        return True

    def discard(self, unit: str) -> None:
        """Remove a unit that turned out to be damaged or is not needed: its commit first, then its payload.

        Raises:
            StorageError: the store refuses.
        """
        self.mirror.delete(self.commit_path(unit))
        self.mirror.delete_tree(self.root / "payload" / unit)
        self.forget(unit)

    def publish(self, name: str) -> None:
        """Put a file beside the units into the object store.

        Raises:
            StorageError: the store refuses.
        """
        self.mirror.put(self.root / name, self.root / name)

    def obtain(self, name: str) -> Path:
        """A file beside the units as it was published last; our own where that only goes on from it, as a log does.

        Raises:
            StorageError: the store refuses.
        """
        path = self.root / name
        with contextlib.suppress(FileNotFoundError):
            published = self.mirror.get(path)
            if not path.is_file() or not path.read_bytes().startswith(published):
                write_atomic(path, published)
        return path

    def _append(self, directory: Path, line: str, event: str) -> None:
        """Append to this process's newest batch; what more than begins a unit goes to the object store at once."""
        process = _process(os.getpid())
        number = _newest_batch.get((directory, process), 0)
        file = directory / f"{process}-{number}.jsonl"
        if _size(file) >= _BATCH_BYTES:
            number += 1
            file = directory / f"{process}-{number}.jsonl"
        _newest_batch[directory, process] = number
        with file.open("a") as handle:
            handle.write(line)
        if event != "start":
            self.mirror.put(file, file)
            if number and file.stat().st_size == len(line.encode()):  # the one before may have ended with a start
                before = directory / f"{process}-{number - 1}.jsonl"
                self.mirror.put(before, before)

    def ledger(self) -> Iterator[dict[str, Any]]:
        """Every line of every process's ledger, by time: of all nodes, as far as they have told.

        Raises:
            StorageError: the store refuses.
        """
        directory = self.root / "ledger"
        told = self.mirror.names(directory)
        wanted = [name for name, size in told.items() if _size(directory / name) < size]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(self.mirror.pull, (directory / name for name in wanted)))
        return super().ledger()

    def tell_ledger(self) -> None:
        """Put what this node's processes have not told into the object store: tries that were lost with them.

        Raises:
            StorageError: the store refuses.
        """
        directory = self.root / "ledger"
        told = self.mirror.names(directory)
        for file in sorted(directory.glob("*.jsonl")):
            if _size(file) > told.get(file.name, -1):
                self.mirror.put(file, file)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _json_or_none(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
