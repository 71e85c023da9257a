"""The command as a user meets it: help, plan, status, methods, doctor, resume, and their exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from lines import make_data, make_model_dir

from lowrank.options import METHOD_OPTIONS
from pipelines import workflow
from pipelines.cli import build_parser, main
from pipelines.config import parse
from pipelines.portable import portable_yaml
from pipelines.sources import hash_sources
from pipelines.tracking import Tracker

COMMANDS = (
    "plan",
    "run",
    "submit",
    "status",
    "resume",
    "serve",
    "stop",
    "ui",
    "chat",
    "verify",
    "gc",
    "methods",
    "doctor",
)
STAGES = ["shard", "decompose", "quantize", "finetune", "evaluate", "register"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    make_model_dir(root)
    return root


@pytest.fixture
def pipeline(root: Path, tmp_path: Path) -> Path:
    values = {
        "name": "tiny",
        "model": {"source": str(root / "model-llama")},
        "data": make_data(tmp_path),
        "decompose": {"rank": 2},
        "serve": {"enabled": False},
        "store": {"path": str(tmp_path / "store")},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["run"])
    assert caught.value.code == 2


def test_plan_loads_nothing_heavy(pipeline: Path) -> None:
    code = "import sys; from pipelines.cli import main; rc = main(['plan', sys.argv[1], '--json']); "
    code += "print(sorted({'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules)), rc, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, str(pipeline)], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[] 0"


def test_plan_tells_keys_and_costs_and_changes_nothing(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "plan", str(pipeline))
    assert [stage["name"] for stage in found["stages"]] == STAGES
    assert all(len(stage["key"]) == 20 and not stage["cached"] for stage in found["stages"])
    assert found["refusals"] == []
    assumed = found["estimates"]["assumed"]
    assert (assumed["training_rows"], assumed["heldout_rows"]) == (24, 8)
    assert 5 < assumed["tokens_per_training_row"] < 64
    assert set(STAGES) <= set(found["estimates"]["seconds"])
    store = pipeline.parent / "store"
    assert [path.name for path in store.iterdir()] == ["_hashes.json"]
    assert run_json(capsys, "plan", str(pipeline))["run_key"] == found["run_key"]
    changed = run_json(capsys, "plan", str(pipeline), "--set", "decompose.rank=3")
    same = [a["key"] == b["key"] for a, b in zip(found["stages"], changed["stages"], strict=True)]
    assert same == [True, False, False, False, False, False]


def test_plan_tells_every_refusal_with_the_code_of_the_first(
    pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["--set", "decompose.rank=999", "--set", "cluster.num_cpus=1"]
    found = run_json(capsys, "plan", str(pipeline), *overrides, code=2)
    assert len(found["refusals"]) == 2
    assert "decompose.rank" in found["refusals"][0]
    assert "cluster.num_cpus" in found["refusals"][1]


def test_plan_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "plan", "--schema")["title"] == "rankline pipeline"
    assert main(["plan"]) == 2


@pytest.mark.parametrize("width", [80, 120])
def test_plan_fits_the_terminal(
    pipeline: Path, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["plan", str(pipeline)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for stage in STAGES:
        assert sum(line.strip().startswith(stage) for line in lines) == 1


def test_methods_come_from_the_registries(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "methods")
    assert {row["name"] for row in found["decompose.method"]} == set(METHOD_OPTIONS)
    assert {row["name"] for row in found["quantize.method"]} == {"nf4", "qpissa", "loftq", "lq_lora", "lplr"}
    assert all(row["summary"] for rows in found.values() for row in rows)
    assert main(["methods"]) == 0


def test_doctor_knows_the_processor_and_who_has_a_port(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import doctor

    def found(check: str) -> dict[str, dict[str, str]]:
        return {one["finding"]: one for one in getattr(doctor, check)(tmp_path)}

    assert any(text.endswith(("avx512f", "avx2", "asimd")) for text in found("_processor"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found("_processor")["none for the compiled kernels"]["remedy"].startswith("Install gcc")
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 5000)):
        used = found("_ports")["127.0.0.1:5000 is in use; MLflow's page would take it"]
        assert used["state"] == "warn"
        assert "rankline ui --port" in used["remedy"]


def test_doctor_tells_a_tracking_database_of_another_version(tmp_path: Path) -> None:
    from pipelines import doctor

    Tracker(tmp_path, None, "rankline").begin("line", {}, {}, None)
    assert [one["state"] for one in doctor._tracking(tmp_path)] == ["ok"]
    with sqlite3.connect(tmp_path / "_mlflow" / "mlflow.db") as database:
        database.execute("update alembic_version set version_num = 'elsewhere'")
    (found,) = doctor._tracking(tmp_path)
    assert found["state"] == "fail"
    assert "elsewhere" in found["finding"]
    assert "mlflow db upgrade" in found["remedy"]


def test_doctor_has_a_remedy_for_each_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "_ray_token").write_text("t")
    (tmp_path / "_ray_token").chmod(0o644)
    (tmp_path / "_mlflow").mkdir()
    (tmp_path / "_mlflow" / "mlflow.db").write_text("no database" * 200)
    found = {check["finding"]: check for check in run_json(capsys, "doctor", "--store", str(tmp_path), code=2)}
    assert all(check["remedy"] for check in found.values() if check["state"] != "ok")
    token = found[f"{tmp_path / '_ray_token'} has mode 0644"]
    assert token["remedy"] == f"Run: chmod 600 {tmp_path / '_ray_token'}"
    assert [
        check["state"] for check in found.values() if check["name"] == "mlflow" and "mlflow.db" in check["finding"]
    ] == ["fail"]


def stored_run(pipeline: Path, status: str, **extra: Any) -> Path:
    """A run as a driver that is gone left it."""
    config = parse(yaml.safe_load(pipeline.read_text()))
    store = Path(config.store.path)
    store.mkdir(exist_ok=True)
    directory = store / config.name
    directory.mkdir(exist_ok=True)
    keys = workflow.stage_keys(config, hash_sources(config, store / "_hashes.json"))
    record = {"name": config.name, "status": status, "keys": dict(sorted(keys.items())), "stages": {}, "manifests": {}}
    (directory / "run.json").write_text(json.dumps(record | extra))
    (directory / "pipeline.yaml").write_bytes(portable_yaml(config))
    return store


def test_status_of_an_empty_store_and_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "status", "--store", str(tmp_path))
    assert (found["runs"], found["cluster"], found["endpoints"]) == ([], None, [])
    assert main(["status", "nobody", "--store", str(tmp_path)]) == 2
    assert "no such run" in capsys.readouterr().err
    assert main(["status", "--store", str(tmp_path / "absent")]) == 0


def test_status_of_a_lost_run(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = stored_run(pipeline, "RUNNING")
    lease = {"pid": 2**22 + 1, "host": os.uname().nodename, "started": 1.0, "token": "t"}
    (store / "tiny" / "lease.json").write_text(json.dumps(lease))
    (run,) = run_json(capsys, "status", "tiny", "--store", str(store))["runs"]
    assert run["status"].startswith("LOST")
    assert [stage["name"] for stage in run["stages"]] == STAGES, "in the order of the line, however they are stored"
    assert {stage["state"] for stage in run["stages"]} == {"to do"}


def test_status_of_a_failed_run_quotes_its_error(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = stored_run(pipeline, "FAILED", error="DataError: row [7] has no [/field]")
    assert main(["status", "--store", str(store)]) == 0
    assert "DataError: row [7] has no [/field]" in capsys.readouterr().out


def test_resume_refuses_changes(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = stored_run(pipeline, "FAILED")
    train = Path(yaml.safe_load(pipeline.read_text())["data"]["train"])
    train.write_text(train.read_text().replace("1 odd?", "one odd?"))
    assert main(["resume", "tiny", "--store", str(store)]) == 2
    message = capsys.readouterr().err
    assert "first at stage finetune" in message
    assert "rankline run" in message
    assert main(["resume", "nobody", "--store", str(store)]) == 2


def test_stop_where_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "stop", "--store", str(tmp_path)) == {"stopped": False}


def test_an_error_with_json_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "run", str(tmp_path / "absent.yaml"), code=2)
    assert found["exit_code"] == 2
    assert "absent.yaml" in found["error"]


def test_a_bug_says_so_and_debug_shows_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("pipelines.inspect_store.methods", broken)
    assert main(["methods"]) == 1
    message = capsys.readouterr().err
    assert "This is a bug" in message
    assert "Traceback" not in message
    with pytest.raises(ZeroDivisionError):
        main(["methods", "--debug"])


def test_ctrl_c_while_python_ends_leaves_at_once_with_the_code_of_the_command() -> None:
    """Ray's own atexit hook sleeps; Ctrl-C there gave its traceback."""
    press = "lambda: (print('ending', flush=True), os.kill(os.getpid(), signal.SIGINT), time.sleep(30))"
    code = (
        f"import atexit, os, signal, sys, time; atexit.register({press}); "
        "from pipelines.cli import entry; sys.argv[1:] = ['status', 'nowhere', '--store', '.']; entry()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert ended.returncode == 2, ended.stderr
    assert "ending" in ended.stdout
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_the_page_answers_its_own_names_only_and_ends_with_its_children(tmp_path: Path) -> None:
    """The real server: up, refusing a foreign host name, and on Ctrl-C no process of it is left."""
    Tracker(tmp_path, None, "rankline").begin("line", {}, {}, None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.cli", "ui", "--store", str(tmp_path), "--port", str(port), "--json"]
    page = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        shown = json.loads("".join(page.stdout.readline() for _ in range(3)))
        assert shown == {"url": f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning"}
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=5"
        names = [found["name"] for found in httpx.get(url).json()["experiments"]]
        assert "rankline" in names
        assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 403
        children = page.children(recursive=True)
        listening = [c for child in children for c in child.net_connections() if c.status == psutil.CONN_LISTEN]
        assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
        page.send_signal(signal.SIGINT)
        assert page.wait(30) == 0
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
    finally:
        if page.is_running():
            page.send_signal(signal.SIGTERM)
            page.wait(30)
