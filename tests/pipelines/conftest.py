"""The one uninterrupted tiny line of a test run; other lines are compared with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from lines import tiny_pipeline

from pipelines import PipelineConfig, RunResult, run


@dataclass(frozen=True)
class WholeLine:
    """A finished run: its pipeline and what it returned."""

    config: PipelineConfig
    result: RunResult


@pytest.fixture(scope="session")
def whole_line(ray_head: Any, tmp_path_factory: pytest.TempPathFactory) -> WholeLine:
    """Run the tiny line once, on the session's Ray."""
    config = tiny_pipeline(tmp_path_factory.mktemp("whole"), ray_head)
    return WholeLine(config, run(config, quiet=True))
