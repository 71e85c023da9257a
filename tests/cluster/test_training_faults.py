"""Training through cut checkpoints, killed workers and a damaged record of Ray Train's: the curve never shows it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from soak import SEED, SOAK, amount, record
from tiny import make_tiny
from training import TOLERANCE, losses_of, make_job, make_token_tables, reference

from cluster.durable import UnitStore
from cluster.errors import TrainError
from cluster.metrics import all_lines
from cluster.model import ModelSource
from cluster.train_job import TrainJob
from cluster.trainer import train
from cluster.training_state import Progress, checkpoints, newest_checkpoint, save_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1800)]

STEPS_PER_EPOCH = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    made = make_tiny(tmp_path_factory.mktemp("base") / "model")
    make_token_tables(made.shards.parents[1], made)
    return made


def two_checkpoints(root: Path) -> UnitStore:
    store = UnitStore(root)
    for step in (2, 4):
        save_checkpoint(store, {"layer:lora_a": torch.full((2, 3), float(step))}, Progress(step=step, epoch=1))
    return store


def damaged(store: UnitStore, units: list[str], harm: Callable[[Path], None], file: str) -> str:
    """What training would do: the step it goes on from, or the error."""
    for unit in units:
        harm(store.path(unit) / file)
    try:
        found = newest_checkpoint(store)
    except TrainError as error:
        return str(error)
    return "step 0" if found is None else f"step {found.step}"


def test_checkpoints_cut_anywhere_never_begin_training_anew(tmp_path: Path) -> None:
    pristine, wrong, tried = two_checkpoints(tmp_path / "pristine"), [], 0
    for file in ("state.safetensors", "unit.json"):
        size = min((pristine.path(unit) / file).stat().st_size for unit in ("step-000002", "step-000004"))
        for offset in range(size - 1):  # without its last byte a JSON file lacks the end of its line alone
            for units, expected in ((["step-000004"], "step 2"), (["step-000002", "step-000004"], "no checkpoint is")):
                shutil.copytree(pristine.root, tmp_path / "cut")
                store, tried = UnitStore(tmp_path / "cut"), tried + 1
                seen = damaged(store, units, lambda path, cut=offset: os.truncate(path, cut), file)  # type: ignore[misc]
                if expected not in seen or (len(units) == 2 and checkpoints(store) != [2, 4]):
                    wrong.append(f"{file} of {units} cut at {offset}: {seen}")
                shutil.rmtree(store.root)
    record("a checkpoint of training cut at every offset", tried, wrong, "the one before, or an error; never step 0")
    assert wrong == []


def test_missing_checkpoints_are_told(tmp_path: Path) -> None:
    assert newest_checkpoint(UnitStore(tmp_path / "new")) is None
    for harm in ("units", "unit.json"):
        store = two_checkpoints(tmp_path / harm)
        if harm == "units":
            shutil.rmtree(store.root / "units")
        else:
            for unit in ("step-000002", "step-000004"):
                (store.path(unit) / "unit.json").unlink()
        with pytest.raises(TrainError, match=r"no checkpoint is whole \(units/step-000004 and all others are missing"):
            newest_checkpoint(store)
        shutil.rmtree(store.root)
        assert newest_checkpoint(store) is None, "what the message advises"


class Killer:
    """SIGKILLs a worker at each of some steps; `on_progress` of a training."""

    def __init__(self, job: TrainJob, steps: list[int], rng: random.Random) -> None:
        self.job, self.steps, self.rng = job, steps, rng
        self.killed_at: float | None = None
        self.attempt, self.reached = 0, 0
        self.seconds: list[float] = []
        self.lost: list[int] = []

    def __call__(self, line: dict[str, Any]) -> None:
        if line["attempt"] > self.attempt:
            self.attempt = line["attempt"]
            if self.killed_at is not None:
                self.seconds.append(time.monotonic() - self.killed_at)
                self.lost.append(self.reached - line["step"] + 1)
                self.killed_at = None
        self.reached = line["step"]
        if self.killed_at is None and self.steps and line["step"] >= self.steps[0]:
            self.steps.pop(0)
            ranks = [entry for entry in self.job.store.ledger() if entry["event"] == "rank"][-2:]
            self.killed_at = time.monotonic()
            os.kill(self.rng.choice(ranks)["pid"], signal.SIGKILL)


@pytest.mark.usefixtures("ray_head")
@pytest.mark.parametrize("stage", [0, 2] if SOAK > 1 else [2])
def test_killed_workers_leave_the_curve_as_it_was(source: ModelSource, tmp_path: Path, stage: int) -> None:
    kills, every, rng = amount(1, 10), 4, random.Random(SEED + stage)
    epochs = amount(6, 20)
    job = make_job(
        source, tmp_path, epochs=epochs, checkpoint_every=every, cpus_per_worker=0.5, num_workers=2, zero_stage=stage,
        max_failures=kills + 2,
    )  # fmt: skip
    total = epochs * STEPS_PER_EPOCH
    # far enough apart that a killed group has passed a checkpoint of its own, and from the end: the driver sees
    # steps half a second late
    killer = Killer(job, [5 + index * (total - 30) // kills + rng.randrange(4) for index in range(kills)], rng)
    outcome = train(job, on_progress=killer)
    expected, _ = reference(job)
    found = losses_of(job)
    wrong = [
        f"step {step}: {ours} for {theirs}"
        for step, (ours, theirs) in enumerate(zip(found, expected, strict=True), start=1)
        if abs(ours - theirs) > TOLERANCE
    ]
    wrong += [f"{lost} steps were lost" for lost in killer.lost if lost > every]
    record(
        f"a training worker killed, ZeRO-{stage}, 2 workers", len(killer.lost), wrong,
        f"losses within {TOLERANCE:g}, at most {every} steps again", steps_again=killer.lost,
        recovery_s=[round(value, 1) for value in killer.seconds],
    )  # fmt: skip
    assert wrong == []
    assert len(killer.lost) == kills
    assert outcome.world_size == 2
    assert outcome.steps_redone == sum(killer.lost)


class Stopped(Exception):
    """Raised by a driver in the middle of a training."""


def harm_ray_train(storage: Path, case: int, rng: random.Random) -> None:
    """Leave half a snapshot, an empty one or nonsense where Ray Train keeps its own; or delete a part, or all."""
    launches = [path for path in storage.iterdir() if path.name != "launches"]
    text = b'{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_000000", "metrics": {"step": 2}}], "latest"'
    if case < 3:
        for launch in launches:
            content = (text[: rng.randrange(len(text))], b"", rng.randbytes(64))[case]
            (launch / "checkpoint_manager_snapshot.json").write_bytes(content)
    else:
        for path in launches if case == 3 else [storage]:
            shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_head")
def test_a_damaged_record_of_ray_train_is_not_needed(source: ModelSource, tmp_path: Path) -> None:
    tried, rng, wrong = amount(1, 5), random.Random(SEED), list[str]()
    first = make_job(source, tmp_path / "0", epochs=25, checkpoint_every=4, cpus_per_worker=0.5, num_workers=1)
    expected, _ = reference(first)

    def stop(line: dict[str, Any]) -> None:
        if line["step"] >= 6:
            raise Stopped

    for case in range(tried):
        job = replace(first, root=tmp_path / str(case) / "stage", storage=tmp_path / str(case) / "ray")
        with pytest.raises(Stopped):
            train(job, on_progress=stop)
        # our reports carry no checkpoint, so that Ray Train has nothing to restore and writes no snapshot
        assert not list(job.storage.rglob("*snapshot*"))
        harm_ray_train(job.storage, case, rng)
        train(job, on_progress=lambda _: None)
        resumed = [line["step"] for line in all_lines(job.root) if line["event"] == "resume"][1:]
        if not resumed or min(resumed) < 4:
            wrong.append(f"case {case}: went on from {resumed}")
        if losses_of(job) != pytest.approx(expected, abs=TOLERANCE):
            wrong.append(f"case {case}: the losses differ")
    record("Ray Train's directory damaged or gone, end to end", tried, wrong, "on from our checkpoint, equal losses")
    assert wrong == []
