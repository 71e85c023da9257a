"""See in seconds, without MLflow, whether a tracking store can be used."""

from __future__ import annotations

import contextlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipelines.errors import TrackingError

#: Seconds to wait for another writer of the embedded database.
LOCK_WAIT_S = 5.0


def probe(uri: str, embedded: bool) -> None:
    """See in seconds, without MLflow, whether a tracking store can be used; what cannot be told passes.

    Args:
        uri: Tracking URI.
        embedded: Whether the store is ours to make.

    Raises:
        TrackingError: locked, damaged, absent, not answering, or of a kind that MLflow no longer has.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        _probe_server(uri, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    elif parts.scheme == "sqlite":
        _probe_sqlite(uri, Path(unquote(parts.path)[1:]), embedded)
    elif parts.scheme in ("", "file"):
        raise TrackingError(
            f"register.tracking_uri: {uri!r} is a directory, and MLflow's file store is gone since 3.13. Allowed are "
            "sqlite:////absolute/path.db, a database URI, http(s)://HOST:PORT, or null for a database in the store."
        )


def _probe_server(uri: str, host: str, port: int) -> None:
    import socket

    try:
        socket.create_connection((host, port), timeout=3.0).close()
    except OSError as error:
        raise TrackingError(
            f"register.tracking_uri: no MLflow server answers at {uri} ({error}). Start it, or set "
            "register.tracking_uri to null for a database in the store."
        ) from error


def _probe_sqlite(uri: str, path: Path, embedded: bool) -> None:
    import sqlite3

    if not embedded and not path.parent.is_dir():
        raise TrackingError(
            f"register.tracking_uri: {uri}: the directory {path.parent} does not exist. Make it, or set "
            "register.tracking_uri to null for a database in the store."
        )
    if not path.is_file():
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=LOCK_WAIT_S, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise TrackingError(
            f"MLflow's database {path}: {error}. End the program that holds it (`rankline ui` and other runs hold it "
            "for moments only), check that it may be written, or restore the file; then run again."
        ) from error
