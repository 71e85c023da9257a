"""Killed anywhere, the line goes on: committed units are never made again, and the results are those of a quiet run."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from lines import (
    MAX_IN_FLIGHT,
    Driver,
    assert_nothing_done_twice,
    events,
    is_finished,
    run_serially,
    stage_units,
    store_of,
    tiny_pipeline,
    unit_hashes,
    with_changes,
)
from resumed import KILLS, STAGES, assert_resumed, killed_in

from cluster.metrics import steps_redone
from lowrank.errors import CheckpointError
from pipelines import PipelineConfig, run
from pipelines.errors import ArtifactError, Interrupted, LeaseError, exit_code
from pipelines.lease import holder
from pipelines.records import read_record

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]


def test_killed_twice_no_unit_is_made_again(whole_line: Any, tmp_path: Path) -> None:
    config = with_changes(whole_line.config, store={"path": str(tmp_path / "store")})
    killed_in(config, "decompose")
    killed_in(config, "quantize")
    for stage in ("shard", "decompose"):
        assert assert_nothing_done_twice(config, stage) <= (stage == "decompose") * MAX_IN_FLIGHT, stage
        assert unit_hashes(config, stage) == unit_hashes(whole_line.config, stage), stage


@pytest.mark.slow
def test_killed_in_decompose_and_finetune_it_goes_on(whole_line: Any, tmp_path: Path) -> None:
    config = with_changes(whole_line.config, store={"path": str(tmp_path / "store")})
    killed_in(config, "decompose")
    killed_in(config, "finetune")
    driver = Driver(config, "--json")
    path = store_of(config).run_dir(config.name) / "lease.json"
    driver.until(lambda: (holder(path) or {}).get("pid") == driver.process.pid)
    with pytest.raises(LeaseError, match=rf"driver {driver.process.pid} on .* is at it") as got:
        run(config, quiet=True)
    assert exit_code(got.value) == 4
    assert driver.wait() == 0, driver.text()
    assert_resumed(config, whole_line, {"decompose": 1, "finetune": 1})
    assert holder(path) is None


@pytest.mark.slow
def test_killed_in_each_stage_it_goes_on(whole_line: Any, tmp_path: Path) -> None:
    config = with_changes(whole_line.config, store={"path": str(tmp_path / "store")})
    for stage in STAGES:
        killed_in(config, stage)
    driver = Driver(config)
    assert driver.wait() == 0, driver.text()
    assert_resumed(config, whole_line, dict.fromkeys(STAGES, 1))
    assert "units" in driver.text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["decompose", "evaluate"])
def test_ctrl_c_ends_what_is_in_flight(whole_line: Any, tmp_path: Path, stage: str) -> None:
    config = with_changes(whole_line.config, store={"path": str(tmp_path / "store")})
    interrupted_in(config, stage)
    assert events(config, stage, "start") == events(config, stage, "commit")
    again = Driver(config)
    assert again.wait() == 0, again.text()
    assert_resumed(config, whole_line, {})


@pytest.mark.slow
def test_ctrl_c_ends_training_at_a_checkpoint(whole_line: Any, tmp_path: Path) -> None:
    changes = {"epochs": 60, "checkpoint_every": 5}
    config = with_changes(whole_line.config, store={"path": str(tmp_path / "store")}, finetune=changes)
    text = interrupted_in(config, "finetune")
    assert re.search(r"stopped at step \d*[05] of 240; its checkpoint stays", text)
    again = Driver(config)
    assert again.wait() == 0, again.text()
    assert assert_nothing_done_twice(config, "finetune") <= 1
    assert steps_redone(stage_units(config, "finetune").root) <= 5


def interrupted_in(config: PipelineConfig, stage: str) -> str:
    """Start a driver, and press Ctrl-C once in the middle of a stage; what it printed."""
    driver = Driver(config)
    driver.until(driver.logged(stage, *KILLS[stage]))
    driver.process.send_signal(signal.SIGINT)
    assert driver.wait() == 130, driver.text()
    assert "Traceback" not in driver.text()
    assert "Go on with: rankline run " in driver.text()
    assert not is_finished(config, stage)
    return driver.text()


def test_the_first_interrupt_ends_what_is_in_flight(ray_head: Any, tmp_path: Path) -> None:
    config = tiny_pipeline(tmp_path, ray_head, shard={"shard_bytes": 1024}, cluster={"max_in_flight": 1})
    root = store_of(config).root / "_artifacts" / "shard"
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it

    def interrupt() -> None:
        while not list(root.glob("*/units/shard-*")):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(Interrupted, match=r"stopped with \d+ of \d+ units done; what is committed stays") as got:
        run(config, quiet=True)
    thread.join()
    assert exit_code(got.value) == 130
    assert not is_finished(config, "shard")
    started = events(config, "shard", "start")
    assert 0 < len(started) < 30
    assert started == events(config, "shard", "commit")
    assert read_record(store_of(config).run_dir("tiny"))["status"] == "INTERRUPTED"
    assert signal.getsignal(signal.SIGINT) is before


def flip(path: Path, offset: int = -1) -> None:
    """Damage one byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    config = tiny_pipeline(tmp_path, None)
    shard = run_serially(config, "shard")["shard"]
    store = stage_units(config, "shard")
    file = store.path("shard-00001") / "shard.safetensors"
    flip(file)
    with pytest.raises(ValueError, match=r"shard-00001/shard\.safetensors is damaged: its sha256 does not match"):
        store.read("shard-00001", verify=True)
    (shard / "manifest.json").unlink()  # not finished yet: finishing it reads every byte
    with pytest.raises(ArtifactError, match=r"^finish shard: .*shard-00001/shard\.safetensors is damaged") as got:
        run_serially(config, "shard")
    assert exit_code(got.value) == 3
    store.discard("shard-00001")
    run_serially(config, "shard")
    assert events(config, "shard", "commit")["shard-00001"] == 2
    assert sum(events(config, "shard", "commit").values()) == len(unit_hashes(config, "shard")) + 1
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"shard-00001/shard\.safetensors") as cut:
        run_serially(config, "decompose")
    assert exit_code(cut.value) == 3
    flip(store.path("index") / "unit.json", 20)
    with pytest.raises(ValueError, match=r"index/unit\.json is damaged"):
        store.read("index")
    text = (shard / "manifest.json").read_text()
    (shard / "manifest.json").write_text(text.replace('"shard-00000": "', '"shard-00000": "0'))
    with pytest.raises(ArtifactError, match=r"manifest\.json: its own hash does not match. Delete .* and run again"):
        store_of(config).read_manifest("shard", shard.name)
