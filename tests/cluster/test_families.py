"""Every adapter family trains under DeepSpeed as one plain process would train it, over NF4 and dense bases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import RANKLESS
from ranks import run_processes
from tiny import make_tiny
from torch import Tensor
from training import TOLERANCE, losses_of, make_job, make_token_tables, reference

from cluster.model import ModelSource, initial_adapters
from cluster.train_job import ADAPTER_UNIT, TrainJob
from lowrank.adapter_options import options_of
from lowrank.adapters.peft_format import load_adapter
from lowrank.adapters.polar import PoLAR
from lowrank.adapters.rank_budget import RankBudget
from lowrank.adapters.registry import FAMILIES
from lowrank.config import AdapterConfig

STEPS = 4
#: Options that a training of four steps needs.
OPTIONS: dict[str, dict[str, Any]] = {"adalora": {"target_r": 1, "initial_steps": 1, "final_steps": 1}}
#: The families that are trained under every ZeRO stage.
STAGED = ("lora", "loha", "lokr", "lokh", "full")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    """Tiny models over NF4 and dense weights; tokens of unequal lengths beside them."""
    root = tmp_path_factory.mktemp("bases")
    made = {base: make_tiny(root / base, base=base) for base in ("nf4", "dense")}
    make_token_tables(root, made["nf4"])
    return made


def job_of(source: ModelSource, root: Path, method: str, stage: int) -> TrainJob:
    adapter = AdapterConfig(
        method=method,  # type: ignore[arg-type]
        r=None if method in RANKLESS else 2,
        lora_alpha=4.0,
        init="kaiming",
        options=OPTIONS.get(method, {}),
    )
    changes = {"zero_stage": stage, "max_steps": STEPS, "learning_rate": 5e-3, "allow_zero3_quantized": True}
    return make_job(dataclasses.replace(source, adapter=adapter), root, **changes)


def plain(job: TrainJob) -> tuple[list[float], dict[str, Tensor]]:
    """What one plain process makes of it, AdaLoRA's budget included."""
    if job.source.adapter.method != "adalora":
        return reference(job)
    budget = RankBudget(2, options_of("adalora", job.source.adapter.options), STEPS)

    def observe(step: int, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        budget.observe(step, values, gradients)

    return reference(job, stepped=observe)


def assert_trained(job: TrainJob, losses: list[float] | None) -> None:
    """The losses, if they are known, and that the stored adapter is the trained one."""
    assert len(losses_of(job)) == STEPS
    if losses is not None:
        assert losses_of(job) == pytest.approx(losses, abs=TOLERANCE)
    facts = job.store.read(ADAPTER_UNIT).facts
    assert facts["reloaded_probe_loss"] == pytest.approx(facts["probe_loss"], abs=1e-5)
    loaded, moved, trained = load_adapter(job.store.path(ADAPTER_UNIT)), set(), set()
    for module, adapter in initial_adapters(job.source).items():
        after = dict(loaded[module].named_parameters())
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                trained.add(name)
                moved |= set() if torch.equal(parameter, after[name]) else {name}
    assert moved == trained


@pytest.mark.parametrize("method", sorted(FAMILIES))
def test_it_trains_over_nf4_under_zero_2(
    bases: dict[str, ModelSource], tmp_path: Path, alone: Callable[..., None], method: str
) -> None:
    job = job_of(bases["nf4"], tmp_path, method, 2)
    alone(job)
    # PoLAR's direction is not the gradient, and DyLoRA draws ranks: a plain loop takes other steps.
    assert_trained(job, None if method in ("polar", "dylora") else plain(job)[0])
    for adapter in load_adapter(job.store.path(ADAPTER_UNIT)).values():
        if isinstance(adapter, PoLAR):
            torch.testing.assert_close(adapter.polar_x.T @ adapter.polar_x, torch.eye(2), rtol=0, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method", STAGED)
def test_two_ranks_equal_one_plain_process_under_every_stage(
    bases: dict[str, ModelSource], tmp_path: Path, method: str
) -> None:
    jobs = {
        (base, stage): job_of(bases[base], tmp_path / f"{base}{stage}", method, stage)
        for base in bases
        for stage in range(4)
    }
    run_processes(2, tmp_path / "two", [(job, None) for job in jobs.values()])
    expected = {base: reference(job_of(bases[base], tmp_path / base, method, 0))[0] for base in bases}
    for (base, _), job in jobs.items():
        assert_trained(job, expected[base])
