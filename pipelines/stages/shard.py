"""shard: a checkpoint becomes row-block files balanced by bytes, an index in Parquet, config and tokenizer.

Weights are streamed: a worker holds one chunk of one tensor. The weight of every linear layer is stored as
(out_features, in_features), whatever the model's own layout, so that later stages know one orientation only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.architecture import Architecture
from cluster.durable import UnitStore, units_at
from cluster.errors import ModelError
from cluster.objects import Mirror
from pipelines.config import PipelineConfig, result_fields
from pipelines.sources import ModelFiles, Sources, Stamps, meta_files, require_stamps
from pipelines.stages.base import Context, Outcome, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank.checkpoint import Checkpoint, TensorSpec


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a tensor, under its name in the model and its key in the checkpoint."""

    tensor: str
    source_key: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    transposed: bool
    start: int
    stop: int


@dataclass(frozen=True)
class ShardJob:
    """One shard file to write."""

    root: Path
    unit: str
    model: ModelFiles
    rows: tuple[Rows, ...]
    stamps: Stamps = ()
    """Of the model's files; a unit that read others is refused."""
    mirror: Mirror | None = None


def settings(config: PipelineConfig, sources: Sources) -> dict[str, Any]:
    """What decides the shards: the model's content and how it is cut."""
    return result_fields(config.shard) | {"model": sources.model_sha256}


def run(ctx: Context) -> Outcome:
    """Write `meta`, one unit per shard file, and `index`."""
    try:
        architecture, plan = _write_shards(ctx)
        ctx.sources.require_model()
    except ModelError:  # nobody can tell which units came from the other model
        for unit in ctx.store.all_committed():
            ctx.store.discard(unit)
        raise
    shards = [f"shard-{index:05d}" for index in range(len(plan))]
    ctx.commit("index", partial(_write_index, ctx.store, shards))
    facts = {
        "num_tensors": len(architecture.parameters),
        "num_parameters": sum(_numel(shape) for shape in architecture.parameters.values()),
        "num_shards": len(shards),
        "bytes": sum((row.stop - row.start) * _row_bytes(row) for rows in plan for row in rows),
        "model_type": architecture.model_type,
    }
    return Outcome(["meta", *shards, "index"], facts)


def _write_shards(ctx: Context) -> tuple[Architecture, list[list[Rows]]]:
    """`meta` and all shards; the architecture and what each shard holds."""
    model, stamps = ctx.sources.model, ctx.sources.model_stamps
    ctx.run_units(write_meta_unit, {"meta": ShardJob(ctx.store.root, "meta", model, (), stamps, ctx.mirror)})
    architecture = Architecture.load(ctx.store.file("meta", "architecture.json"))
    plan = plan_shards(resolve_rows(model.checkpoint(), architecture), ctx.config.shard.shard_bytes)
    jobs = {
        f"shard-{index:05d}": ShardJob(ctx.store.root, f"shard-{index:05d}", model, tuple(rows), stamps, ctx.mirror)
        for index, rows in enumerate(plan)
    }
    ctx.run_units(write_shard_unit, jobs, extra=1)
    return architecture, plan


STAGE = Stage("shard", 1, (), settings, run, "checkpoint -> row-block shards, index, config, tokenizer")


