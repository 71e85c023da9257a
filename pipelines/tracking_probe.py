"""See in seconds, without MLflow, whether a tracking store can be used."""

from __future__ import annotations

import configparser
import contextlib
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipelines.errors import TrackingError

#: Seconds to wait for another writer of the embedded database.
LOCK_WAIT_S = 5.0
#: Seconds for an MLflow server to answer one question.
ANSWER_S = 15.0


def probe(uri: str, embedded: bool) -> None:
    """See in seconds, without MLflow, whether a tracking store can be used; what cannot be told passes.

    Args:
        uri: Tracking URI.
        embedded: Whether the store is ours to make.

    Raises:
        TrackingError: locked, damaged, absent, not answering, refusing our login, or of a kind that MLflow no longer
            has.
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
    if not any(os.environ.get(f"MLFLOW_TRACKING_{way}") for way in ("AUTH", "AWS_SIGV4")):
        _ask(uri)


def _ask(uri: str) -> None:
    """One small question with the login that MLflow itself will use; only a refusal counts."""
    import httpx

    user, password = _login()
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token and not user else {}
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    try:
        answer = httpx.get(
            f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search",
            params={"max_results": 1},
            auth=(user, password) if user and password else None,
            headers=headers,
            timeout=ANSWER_S,
            verify=not insecure and (os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True),
        )
    except httpx.HTTPError as error:
        raise TrackingError(
            f"register.tracking_uri: no MLflow server answers at {uri} ({error or type(error).__name__})."
        ) from error
    if answer.status_code == 401:
        who = f"the login of {user!r}" if user else "to answer without a login"
        raise TrackingError(
            f"register.tracking_uri: the MLflow server at {uri} refuses {who}. Set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or write both into ~/.mlflow/credentials."
        )
    if answer.status_code == 403:
        raise TrackingError(
            f"register.tracking_uri: the MLflow server at {uri} refuses us ({answer.text[:100]}). If it is the host, "
            "start the server with that host and port among its --allowed-hosts; else ask for permission."
        )


def _login() -> tuple[str | None, str | None]:
    """User and password from where MLflow takes them: the environment, then ~/.mlflow/credentials."""
    kept = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, ValueError, configparser.Error):
        kept.read(Path("~/.mlflow/credentials").expanduser())
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    user, password = (os.environ.get(name) or kept.get("mlflow", name.lower(), fallback=None) for name in names)
    return user, password


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
