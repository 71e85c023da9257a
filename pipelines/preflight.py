"""Before anything runs: what is cached, what would be refused, and what the rest will cost.

Estimates come from sizes, a parameter count and one short matrix product on this machine; they are rough, and say so.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, PortError
from lowrank.errors import LowRankError
from pipelines.artifacts import Store
from pipelines.config import PipelineConfig
from pipelines.errors import ArtifactError, ConfigError, PipelineError
from pipelines.sources import Sources, data_files

#: A quantized weight, its block maxima and its factors, in bytes per weight (an upper bound for r <= 64).
PACKED_BYTES = 0.75
#: Disk that must stay free beside what a run writes.
SPARE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class ModelSize:
    """Sizes read from the checkpoint's headers; no weight is read."""

    num_parameters: int
    dense_bytes: int
    largest_tensor_bytes: int
    max_rank: int


def model_size(sources: Sources) -> ModelSize:
    """Count parameters and bytes of a model from its headers."""
    specs = sources.model.checkpoint().specs()
    matrices = [spec for spec in specs if len(spec.shape) == 2 and "embed" not in spec.name and "head" not in spec.name]
    return ModelSize(
        num_parameters=sum(_numel(spec.shape) for spec in specs),
        dense_bytes=sum(spec.nbytes for spec in specs),
        largest_tensor_bytes=max(spec.nbytes for spec in specs),
        max_rank=min((min(spec.shape) for spec in matrices), default=1),
    )


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def require_ready(config: PipelineConfig, sources: Sources, store: Store) -> None:
    """Raise the first refusal."""
    for error in refusals(config, sources, store):
        raise error


def refusals(config: PipelineConfig, sources: Sources, store: Store) -> Iterator[Exception]:
    """Every reason not to start, as the error that the run would end with."""
    size: ModelSize | None = None
    try:
        size = model_size(sources)
    except (LowRankError, ClusterError) as error:
        yield error
    if size is not None and config.decompose.rank and config.decompose.rank > size.max_rank:
        yield ConfigError(
            f"decompose.rank: {config.decompose.rank} is more than min(m, n) = {size.max_rank} of the smallest target. "
            f"Set decompose.rank <= {size.max_rank}, or name larger layers in decompose.target_modules."
        )
    if size is not None:
        yield from _disk(config, size, store)
    yield from _port(config, store)
    yield from _layout(config)


def _disk(config: PipelineConfig, size: ModelSize, store: Store) -> Iterator[Exception]:
    needed = disk_bytes(size) + SPARE_BYTES
    free = shutil.disk_usage(_existing(store.root)).free
    if free < needed:
        yield ArtifactError(
            f"store {store.root}: {free / 2**30:.1f} GiB are free, about {needed / 2**30:.1f} GiB are needed. "
            "Free some, or set store.path to a larger disk."
        )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _port(config: PipelineConfig, store: Store) -> Iterator[Exception]:
    """The serve port must be free, or ours already."""
    import socket

    from pipelines.endpoint import served_models, token_file

    if not config.serve.enabled:
        return
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((config.serve.host, config.serve.port)) != 0:
            return
    path = token_file(config, store.root)
    url = f"http://{config.serve.host}:{config.serve.port}"
    if not path.is_file() or not served_models(url, path.read_text().strip()):
        yield PortError(
            f"serve.port: {config.serve.port} on {config.serve.host} is in use by another program. "
            "Set serve.port to a free one, or end that program (`rankline stop` ends an endpoint of this store)."
        )


def _layout(config: PipelineConfig) -> Iterator[Exception]:
    """Workers, data and serving must fit together, or training would wait for ever."""
    from cluster.errors import ResourceError
    from cluster.session import default_num_cpus

    if config.cluster.address is not None:
        return
    have = config.cluster.num_cpus or default_num_cpus()
    tune = config.finetune
    need = tune.num_workers * tune.cpus_per_worker + 1 + (config.serve.num_replicas * config.serve.num_cpus)
    if have < need:
        yield ResourceError(
            f"cluster.num_cpus: {have} logical CPUs do not hold {tune.num_workers} workers x {tune.cpus_per_worker:g}, "
            f"one for data and {config.serve.num_replicas} replica(s) x {config.serve.num_cpus:g}. "
            f"Set cluster.num_cpus >= {need:g}, or finetune.num_workers lower."
        )