def _numel(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _row_bytes(rows: Rows) -> int:
    return _numel(rows.shape[1:]) * rows.itemsize


def write_meta_unit(job: ShardJob) -> None:
    """Write config, tokenizer and architecture as a unit."""
    units_at(job.root, job.mirror).commit(job.unit, partial(_write_meta, job))


def _write_meta(job: ShardJob, directory: Path) -> dict[str, Any]:
    """config.json, the tokenizer and the architecture read from the config."""
    from cluster.architecture import describe, load_config

    model = job.model
    if model.kind == "gguf":
        _write_gguf_meta(model, directory)
    else:
        for file in meta_files(model.path):
            shutil.copyfile(file, directory / file.name)
    for file in meta_files(model.tokenizer) if model.tokenizer else []:
        if file.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(file, directory / file.name)
    architecture = describe(load_config(directory))
    architecture.save(directory / "architecture.json")
    require_stamps(job.stamps)
    return {"model_type": architecture.model_type}


def _write_gguf_meta(model: ModelFiles, directory: Path) -> None:
    from transformers import AutoTokenizer

    from lowrank.gguf import GGUFCheckpoint

    config = GGUFCheckpoint(model.path).config
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    if model.tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(str(model.path.parent), gguf_file=model.path.name)
        tokenizer.save_pretrained(str(directory))


def resolve_rows(checkpoint: Checkpoint, architecture: Architecture) -> list[Rows]:
    """Every tensor of the model as rows of the checkpoint, tied ones once.

    Raises:
        ModelError: a tensor is missing or has another shape; the message lists the first few.
    """
    from lowrank.checkpoint import DTYPE_NAMES

    by_name = {_model_name(spec.name, architecture): spec for spec in checkpoint.specs()}
    missing = [name for name in architecture.parameters if name not in by_name]
    if missing:
        raise ModelError(
            f"shard: the checkpoint lacks {len(missing)} of {len(architecture.parameters)} tensors of this "
            f"{architecture.model_type} model, first {missing[:3]}. Check that config.json belongs to these weights."
        )
    transposed = {f"{spec.name}.weight" for spec in architecture.linears if spec.transposed}
    found = []
    for name, shape in architecture.parameters.items():
        spec: TensorSpec = by_name[name]
        if spec.shape != shape:
            raise ModelError(f"shard {name}: the checkpoint has shape {spec.shape}, config.json asks for {shape}.")
        flip = name in transposed
        shape = shape[::-1] if flip else shape
        dtype = DTYPE_NAMES[spec.dtype]
        rows = shape[0] if shape else 1
        found.append(Rows(name, spec.name, shape, dtype, spec.dtype.itemsize, flip, 0, rows))
    return found


def _model_name(key: str, architecture: Architecture) -> str:
    """The model's name of a checkpoint key: some files leave out the base model's prefix."""
    name = key if key in architecture.parameters else f"{architecture.base_prefix}.{key}"
    if name not in architecture.parameters and key in architecture.aliases:
        return architecture.aliases[key]
    return name if name in architecture.parameters else key


def plan_shards(tensors: list[Rows], shard_bytes: int) -> list[list[Rows]]:
    """Cut tensors by rows into the fewest files of at most `shard_bytes`, evenly filled; a row is never cut."""
    total = sum((rows.stop - rows.start) * _row_bytes(rows) for rows in tensors)
    capacity = -(-total // max(1, -(-total // shard_bytes)))
    shards: list[list[Rows]] = [[]]
    room = capacity
    for rows in tensors:
        start = rows.start
        while start < rows.stop:
            fit = min(rows.stop - start, room // max(_row_bytes(rows), 1))
            if fit <= 0 and shards[-1]:
                shards.append([])
                room = capacity
                continue
            stop = start + max(fit, 1)
            shards[-1].append(Rows(**(rows.__dict__ | {"start": start, "stop": stop})))
            room -= (stop - start) * _row_bytes(rows)
            start = stop
    return shards


def write_shard_unit(job: ShardJob) -> None:
    """Write one shard file as a unit; its facts hold bytes and sha256 of every piece."""
    units_at(job.root, job.mirror).commit(job.unit, partial(_write_shard, job))


def _write_shard(job: ShardJob, directory: Path) -> dict[str, Any]:
    from lowrank.checkpoint import DTYPES, Piece, write_shard

    checkpoint = job.model.checkpoint()
    pieces = []
    for rows in job.rows:
        shape = (rows.stop - rows.start, *rows.shape[1:]) if rows.shape else ()
        read = partial(read_rows, checkpoint, rows)
        pieces.append(Piece(f"{rows.tensor}@{rows.start}", DTYPES[rows.dtype], shape, rows.start, read))
    digests = write_shard(directory / "shard.safetensors", pieces)
    require_stamps(job.stamps)
    records = [
        {"tensor": rows.tensor, "dtype": rows.dtype, "shape": list(rows.shape), "transposed": rows.transposed}
        | {"row_start": rows.start, "row_stop": rows.stop, "key": piece.key, "nbytes": nbytes, "sha256": digest}
        for rows, piece, (nbytes, digest) in zip(job.rows, pieces, digests)
    ]
    return {"pieces": records}


def read_rows(checkpoint: Checkpoint, rows: Rows, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of W as the model holds it, whatever way round the checkpoint does."""
    if rows.transposed:
        return checkpoint.read_columns(rows.source_key, start, stop).T
    return checkpoint.read_rows(rows.source_key, start, stop)


def _write_index(store: UnitStore, shards: list[str], directory: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = []
    for unit in shards:
        for piece in store.read(unit).facts["pieces"]:
            records.append(piece | {"file": f"units/{unit}/shard.safetensors"})
    pq.write_table(pa.Table.from_pylist(records), directory / "index.parquet")
    return {"num_pieces": len(records)}
