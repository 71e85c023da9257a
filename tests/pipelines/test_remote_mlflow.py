"""A line into an MLflow server that wants a login, started as docker/compose.yaml starts it."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from lines import Driver, ledger_lines, stage_units, store_of, with_changes

from pipelines.cli import main
from pipelines.config import to_dict
from pipelines.errors import TrackingError
from pipelines.tracking import RegistryReader
from pipelines.tracking_probe import probe

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(400)]

DOCKER = Path(__file__).parents[2] / "docker"
USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"


@dataclass(frozen=True)
class Server:
    """A running server: where it is, its administrator's password, and where it keeps everything."""

    port: int
    password: str
    root: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def server_command(port: int, root: Path) -> list[str]:
    """The command of compose.yaml, with a database and a directory of ours."""
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    [script] = compose["services"]["mlflow"]["command"]
    words = shlex.split(script.partition("exec mlflow ")[2])
    ours = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--backend-store-uri": f"sqlite:///{root}/mlflow.db",
        "--artifacts-destination": str(root / "artifacts"),
        "--allowed-hosts": f"127.0.0.1:{port}",
    }
    for option, value in ours.items():
        words[words.index(option) + 1] = value
    assert {"--app-name", "basic-auth", "--serve-artifacts"} <= set(words)
    return [sys.executable, "-m", "mlflow", *words]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    root, secret = tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("secret") / "auth.ini"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        made = Server(free.getsockname()[1], secrets.token_hex(16), root)
    lines = (DOCKER / "mlflow_auth.ini").read_text().splitlines()
    lines = [f"database_uri = sqlite:///{root}/auth.db" if "database_uri" in line else line for line in lines]
    secret.write_text("\n".join([*lines, f"admin_password = {made.password}"]))
    secret.chmod(0o600)
    environment = os.environ | {
        "MLFLOW_AUTH_CONFIG_PATH": str(secret),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = server_command(made.port, root)
    with (root / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=root, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until_healthy(made, process)
        yield made
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except OSError:
            assert process.poll() is None, (server.root / "server.log").read_text()
            assert time.monotonic() < deadline, (server.root / "server.log").read_text()
            time.sleep(0.2)


@pytest.fixture
def config(whole_line: Any, server: Server, tmp_path: Path) -> Any:
    """The tiny line into that server, its first three stages done."""
    made = with_changes(
        whole_line.config, store={"path": str(tmp_path / "store")}, register={"tracking_uri": server.url}
    )
    for stage in ("shard", "decompose", "quantize"):
        ours, theirs = (store_of(one).root / "_artifacts" / stage for one in (made, whole_line.config))
        shutil.copytree(theirs, ours)
    (tmp_path / "p.yaml").write_text(json.dumps(to_dict(made)))
    return made


def refused(command: str, pipeline: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([command, str(pipeline)]) == 4
    told = capsys.readouterr()
    return " ".join((told.out + told.err).split())


def holding(secret: str, *roots: Path) -> list[Path]:
    """Files below the roots with these bytes in them."""
    found = []
    for path in (path for root in roots for path in root.rglob("*")):
        if path.is_file() and not path.is_symlink() and secret.encode() in path.read_bytes():
            found.append(path)
    return found


def test_a_line_into_a_server_with_a_login(
    config: Any,
    server: Server,
    ray_head: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, wrong = ledger_lines(config), "not-" + secrets.token_hex(8)
    with monkeypatch.context() as without:
        without.delenv(USER, raising=False)
        without.setenv("HOME", str(tmp_path / "home"))  # no credentials of whoever runs this
        for command in ("plan", "run"):
            told = refused(command, tmp_path / "p.yaml", capsys)
            assert "refuses to answer without a login. Set MLFLOW_TRACKING_USERNAME" in told
    monkeypatch.setenv(USER, "admin")
    monkeypatch.setenv(PASSWORD, wrong)
    for command in ("plan", "run"):
        assert "refuses the login of 'admin'" in refused(command, tmp_path / "p.yaml", capsys)
    assert ledger_lines(config) == before, "nothing was begun"
    monkeypatch.setenv(PASSWORD, server.password)
    with pytest.raises(TrackingError, match="allowed-hosts"):
        probe(f"http://localhost:{server.port}", embedded=False)
    driver = Driver(config)
    assert driver.wait() == 0, driver.text()
    assert ledger_lines(config) > before
    assert all(f"{stage:<10} cached" in driver.text() for stage in ("shard", "decompose", "quantize"))
    (version,) = RegistryReader(server.url).versions(config.name)
    assert version.source.startswith("mlflow-artifacts:/")
    came_down_as_it_is(config, server, version, tmp_path / "down")
    assert holding(server.password, tmp_path, server.root, Path(ray_head.temp_dir)) == []
    assert holding(wrong, tmp_path, server.root) == []
    assert holding("adapter_model", server.root), "the search does find what is there"


def came_down_as_it_is(config: Any, server: Server, version: Any, directory: Path) -> None:
    """Every file of the version, through the server and byte for byte what `register` has in the store."""
    from mlflow import MlflowClient

    directory.mkdir()
    client = MlflowClient(tracking_uri=server.url, registry_uri=server.url)
    assert client.get_model_version_by_alias(config.name, "champion").version == version.version
    got = Path(client.download_artifacts(version.run_id, "model", str(directory)))
    bundle = stage_units(config, "register").path("bundle")
    names = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    common = {path.relative_to(got).as_posix() for path in got.rglob("*") if path.is_file()}
    assert "adapter_model.safetensors" in {name.rpartition("/")[2] for name in common}
    assert common == names
    for name in common:
        assert (got / name).read_bytes() == (bundle / name).read_bytes(), name
    assert any((server.root / "artifacts").rglob("adapter_model.safetensors"))
