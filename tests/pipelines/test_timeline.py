"""What a run's ledgers tell: in pictures, in MLflow, and line by line while it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lines import Driver, store_of, with_changes
from matplotlib.figure import Figure

from cluster.durable import UnitStore
from pipelines.progress import ProgressBoard
from pipelines.timeline import GAP_S, counts, draw_timeline, of_run, spans

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Two workers: one lost `b` with its process, the other made it, and both made `c`; then two training workers."""
    lines = [
        (10.0, 1, "start", "a", {}),
        (12.0, 1, "commit", "a", {"cpu_seconds": 1.5}),
        (12.0, 1, "start", "b", {}),
        (12.5, 1, "start", "z", {}),
        (100.0, 2, "start", "b", {}),
        (103.0, 2, "commit", "b", {"cpu_seconds": 2.0}),
        (103.0, 2, "start", "c", {}),
        (103.5, 3, "start", "c", {}),
        (104.0, 2, "commit", "c", {"cpu_seconds": 1.0}),
        (104.5, 3, "surplus", "c", {}),
        (105.0, 4, "rank", "step-2", {"cpu_seconds": 7.0}),
        (109.0, 4, "rank", "step-4", {"cpu_seconds": 9.0}),
    ]
    (tmp_path / "ledger").mkdir()
    for time, pid, event, unit, more in lines:
        line = {"event": event, "unit": unit, "time": time, "node": "0123456789abcdef", "pid": pid, **more}
        with (tmp_path / "ledger" / f"here-{pid}.jsonl").open("a") as handle:
            handle.write(json.dumps(line) + "\n")
    return tmp_path


def test_every_try_has_an_outcome(artifact: Path) -> None:
    found = [(span.unit, span.worker, span.start, span.end, span.outcome) for span in spans("s", artifact)]
    assert found == [
        ("a", "01234567:1", 10.0, 12.0, "committed"),
        ("b", "01234567:1", 12.0, 12.5, "lost"),
        ("z", "01234567:1", 12.5, 12.5, "lost"),
        ("b", "01234567:2", 100.0, 103.0, "committed"),
        ("c", "01234567:2", 103.0, 104.0, "committed"),
        ("c", "01234567:3", 103.5, 104.5, "surplus"),
        ("training", "01234567:4", 105.0, 109.0, "committed"),
    ]
    told = counts(artifact)
    assert told == {"stage_units_done": 3.0, "stage_units_redone": 3.0, "stage_cpu_seconds": 1.5 + 3.0 + 9.0}


def test_idle_times_are_cut_in_the_picture(artifact: Path) -> None:
    ax = Figure().add_subplot()
    draw_timeline(ax, of_run({"shard": artifact}))
    bars = [bar for bar in ax.patches if bar.get_width() > 0]
    assert max(bar.get_x() + bar.get_width() for bar in bars) == pytest.approx(2.5 + GAP_S + 9.0, abs=0.01)
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"01234567:{pid}" for pid in (1, 2, 3, 4)]
    assert "cut" in ax.get_xlabel()


def test_a_run_tells_each_unit_as_json_and_keeps_its_counts(whole_line: Any, tmp_path: Path) -> None:
    config = with_changes(whole_line.config, name="told", evaluate={"max_rows": 4})
    driver = Driver(config, "--log-json", "--quiet")
    assert driver.wait() == 0, driver.text()
    lines = [json.loads(line) for line in driver.text().splitlines() if line.startswith('{"time"')]
    ended = {line["stage"]: line["note"] for line in lines if line["event"] == "stage end"}
    assert list(ended) == ["shard", "decompose", "quantize", "finetune", "evaluate", "register"]
    assert ended["finetune"].startswith("cached")
    units = [line for line in lines if line["event"] == "unit" and line["stage"] == "evaluate"]
    begun = next(line for line in lines if line["event"] == "stage" and line["stage"] == "evaluate")
    assert [line["done"] for line in units] == list(range(begun["found"] + 1, begun["units"] + 1))
    for line in units:
        assert line["seconds"] > 0
        assert line["node"]
        assert UnitStore(stage_root(config, "evaluate")).is_committed(line["unit"])
    small = {"tokens"}  # which the driver makes before it counts
    assert counts(stage_root(config, "evaluate"))["stage_units_done"] == len(units) + len(small)
    assert {span.unit for span in spans("", stage_root(config, "evaluate"))} - {line["unit"] for line in units} == small
    report = (store_of(config).run_dir("told") / "report.html").read_text()
    assert "Who worked when" in report


def stage_root(config: Any, stage: str) -> Path:
    from lines import stage_units

    root: Path = stage_units(config, stage).root
    return root


def test_messages_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBoard(log_json=True) as board:
        board.say("going on")
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["text"]) == ("message", "going on")
