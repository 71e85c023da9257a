"""One driver per run: a lease file made with O_EXCL, with the holder's process and a fencing token.

A lease of a dead process on this host is taken over; one of another host is refused, since nobody here can tell
whether that driver lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import LeaseError


def _start_time(pid: int) -> float | None:
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
        data: dict[str, Any] = json.loads(path.read_text())
        here, pid, started = data["host"] == socket.gethostname(), int(data["pid"]), data["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if here and _start_time(pid) != started else data


@contextlib.contextmanager
def lease(path: Path) -> Iterator[str]:
    """Hold the lease while the block runs; yields the fencing token.

    Raises:
        LeaseError: a live driver holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    record = {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_time(os.getpid()), "token": token}
    with _guard(path):
        _claim(path, record)
    try:
        yield token
    finally:
        with _guard(path):
            if (holder(path) or {}).get("token") == token:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[None]:
    """Keep out the other drivers of this host while the lease is looked at and changed.

    Without it a slow claimant of a stale lease could take away the live one that a faster claimant has just made.
    """
    with path.with_name(f".{path.name}.lock").open("a") as handle:
        with contextlib.suppress(OSError):  # a file system without locks: the exclusive link below still holds
            fcntl.flock(handle, fcntl.LOCK_EX)
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
