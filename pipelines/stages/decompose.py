"""decompose: every target weight becomes factors with a fit report, one tensor (or one stack of them) per unit.

A tensor of several row blocks spreads its blocks over the cluster from within its own task; the blocking follows from
`block_bytes` alone and reductions run along a fixed tree, so the factors do not depend on where they were computed.
With `stack`, equal-shaped weights are decomposed together as one tensor; each then gets its own slice as a unit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.architecture import LinearSpec, select_targets
from cluster.artifacts import ShardSet
from cluster.durable import UnitStore, units_at
from cluster.objects import Mirror
from lowrank.config import DecomposeConfig
from pipelines.config import PipelineConfig, result_fields
from pipelines.locality import block_on, weights_on
from pipelines.sources import Sources
from pipelines.stages.base import Context, Outcome, Stage

if TYPE_CHECKING:
    from lowrank.blocks import BlockMatrix
    from lowrank.executor import Executor
    from lowrank.factors import Decomposition, Factors


@dataclass(frozen=True)
class DecomposeJob:
    """One tensor to decompose, or several of one shape on top of each other."""

    root: Path
    shards: Path
    unit: str
    modules: tuple[str, ...]
    config: DecomposeConfig
    use_ray: bool
    task_cpus: float
    resources: Mapping[str, float] = field(default_factory=dict)
    mirror: Mirror | None = None

    @property
    def store(self) -> UnitStore:
        """Where the unit goes."""
        return units_at(self.root, self.mirror)

    @property
    def shard_set(self) -> ShardSet:
        """Where the weights are."""
        return ShardSet(self.shards, self.mirror)


def settings(config: PipelineConfig, sources: Sources) -> dict[str, Any]:
    """What decides the factors."""
    return {name: value for name, value in result_fields(config.decompose).items() if name != "mode"}


def run(ctx: Context) -> Outcome:
    """One unit per target tensor or stack, largest first, the slices of stacks, spectra for a budget, and `index`."""
    shards = ShardSet(ctx.inputs["shard"], ctx.mirror)
    targets = select_targets(shards.architecture, ctx.config.decompose.target_modules)
    config, cpus = ctx.config.decompose, ctx.config.cluster.task_cpus
    resources = ctx.config.cluster.stage_resources.get("decompose", {})
    jobs = {
        unit: DecomposeJob(ctx.store.root, shards.path, unit, modules, config, ctx.use_ray, cpus, resources, ctx.mirror)
        for unit, modules in groups(targets, config.stack)
    }
    spectra = [f"spectrum.{unit}" for unit in jobs] if config.budget else []

    def near(job: DecomposeJob) -> str:
        return weights_on(shards, job.modules)

    if config.budget:
        measured = {f"spectrum.{unit}": job for unit, job in jobs.items()}
        ctx.run_units(spectrum_unit, measured, num_cpus=cpus, extra=1, near=near)
        ctx.commit("ranks", partial(_allocate, ctx.store, list(jobs.values()), config))
        ranks = ctx.store.read("ranks").facts["ranks"]
        jobs = {unit: replace(job, config=replace(config, rank=ranks[unit])) for unit, job in jobs.items()}
    ctx.run_units(decompose_unit, jobs, num_cpus=cpus, extra=1, near=near)
    modules = [spec.name for spec in targets]
    if config.stack:
        ctx.run_units(slice_unit, {m: (job, m) for job in jobs.values() for m in job.modules}, num_cpus=cpus, extra=1)
    ctx.commit("index", partial(_write_index, ctx.store, modules))
    reports = [ctx.store.read(module).facts for module in modules]
    facts = {
        "num_tensors": len(targets),
        "mean_rank": sum(report["rank"] for report in reports) / len(reports),
        "mean_relative_error": sum(report["relative_error"] for report in reports) / len(reports),
        "mean_explained_energy": sum(report["explained_energy"] for report in reports) / len(reports),
        "num_blocks": sum(report["num_blocks"] for report in reports),
        "not_converged": sum(not report["converged"] for report in reports),
    }
    slices = modules if config.stack else []
    return Outcome([*jobs, *slices, *spectra, *(["ranks"] if spectra else []), "index"], facts)


STAGE = Stage("decompose", 2, ("shard",), settings, run, "shards -> factors per target tensor")


def groups(targets: Sequence[LinearSpec], stack: str | None) -> list[tuple[str, tuple[str, ...]]]:
    """(unit, modules) of every decomposition, largest first.

    Args:
        targets: layers with their names and shapes.
        stack: None decomposes each alone; `layers` stacks one projection of all layers, `projections` the equal-shaped
            projections of one layer. A layer's number is the first integer in its name.
    """
    found: dict[str, list[LinearSpec]] = {}
    for spec in targets:
        found.setdefault(_group(spec, stack), []).append(spec)
    sized = sorted(found.items(), key=lambda item: (-sum(s.shape[0] * s.shape[1] for s in item[1]), item[0]))
    return [(unit, tuple(spec.name for spec in members)) for unit, members in sized]


def _group(spec: LinearSpec, stack: str | None) -> str:
    if stack is None:
        return spec.name
    parts = spec.name.split(".")
    layer = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    shape = "x".join(map(str, spec.shape))
    if stack == "layers":
        return "stack." + ".".join("all" if index == layer else part for index, part in enumerate(parts)) + f".{shape}"
    kept = parts if layer is None else parts[: layer + 1]
    return f"stack.{'.'.join(kept)}.{shape}"


def stored_matrix(shards: ShardSet, modules: Sequence[str], block_bytes: int) -> BlockMatrix:
    """The weights of layers of one shape, on top of each other, as row blocks that are read where they are needed."""
    from lowrank.blocks import BlockMatrix
    from lowrank.checkpoint import DTYPES

    tensors = [shards.tensors[f"{module}.weight"] for module in modules]
    pieces = [piece for tensor in tensors for piece in shards.slices(tensor.name, 0, tensor.shape[0])]
    shape = (len(tensors) * tensors[0].shape[0], tensors[0].shape[1])
    return BlockMatrix.from_slices(tensors[0].name, pieces, shape, DTYPES[tensors[0].dtype], block_bytes)


def spectrum_unit(job: DecomposeJob) -> None:
    """Commit all singular values of one tensor, for the ranks under a budget."""
    job.store.commit(f"spectrum.{job.unit}", partial(_spectrum, job))


def _spectrum(job: DecomposeJob, directory: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    from lowrank.spectra import stored_singular_values

    matrix = stored_matrix(job.shard_set, job.modules, job.config.block_bytes)
    sigma = stored_singular_values(matrix, _executor(job, len(matrix.blocks)))
    save_file({"sigma": sigma}, directory / "spectrum.safetensors")
    return {"module": job.unit, "shape": list(matrix.shape)}


def _allocate(
    store: UnitStore, jobs: Sequence[DecomposeJob], config: DecomposeConfig, directory: Path
) -> dict[str, Any]:
    """The ranks with the least total error at `budget`, every tensor's error relative to its own norm."""
    from safetensors.torch import load_file

    from lowrank.allocate import RankBounds, Spectrum, allocate_parameters

    spectra = []
    for job in jobs:
        unit = f"spectrum.{job.unit}"
        sigma = load_file(store.file(unit, "spectrum.safetensors"))["sigma"]
        energy = float(sigma.square().sum())
        m, n = store.read(unit).facts["shape"]
        spectra.append(Spectrum(job.unit, (m, n), sigma, importance=1 / energy if energy else 1.0))
    whole = sum(spectrum.shape[0] * spectrum.shape[1] for spectrum in spectra)
    found = allocate_parameters(spectra, (config.budget or 1.0) * whole, RankBounds(max_rank=config.max_rank))
    return {"ranks": found.ranks, "spent": found.spent, "budget": found.budget, "relative_error": found.relative_error}


