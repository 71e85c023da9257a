"""Optimisers of pairs under ZeRO: on every stage and for every number of ranks, what one plain process computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Interrupted, run_processes
from tiny import make_tiny
from training import losses_of, make_job, make_token_tables, reference

from cluster.family_hooks import FAMILY_HOOKS, Hooks
from cluster.metrics import read_metrics, steps_redone
from cluster.model import ModelSource
from cluster.train_job import ADAPTER_UNIT, TrainJob
from cluster.training_state import load_tensors
from lowrank.adapters.lora import LoRA
from lowrank.adapters.peft_format import load_adapter
from lowrank.config import AdapterConfig
from lowrank.optimizers.pairs import is_b

TOLERANCE = 1e-4
STEPS = 20
#: Steps of the part that every `make test` runs.
FEW = 6
#: Learning rates that move s·B·A by tens of percent in 20 steps.
RATES = {"lora_plus": 1e-3, "riemannian": 5e-3, "reflora": 5e-3, "altlora": 5e-2, "lora_rite": 1e-3}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    """Tiny models whose adapters start at B ≠ 0; tokens of unequal lengths beside them."""
    root = tmp_path_factory.mktemp("bases")
    pissa = AdapterConfig(r=2, lora_alpha=5.0, init="pissa")
    made = {"nf4": make_tiny(root / "nf4"), "dense": make_tiny(root / "dense", base="dense", adapter=pissa)}
    make_token_tables(root, made["nf4"])
    return made


def job_of(source: ModelSource, root: Path, optimizer: str, stage: int, **changes: Any) -> TrainJob:
    """20 steps of 8 rows without warm-up: two micro-batches each on two ranks, four on one."""
    # ZeRO-3 would keep tensors as small as these whole, and with them what it does to large ones untested.
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    fields: dict[str, Any] = {
        "optimizer": optimizer,
        "learning_rate": RATES[optimizer],
        "zero_stage": stage,
        "global_batch_size": 8,
        "epochs": 5,
        "max_steps": STEPS,
        "warmup_ratio": 0.0,
        "checkpoint_every": FEW // 2,
        "deepspeed": extra,
        "allow_zero3_quantized": True,
    }
    return make_job(source, root, **(fields | changes))


Expected = tuple[list[float], dict[str, torch.Tensor]]


def assert_equals(job: TrainJob, expected: Expected) -> None:
    """The same losses, and the same s·B·A relative to its Frobenius norm."""
    losses, deltas = expected
    assert losses_of(job) == pytest.approx(losses, abs=TOLERANCE)
    assert len(losses) == job.config.max_steps
    adapters = load_adapter(job.store.path(ADAPTER_UNIT))
    assert set(adapters) == set(deltas)
    for module, adapter in adapters.items():
        error = (adapter.delta_weight() - deltas[module]).norm() / deltas[module].norm()
        assert float(error) < TOLERANCE, module


#: (optimizer, base, stage of two ranks)
CORE = [("riemannian", "dense", 1), ("reflora", "nf4", 2), ("lora_rite", "dense", 0)]
#: (optimizer, base, stage of two ranks that are interrupted, stage of the one rank that goes on)
RESUMES = [("altlora", "dense", 3, 2), ("lora_plus", "dense", 2, 0)]


def test_two_ranks_equal_one_plain_process_and_resume_on_one(
    bases: dict[str, ModelSource], tmp_path: Path, alone: Callable[..., None]
) -> None:
    def few(name: str, base: str, stage: int) -> TrainJob:
        return job_of(bases[base], tmp_path / f"{name}{stage}", name, stage, max_steps=FEW)

    whole = [few(*case) for case in CORE]
    cut = [few(*case[:3]) for case in RESUMES]
    run_processes(2, tmp_path / "two", [*((job, None) for job in whole), *((job, FEW // 2) for job in cut)])
    for job, (_, _, _, after) in zip(cut, RESUMES, strict=True):
        alone(dataclasses.replace(job, config=dataclasses.replace(job.config, zero_stage=after, deepspeed={})))
        assert steps_redone(job.root) == 0
    for job in [*whole, *cut]:
        assert_equals(job, reference(job))
    adapters = load_adapter(whole[0].store.path(ADAPTER_UNIT)).values()
    pairs_bytes = 4 * sum(adapter.num_parameters for adapter in adapters)
    # ZeRO-1 and 2 gather fp32 gradients, ZeRO-3 parameters too; without ZeRO both are whole. One rank gathers nothing.
    first = [read_metrics(job.root)[0]["gathered_bytes"] for job in (*whole, cut[0])]
    assert first == [pairs_bytes, pairs_bytes, 0, 2 * pairs_bytes]
    assert read_metrics(cut[0].root)[-1]["gathered_bytes"] == 0
    assert "gathered_bytes" not in read_metrics(cut[1].root)[0]


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("optimizer", sorted(RATES))
def test_every_stage_with_one_and_two_ranks_equals_one_plain_process(
    bases: dict[str, ModelSource], tmp_path: Path, alone: Callable[..., None], optimizer: str, base: str
) -> None:
    expected = reference(job_of(bases[base], tmp_path / "reference", optimizer, 0))
    two = [job_of(bases[base], tmp_path / f"two{stage}", optimizer, stage) for stage in range(4)]
    one = [job_of(bases[base], tmp_path / f"one{stage}", optimizer, stage) for stage in range(4)]
    run_processes(2, tmp_path / "two", [(job, None) for job in two])
    for job in one:
        alone(job)
    for job in [*two, *one]:
        assert_equals(job, expected)


@pytest.mark.parametrize(
    ("optimizer", "stage"),
    [
        ("lora_rite", 2),
        *(
            pytest.param(optimizer, stage, marks=pytest.mark.slow)
            for optimizer in sorted(RATES)
            for stage in range(4)
            if (optimizer, stage) != ("lora_rite", 2)
        ),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    bases: dict[str, ModelSource], tmp_path: Path, alone: Callable[..., None], optimizer: str, stage: int
) -> None:
    cut, whole = (job_of(bases["dense"], tmp_path / name, optimizer, stage, max_steps=FEW) for name in ("cut", "whole"))
    with pytest.raises(Interrupted):
        alone(cut, stop_after=FEW // 2)
    alone(cut)
    alone(whole)
    assert losses_of(cut) == losses_of(whole)
    for one, other in zip(load_tensors(cut.store, FEW).items(), load_tensors(whole.store, FEW).items()):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1]), one[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "extra"),
    # Accumulation in fp32 makes DeepSpeed take another optimizer class for ZeRO-1.
    [(1, {}), (1, {"data_types": {"grad_accum_dtype": "fp32"}}), (2, {}), (3, {})],
    ids=["1", "1-fp32-accumulation", "2", "3"],
)
@pytest.mark.parametrize("optimizer", ["riemannian", "lora_rite"])
def test_bfloat16_learns_alike_on_one_and_two_ranks(
    bases: dict[str, ModelSource],
    tmp_path: Path,
    alone: Callable[..., None],
    optimizer: str,
    stage: int,
    extra: dict[str, Any],
) -> None:
    one, two = (
        job_of(bases["dense"], tmp_path / name, optimizer, stage, compute_dtype="bfloat16", deepspeed=extra)
        for name in ("one", "two")
    )
    alone(one)
    run_processes(2, tmp_path / "ranks", [(two, None)])
    losses, _ = reference(one)
    for job in (one, two):
        assert losses_of(job) == pytest.approx(losses, abs=0.05)
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("stage", [0, 3])
def test_a_penalty_is_part_of_the_gradient_and_not_of_the_loss(
    bases: dict[str, ModelSource],
    tmp_path: Path,
    alone: Callable[..., None],
    stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = job_of(bases["dense"], tmp_path / "plain", "riemannian", 0, max_steps=FEW)
    without = reference(plain)
    monkeypatch.setattr(LoRA, "penalty", lambda self: 5.0 * self.lora_a.square().sum())
    job = job_of(bases["dense"], tmp_path / "penalty", "riemannian", stage, max_steps=FEW, deepspeed={})
    expected = reference(job)
    alone(job)
    assert_equals(job, expected)
    assert expected[0][0] == pytest.approx(without[0][0], abs=1e-6)
    assert abs(expected[0][-1] - without[0][-1]) > 10 * TOLERANCE


class Pruner:
    """Keeps the column of every B whose |B∘g| was largest so far, summed over the steps; sets the others to 0."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def observe(
        self, step: int, parameters: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        changed = {}
        for name in filter(is_b, parameters):
            seen = (parameters[name] * gradients[name]).abs().sum(0)
            self.sums[name] = self.sums.get(name, torch.zeros_like(seen)) + seen
            if step % 2:
                kept = torch.zeros_like(seen)
                kept[int(self.sums[name].argmax())] = 1.0
                changed[name] = parameters[name] * kept
        return changed

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.sums)

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.sums = dict(state)


def plain_with_pruner(job: TrainJob) -> Expected:
    """`reference`, told of every step by a pruner of whole parameters."""
    pruner = Pruner()

    def tell(step: int, parameters: dict[str, torch.nn.Parameter]) -> None:
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        with torch.no_grad():
            for name, value in pruner.observe(step, values, gradients).items():
                parameters[name].copy_(value)

    return reference(job, stepped=tell)


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_an_observer_sees_whole_tensors_and_changes_parameters(
    bases: dict[str, ModelSource],
    tmp_path: Path,
    alone: Callable[..., None],
    stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILY_HOOKS, "lora", lambda config, total_steps: Hooks(observer=Pruner()))
    # One step between two changes, the last one after the last step, and an interruption between them.
    job = job_of(bases["dense"], tmp_path, "lora_plus", stage, max_steps=FEW)
    with pytest.raises(Interrupted):
        alone(job, stop_after=FEW // 2)
    alone(job)
    assert_equals(job, plain_with_pruner(job))
    for adapter in load_adapter(job.store.path(ADAPTER_UNIT)).values():
        assert isinstance(adapter, LoRA)
        assert int((adapter.lora_b.abs().sum(0) > 0).sum()) == 1
