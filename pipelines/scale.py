"""A run on paper: memory, bytes and seconds for a model of which only the config.json is there.

`pipelines.stage_work` counts what the stages do, `pipelines.training_memory` what a rank holds; every figure of a
device is in `pipelines.devices.Rates`, and whatever else a number rests on is listed under `assumed`.
`benchmarks/scale.py` compares all this with runs that were not used for any constant.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from pipelines import stage_work
from pipelines.config import PipelineConfig, parse
from pipelines.devices import GIB, rates
from pipelines.errors import ConfigError
from pipelines.model_shape import ModelShape, read_shape
from pipelines.stage_work import Cluster, Given, Rows
from pipelines.training_memory import remedies, training_plan

#: Longest row of a plan without a pipeline, in tokens.
MAX_LENGTH = 512
_STAGES = (
    stage_work.shard,
    stage_work.decompose,
    stage_work.quantize,
    stage_work.finetune,
    stage_work.evaluate,
    stage_work.register,
)


def plan_scale(config: PipelineConfig, shape: ModelShape, cluster: Cluster, rows: Rows) -> dict[str, Any]:
    """Work, seconds and memory of a pipeline; plain values, as `--json` prints them.

    Raises:
        TrainError: the training settings contradict one another (see `cluster.zero`).
    """
    has_gpu = cluster.gpus_per_node > 0
    world = cluster.nodes * cluster.gpus_per_node if has_gpu else config.finetune.num_workers
    given = Given(
        config=config,
        shape=shape,
        rows=rows,
        cluster=cluster,
        training=training_plan(config, shape, cluster.rates, world, has_gpu),
    )
    works = [count(given) for count in _STAGES]
    start = cluster.rates.fixed_s["start"]
    return {
        "num_parameters": shape.num_parameters,
        "adapter_parameters": shape.adapter_parameters,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "ranks": world,
        "zero_stage": given.training.stage,
        "dtype": given.training.dtype,
        "stages": [dataclasses.asdict(work) | {"seconds": work.seconds, "bound": work.bound} for work in works],
        "seconds": start + sum(work.seconds for work in works),
        "memory": _memory(given),
        "deepspeed": given.training.deepspeed,
        "advice": _advice(given),
        "assumed": _assumed(given),
    }


def plan_from_files(
    config: PipelineConfig | None,
    model_config: Path,
    *,
    nodes: int,
    gpus_per_node: int,
    device: str,
    gpu_memory_gib: float | None = None,
    rows: Rows,
) -> dict[str, Any]:
    """`plan_scale` from what the command line gives; without a pipeline the defaults of every setting.

    Raises:
        ConfigError: a number out of range, an unknown device, or a model configuration that cannot be used.
    """
    for option, value, least in (("--nodes", nodes, 1), ("--gpus-per-node", gpus_per_node, 0)):
        if value < least:
            raise ConfigError(f"{option}: got {value}; allowed is {least} or more.")
    if gpu_memory_gib is not None and not (gpu_memory_gib > 0 and math.isfinite(gpu_memory_gib)):
        raise ConfigError(f"--gpu-memory: got {gpu_memory_gib:g}; allowed is more than 0 GiB.")
    config = config or parse(
        {"name": "plan", "model": {"source": "-"}, "data": {"train": "-", "heldout": "-", "max_length": MAX_LENGTH}}
    )
    found = rates(device, gpus_per_node)
    if gpus_per_node and found.memory_bytes is None and gpu_memory_gib is None:
        raise ConfigError(
            f"--gpus-per-node: got {gpus_per_node} with --device {device}, which has no GPU. Set --gpus-per-node 0, "
            "give --gpu-memory, or name a GPU."
        )
    if gpu_memory_gib is not None:
        found = dataclasses.replace(found, memory_bytes=int(gpu_memory_gib * GIB))
    shape = read_shape(model_config, config)
    cluster = Cluster(nodes=nodes, gpus_per_node=gpus_per_node, rates=found)
    return plan_scale(config, shape, cluster, rows)


def rows_of(
    config: PipelineConfig | None, train: int | None = None, heldout: int | None = None, tokens: float | None = None
) -> Rows:
    """The rows that a plan assumes: what is given here, else defaults, rows as long as `data.max_length`.

    Raises:
        ConfigError: a number of rows or tokens that is not positive.
    """
    for option, value in (("--train-rows", train), ("--heldout-rows", heldout), ("--tokens-per-row", tokens)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{option}: got {value:g}; allowed is more than 0.")
    longest = config.data.max_length if config else MAX_LENGTH
    return Rows(
        train=train or stage_work.TRAIN_ROWS,
        heldout=heldout or stage_work.HELDOUT_ROWS,
        tokens=min(tokens or longest, longest),
    )


def _memory(given: Given) -> dict[str, Any]:
    """A rank's bytes, whether they fit, and what would make them fit."""
    memory, room = given.training.memory, given.cluster.rates.memory_bytes
    fits = None if room is None else memory.peak <= room
    found = [] if room is None else remedies(given.config, given.training, room)
    return memory.as_dict() | {"room": room, "fits": fits, "remedies": found}


