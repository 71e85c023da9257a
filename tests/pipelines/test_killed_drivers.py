"""A driver killed at any moment, or with its whole cluster, and started again: the results of a quiet run."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lines import Driver, is_finished, store_of, with_changes
from resumed import KILLS, STAGES, assert_resumed
from soak import SEED, amount, record

from cluster import processes, session
from cluster.head import read_record
from pipelines import PipelineConfig

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(3600)]

#: A driver's life in seconds, drawn evenly; its imports take the first few.
LIFE_S = 20.0
#: Kills of one run before it may end.
KILLS_PER_RUN = 12
TARGET = (
    "exact stages byte-equal, adapter within 1e-4, only units in flight again, nothing committed or registered twice"
)


def stage_at(config: PipelineConfig) -> str:
    """The first stage that is not finished."""
    return next((stage for stage in STAGES if not is_finished(config, stage)), "after all")


def ended(driver: Driver, seconds: float) -> bool:
    """Let it live so long; whether it ended by itself, else it is killed."""
    try:
        driver.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        driver.kill()
        return False


def problems(config: PipelineConfig, whole: Any, kills: Counter[str], driver: Driver) -> list[str]:
    """What a run that was killed so often has not as an uninterrupted one has."""
    if driver.wait() != 0:
        return [f"after {dict(kills)}: {driver.text()[-300:]}"]
    try:
        assert_resumed(config, whole, kills)
    except AssertionError as error:
        return [f"after {dict(kills)}: {error}"]
    return []


def kill_as_it_ends(config: PipelineConfig, stage: str) -> None:
    driver = Driver(config)
    driver.until(lambda: is_finished(config, stage))
    driver.kill()


def interrupt(config: PipelineConfig, stage: str, presses: int) -> list[str]:
    """Press Ctrl-C in the middle of a stage; what is wrong with how the driver ends."""
    driver = Driver(config)
    driver.until(driver.logged(stage, *KILLS[stage]))
    for _ in range(presses):
        driver.process.send_signal(signal.SIGINT)
        time.sleep(0.7)
    code, text = driver.wait(), driver.text()
    if code == 0 and presses == 1 and is_finished(config, STAGES[-1]):
        return []  # what was in flight was the last of the run
    good = code == 130 and "Go on with: rankline run" in text and "Traceback" not in text
    return [] if good else [f"{presses} in {stage}: exit {code}: {text[-400:]}"]


def test_a_sample_of_all_on_one_run(whole_line: Any, tmp_path: Path) -> None:
    config = with_changes(whole_line.config, store={"path": str(tmp_path / "store")})
    kills = Counter(["shard", "decompose"])
    kill_as_it_ends(config, "shard")
    wrong = interrupt(config, "decompose", 2)
    if not ended(Driver(config), random.Random(SEED).uniform(6.0, LIFE_S)):
        kills[stage_at(config)] += 1
    wrong += problems(config, whole_line, kills, Driver(config))
    record("killed at a stage's end, interrupted, killed at a random moment", 3, wrong, TARGET, killed_in=kills)
    assert wrong == []


@pytest.mark.slow
def test_killed_at_random_moments(whole_line: Any, tmp_path: Path) -> None:
    rng, wanted, wrong = random.Random(SEED), amount(10, 100), list[str]()
    where, runs, began = Counter[str](), 0, time.monotonic()
    while where.total() < wanted:
        config = with_changes(whole_line.config, store={"path": str(tmp_path / str(runs) / "store")})
        (tmp_path / str(runs)).mkdir()
        kills, runs = Counter[str](), runs + 1
        while kills.total() < KILLS_PER_RUN and where.total() < wanted:
            driver = Driver(config)
            if ended(driver, rng.uniform(1.0, LIFE_S)):
                break
            kills[stage_at(config)] += 1
            where[stage_at(config)] += 1
        else:
            driver = Driver(config)
        wrong += problems(config, whole_line, kills, driver)
    record(
        "the driver killed at a random moment", wanted, wrong, TARGET, runs=runs, in_stage=where,
        seconds=round(time.monotonic() - began),
    )  # fmt: skip
    assert wrong == []


@pytest.mark.slow
def test_killed_at_the_stages_ends(whole_line: Any, tmp_path: Path) -> None:
    config = with_changes(whole_line.config, store={"path": str(tmp_path / "store")})
    for stage in STAGES:
        kill_as_it_ends(config, stage)
    wrong = problems(config, whole_line, Counter(STAGES), Driver(config))
    record("the driver killed as a stage ends", len(STAGES), wrong, TARGET)
    assert wrong == []


def test_the_whole_cluster_lost(whole_line: Any, tmp_path: Path) -> None:
    changes = {"address": None, "token_file": None, "num_cpus": 4}
    config = with_changes(whole_line.config, store={"path": str(tmp_path / "store")}, cluster=changes)
    stages, wrong, seconds = amount(["decompose"], STAGES), list[str](), list[float]()
    root = store_of(config).root
    try:
        for stage in stages:
            driver = Driver(config)
            driver.until(driver.logged(stage, *KILLS[stage]))
            head = read_record(root)
            assert head is not None
            began = time.monotonic()
            for process in processes.belonging(head.marker, head.sids):
                process.kill()
            code = driver.wait(300)
            seconds.append(round(time.monotonic() - began, 1))
            if stage == "register" and code == 0:
                continue  # it asks nothing of the cluster, and may end before the loss is noticed
            if code != 4 or "Go on with: rankline run" not in driver.text():
                wrong.append(f"{stage}: exit {code}: {driver.text()[-600:]}")
        wrong += problems(config, whole_line, Counter(stages), Driver(config))
    finally:
        session.stop(root)
    record("the whole cluster lost in a stage", len(stages), wrong, "exit 4, then " + TARGET, noticed_s=seconds)
    assert wrong == []


@pytest.mark.slow
def test_interrupted_once_and_twice(whole_line: Any, tmp_path: Path) -> None:
    """Once: the units in flight end. Twice: it stops now."""
    wrong, tried = list[str](), 0
    for presses in (2, 1):
        (tmp_path / str(presses)).mkdir()
        config = with_changes(whole_line.config, store={"path": str(tmp_path / str(presses) / "store")})
        for stage in STAGES:
            if not is_finished(config, stage):  # else Ctrl-C came just after its last unit
                tried += 1
                wrong += interrupt(config, stage, presses)
        wrong += problems(config, whole_line, Counter(STAGES), Driver(config))
    record("Ctrl-C pressed once or twice in a stage", tried, wrong, "exit 130, then " + TARGET)
    assert wrong == []
