"""`rankline serve --build`: what Serve's own command deploys from the file answers as the endpoint does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from serving_samples import free_port

from cluster.serving.client import wait_ready
from cluster.serving.deploy import undeploy
from pipelines.artifacts import Store
from pipelines.cli import main
from pipelines.config import to_dict
from pipelines.errors import ConfigError
from pipelines.serve_app import serve_yaml

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


def copy_of_run(whole_line: Any, name: str, **serve: Any) -> Store:
    """The finished run under another name and with other settings of its endpoint; returns the store."""
    directory: Path = whole_line.result.directory
    shutil.copytree(directory, directory.with_name(name))
    settings = to_dict(whole_line.config)
    settings["serve"] |= serve
    (directory.with_name(name) / "pipeline.yaml").write_text(yaml.safe_dump(settings))
    return Store(directory.parent)


def test_serve_deploy_takes_the_file(
    whole_line: Any, ray_head: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, token_file = free_port(), tmp_path / "token"
    store = copy_of_run(whole_line, "built", port=port, num_cpus=0.5, token_file=str(token_file))
    path = tmp_path / "serve.yaml"
    assert main(["serve", "built", "--store", store.name, "--build", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": ray_head.token_file}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [str(Path(sys.executable).with_name("serve")), "deploy", str(path), "-a", ray_head.dashboard_url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, 120)
        headers = {"Authorization": f"Bearer {token_file.read_text().strip()}"}
        listed = httpx.get(f"{url}/v1/models", headers=headers, trust_env=False).raise_for_status().json()["data"]
        assert {"base", "tiny", "tiny:1", "tiny@champion"} == {model["id"] for model in listed}
        body = {"model": "tiny@champion", "prompt": "4 odd?", "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/completions", headers=headers, json=body, trust_env=False, timeout=60)
        assert answer.raise_for_status().json()["system_fingerprint"] == "tiny:1"
    finally:
        undeploy("rankline-tiny")


def test_the_file_fits_serves_schema_and_scales(whole_line: Any) -> None:
    from ray.serve.schema import ServeDeploySchema

    store = copy_of_run(whole_line, "scaled", num_replicas=2, max_replicas=6, max_concurrent=8)
    text = serve_yaml(store, "scaled")
    schema = ServeDeploySchema(**yaml.safe_load(text))
    [deployment] = schema.applications[0].deployments
    scaling = deployment.autoscaling_config
    assert isinstance(scaling, dict)
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (2, 6, 8)
    assert text.startswith("# tiny:1 and every adapter")
    assert "token" not in text.lower()
    with pytest.raises(ConfigError, match="no finished run of that name"):
        serve_yaml(store, "nobody")


def test_every_node_with_replicas_has_a_proxy_where_others_reach_it(whole_line: Any, tmp_path: Path) -> None:
    store = copy_of_run(whole_line, "reached", host="0.0.0.0", token_file=str(tmp_path / "token"))
    written = yaml.safe_load(serve_yaml(store, "reached"))
    assert (written["proxy_location"], written["http_options"]["host"]) == ("EveryNode", "0.0.0.0")
    assert yaml.safe_load(serve_yaml(store, "tiny"))["proxy_location"] == "HeadOnly"
