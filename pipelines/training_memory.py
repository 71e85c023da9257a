"""What one training rank holds, split by what holds it, and whether that fits; for `rankline plan --model-config`.

The formulas are `cluster.zero.estimate_memory`'s. Added here: the workspace beside them, and the peak while the model
is loaded, when every rank holds the whole base: ZeRO-3 partitions it only afterwards (`zero.Init` is not used).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.zero import deepspeed_config, effective_stage, estimate_memory, reduce_bucket, zero_stage
from pipelines.config import PipelineConfig
from pipelines.devices import Rates
from pipelines.model_shape import ModelShape

#: Entries that a CPU dequantizes at a time (`lowrank.linear`); on a GPU a whole weight is.
_PANEL = 2**22


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        weights: the frozen base, NF4 or dense, partitioned by ZeRO-3 where it is in parameters.
        adapter: trained parameters in the training dtype.
        gradients: of the adapter.
        optimizer: moments, and fp32 copies.
        activations: of one micro-batch.
        workspace: a dequantized weight, ZeRO's buckets, what ZeRO-3 gathers, the process or the GPU's context.
        load: peak while the model is loaded, before anything is partitioned.
        host: bytes that offloading moves from the GPU to the node, per rank.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    load: int
    host: int = 0

    @property
    def training(self) -> int:
        """All but `load` and `host`: the peak of a step."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.workspace

    @property
    def peak(self) -> int:
        """The larger of loading and training."""
        return max(self.load, self.training)

    def as_dict(self) -> dict[str, int]:
        """Every part, with `training` and `peak`."""
        return dataclasses.asdict(self) | {"training": self.training, "peak": self.peak}


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How training runs: ranks, ZeRO stage, dtype, its DeepSpeed JSON, and a rank's memory."""

    world: int
    has_gpu: bool
    stage: int
    dtype: str
    deepspeed: dict[str, Any]
    memory: RankMemory


def training_plan(config: PipelineConfig, shape: ModelShape, rates: Rates, world: int, has_gpu: bool) -> TrainingPlan:
    """Stage, dtype, DeepSpeed JSON and memory per rank of `world` ranks.

    Raises:
        TrainError: a combination that training would refuse.
    """
    tune = config.finetune
    dtype = tune.compute_dtype
    if dtype == "auto":
        dtype = "bfloat16" if has_gpu else "float32"
    stage = effective_stage(zero_stage(tune, tune.base, has_gpu), dtype)
    bucket = reduce_bucket(shape.adapter_sizes)
    settings = deepspeed_config(tune, stage=stage, world=world, dtype=dtype, bucket=bucket)
    memory = _rank_memory(config, shape, rates, settings, stage=stage, world=world, dtype=dtype, has_gpu=has_gpu)
    return TrainingPlan(world=world, has_gpu=has_gpu, stage=stage, dtype=dtype, deepspeed=settings, memory=memory)


def base_bytes(config: PipelineConfig, shape: ModelShape, width: int) -> tuple[int, int]:
    """(bytes of the frozen base in memory, those of them in parameters, which ZeRO-3 can partition).

    NF4 layers hold half a byte per weight and an fp32 absmax per block; everything else is in the training dtype.
    """
    if config.finetune.base == "dense":
        return width * shape.num_parameters, width * shape.num_parameters
    plain = width * (shape.num_parameters - shape.num_targets)
    packed = shape.num_targets // 2 + 4 * shape.num_targets // config.quantize.block_size
    return plain + packed, plain


def _rank_memory(
    config: PipelineConfig,
    shape: ModelShape,
    rates: Rates,
    settings: Mapping[str, Any],
    *,
    stage: int,
    world: int,
    dtype: str,
    has_gpu: bool,
) -> RankMemory:
    width = 2 if dtype == "bfloat16" else 4
    base, partitionable = base_bytes(config, shape, width)
    tune = config.finetune
    rows = min(tune.micro_batch_size, -(-tune.global_batch_size // world))
    found = estimate_memory(
        dataclasses.replace(tune, micro_batch_size=rows),
        stage=stage,
        world=world,
        dtype=dtype,
        base_bytes=base,
        partitionable_bytes=partitionable,
        adapter_parameters=shape.adapter_parameters,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        vocabulary=shape.vocab_size,
        max_length=config.data.max_length,
    )
    weights, optimizer, host = found.base, found.optimizer, 0
    block = settings["zero_optimization"]
    if has_gpu and _offloads(block, "offload_optimizer"):
        optimizer, host = 0, host + found.optimizer
    if has_gpu and stage == 3 and _offloads(block, "offload_param"):
        moved = partitionable // world
        weights, host = weights - moved, host + moved
    return RankMemory(
        weights=weights,
        adapter=found.adapter,
        gradients=found.gradients,
        optimizer=optimizer,
        activations=found.activations,
        workspace=_workspace(config, shape, rates, block, partitionable, width, has_gpu),
        load=base + width * shape.adapter_parameters + rates.process_bytes,
        host=host,
    )


def _offloads(block: Mapping[str, Any], name: str) -> bool:
    return bool((block.get(name) or {}).get("device", "none") != "none")


def _workspace(
    config: PipelineConfig,
    shape: ModelShape,
    rates: Rates,
    block: Mapping[str, Any],
    partitionable: int,
    width: int,
    has_gpu: bool,
) -> int:
    """Beside what stays: one dequantized weight, one bucket, what ZeRO-3 has gathered, and the process."""
    largest = max(spec.shape[0] * spec.shape[1] for spec in shape.targets)
    dequantized = 0
    if config.finetune.base == "nf4":
        # On a GPU fp32 first, then the training dtype; on a CPU one panel.
        dequantized = (4 + width) * largest if has_gpu else 4 * min(largest, _PANEL)
    bucket = width * int(block.get("reduce_bucket_size", 0))
    gathered = 0
    if block["stage"] == 3:
        live = int(block["stage3_max_live_parameters"]) + int(block["stage3_prefetch_bucket_size"])
        gathered = min(partitionable, width * live)
    return dequantized + bucket + gathered + rates.process_bytes


def remedies(config: PipelineConfig, plan: TrainingPlan, room: int) -> list[str]:
    """What would make a rank fit into `room` bytes, nearest first; empty where it fits."""
    memory, tune = plan.memory, config.finetune
    if memory.peak <= room:
        return []
    found = []
    if memory.load > room:
        if tune.base == "dense":
            found.append("finetune.base: nf4 (every rank loads the whole base before ZeRO-3 partitions it)")
        else:
            found.append("GPUs with more memory: the packed base alone does not fit one")
    if memory.training > room and memory.activations > room // 8:
        if not tune.gradient_checkpointing:
            found.append("finetune.gradient_checkpointing: true")
        if tune.micro_batch_size > 1:
            found.append(f"finetune.micro_batch_size < {tune.micro_batch_size}")
        found.append("data.max_length lower")
    if memory.training > room and tune.base == "dense" and plan.stage < 3:
        found.append("finetune.zero_stage: 3")
    if memory.training > room and memory.optimizer + memory.gradients > room // 8:
        found.append(
            "a smaller finetune.adapter.r, more ranks, or offload_optimizer (pipelines/configs/cpu-offload.yaml)"
        )
    return found or ["more ranks, or GPUs with more memory"]
