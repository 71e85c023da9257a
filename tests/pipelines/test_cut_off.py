"""Nodes whose network is taken away in the middle of a stage: the line goes on without them, and they may come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lines import Driver, is_finished, stage_units, with_changes
from machines import Machine, Machines, gone
from resumed import assert_resumed
from soak import amount, record

from pipelines import PipelineConfig

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

#: Stages in which a node is cut off, by run; each run has a node for each of its cuts beside the head.
RUNS = amount([("decompose", "finetune")], [("decompose", "finetune"), ("shard", "quantize", "evaluate")])
TARGET = "exit 0 on what is left, exact stages byte-equal, adapter within 1e-4, nothing committed twice"


@pytest.fixture
def machines() -> Iterator[Machines]:
    with Machines() as made:
        made.start(num_cpus=4)
        yield made


def on_machines(config: PipelineConfig, machines: Machines, root: Path, **sections: Any) -> PipelineConfig:
    """The same pipeline on the cluster of these machines, each at work on one unit, in a store of its own."""
    sections["cluster"] = {
        "address": machines.address,
        "token_file": str(machines.token),
        "max_in_flight": len(machines.machines),
        "task_cpus": 4.0,
        **sections.get("cluster", {}),
    }
    return with_changes(config, store={"path": str(root / "store")}, **sections)


def works_at(config: PipelineConfig, stage: str, machine: Machine) -> bool:
    """Whether a node has begun a unit of the stage, or trains and a checkpoint is there, and has not ended it."""
    lines = list(stage_units(config, stage).ledger())
    own = Counter(line["event"] for line in lines if line["node"] == machine.node)
    if stage == "finetune":
        return own["rank"] > 0 and any(line["event"] == "commit" and line["unit"] == "step-000002" for line in lines)
    return own["start"] > own["commit"] + own["surplus"]


def cut_in(
    machines: Machines, stages: Sequence[str], config: PipelineConfig, driver: Driver, ends: bool = True
) -> list[str]:
    """Cut a node off in each stage, and let it come back in the next, if it `ends`; where that came too late."""
    wrong, away = list[str](), list[Machine]()
    for stage, machine in zip(stages, machines.machines[1:], strict=True):
        driver.until(lambda stage=stage, machine=machine: works_at(config, stage, machine))  # type: ignore[misc]
        machines.cut(machine)
        away.append(machine)
        if is_finished(config, stage):
            wrong.append(f"{stage} had ended")
        if not ends:
            break
        driver.until(lambda stage=stage: is_finished(config, stage))  # type: ignore[misc]
        if stage != stages[-1]:
            machines.join(away.pop())
    return wrong


@pytest.mark.parametrize("stages", RUNS, ids="-".join)
def test_the_line_goes_on_without_nodes_that_are_cut_off(
    whole_line: Any, machines: Machines, tmp_path: Path, stages: tuple[str, ...]
) -> None:
    for _ in stages:
        machines.start(num_cpus=4)
    tune = {"num_workers": 2, "cpus_per_worker": 0.5}
    config = on_machines(whole_line.config, machines, tmp_path, finetune=tune)
    driver = Driver(config, within=machines.head.within)
    wrong = cut_in(machines, stages, config, driver)
    if driver.wait(300) != 0:
        wrong.append(driver.text()[-2000:])
    else:
        assert_resumed(config, whole_line, Counter(stages))
    came_back = machines.machines[1:-1]
    wrong += [f"{machine.name} is back in the cluster" for machine in came_back if not gone(machine, 20)]
    record(f"a node cut off in {', '.join(stages)}, back in the next", len(stages), wrong, TARGET)
    assert wrong == []


@pytest.mark.slow
def test_the_only_nodes_that_fit_are_cut_off(whole_line: Any, machines: Machines, tmp_path: Path) -> None:
    where = {"stage_resources": {"decompose": {"linalg": 0.5}}, "node_wait_s": 3}
    config = on_machines(whole_line.config, machines, tmp_path, cluster=where)
    machine = machines.start(num_cpus=4, resources={"linalg": 1})
    driver = Driver(config, within=machines.head.within)
    cut_in(machines, ["decompose"], config, driver, ends=False)
    assert driver.wait(120) == 4, driver.text()
    assert "0.5 linalg: every node that fitted is gone, and none came in 3 s (cluster.node_wait_s)" in driver.text()
    assert "Go on with: rankline run" in driver.text()
    machines.join(machine)
    assert gone(machine, 20)
    other = machines.start(num_cpus=4, resources={"linalg": 1})
    again = Driver(config, within=machines.head.within, resume=True)
    assert again.wait(200) == 0, again.text()
    assert_resumed(config, whole_line, Counter(["decompose"]))
    nodes = {line["node"] for line in stage_units(config, "decompose").ledger() if line["unit"] != "index"}
    assert nodes == {machine.node, other.node}
