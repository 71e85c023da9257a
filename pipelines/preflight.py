"""Before anything runs: what is cached, what would be refused, and what the rest will cost.

A refusal is the very error that the run would end with, found in seconds: neither torch nor Ray nor MLflow is
imported here.
"""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, ConnectError, PortError, ResourceError, StorageError, TokenError
from lowrank.errors import LowRankError
from lowrank.headers import TensorHeader
from pipelines.artifacts import Store
from pipelines.config import PipelineConfig
from pipelines.errors import ArtifactError, ConfigError, PipelineError
from pipelines.estimates import ModelSize, disk_bytes, estimates, is_linear, model_size
from pipelines.rowcheck import RowStats, check_rows
from pipelines.sources import ModelFiles, Sources, data_files, resolve_model

#: Disk that must stay free beside what a run writes.
SPARE_BYTES = 256 * 1024 * 1024
#: Longest wait for a port to answer.
PROBE_S = 3.0
Refused = (PipelineError, ClusterError, LowRankError)


def require_ready(config: PipelineConfig, sources: Sources, store: Store) -> None:
    """Raise what refuses the run; more than one reason are told together, with the exit code of the first."""
    problems = examine(config, sources.model, store).refusals
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise type(problems[0])("\n".join(map(str, problems))) from problems[0]


@dataclass(frozen=True)
class Examined:
    """What was found: refusals, each as the error that the run would end with, and what estimates need."""

    refusals: list[Exception]
    size: ModelSize | None
    rows: dict[str, RowStats] | None


def examine(config: PipelineConfig, model: ModelFiles, store: Store) -> Examined:
    """Look at the model's headers, the rows, and the machine."""
    problems, size = _model(config, model, store)
    rows = None
    try:
        rows = check_rows(config.data)
    except ClusterError as error:
        problems.append(error)
    return Examined([*problems, *environment_refusals(config, store)], size, rows)


def environment_refusals(config: PipelineConfig, store: Store) -> Iterator[Exception]:
    """What stands against a run whatever its model and data."""
    yield from _tokens(config, store)
    yield from _port(config, store)
    yield from _layout(config)
    yield from _address(config)
    yield from _tracking(config, store)
    yield from _storage(config, store)


def missing_sources(config: PipelineConfig) -> Iterator[Exception]:
    """Model and data that cannot be found; with any of them there are no keys."""
    finders: list[Callable[[], object]] = [
        lambda: resolve_model(config.model).files(),
        lambda: data_files(config.data.train),
        lambda: data_files(config.data.heldout),
    ]
    for find in finders:
        try:
            find()
        except Refused as error:
            yield error


def _model(config: PipelineConfig, model: ModelFiles, store: Store) -> tuple[list[Exception], ModelSize | None]:
    from cluster.known_models import check_config

    try:
        if model.kind == "safetensors":
            check_config(model.path)
        headers = model.headers()
    except (LowRankError, ClusterError) as error:
        return [error], None
    size = model_size(headers)
    problems = list(_disk(size, store))
    rank, limit = config.decompose.rank, largest_rank(config, headers)
    if rank and rank > limit:
        problem = ConfigError(
            f"decompose.rank: {rank} is more than min(m, n) = {limit} of the smallest target. "
            f"Set decompose.rank <= {limit}, or name larger layers in decompose.target_modules."
        )
        problems.insert(0, problem)
    return problems, size


def largest_rank(config: PipelineConfig, headers: list[TensorHeader]) -> int:
    """min(m, n) of the smallest target; where names cannot be matched (GGUF has its own), of the largest layer."""
    linear = {header.name.removesuffix(".weight"): min(header.shape) for header in headers if is_linear(header)}
    if not linear:
        return 1 << 60
    wanted = config.decompose.target_modules
    if wanted == "all-linear":
        return min(linear.values())
    chosen = [rank for name, rank in linear.items() if any(_matches(pattern, name) for pattern in wanted)]
    return min(chosen) if chosen else max(linear.values())


def _matches(pattern: str, name: str) -> bool:
    try:
        return name == pattern or name.endswith("." + pattern) or re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _disk(size: ModelSize, store: Store) -> Iterator[Exception]:
    needed = disk_bytes(size) + SPARE_BYTES
    free = shutil.disk_usage(_existing(store.root)).free
    if free < needed:
        setting = "store.path" if store.mirror is None else "store.cache"
        yield ArtifactError(
            f"store {store.root}: {free / 2**30:.1f} GiB are free, about {needed / 2**30:.1f} GiB are needed. "
            f"Free some, or set {setting} to a larger disk."
        )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _tokens(config: PipelineConfig, store: Store) -> Iterator[Exception]:
    """A token that others can read is refused now, not when its endpoint is deployed."""
    from cluster.connection import load_token
    from cluster.serving.auth import read_token
    from pipelines.endpoint import token_file

    named = Path(config.cluster.token_file).expanduser() if config.cluster.token_file else None
    own = store.root / "_ray_token"
    try:
        if config.cluster.address not in (None, "auto"):
            load_token(named)
        elif (named or own).is_file():
            load_token(named or own)
    except TokenError as error:
        yield error
    try:
        if config.serve.enabled and token_file(config, store.root).is_file():
            read_token(token_file(config, store.root))
    except TokenError as error:
        yield error


