"""The ZeRO plan: stage, DeepSpeed JSON, memory; no cluster, no DeepSpeed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cluster.config import FinetuneConfig
from cluster.errors import TrainError
from cluster.zero import (
    Base,
    MemoryEstimate,
    check_optimizer,
    deepspeed_config,
    effective_stage,
    estimate_memory,
    merge,
    reduce_bucket,
    zero_stage,
)
from lowrank.config import AdapterConfig


@pytest.mark.parametrize(
    ("asked", "base", "has_gpu", "stage"),
    [
        (None, "nf4", False, 2),
        (None, "nf4", True, 2),
        (None, "dense", False, 2),
        (None, "dense", True, 3),
        (0, "nf4", True, 0),
        (3, "dense", False, 3),
    ],
)
def test_stage(asked: Any, base: Base, has_gpu: bool, stage: int) -> None:
    assert zero_stage(FinetuneConfig(zero_stage=asked), base, has_gpu) == stage


def test_bfloat16_without_zero_runs_as_zero_1() -> None:
    assert [effective_stage(stage, "bfloat16") for stage in range(4)] == [1, 1, 2, 3]
    assert [effective_stage(stage, "float32") for stage in range(4)] == [0, 1, 2, 3]


def test_zero3_over_nf4_needs_its_flag() -> None:
    config = FinetuneConfig(zero_stage=3)
    with pytest.raises(TrainError, match=r"zero_stage is 3 over an NF4 base.*allow_zero3_quantized = true"):
        zero_stage(config, "nf4", True)
    assert zero_stage(dataclasses.replace(config, allow_zero3_quantized=True), "nf4", True) == 3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_fit_the_adapter(stage: int) -> None:
    sizes = [4608, 12288] * 200  # a LoRA of rank 8: its whole gradient is far below a bucket of full training
    bucket = reduce_bucket(sizes)
    assert max(sizes) <= bucket <= max(2**18, sum(sizes) // 8)
    assert reduce_bucket([3_000_000]) == 3_000_000  # no tensor is larger than its bucket
    assert reduce_bucket([2**30] * 2) == 50_000_000
    made = deepspeed_config(FinetuneConfig(), stage=stage, world=2, dtype="float32", bucket=bucket)
    assert made["zero_optimization"]["reduce_bucket_size"] == bucket


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_json(stage: int, world: int) -> None:
    config = FinetuneConfig(learning_rate=1e-3, betas=(0.8, 0.9), weight_decay=0.1, max_grad_norm=0.5)
    made = deepspeed_config(config, stage=stage, world=world, dtype="float32", accumulation=3)
    assert made["train_batch_size"] == made["train_micro_batch_size_per_gpu"] * 3 * world
    assert made["optimizer"]["type"] == "AdamW"
    params = made["optimizer"]["params"]
    assert (params["lr"], params["betas"], params["weight_decay"]) == (1e-3, [0.8, 0.9], 0.1)
    assert params["torch_adam"] is True
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"]["stage"] == stage
    assert made["bf16"] == {"enabled": False}
    assert deepspeed_config(config, stage=stage, world=world, dtype="bfloat16")["bf16"] == {"enabled": True}


def test_extra_keys_are_merged_but_never_over_a_field() -> None:
    extra = {"zero_optimization": {"reduce_bucket_size": 7}, "prescale_gradients": True}
    made = deepspeed_config(FinetuneConfig(deepspeed=extra), stage=2, world=2, dtype="float32")
    assert made["zero_optimization"]["reduce_bucket_size"] == 7
    assert made["zero_optimization"]["stage"] == 2
    assert made["prescale_gradients"] is True
    with pytest.raises(TrainError, match=r"'gradient_clipping', which belongs to finetune.max_grad_norm"):
        deepspeed_config(FinetuneConfig(deepspeed={"gradient_clipping": 2}), stage=2, world=2, dtype="float32")
    with pytest.raises(TrainError, match=r"zero_optimization.stage is 1, the plan says 2"):
        deepspeed_config(
            FinetuneConfig(deepspeed={"zero_optimization": {"stage": 1}}), stage=2, world=2, dtype="float32"
        )


def test_an_optimizer_with_moments_of_its_own_steps_plain_sgd() -> None:
    config = FinetuneConfig(weight_decay=0.1, max_grad_norm=0.5)
    made = deepspeed_config(config, stage=3, world=2, dtype="float32", plain="SGD", clips=False, persistent=7)
    assert made["optimizer"] == {"type": "SGD", "params": {"lr": config.learning_rate, "weight_decay": 0.1}}
    assert made["gradient_clipping"] == 0.0
    assert made["zero_allow_untested_optimizer"] is True
    assert made["zero_optimization"]["stage3_param_persistence_threshold"] == 7


def test_pairs_need_a_family_of_pairs() -> None:
    check_optimizer(FinetuneConfig(optimizer="riemannian"))
    family = dataclasses.replace(AdapterConfig(), method="other")  # type: ignore[arg-type]
    check_optimizer(FinetuneConfig(adapter=family))
    with pytest.raises(TrainError, match=r"finetune.optimizer 'riemannian' steps pairs A, B .* 'other' does not train"):
        check_optimizer(FinetuneConfig(adapter=family, optimizer="riemannian"))


def test_galore_needs_matrices_above_its_rank() -> None:
    for adapter in (AdapterConfig(method="full"), AdapterConfig(r=64), AdapterConfig(r=8, rank_pattern={"q_proj": 64})):
        check_optimizer(FinetuneConfig(adapter=adapter, optimizer="galore", optimizer_options={"rank": 32}))
    with pytest.raises(TrainError, match=r"'galore' of rank 128 projects nothing of 'lora' adapters of rank 64"):
        check_optimizer(FinetuneConfig(adapter=AdapterConfig(r=64), optimizer="galore"))
    with pytest.raises(TrainError, match=r"landing steps .* of 'polar'"):
        check_optimizer(FinetuneConfig(adapter=AdapterConfig(method="polar", r=200), optimizer="galore"))


def test_merge_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": 1}}
    assert merge(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


def estimate(stage: int, world: int, optimizer: Any = "adamw", **changes: Any) -> MemoryEstimate:
    values: dict[str, Any] = {"dtype": "float32", "base_bytes": 1000, "partitionable_bytes": 600}
    values |= {"adapter_parameters": 100, "hidden_size": 8, "num_layers": 2, "vocabulary": 10, "max_length": 4}
    return estimate_memory(FinetuneConfig(optimizer=optimizer), stage=stage, world=world, **(values | changes))


def test_each_stage_holds_no_more_than_the_one_before() -> None:
    totals = [estimate(stage, 4).total for stage in (1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    assert estimate(1, 4).optimizer * 4 == estimate(1, 1).optimizer
    assert estimate(2, 4).gradients * 4 == estimate(2, 1).gradients
    assert estimate(3, 2).base == 400 + 300
    assert estimate(2, 2).gradients + estimate(2, 2).optimizer <= 0.55 * (
        estimate(2, 1).gradients + estimate(2, 1).optimizer
    )


def test_whole_tensors_of_pairs_are_not_cut() -> None:
    for optimizer, numbers in [("lora_plus", 0), ("riemannian", 3), ("lora_rite", 5), ("galore", 4)]:
        own = 2 if optimizer in ("lora_rite", "galore") else 0
        assert estimate(0, 4, optimizer).optimizer - estimate(0, 4).optimizer == 400 * (numbers - own)
        assert estimate(2, 4, optimizer).optimizer - estimate(2, 4).optimizer == 400 * numbers - 100 * own


def test_recomputing_activations_needs_less_of_them() -> None:
    plain, saving = FinetuneConfig(), FinetuneConfig(gradient_checkpointing=True)
    values: dict[str, Any] = {"stage": 2, "world": 1, "dtype": "bfloat16", "base_bytes": 0, "partitionable_bytes": 0}
    values |= {"adapter_parameters": 1, "hidden_size": 576, "num_layers": 30, "vocabulary": 0, "max_length": 512}
    assert estimate_memory(saving, **values).activations < estimate_memory(plain, **values).activations / 5
