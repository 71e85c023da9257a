"""decompose: every target weight becomes U, s, Vᴴ with a fit report, one tensor per unit.

A tensor of several row blocks spreads its blocks over the cluster from within its own task; the blocking follows from
`block_bytes` alone and reductions run along a fixed tree, so the factors do not depend on where they were computed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.architecture import select_targets
from cluster.artifacts import ShardSet
from cluster.durable import UnitStore
from lowrank.config import DecomposeConfig
from pipelines.config import PipelineConfig, result_fields
from pipelines.sources import Sources
from pipelines.stages.base import Context, Outcome, Stage

if TYPE_CHECKING:
    from lowrank.blocks import BlockMatrix
    from lowrank.executor import Executor


@dataclass(frozen=True)
class DecomposeJob:
    """One tensor to decompose."""

    root: Path
    shards: Path
    module: str
    config: DecomposeConfig
    use_ray: bool
    task_cpus: float


def settings(config: PipelineConfig, sources: Sources) -> dict[str, Any]:
    """What decides the factors."""
    return result_fields(config.decompose)


def run(ctx: Context) -> Outcome:
    """One unit per target tensor, largest first, and `index`."""
    shards = ShardSet(ctx.inputs["shard"])
    targets = select_targets(shards.architecture, ctx.config.decompose.target_modules)
    largest_first = sorted(targets, key=lambda spec: (-spec.shape[0] * spec.shape[1], spec.name))
    config, cpus = ctx.config.decompose, ctx.config.cluster.task_cpus
    jobs = {
        spec.name: DecomposeJob(ctx.store.root, shards.path, spec.name, config, ctx.use_ray, cpus)
        for spec in largest_first
    }
    ctx.run_units(decompose_unit, jobs, num_cpus=cpus, extra=1)
    ctx.commit("index", partial(_write_index, ctx.store, [spec.name for spec in targets]))
    reports = [ctx.store.read(spec.name).facts for spec in targets]
    facts = {
        "num_tensors": len(targets),
        "mean_rank": sum(report["rank"] for report in reports) / len(reports),
        "mean_relative_error": sum(report["relative_error"] for report in reports) / len(reports),
        "mean_explained_energy": sum(report["explained_energy"] for report in reports) / len(reports),
        "num_blocks": sum(report["num_blocks"] for report in reports),
        "not_converged": sum(not report["converged"] for report in reports),
    }
    return Outcome([*jobs, "index"], facts)


STAGE = Stage("decompose", 1, ("shard",), settings, run, "shards -> U, s, Vᴴ per target tensor")


def stored_matrix(shards: ShardSet, module: str, block_bytes: int) -> BlockMatrix:
    """The weight of a layer as row blocks that are read where they are needed."""
    from lowrank.blocks import BlockMatrix
    from lowrank.checkpoint import DTYPES

    tensor = shards.tensors[f"{module}.weight"]
    pieces = shards.slices(tensor.name, 0, tensor.shape[0])
    return BlockMatrix.from_slices(tensor.name, pieces, tensor.shape, DTYPES[tensor.dtype], block_bytes)


def decompose_unit(job: DecomposeJob) -> None:
    """Decompose one tensor and commit it."""
    UnitStore(job.root).commit(job.module, partial(_decompose, job))


def _decompose(job: DecomposeJob, directory: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    from lowrank.decompositions import decompose
    from lowrank.rank import RankRule

    config = job.config
    matrix = stored_matrix(ShardSet(job.shards), job.module, config.block_bytes)
    rule = RankRule(rank=config.rank, energy=config.energy, error=config.error, max_rank=config.max_rank)
    result = decompose(
        matrix,
        method=config.method,
        rule=rule,
        seed=config.seed,
        executor=_executor(job, len(matrix.blocks)),
        **config.options,
    )
    result.factors.save(directory / "factors.safetensors")
    save_file({"spectrum": result.spectrum.contiguous()}, directory / "spectrum.safetensors")
    report = asdict(result.report)
    del report["seconds"]  # a time would make equal results look different
    facts = report | {"module": job.module, "shape": list(matrix.shape), "num_blocks": len(matrix.blocks)}
    (directory / "report.json").write_text(json.dumps(facts, sort_keys=True))
    return facts


def _executor(job: DecomposeJob, num_blocks: int) -> Executor:
    """This process for a tensor of one block, the cluster for one of many."""
    if num_blocks == 1 or not job.use_ray:
        from lowrank.executor import SerialExecutor

        return SerialExecutor()
    from cluster.executor import RayExecutor

    return RayExecutor(num_cpus=job.task_cpus, spread=True)


def _write_index(store: UnitStore, modules: list[str], directory: Path) -> dict[str, Any]:
    """Fit reports and spectra as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    reports = [store.read(module).facts for module in modules]
    pq.write_table(pa.Table.from_pylist(reports), directory / "index.parquet")
    spectra = []
    for module in modules:
        values = load_file(store.path(module) / "spectrum.safetensors")["spectrum"].double()
        spectra += [{"module": module, "index": i, "sigma": sigma} for i, sigma in enumerate(values.tolist())]
    pq.write_table(pa.Table.from_pylist(spectra), directory / "spectra.parquet")
    return {"num_tensors": len(modules)}
