"""quantize: every target weight becomes packed NF4 bytes, of W or of the residual W − S, one tensor per unit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.architecture import select_targets
from cluster.artifacts import ShardSet, save_split
from cluster.durable import UnitStore, units_at
from cluster.objects import Mirror
from lowrank.config import QuantizeConfig
from pipelines.config import PipelineConfig, result_fields
from pipelines.locality import weights_on
from pipelines.sources import Sources
from pipelines.stages.base import Context, Outcome, Stage


@dataclass(frozen=True)
class QuantizeJob:
    """One tensor to quantize."""

    root: Path
    shards: Path
    factors: Path
    module: str
    method: str
    config: QuantizeConfig
    mirror: Mirror | None = None


def settings(config: PipelineConfig, sources: Sources) -> dict[str, Any]:
    """What decides the packed bytes."""
    return result_fields(config.quantize) | {"mode": config.decompose.mode}


def run(ctx: Context) -> Outcome:
    """One unit per target tensor, and `index`."""
    shards = ShardSet(ctx.inputs["shard"], ctx.mirror)
    modules = [spec.name for spec in select_targets(shards.architecture, ctx.config.decompose.target_modules)]
    config, factors = ctx.config.quantize, ctx.inputs["decompose"] / "units"
    method = "replace" if ctx.config.decompose.mode == "replace" else config.method
    jobs = {
        module: QuantizeJob(ctx.store.root, shards.path, factors, module, method, config, ctx.mirror)
        for module in modules
    }

    def near(job: QuantizeJob) -> str:
        return weights_on(shards, [job.module])

    ctx.run_units(quantize_unit, jobs, num_cpus=ctx.config.cluster.task_cpus, extra=1, near=near)
    ctx.commit("index", partial(_write_index, ctx.store, modules))
    records = [ctx.store.read(module).facts for module in modules]
    dense = sum(shards.tensors[f"{module}.weight"].nbytes for module in modules)
    facts = {
        "num_tensors": len(records),
        "num_fallback": sum(record["fallback"] for record in records),
        "mean_quantization_error": sum(record["quantization_error"] for record in records) / len(records),
        "mean_plain_error": sum(record["plain_error"] for record in records) / len(records),
        "packed_bytes": sum(record["packed_bytes"] for record in records),
        "factor_bytes": sum(record["factor_bytes"] for record in records),
        "dense_bytes": dense,
    }
    return Outcome([*modules, "index"], facts)


STAGE = Stage(
    "quantize",
    2,
    ("shard", "decompose"),
    settings,
    run,
    "shards, factors -> packed NF4 and the part S that was split off",
)


def quantize_unit(job: QuantizeJob) -> None:
    """Quantize one tensor and commit it."""
    units_at(job.root, job.mirror).commit(job.module, partial(_quantize, job))


def _quantize(job: QuantizeJob, directory: Path) -> dict[str, Any]:
    from lowrank.factors import load_factors
    from lowrank.quantization.residual import split_weight

    config = job.config
    weight = ShardSet(job.shards, job.mirror).load(f"{job.module}.weight")
    factors = None
    if job.method != "nf4":
        factors = load_factors(units_at(job.factors.parent, job.mirror).file(job.module, "factors.safetensors"))
    split = split_weight(
        job.module,
        weight,
        factors,
        job.method,
        structured=config.part == "structured",
        block_size=config.block_size,
        double_quant=config.double_quant,
        max_rank=config.max_rank,
        **({} if job.method == "replace" else config.options),
    )
    save_split(directory, split)
    return {
        "module": job.module,
        "shape": list(weight.shape),
        "split_rank": 0 if split.part is None else split.part.rank,
        "part": None if split.part is None else split.part.kind,
        "quantization_error": split.quantization_error,
        "plain_error": split.plain_error,
        "fallback": split.fallback,
        "packed_bytes": split.packed_bytes,
        "factor_bytes": split.factor_bytes,
        "block_size": config.block_size,
        "double_quant": config.double_quant,
    }


def _write_index(store: UnitStore, modules: list[str], directory: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([store.read(module).facts for module in modules]), directory / "index.parquet")
    return {"num_tensors": len(modules)}