def decompose_unit(job: DecomposeJob) -> None:
    """Decompose one tensor, or one stack, and commit it."""
    job.store.commit(job.unit, partial(_decompose, job))


def slice_unit(part: tuple[DecomposeJob, str]) -> None:
    """Commit one weight's share of a stack that is done."""
    job, module = part
    job.store.commit(module, partial(_write_slice, job, job.modules.index(module)))


def _decompose(job: DecomposeJob, directory: Path) -> dict[str, Any]:
    from lowrank.decompositions import METHODS, decompose, spectral_error
    from lowrank.rank import RankRule

    config = job.config
    matrix = stored_matrix(job.shard_set, job.modules, config.block_bytes)
    rule = None
    if METHODS[config.method].max_rank is not None:
        rule = RankRule(rank=config.rank, energy=config.energy, error=config.error, max_rank=config.max_rank)
    executor = _executor(job, len(matrix.blocks))
    result = decompose(
        matrix,
        method=config.method,
        rule=rule,
        seed=config.seed,
        executor=executor,
        **config.options | ({"depth": len(job.modules)} if config.stack else {}),
    )
    worst = spectral_error(matrix, result.factors, executor, seed=config.seed)
    return _write(result, job.unit, matrix, directory, worst)


def _write(result: Decomposition, name: str, matrix: BlockMatrix, directory: Path, worst: float) -> dict[str, Any]:
    from safetensors.torch import save_file

    result.factors.save(directory / "factors.safetensors")
    save_file({"spectrum": result.spectrum.contiguous()}, directory / "spectrum.safetensors")
    report = asdict(result.report)
    del report["seconds"]  # a time would make equal results look different
    facts = report | {"module": name, "shape": list(matrix.shape), "num_blocks": len(matrix.blocks)}
    facts["spectral_error"] = worst
    (directory / "report.json").write_text(json.dumps(facts, sort_keys=True))
    return facts


