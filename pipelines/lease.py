"""One driver per run: a lease file made with O_EXCL, with the holder's process and a fencing token.

A lease of a dead process on this host is taken over; one of another host is refused, since nobody here can tell
whether that driver lives.
"""

from __future__ import annotations

import contextlib
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
    except (OSError, ValueError):
        return None
    if data["host"] == socket.gethostname() and _start_time(data["pid"]) != data["started"]:
        return None
    return data


@contextlib.contextmanager
def lease(path: Path) -> Iterator[str]:
    """Hold the lease while the block runs; yields the fencing token.

    Raises:
        LeaseError: a live driver holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    present = holder(path)
    if present is not None:
        raise LeaseError(
            f"run {path.parent.name}: driver {present['pid']} on {present['host']} is at it. Wait for it, or stop that "
            f"process; if that host is gone, delete {path}."
        )
    token = uuid.uuid4().hex
    record = {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_time(os.getpid()), "token": token}
    _claim(path, record)
    try:
        yield token
    finally:
        if (holder(path) or {}).get("token") == token:
            path.unlink(missing_ok=True)


def _claim(path: Path, record: dict[str, Any]) -> None:
    """Make the file exclusively; a stale one is moved aside first, so that one of two claimants wins."""
    if path.exists() and holder(path) is None:
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, path.with_name(f".{path.name}.stale.{record['token'][:8]}"))
    temporary = path.with_name(f".{path.name}.{record['token'][:8]}")
    temporary.write_text(json.dumps(record))
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise LeaseError(f"run {path.parent.name}: another driver took the lease just now. Run again later.") from error
    finally:
        temporary.unlink()
        for stale in path.parent.glob(f".{path.name}.stale.*"):
            stale.unlink(missing_ok=True)