def _advice(given: Given) -> list[str]:
    """What is possible, but not what was meant."""
    config, shape, cluster, plan = given.config, given.shape, given.cluster, given.training
    tune, room, found = config.finetune, cluster.rates.memory_bytes, []
    if tune.global_batch_size < plan.world:
        found.append(
            f"finetune.global_batch_size: {tune.global_batch_size} rows for {plan.world} ranks leave "
            f"{plan.world - tune.global_batch_size} of them idle. "
            f"Set it to {plan.world * tune.micro_batch_size} or more."
        )
    width = 2 if plan.dtype == "bfloat16" else 4
    if plan.has_gpu and room is not None and width * shape.num_parameters > room:
        found.append(
            f"evaluate: a variant is scored on one GPU, in dense weights of {width * shape.num_parameters / GIB:.0f} "
            f"GiB; a GPU has {room / GIB:.0f}. This model cannot be evaluated there."
        )
    if 4 * shape.num_parameters > 64 * GIB and config.finetune.base == "nf4":
        found.append(
            f"register: what is exported is scored on the driver's cores in fp32, {4 * shape.num_parameters / GIB:.0f} "
            "GiB of its memory."
        )
    if plan.has_gpu:
        host = cluster.gpus_per_node * (plan.memory.load + plan.memory.host)
        found.append(
            f"host memory: up to {host / GIB:.0f} GiB per node while {cluster.gpus_per_node} ranks load the base."
        )
    return found


def _assumed(given: Given) -> dict[str, Any]:
    """Everything that the figures rest on and no file of the user's says."""
    config, rows, found = given.config, given.rows, given.cluster.rates
    simple = config.decompose.method in ("randomized_svd", "block_krylov") and config.decompose.rank is not None
    notes = [
        *found.notes,
        "files are read cold, written, synced and hashed; on several nodes all of them lie on shared storage",
        "shard, decompose and quantize work on cores, never on GPUs; no core works beside them",
        "evaluate scores each variant on one GPU per node, or one core, with weights dequantized",
        "activations are 34 numbers of the hidden width per token and layer (cluster.zero.estimate_memory)",
        "every rank loads the whole base before ZeRO-3 partitions it",
        "serving is not counted",
    ]
    if not simple:
        notes.append(f"decompose.{config.decompose.method} is counted as randomized_svd of rank {given.rank}")
    return {
        "training_rows": rows.train,
        "heldout_rows": rows.heldout,
        "tokens_per_row": rows.tokens,
        "answer_share": rows.answer_share,
        "optimizer_steps": stage_work.steps_of(config, rows),
        "max_length": config.data.max_length,
        "micro_batch_size": config.finetune.micro_batch_size,
        "stored_bytes_per_number": given.shape.itemsize,
        "device": dataclasses.asdict(dataclasses.replace(found, notes=(), fixed_s=dict(found.fixed_s))),
        "notes": notes,
    }
