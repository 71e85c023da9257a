"""A real file system that fills up in the middle of a line: nothing is lost, and with more room the line goes on."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lines import Driver, run_serially, store_of, tiny_pipeline, with_changes
from resumed import KILLS, STAGES, assert_resumed
from soak import SEED, amount, record

from pipelines import maintenance
from pipelines.records import write_record

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1200)]

PAGE = 4096


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of its own; skips where this user may mount none."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8g", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no mount: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def resize(place: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True, capture_output=True)


def fill(place: Path, room: int) -> None:
    """Leave so many bytes of room, while somebody writes there."""
    for _ in range(100):
        facts = os.statvfs(place)
        with contextlib.suppress(subprocess.CalledProcessError):  # it holds more by now
            return resize(place, (facts.f_blocks - facts.f_bfree) * facts.f_frsize + room)
    raise AssertionError("it grew faster than it was shrunk")


def earlier_run(place: Path, config: Any) -> Any:
    """A finished part of another run on the same disk."""
    earlier = with_changes(
        config, name="earlier", store={"path": str(place)}, shard={"shard_bytes": 4096}, decompose={"rank": 1}
    )
    made = run_serially(earlier, "shard", "decompose", "quantize")
    store = store_of(earlier)
    manifests = {stage: store.read_manifest(stage, path.name) for stage, path in made.items()}
    directory = store.run_dir("earlier")
    directory.mkdir()
    keys = {stage: path.name for stage, path in made.items()}
    hashes = {stage: manifest.sha256 for stage, manifest in manifests.items() if manifest is not None}
    write_record(directory, {"name": "earlier", "status": "FINISHED", "keys": keys, "manifests": hashes})
    return earlier


def test_a_disk_that_fills_up(whole_line: Any, ray_head: Any, tmpfs: Path) -> None:
    stages, rng, wrong, seen = amount(["decompose"], STAGES), random.Random(SEED), list[str](), list[str]()
    earlier = earlier_run(tmpfs, tiny_pipeline(tmpfs.parent, ray_head))
    config = with_changes(whole_line.config, store={"path": str(tmpfs)})
    for stage in stages:
        driver = Driver(config)
        driver.until(driver.logged(stage, *KILLS[stage]))
        fill(tmpfs, rng.randrange(4) * PAGE)
        code = driver.wait(300)
        seen.append(f"{stage}: exit {code}")
        if code != 3 or "Go on with" not in driver.text():
            wrong.append(f"{stage}: exit {code}: {driver.text()[-600:]}")
        if problems := maintenance.verify(store_of(earlier), "earlier")["problems"]:
            wrong.append(f"{stage}: the earlier run is damaged: {problems}")
        resize(tmpfs, 8 * 2**30)
    again = Driver(config)
    if again.wait(300) != 0:
        wrong.append(f"going on failed: {again.text()[-600:]}")
    else:
        assert_resumed(config, whole_line, dict.fromkeys(STAGES, 1))
    record(
        "a small file system fills up in a stage", len(stages), wrong,
        "exit 3, the earlier run whole, going on completes", seen=seen,
    )  # fmt: skip
    assert wrong == []
