"""`rankline ui`: MLflow's own server on the database of a store's runs, on loopback only.

Runs that a server of its own keeps are shown there: that one's address is told.

The server makes children of its own, so it gets a process group, which ends with this command whatever ends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO
from urllib.parse import unquote, urlsplit

from cluster.errors import PortError
from pipelines.artifacts import Store
from pipelines.errors import TrackingError
from pipelines.tracking import default_uri
from pipelines.tracking_probe import probe

START_S = 120.0
STOP_S = 10.0


def serve(store: Store, port: int, ready: Callable[[str, bool], None]) -> int:
    """Run MLflow's server on what the store's runs are tracked in, until it ends or Ctrl-C.

    `ready` is told the address once it answers, and whether the server ends with this command: where the runs are on a
    server of their own, its address is all there is to tell.

    Raises:
        TrackingError: the store has no usable tracking database, or the server does not come up.
        PortError: the port is in use.
        StorageError: the object store refuses.
    """
    uri = _tracking_uri(store)
    if uri.startswith(("http://", "https://")):
        probe(uri, embedded=False)
        ready(uri, False)
        return 0
    probe(uri, embedded=uri == default_uri(store.root))
    with socket.socket() as taken:
        if taken.connect_ex(("127.0.0.1", port)) == 0:
            raise PortError(f"ui: port {port} is in use. Give another one with --port.")
    with tempfile.TemporaryFile() as log, _group(_command(uri, store.root, port), log) as process:
        _wait_until_up(process, port, log)
        ready(f"http://127.0.0.1:{port}/{_runs_page(uri)}", True)
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
            raise TrackingError(f"ui: MLflow's server ended by itself:\n{_tail(log)}")
    return 0


def _tracking_uri(store: Store) -> str:
    """The database in the store, or else what its runs came to use last.

    Raises:
        TrackingError: there is none.
    """
    database = store.root / "_mlflow" / "mlflow.db"
    if store.mirror is None and database.is_file():
        return default_uri(store.root)
    used = store.registries()
    if used:
        return used[-1]
    where = str(database) if store.mirror is None else f"{store.where(store.root)}/_registries.json"
    raise TrackingError(f"ui: {where} does not exist. Run a pipeline first, or give its store with --store.")


def _runs_page(uri: str) -> str:
    """The page of the newest experiment's runs, where sqlite has it; MLflow opens on prompts and traces otherwise."""
    if not uri.startswith("sqlite:///"):
        return ""
    database = unquote(urlsplit(uri).path)[1:]
    query = "select experiment_id from experiments order by last_update_time desc, experiment_id desc limit 1"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            (experiment,) = connection.execute(query).fetchone()
    except (sqlite3.Error, TypeError):
        return ""
    return f"#/experiments/{experiment}/runs?workflowType=machine_learning"


def _command(uri: str, store: Path, port: int) -> list[str]:
    # Only these host names are answered: another site cannot reach the server through a name of its own (rebinding).
    names = [f"127.0.0.1:{port}", f"localhost:{port}"]
    options = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        "--allowed-hosts": ",".join(names),
        "--cors-allowed-origins": ",".join(f"http://{name}" for name in names),
        "--backend-store-uri": uri,
        "--registry-store-uri": uri,
        "--default-artifact-root": str(store / "_mlflow" / "artifacts"),
    }
    return [sys.executable, "-m", "mlflow", "server", *(word for pair in options.items() for word in pair)]


@contextlib.contextmanager
def _group(command: list[str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process group that ends with the block, on SIGTERM too."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # Its job runner would start processes for features that nothing here uses.
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield process
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)
        _end(process)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    import httpx

    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2.0, trust_env=False).is_success:
                return
        time.sleep(0.2)
    raise TrackingError(f"ui: MLflow's server did not come up within {START_S:.0f} s:\n{_tail(log)}")


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-5:])
