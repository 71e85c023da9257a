"""`rankline ui`: MLflow's own server on a store's database, on loopback only."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from cluster.errors import PortError
from pipelines.errors import TrackingError
from pipelines.tracking import default_uri


def serve(store: Path, port: int) -> int:
    """Run MLflow's server until it ends or Ctrl-C.

    Raises:
        TrackingError: the store has no tracking database. PortError: the port is in use.
    """
    database = store / "_mlflow" / "mlflow.db"
    if not database.is_file():
        raise TrackingError(f"ui: {database} does not exist. Run a pipeline first, or give --store.")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise PortError(f"ui: port {port} is in use. Give another one with --port.")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        default_uri(store),
        "--default-artifact-root",
        str(store / "_mlflow" / "artifacts"),
    ]
    print(f"MLflow on http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
    process = subprocess.Popen(command, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"})
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 0
