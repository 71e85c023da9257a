"""Durable commits on a file system: temporary name, fsync, a manifest with a sha256 per file, one atomic rename.

`cluster.mirrored` has the same on an object store; `units_at` chooses, and readers ask `fetch` for a unit's directory.

A *unit* is a directory that is either absent or whole. What it holds is hashed in its `unit.json`; how it came about
(node, process, seconds, memory) lies beside it in `sidecar.json`, outside every hash. Every process that works on
units also appends to a ledger file of its own, so that any number of nodes can tell what was started and committed
where without a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError, DamagedError
from lowrank.errors import LowRankError
from lowrank.reading import is_number, is_texts, parse_json, read_json, shown

if TYPE_CHECKING:
    from cluster.objects import Mirror

MANIFEST, SIDECAR = "unit.json", "sidecar.json"


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with one spelling: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def sync(path: Path) -> None:
    """Bring a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file by a whole new one, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync(path.parent)


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Replace a JSON file atomically."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True, default=str).encode() + b"\n", mode)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Read what an earlier stage has left at `path`; whatever strange files lead to is one error.

    Raises:
        DamagedError: it is not what that stage writes. OSError: the disk refuses.
    """
    try:
        yield
    except (ClusterError, LowRankError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # libraries tell damage by one without
            raise
        raise DamagedError(
            f"read {path}: damaged ({type(error).__name__}: {error}). Delete the stage that holds it and run again: it "
            "is made anew."
        ) from error


@dataclass(frozen=True)
class UnitRecord:
    """A committed unit: sha256 per file, the facts that its stage passes on, and the hash over both."""

    name: str
    files: dict[str, str]
    facts: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class UnitStore:
    """The units of one stage under `root/units`, and their ledger under `root/ledger`."""

    root: Path

    def path(self, unit: str) -> Path:
        """Directory of a unit, whether it is committed or not."""
        return self.root / "units" / unit

    def where(self, unit: str) -> str:
        """What messages call a unit."""
        return str(self.path(unit))

    def is_committed(self, unit: str) -> bool:
        """Whether the unit is there, whole."""
        return (self.path(unit) / MANIFEST).is_file()

    def committed(self, units: Iterable[str]) -> set[str]:
        """Those of them that are there."""
        return {unit for unit in units if self.is_committed(unit)}

    def all_committed(self) -> list[str]:
        """Every unit that is there."""
        return sorted(path.parent.name for path in (self.root / "units").glob(f"*/{MANIFEST}"))

    def fetch(self, unit: str) -> Path:
        """The directory of a committed unit, on this machine."""
        return self.path(unit)

    def file(self, unit: str, name: str) -> Path:
        """One file of a committed unit, on this machine."""
        return self.path(unit) / name

    def bring(self, units: Iterable[str]) -> None:
        """Have the records of units at hand, many at a time."""

    def forget(self, unit: str) -> bool:
        """Drop a copy of the unit that may be out of date; whether there can be such a copy."""
        return False

    def publish(self, name: str) -> None:
        """A file beside the units, such as a log, is for all nodes to see."""

    def obtain(self, name: str) -> Path:
        """A file beside the units as it was published last, on this machine; it may not be there."""
        return self.root / name

    def commit(self, unit: str, write: Callable[[Path], dict[str, Any] | None]) -> UnitRecord:
        """Make a unit: `write(directory)` fills a temporary directory and returns facts; then one rename.

        A unit that is there already is returned as it is: Ray runs a task again whose worker died after its commit.
        Of two processes that make the same unit at once the first commits; the other's (equal) result is surplus.
        Facts enter the unit's hash.
        """
        if self.is_committed(unit):
            return self.read(unit)
        started, cpu = time.time(), time.process_time()
        self.log("start", unit)
        final = self.path(unit)
        temporary = self.root / "tmp" / f"{unit}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        temporary.mkdir(parents=True)
        try:
            facts = write(temporary) or {}
            record = _seal(temporary, unit, facts)
            sidecar = {"host": socket.gethostname(), "node": node_id(), "pid": os.getpid(), "started": started}
            sidecar |= {"seconds": time.time() - started, "peak_rss_bytes": peak_rss_bytes()}
            (temporary / SIDECAR).write_text(json.dumps(sidecar))
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._place(temporary, unit)
            except OSError:
                if not self.is_committed(unit):
                    raise
                self.log("surplus", unit)
                return self.read(unit)
            sync(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        spent = {"seconds": time.time() - started, "cpu_seconds": time.process_time() - cpu}
        self.log("commit", unit, sha256=record.sha256, **spent)
        return record

    def _place(self, whole: Path, unit: str) -> None:
        """Rename a whole directory to its unit; what is left there of a damaged one goes out of the way."""
        try:
            os.rename(whole, self.path(unit))
        except OSError:
            if self.is_committed(unit) or not self.path(unit).exists():
                raise
            self.discard(unit)
            os.rename(whole, self.path(unit))

    def read(self, unit: str, verify: bool = False) -> UnitRecord:
        """The record of a committed unit; `verify` re-hashes its files.

        Raises:
            FileNotFoundError: not committed. ValueError: damaged; the message names the file.
        """
        directory = self.path(unit)
        record = parse_record(directory / MANIFEST, lambda: read_json(directory / MANIFEST))
        if verify:
            for file, digest in record.files.items():
                if not can_be_named(file):
                    raise ValueError(f"{directory / MANIFEST} is damaged: it names the file {shown(file)}")
                if not (directory / file).is_file() or sha256_file(directory / file) != digest:
                    raise ValueError(f"{directory / file} is damaged: its sha256 does not match the manifest")
        return record

    def sidecar(self, unit: str) -> dict[str, Any]:
        """Who made the unit, where, and at what cost: `node`, `seconds`, `peak_rss_bytes`, and more.

        It stands outside of every hash: of a damaged one nothing is known, which is no reason to stop.
        """
        try:
            value = read_json(self.path(unit) / SIDECAR)
        except (OSError, ValueError):
            value = {}
        return whole_sidecar(value)

    def discard(self, unit: str) -> None:
        """Remove a unit that turned out to be damaged: at once, whatever holds its files open."""
        aside = self.root / "tmp" / f"{unit}.{uuid.uuid4().hex[:8]}.discarded"
        aside.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path(unit), aside)
        shutil.rmtree(aside, ignore_errors=True)

    def log(self, event: str, unit: str, **facts: Any) -> None:
        """Append one line to this process's own ledger file."""
        directory = self.root / "ledger"
        directory.mkdir(parents=True, exist_ok=True)
        line = {"event": event, "unit": unit, "time": time.time(), "node": node_id(), "pid": os.getpid(), **facts}
        self._append(directory, json.dumps(line) + "\n", event)

    def _append(self, directory: Path, line: str, event: str) -> None:
        with (directory / f"{socket.gethostname()}-{os.getpid()}.jsonl").open("a") as handle:
            handle.write(line)

    def hash_again(self, unit: str) -> list[int]:
        """Sizes of a unit's files, hashed where the store keeps them; here `read` has done that.

        Raises:
            ValueError: one is damaged or gone; the message names it.
        """
        return [(self.path(unit) / file).stat().st_size for file in self.read(unit).files]

    def tell_ledger(self) -> None:
        """What this node's processes have written in the ledger is for all nodes to see."""

    def ledger(self) -> Iterator[dict[str, Any]]:
        """Every line of every process's ledger, by time; torn lines are passed over."""
        lines = []
        for file in sorted((self.root / "ledger").glob("*.jsonl")):
            for text in file.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    line = parse_json(text)
                    if isinstance(line, dict) and is_number(line.get("time")) and _has_texts(line, "event", "unit"):
                        lines.append(line)
        return iter(sorted(lines, key=lambda line: line["time"]))


