"""`rankline submit` through a real Ray Jobs server: one attempt after the other under one run key."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from lines import ledger_lines, stage_units, tiny_pipeline, with_changes

from pipelines.cli import main
from pipelines.config import to_dict

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