def _write_slice(job: DecomposeJob, index: int, directory: Path) -> dict[str, Any]:
    """One weight's share of a stack: its own factors, its own error; the numbers of the stack shared out."""
    from lowrank.decompositions import spectral_error
    from lowrank.executor import SerialExecutor
    from lowrank.factors import Decomposition, FitReport, load_factors

    store, module = job.store, job.modules[index]
    stack: Any = load_factors(store.file(job.unit, "factors.safetensors"))
    known = store.read(job.unit).facts
    report = FitReport(**{item.name: known.get(item.name, 0.0) for item in fields(FitReport)})
    matrix = stored_matrix(job.shard_set, [module], job.config.block_bytes)
    factors: Factors = stack.slice(index)
    total = matrix.squared_norm(SerialExecutor())
    error = (matrix.squared_residual(factors, SerialExecutor()) / total) ** 0.5 if total else 0.0
    share = replace(
        report,
        relative_error=error,
        explained_energy=1 - error**2,
        num_parameters=-(-report.num_parameters // len(job.modules)),
        history=(),
    )
    worst = spectral_error(matrix, factors, SerialExecutor(), seed=job.config.seed)
    return _write(Decomposition(module, factors, share, _no_spectrum()), module, matrix, directory, worst)


def _no_spectrum() -> Any:
    import torch

    return torch.empty(0)


def _executor(job: DecomposeJob, num_blocks: int) -> Executor:
    """This process for a tensor of one block, the cluster for one of many."""
    if num_blocks == 1 or not job.use_ray:
        from lowrank.executor import SerialExecutor

        return SerialExecutor()
    from cluster.executor import RayExecutor

    return RayExecutor(num_cpus=job.task_cpus, spread=True, near=block_on, resources=job.resources)


def _write_index(store: UnitStore, modules: list[str], directory: Path) -> dict[str, Any]:
    """Fit reports and spectra as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    reports = [store.read(module).facts for module in modules]
    pq.write_table(pa.Table.from_pylist(reports), directory / "index.parquet")
    spectra = []
    for module in modules:
        values = load_file(store.file(module, "spectrum.safetensors"))["spectrum"].double()
        spectra += [{"module": module, "index": i, "sigma": sigma} for i, sigma in enumerate(values.tolist())]
    schema = pa.schema([("module", pa.string()), ("index", pa.int64()), ("sigma", pa.float64())])
    pq.write_table(pa.Table.from_pylist(spectra, schema), directory / "spectra.parquet")
    return {"num_tensors": len(modules)}
