"""`rankline submit` through a real Ray Jobs server: one attempt after the other under one run key."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from lines import EXACT, ledger_lines, stage_units, tiny_pipeline, unit_hashes, with_changes
from object_stores import settings
from resumed import STAGES

from pipelines.cli import main
from pipelines.config import parse, to_dict
from pipelines.portable import read_pipeline

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


@pytest.mark.slow
def test_a_submitted_line_runs_as_a_job_and_its_next_attempt_finds_everything_done(
    whole_line: Any, ray_head: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_changes(
        whole_line.config,
        name="submitted",
        cluster={"address": None},
        evaluate={"max_rows": 4, "rows_per_unit": 4},
    )
    (tmp_path / "p.yaml").write_text(json.dumps(to_dict(config)))
    arguments = ["submit", str(tmp_path / "p.yaml"), "--address", ray_head.dashboard_url]
    seen: list[tuple[str, str]] = []
    ledgers: list[int] = []
    for attempt in (1, 2):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        last = out.strip().splitlines()[-1]
        submission, status = last.split(": ")
        assert status == "SUCCEEDED"
        seen.append((submission.rpartition("-")[0], submission.rpartition("-")[2]))
        lines = [line for line in out.splitlines() if line.startswith(("finetune ", "evaluate ", "register "))]
        done = [line.split()[0] for line in lines if "cached" in line]
        assert done == (["finetune"] if attempt == 1 else ["finetune", "evaluate", "register"]), out
        ledgers.append(ledger_lines(config))
    assert ledgers[0] == ledgers[1]
    assert seen[0][0] == seen[1][0]
    assert [number for _, number in seen] == ["1", "2"]
    summary = json.loads((Path(config.store.path) / "submitted" / "summary.json").read_text())
    assert summary["registered"]["name"] == "submitted"
    assert set(summary["losses"]) == {"dense", "nf4", "nf4_init", "adapter"}
    assert stage_units(config, "shard").is_committed("index")


def test_a_submission_is_watched_and_ended(ray_head: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_pipeline(tmp_path, ray_head, cluster={"address": None}, finetune={"epochs": 500})
    (tmp_path / "p.yaml").write_text(json.dumps(to_dict(config)))
    arguments = ["submit", str(tmp_path / "p.yaml"), "--address", ray_head.dashboard_url]

    capsys.readouterr()  # what making the model has printed

    def said(*more: str) -> Any:
        assert main([*arguments, *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert said("--status") == []
    assert main([*arguments, "--cancel"]) == 4
    assert "was never submitted there" in capsys.readouterr().err
    submission = said("--no-follow")["submission_id"]
    assert submission.endswith("-1")
    deadline = time.monotonic() + 120
    while "decompose" not in said("--logs")["log"]:
        assert time.monotonic() < deadline, said("--logs")
        time.sleep(0.5)
    assert said("--status")[0] | {"message": ""} == {"submission_id": submission, "status": "RUNNING", "message": ""}
    assert said("--cancel") == {"submission_id": submission, "status": "STOPPED"}
    assert [one["status"] for one in said("--status")] == ["STOPPED"]
    assert main([*arguments, "--cancel"]) == 4
    assert "it has ended as STOPPED already" in capsys.readouterr().err
    assert stage_units(config, "shard").is_committed("index"), "what is committed stays"


def secrets() -> list[str]:
    return [os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_line_on_s3_is_submitted_by_what_anybody_may_read(
    whole_line: Any, ray_head: Any, s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_changes(
        whole_line.config, name="on-s3", cluster={"address": None}, **settings(s3.uri(), tmp_path / "cluster")
    )
    (tmp_path / "p.yaml").write_text(json.dumps(to_dict(config)))
    arguments = ["submit", str(tmp_path / "p.yaml"), "--address", ray_head.dashboard_url]

    def said(*more: str) -> Any:
        assert main([*arguments, *more, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    capsys.readouterr()
    first = said("--no-follow")["submission_id"]
    # a machine that has nothing of it, and only looks
    elsewhere = ["--cache", str(tmp_path / "elsewhere")]
    assert [one["submission_id"] for one in said("--status", *elsewhere)] == [first]
    for attempt, again in ((first, []), (first.removesuffix("1") + "2", list(STAGES))):  # the first is followed
        assert main([*arguments, *elsewhere]) == 0
        out = capsys.readouterr().out
        assert out.strip().splitlines()[-1] == f"{attempt}: SUCCEEDED", out
        cached = [line.split()[0] for line in out.splitlines() if "cached" in line and ", key " in line]
        assert cached == again, out
        assert not any(secret in out for secret in secrets())
    for stage in EXACT:
        assert unit_hashes(config, stage) == unit_hashes(whole_line.config, stage), stage
    log = said("--logs", *elsewhere)
    assert log["submission_id"].endswith("-2")

    from cluster.submit import open_client

    jobs = [
        job for job in open_client(ray_head.dashboard_url).list_jobs() if str(job.submission_id).startswith(first[:-1])
    ]
    assert len(jobs) == 2
    written = [json.dumps(job.dict(), default=str) for job in jobs]
    assert all("/_submitted/" in text for text in written)
    keys = [key for key in s3.keys(config.store.path) if key.endswith((".yaml", ".json", ".html"))]
    assert any(key.startswith("_submitted/") for key in keys)
    mirror = stage_units(config, "shard").mirror
    written += [mirror.get(mirror.root / key).decode() for key in keys]
    for text in written:
        assert not any(secret in text for secret in secrets()), text[:500]


def test_a_job_is_told_where_its_pipeline_lies(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted: list[tuple[str, dict[str, Any]]] = []

    def take(address: str, entrypoint: str, key: str, **more: Any) -> str:
        submitted.append((entrypoint, more))
        return f"{key}-1"

    monkeypatch.setattr("cluster.submit.submit", take)
    config = tiny_pipeline(tmp_path, None, **settings(s3.uri(), tmp_path / "here"))
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps(to_dict(config)))
    command = ["submit", str(path), "--address", "http://127.0.0.1:1", "--no-follow"]
    assert main(command) == 0
    ((entrypoint, more),) = submitted
    assert more.get("runtime_env") is None
    assert not any(secret in entrypoint for secret in secrets())
    words = shlex.split(entrypoint)
    assert words[:4] == ["python", "-m", "pipelines.cli", "run"]
    assert words[4].startswith("s3://rankline/stores/")
    assert parse(read_pipeline(words[4])) == config
    capsys.readouterr()
    assert main(["plan", words[4].replace("_submitted/", "_submitted/no-")]) == 2
    assert "there is no such object. Give a pipeline YAML" in capsys.readouterr().err
    assert main(["plan", "s3://key:hunter2@bucket/p/q.yaml"]) == 2
    assert "hunter2" not in (told := capsys.readouterr().err)
    assert "read pipeline: holds credentials" in told
    assert main([*command, "--set", "register.tracking_uri=http://127.0.0.1:1"]) == 2
    assert "is none. Allowed are" in " ".join(capsys.readouterr().err.split())
    assert len(submitted) == 1
