"""Runs that were killed and started again, against one that was not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lines import (
    EXACT,
    MAX_IN_FLIGHT,
    Driver,
    assert_nothing_done_twice,
    events,
    is_finished,
    stage_units,
    store_of,
    unit_hashes,
)
from safetensors.torch import load_file

from cluster.metrics import steps_redone
from cluster.train_job import METRICS_FILE
from pipelines import PipelineConfig
from pipelines.records import read_record
from pipelines.tracking import RegistryReader, default_uri

#: stage -> (ledger event, unit) that a driver is killed upon.
KILLS = {
    "shard": ("start", "shard-"),
    "decompose": ("commit", ""),
    "quantize": ("start", ""),
    "finetune": ("commit", "step-"),
    "evaluate": ("start", "nf4-"),
    "register": ("start", "bundle"),
}
STAGES = list(KILLS)


def killed_in(config: PipelineConfig, stage: str) -> None:
    """Start a driver, and SIGKILL it in the middle of a stage."""
    driver = Driver(config)
    driver.until(driver.logged(stage, *KILLS[stage]))
    driver.kill()
    assert not is_finished(config, stage), f"the kill came after {stage}"
    record = read_record(store_of(config).run_dir(config.name))
    assert record["status"] == "RUNNING"


def assert_resumed(config: PipelineConfig, whole: Any, kills: Mapping[str, int]) -> None:
    """Everything is there, made once but for what was in flight, and equal to the uninterrupted run."""
    for stage in STAGES:
        assert assert_nothing_done_twice(config, stage) <= kills.get(stage, 0) * MAX_IN_FLIGHT, stage
        if stage != "finetune":
            committed = events(config, stage, "commit")
            assert set(committed) == set(unit_hashes(config, stage)), stage
            assert set(committed.values()) == {1}, f"{stage}: committed twice"
    for stage in EXACT:
        assert unit_hashes(config, stage) == unit_hashes(whole.config, stage), stage
    units, name = stage_units(config, "finetune"), "adapter_model.safetensors"
    assert (
        steps_redone(units.obtain(METRICS_FILE).parent) <= kills.get("finetune", 0) * config.finetune.checkpoint_every
    )
    theirs = load_file(stage_units(whole.config, "finetune").file("adapter", name))
    ours = load_file(units.file("adapter", name))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=0)
    summary = json.loads((store_of(config).run_dir(config.name) / "summary.json").read_text())
    assert summary["losses"] == pytest.approx(whole.result.summary["losses"], abs=1e-4)
    registry = RegistryReader(config.register.tracking_uri or default_uri(store_of(config).root))
    assert len(registry.versions(config.name)) == 1, "registered twice"