def _port(config: PipelineConfig, store: Store) -> Iterator[Exception]:
    """The serve port must be free, or ours already."""
    from pipelines.endpoint import served_models, token_file

    if not config.serve.enabled or not _answers(config.serve.host, config.serve.port):
        return
    path = token_file(config, store.root)
    url = f"http://{config.serve.host}:{config.serve.port}"
    if not path.is_file() or not served_models(url, path.read_text().strip()):
        yield PortError(
            f"serve.port: {config.serve.port} on {config.serve.host} is in use by another program. "
            "Set serve.port to a free one, or end that program (`rankline stop` ends an endpoint of this store)."
        )


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=PROBE_S):
            return True
    except OSError:
        return False


def _layout(config: PipelineConfig) -> Iterator[Exception]:
    """Workers, data and serving must fit together, or training would wait for ever."""
    from cluster.session import default_num_cpus

    if config.cluster.address is not None:
        return
    if config.cluster.stage_resources:
        yield ResourceError(
            "cluster.stage_resources: the embedded cluster has none of its own. Set cluster.address to a cluster whose "
            "nodes have them (`ray start --resources`), or leave it out."
        )
    have = config.cluster.num_cpus or default_num_cpus()
    tune = config.finetune
    need = tune.num_workers * tune.cpus_per_worker + 1 + (config.serve.num_replicas * config.serve.num_cpus)
    if have < need:
        yield ResourceError(
            f"cluster.num_cpus: {have} logical CPUs do not hold {tune.num_workers} workers x {tune.cpus_per_worker:g}, "
            f"one for data and {config.serve.num_replicas} replica(s) x {config.serve.num_cpus:g}. "
            f"Set cluster.num_cpus >= {need:g}, or finetune.num_workers lower."
        )
    if tune.placement == "strict_spread" and tune.num_workers > 1:
        yield ResourceError(
            f"finetune.placement: 'strict_spread' puts {tune.num_workers} workers on a node each, and the embedded "
            "cluster is one node. Set it to 'spread', or cluster.address to a larger cluster."
        )


def _address(config: PipelineConfig) -> Iterator[Exception]:
    from cluster.connection import split_address

    address = config.cluster.address
    if address in (None, "auto"):
        return
    try:
        host, port = split_address(str(address))
    except ConnectError as error:
        yield error
        return
    if not _answers(host, port):
        yield ConnectError(
            f"cluster.address: nobody answers at {address} within {PROBE_S:g} s. Check the address and that the "
            "cluster runs; without an address an embedded cluster is started."
        )


def _tracking(config: PipelineConfig, store: Store) -> Iterator[Exception]:
    from pipelines.tracking import default_uri
    from pipelines.tracking_probe import probe

    try:
        probe(config.register.tracking_uri or default_uri(store.root), embedded=config.register.tracking_uri is None)
    except PipelineError as error:
        yield error


def _storage(config: PipelineConfig, store: Store) -> Iterator[Exception]:
    """An object store must take, list and give a marker, and a database must keep the run's lease."""
    from pipelines.lease_database import LeaseDatabase, lease_url
    from pipelines.run_lease import run_id

    if store.mirror is None:
        return
    if config.register.tracking_uri is None:
        yield ConfigError(
            "register.tracking_uri: null keeps MLflow's database in the store, which is an object store and cannot "
            "hold one. Set it to an MLflow server (http://HOST:PORT) or to a database."
        )
    try:
        store.mirror.probe()
    except (StorageError, OSError) as error:
        yield error
    try:
        LeaseDatabase(lease_url(config)).holder(run_id(store, config.name))
    except PipelineError as error:
        yield error


def plan(config: PipelineConfig) -> dict[str, Any]:
    """Stages with keys and what is cached, refusals with reasons, and estimates. Writes nothing but the hash cache."""
    from pipelines.sources import hash_sources
    from pipelines.stages import STAGES
    from pipelines.workflow import run_key, stage_keys

    store = Store.of(config.store)
    problems = list(missing_sources(config))
    result: dict[str, Any] = {"name": config.name, "run_key": None, "estimates": None}
    keys: dict[str, str] = {}
    if problems:
        problems += environment_refusals(config, store)
    else:
        sources = hash_sources(config, store.root / "_hashes.json")
        keys = stage_keys(config, sources)
        found = examine(config, sources.model, store)
        problems += found.refusals
        result["run_key"] = run_key(keys)
        if found.size and found.rows:
            result["estimates"] = estimates(config, found.size, found.rows)
    stages = []
    for stage in STAGES:
        cached = False
        try:
            asked = bool(keys) and not any(isinstance(problem, StorageError) for problem in problems)
            cached = asked and store.read_manifest(stage.name, keys[stage.name]) is not None
        except (PipelineError, StorageError) as error:
            problems.append(error)
        stages.append({"name": stage.name, "key": keys.get(stage.name), "cached": cached, "summary": stage.summary})
    refused = [str(problem) for problem in problems]
    return result | {"stages": stages, "refusals": refused, "refusal_errors": problems}