def units_at(root: Path, mirror: Mirror | None) -> UnitStore:
    """The units at a directory; of an object store where it mirrors one."""
    if mirror is None:
        return UnitStore(root)
    from cluster.mirrored import MirroredUnits

    return MirroredUnits(root, mirror)


def parse_record(where: Path | str, read: Callable[[], Any]) -> UnitRecord:
    """The record of a unit out of a manifest that `read` reads.

    Raises:
        ValueError: it is damaged; the message says where it is.
    """
    try:
        data = read()
        record = UnitRecord(data["name"], data["files"], data["facts"], data["sha256"])
        if not is_texts(record.files) or not isinstance(record.facts, dict):
            raise ValueError("files and facts must be mappings")
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{where} is damaged ({error})") from error
    if _digest(record.name, record.files, record.facts) != record.sha256:
        raise ValueError(f"{where} is damaged: its own hash does not match")
    return record


def whole_sidecar(value: Any) -> dict[str, Any]:
    """A unit's sidecar, or one that knows nothing in place of a damaged one."""
    fits = isinstance(value, dict) and isinstance(value.get("node"), str)
    fits = fits and all(is_number(value.get(name)) for name in ("seconds", "peak_rss_bytes"))
    return value if fits else {"node": "unknown", "seconds": 0.0, "peak_rss_bytes": 0}


def can_be_named(file: str) -> bool:
    """Whether a file system takes the name at all."""
    names = file.encode(errors="replace").split(b"/")
    return len(file) < 1024 and b"\0" not in b"".join(names) and all(0 < len(name) <= 255 for name in names)


def _has_texts(line: dict[str, Any], *names: str) -> bool:
    return all(isinstance(line.get(name), str) for name in names)


def _seal(directory: Path, unit: str, facts: dict[str, Any]) -> UnitRecord:
    files = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        sync(file)
        files[file.relative_to(directory).as_posix()] = sha256_file(file)
    record = UnitRecord(unit, files, facts, _digest(unit, files, facts))
    write_json(directory / MANIFEST, {"name": unit, "files": files, "facts": facts, "sha256": record.sha256})
    return record


def _digest(unit: str, files: dict[str, str], facts: dict[str, Any]) -> str:
    return sha256_bytes(canonical({"name": unit, "files": files, "facts": facts}))


def node_id() -> str:
    """Ray's id of this node inside a Ray worker, else `driver`."""
    import sys

    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return "driver"
    return str(ray.get_runtime_context().get_node_id())


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    import resource

    # ru_maxrss of a new program begins with the peak of the process that started it; VmHWM is its own
    with contextlib.suppress(OSError), Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
