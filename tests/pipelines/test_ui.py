"""`rankline ui` on a store whose runs are tracked elsewhere: a server, or a database of their own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from pipelines.artifacts import Store
from pipelines.cli import main
from pipelines.tracking import Tracker


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An object store that no run has used."""
    return Store.open((tmp_path / "objects").as_uri(), str(tmp_path / "cache"))


@pytest.fixture
def tracking_server() -> Iterator[str]:
    """Something that answers as an MLflow server would when it is asked for experiments."""

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ui(store: Store, *more: str) -> list[str]:
    return ["ui", "--store", store.name, "--cache", str(store.root), *more]


def test_the_server_that_keeps_the_runs_is_told(
    store: Store, tracking_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ui(store)) == 4
    assert "_registries.json does not exist. Run a pipeline first" in capsys.readouterr().err
    store.remember_registry("sqlite:////before/mlflow.db")
    store.remember_registry(tracking_server)
    assert main(ui(store)) == 0
    assert capsys.readouterr().out == f"MLflow on {tracking_server}\n"
    assert main(ui(store, "--json")) == 0
    assert json.loads(capsys.readouterr().out) == {"url": tracking_server}


def test_a_server_or_database_that_is_gone_is_told(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        store.remember_registry(f"http://127.0.0.1:{free.getsockname()[1]}")
        assert main(ui(store)) == 4
    assert "no MLflow server answers" in capsys.readouterr().err
    store.remember_registry("sqlite:////nowhere/of/ours/mlflow.db")
    assert main(ui(store)) == 4
    assert "/nowhere/of/ours does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_a_database_of_their_own_is_opened(store: Store, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'tracked.db'}"
    Tracker(tmp_path / "driver", uri, "rankline").begin("line", {}, {}, None)
    store.remember_registry(uri)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.cli", *ui(store, "--port", str(port), "--json")]
    page = psutil.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        shown = json.loads("".join(page.stdout.readline() for _ in range(3)))
        assert shown == {"url": f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning"}
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=5"
        assert "rankline" in [found["name"] for found in httpx.get(url).json()["experiments"]]
    finally:
        page.send_signal(signal.SIGINT)
        assert page.wait(30) == 0
