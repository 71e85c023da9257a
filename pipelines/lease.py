"""One driver per run: what a driver asks of its lease, and a lease file made with O_EXCL.

The file holds the holder's process and a fencing token. A lease of a dead process on this host is taken over; one of
another host is refused, since nobody here can tell whether that driver lives. Runs in an object store, which has no
O_EXCL, keep a row in a database instead (`pipelines.lease_database`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lowrank.reading import read_json
from pipelines.errors import LeaseError


class HeldLease(Protocol):
    """A lease that was taken."""

    def require(self) -> None:
        """Go on only while the lease is still this one; to be called before anything is committed.

        Raises:
            LeaseError: another driver has taken the run over.
        """
        ...

    def fenced(self) -> contextlib.AbstractContextManager[None]:
        """Keep out other drivers while the block writes what only the holder may.

        Raises:
            LeaseError: see `require`.
        """
        ...


def start_time(pid: int) -> float | None:
    """Start time of a live process, or None."""
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return float(process.create_time())
    return None


def holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lease, or None; a lease of a process that died here counts as none."""
    try:
        data: dict[str, Any] = read_json(path)
        here, pid, started = data["host"] == socket.gethostname(), int(data["pid"]), data["started"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return None if here and start_time(pid) != started else data


@dataclass(frozen=True)
class Lease:
    """A lease that was taken, and the token that tells it from every other one."""

    path: Path
    token: str

    def require(self) -> None:
        """Go on only while the lease is still this one; to be called before anything is committed.

        Raises:
            LeaseError: somebody took it away, or another driver has taken the run over.
        """
        try:
            found = read_json(self.path)
        except (FileNotFoundError, ValueError):  # a disk that refuses says so itself
            found = {}
        if not isinstance(found, dict) or found.get("token") != self.token:
            other = f"driver {found['pid']} on {found['host']} is" if _is_record(found) else "somebody was"
            raise LeaseError(
                f"run {self.path.parent.name}: {other} at {self.path} while this driver held it. This driver stops; "
                "what it has committed stays."
            )

    @contextlib.contextmanager
    def fenced(self) -> Iterator[None]:
        """Keep out other drivers of this host from taking over while the block writes what only the holder may.

        Raises:
            LeaseError: see `require`.
        """
        with _guard(self.path):
            self.require()
            yield


def _is_record(found: Any) -> bool:
    return isinstance(found, dict) and {"pid", "host", "token"} <= set(found)


@contextlib.contextmanager
def lease(path: Path) -> Iterator[Lease]:
    """Hold the lease while the block runs.

    Raises:
        LeaseError: a live driver holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    record = {"pid": os.getpid(), "host": socket.gethostname(), "started": start_time(os.getpid()), "token": token}
    with _guard(path):
        _claim(path, record)
    try:
        yield Lease(path, token)
    finally:
        with _guard(path):
            if (holder(path) or {}).get("token") == token:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[None]:
    """Keep out the other drivers of this host while the lease is looked at and changed.

    Without it a slow claimant of a stale lease could take away the live one that a faster claimant has just made.
    """
    with contextlib.ExitStack() as stack:
        # A disk that refuses, or a file system without locks: the exclusive link below still holds.
        with contextlib.suppress(OSError):
            handle = stack.enter_context(path.with_name(f".{path.name}.lock").open("a"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def store_in_use(root: Path) -> Iterator[None]:
    """Let nobody clear the store up while the block runs.

    Raises:
        LeaseError: somebody does.
    """
    with _locked(root, fcntl.LOCK_SH, f"use {root}: `rankline gc` is at this store. Wait for it."):
        yield


@contextlib.contextmanager
def store_to_oneself(root: Path) -> Iterator[None]:
    """Let no run begin while the block runs.

    Raises:
        LeaseError: one is under way.
    """
    with _locked(root, fcntl.LOCK_EX, f"clear {root} up: a driver is at a run of this store. Wait for it."):
        yield


@contextlib.contextmanager
def _locked(root: Path, kind: int, refusal: str) -> Iterator[None]:
    with (root / "_store.lock").open("a+") as handle:  # NFS gives shared locks to readers alone
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LeaseError(refusal) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                raise
        yield


def _claim(path: Path, record: dict[str, Any]) -> None:
    """Make the file exclusively, after a stale one is removed."""
    present = holder(path)
    if present is not None:
        raise LeaseError(
            f"run {path.parent.name}: driver {present['pid']} on {present['host']} is at it. Wait for it, or stop that "
            f"process; if that host is gone, delete {path}."
        )
    path.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{record['token'][:8]}")
    temporary.write_text(json.dumps(record))
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise LeaseError(f"run {path.parent.name}: another driver took the lease just now. Run again later.") from error
    finally:
        temporary.unlink()
