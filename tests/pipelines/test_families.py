"""Every adapter family through the whole line: trained under Ray Train and ZeRO-2 over NF4, evaluated, registered."""

import json
from pathlib import Path
from typing import Any

import pytest
from lines import tiny_pipeline

from lowrank.adapters.registry import FAMILIES
from pipelines import run

#: Families without a rank.
RANKLESS = ("krona", "kradapter", "full")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory, so that what all families share is made once."""
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name == "loha" else pytest.mark.slow) for name in sorted(FAMILIES)]
)
def test_it_runs_end_to_end(ray_head: Any, store: Path, method: str) -> None:
    adapter = {"method": method, "init": "kaiming", "lora_alpha": 4.0} | ({} if method in RANKLESS else {"r": 2})
    config = tiny_pipeline(
        store,
        ray_head,
        name=f"family-{method}",
        quantize={"method": "nf4"},
        finetune={"adapter": adapter, "zero_stage": 2, "max_steps": 3},
        evaluate={"must_improve": False, "max_rows": 4},
    )
    result = run(config, quiet=True)
    losses = result.summary["losses"]
    assert losses["nf4_init"] == pytest.approx(losses["nf4"], abs=2e-3)
    assert losses["adapter"] != losses["nf4_init"]
    bundle = next(stage for stage in result.stages if stage.name == "register")
    written = json.loads((result.directory / "run.json").read_text())
    assert written["status"] == "FINISHED"
    assert bundle.facts["version"]
