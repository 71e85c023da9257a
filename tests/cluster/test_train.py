"""Fine-tuning: one loss curve whatever the ranks and the ZeRO stage, through kills, resumes and bad numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import Interrupted, run_processes
from tiny import make_tiny, make_tokens
from training import assert_same_training, losses_of, make_job, reference

from cluster.errors import ResourceError, TrainError
from cluster.metrics import all_lines, read_metrics, steps_redone
from cluster.model import ModelSource
from cluster.placement import refuse_unfit
from cluster.train_job import ADAPTER_UNIT, STOP_FILE, TrainJob
from cluster.trainer import train
from cluster.training_state import checkpoints
from lowrank.config import AdapterConfig

ROWS, HELDOUT = 32, 8


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    """A tiny model over NF4, the same with dropout, and a dense one; tokens beside them."""
    root = tmp_path_factory.mktemp("bases")
    dropout = AdapterConfig(lora_alpha=4.0, lora_dropout=0.2)
    made = {
        "nf4": make_tiny(root / "nf4"),
        "dense": make_tiny(root / "dense", base="dense", adapter=AdapterConfig(r=2, lora_alpha=4.0, init="kaiming")),
    }
    made["dropout"] = dataclasses.replace(made["nf4"], adapter=dropout)
    tokenizer = made["nf4"].shards / "units" / "meta"
    make_tokens(root / "train", tokenizer, ROWS)
    make_tokens(root / "heldout", tokenizer, HELDOUT, offset=50)
    return made


def stages() -> list[tuple[str, int]]:
    return [("nf4", 0), ("nf4", 1), ("nf4", 2), ("dense", 0), ("dense", 3)]


#: (base, stage of two ranks that are interrupted, stage of the one rank that goes on)
RESUMES = [("nf4", 1, 2), ("dense", 3, 0)]
MORE_RESUMES = [("nf4", 2, 0), ("nf4", 0, 1), ("dense", 0, 3), ("dense", 1, 3), ("dense", 2, 2)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("cases", "resumes"),
    [
        pytest.param([("nf4", 0), ("nf4", 1), ("nf4", 2), ("dense", 3)], RESUMES, id="main"),
        pytest.param(
            [*stages(), ("dense", 1), ("dense", 2), ("nf4", 3)], MORE_RESUMES, id="all", marks=pytest.mark.slow
        ),
    ],
)
def test_two_ranks_equal_one_plain_process_under_every_stage_and_resume_on_one(
    bases: dict[str, ModelSource],
    tmp_path: Path,
    alone: Callable[..., None],
    cases: list[tuple[str, int]],
    resumes: list[tuple[str, int, int]],
) -> None:
    def job_of(base: str, stage: int, kind: str) -> TrainJob:
        root = tmp_path / f"{kind}-{base}{stage}"
        return make_job(bases[base], root, zero_stage=stage, allow_zero3_quantized=True, checkpoint_every=3, epochs=1)

    jobs = [(base, job_of(base, stage, "whole")) for base, stage in cases]
    cut = [(base, job_of(base, stage, "cut"), after) for base, stage, after in resumes]
    run_processes(2, tmp_path / "two", [*((job, None) for _, job in jobs), *((job, 3) for _, job, _ in cut)])
    expected = {base: reference(job_of(base, 0, "reference")) for base in ("nf4", "dense")}
    for base, job in jobs:
        assert_same_training(job, *expected[base])
        facts = job.store.read(ADAPTER_UNIT).facts
        assert facts["reloaded_probe_loss"] == pytest.approx(facts["probe_loss"], abs=1e-5)
    for base, job, after in cut:
        assert checkpoints(job.store) == [3]
        alone(dataclasses.replace(job, config=dataclasses.replace(job.config, zero_stage=after)))
        assert_same_training(job, *expected[base])
        assert steps_redone(job.root) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("base", "stage"), [("nf4", 0), ("nf4", 2), ("dense", 3)])
def test_bfloat16_resumes_to_the_bit(
    bases: dict[str, ModelSource], tmp_path: Path, alone: Callable[..., None], base: str, stage: int
) -> None:
    cut, whole = (
        make_job(bases[base], tmp_path / name, zero_stage=stage, compute_dtype="bfloat16", epochs=1)
        for name in ("cut", "whole")
    )
    with pytest.raises(Interrupted):
        alone(cut, stop_after=4)
    alone(cut)
    alone(whole)
    assert losses_of(cut) == losses_of(whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("base", "stage"), [*stages(), ("dense", 1), ("dense", 2), ("nf4", 3)])
def test_one_rank_equals_plain_pytorch(
    bases: dict[str, ModelSource], tmp_path: Path, alone: Callable[..., None], base: str, stage: int
) -> None:
    job = make_job(bases[base], tmp_path, zero_stage=stage, allow_zero3_quantized=True)
    alone(job)
    assert_same_training(job, *reference(job))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", [{"packing": True}, {"gradient_checkpointing": True}], ids=["packed", "recomputed"])
def test_packing_and_recomputation_change_no_loss(
    bases: dict[str, ModelSource], tmp_path: Path, alone: Callable[..., None], changes: dict[str, Any]
) -> None:
    job = make_job(bases["nf4"], tmp_path, zero_stage=1, epochs=1, **changes)
    alone(job)
    assert_same_training(job, *reference(job))


@pytest.mark.filterwarnings("ignore")
def test_early_stopping_keeps_the_best_checkpoint(
    bases: dict[str, ModelSource], tmp_path: Path, alone: Callable[..., None]
) -> None:
    job = make_job(
        bases["nf4"], tmp_path, zero_stage=0, epochs=9, learning_rate=0.3, eval_every=1, patience=3, keep="best"
    )
    alone(job)
    lines = read_metrics(job.root)
    heldout = [line["heldout_loss"] for line in lines]
    best = heldout.index(min(heldout)) + 1
    assert len(lines) == best + 3
    facts = job.store.read(ADAPTER_UNIT).facts
    assert facts["global_step"] == best
    assert set(checkpoints(job.store)) >= {best, len(lines)}
    assert len(checkpoints(job.store)) <= 3


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_checkpoint_is_passed_over(
    bases: dict[str, ModelSource], tmp_path: Path, alone: Callable[..., None]
) -> None:
    job = make_job(bases["dropout"], tmp_path / "cut", zero_stage=2)
    whole = make_job(bases["dropout"], tmp_path / "whole", zero_stage=2)
    with pytest.raises(Interrupted):
        alone(job, stop_after=8)
    state = job.store.path("step-000008") / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-8] + b"\0" * 8)
    alone(job)
    alone(whole)
    assert_same_training(job, losses_of(whole))
    assert steps_redone(job.root) == 4
    before = (job.store.path(ADAPTER_UNIT) / "adapter_model.safetensors").read_bytes()
    alone(job)  # committed: nothing runs again
    assert (job.store.path(ADAPTER_UNIT) / "adapter_model.safetensors").read_bytes() == before
    assert steps_redone(job.root) == 4


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_not_finite_stops_and_so_does_the_driver(
    bases: dict[str, ModelSource], tmp_path: Path, alone: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cluster.train_loop as loop

    job = make_job(bases["nf4"], tmp_path, zero_stage=0)
    (tmp_path / STOP_FILE).touch()
    with pytest.raises(TrainError, match="stopped by its driver at step 0"):
        alone(job, launch=tmp_path)
    plain = loop.answer_nll
    monkeypatch.setattr(loop, "answer_nll", lambda *arguments: plain(*arguments) * math.inf)
    with pytest.raises(TrainError, match=r"the loss of step 1 is inf; it must be finite. Lower finetune.learning_rate"):
        alone(job)
    assert not job.store.is_committed(ADAPTER_UNIT)


def test_a_layout_larger_than_the_cluster_is_refused() -> None:
    wanted = {"CPU": 2.0}
    refuse_unfit([{"CPU": 6}], wanted, 3, "spread")
    with pytest.raises(ResourceError, match=r"start 3 training workers: they need 6 CPUs, the cluster has 4"):
        refuse_unfit([{"CPU": 4}], wanted, 3, "spread")
    with pytest.raises(ResourceError, match=r"they need 3 GPUs, the cluster has 2"):
        refuse_unfit([{"CPU": 8, "GPU": 2}], wanted | {"GPU": 1}, 3, "pack")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_head")
@pytest.mark.filterwarnings("ignore")
def test_a_killed_worker_is_replaced_and_the_curve_does_not_show_it(
    bases: dict[str, ModelSource], tmp_path: Path
) -> None:
    job = make_job(bases["nf4"], tmp_path, epochs=6, checkpoint_every=4, cpus_per_worker=0.5)
    seen: list[int] = []

    def kill_once(line: dict[str, Any]) -> None:
        if line["step"] > job.config.checkpoint_every and not seen:
            seen.append(line["step"])
            victims = [entry["pid"] for entry in job.store.ledger() if entry["event"] == "rank" and entry["rank"] == 1]
            os.kill(victims[-1], signal.SIGKILL)

    outcome = train(job, on_progress=kill_once)
    assert_same_training(job, *reference(job))
    assert outcome.world_size == 2
    assert outcome.global_step == len(losses_of(job)) == 36
    assert outcome.steps_redone <= job.config.checkpoint_every
    assert [line["step"] for line in all_lines(job.root) if line["event"] == "resume"][1] >= 4
    pids = {entry["pid"] for entry in job.store.ledger() if entry["event"] == "rank"}
    assert len(pids) == 4
    written = json.loads((outcome.path / "adapter_config.json").read_text())["rankline"]
    assert job.source.base_facts.items() <= written.items()
    assert train(job, on_progress=kill_once) == outcome