def disk_bytes(size: ModelSize) -> int:
    """Shards, packed weights, factors and checkpoints, roughly."""
    return int(size.dense_bytes + 2 * PACKED_BYTES * size.num_parameters)


def estimates(config: PipelineConfig, size: ModelSize) -> dict[str, Any]:
    """Rough memory, disk and time per stage."""
    flops = _flops_per_second()
    rows = _count_rows(config.data.train)
    heldout = min(_count_rows(config.data.heldout), config.evaluate.max_rows or 1 << 60)
    tokens = min(config.data.max_length, 128)
    steps_rows = rows * config.finetune.epochs
    if config.finetune.max_steps:
        steps_rows = min(steps_rows, config.finetune.max_steps * config.finetune.global_batch_size)
    passes = 2 * (config.decompose.n_iter + 1)
    rank = (config.decompose.rank or 64) + config.decompose.oversampling
    n = size.num_parameters
    return {
        "disk_bytes": disk_bytes(size),
        "memory_bytes": {
            "shard": 2 * 32 * 2**20 + 400 * 2**20,
            "decompose": 3 * min(size.largest_tensor_bytes, config.decompose.block_bytes) + 400 * 2**20,
            "quantize": 4 * size.largest_tensor_bytes + 400 * 2**20,
            "finetune": int(PACKED_BYTES * n + 1.2 * 2**30),
            "evaluate": 4 * n + int(1.2 * 2**30),
        },
        "seconds": {
            "shard": 10 + size.dense_bytes / 100e6,
            "decompose": 5 + 2 * n * rank * passes / flops,
            "quantize": 5 + n / 20e6,
            "finetune": 30 + 4 * n * tokens * steps_rows / (0.5 * flops),
            "evaluate": 10 + 4 * 2 * n * tokens * heldout / (0.5 * flops),
            "register": 10,
            "serve": 20 if config.serve.enabled else 0,
        },
        "assumed": {"tokens_per_row": tokens, "rows": rows, "heldout_rows": heldout, "gflops_per_second": flops / 1e9},
    }


def _count_rows(source: str) -> int:
    count = 0
    for file in data_files(source):
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            count += int(pq.read_metadata(file).num_rows)
        else:
            with file.open("rb") as handle:
                count += sum(1 for line in handle if line.strip())
    return count


def _flops_per_second() -> float:
    """Speed of one fp32 matrix product on this machine, in operations per second."""
    import time

    import numpy as np

    a = np.ones((768, 768), dtype=np.float32)
    a @ a
    began = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 768**3 / (time.perf_counter() - began)


def plan(config: PipelineConfig) -> dict[str, Any]:
    """Stages with keys and what is cached, refusals with reasons, and estimates."""
    from pipelines.sources import hash_sources
    from pipelines.stages import STAGES
    from pipelines.workflow import run_key, stage_keys

    store = Store(Path(config.store.path).resolve())
    store.root.mkdir(parents=True, exist_ok=True)
    sources = hash_sources(config, store.root / "_hashes.json")
    keys = stage_keys(config, sources)
    problems = list(refusals(config, sources, store))
    stages = []
    for stage in STAGES:
        try:
            cached = store.read_manifest(stage.name, keys[stage.name]) is not None
        except PipelineError as error:
            problems.append(error)
            cached = False
        stages.append({"name": stage.name, "key": keys[stage.name], "cached": cached, "summary": stage.summary})
    result: dict[str, Any] = {"name": config.name, "run_key": run_key(keys), "stages": stages}
    result["refusals"] = [str(problem) for problem in problems]
    result["refusal_errors"] = problems
    try:
        result["estimates"] = estimates(config, model_size(sources))
    except (LowRankError, ClusterError):
        result["estimates"] = None
    return result
