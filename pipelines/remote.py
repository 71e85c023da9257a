"""`rankline submit`: the same YAML as a Ray job; one id per attempt, and a live attempt is followed, not doubled.

A submission is found again by the run's key, so that the YAML and the address are all that it takes to see its
status and its log, and to end it.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.artifacts import Store
from pipelines.config import PipelineConfig
from pipelines.lease_database import lease_url
from pipelines.portable import portable_yaml
from pipelines.sources import hash_sources
from pipelines.workflow import run_key, stage_keys

if TYPE_CHECKING:
    from cluster.submit import Attempt


def submit(config: PipelineConfig, address: str, follow: bool) -> dict[str, Any]:
    """Submit a pipeline to the cluster whose dashboard is at `address`.

    The YAML goes to the store, which the cluster's nodes must share; the job runs `rankline run` on it there. Of an
    object store the job is told the URI alone: credentials are those of the cluster's own environment.

    Returns:
        `submission_id`, `status` and `exit_code`.

    Raises:
        ConfigError: the store is an object store, and nothing keeps its runs to one driver.
        cluster.errors.ClusterError: unreachable, refused, or the followed job failed.
        StorageError: the object store refuses.
    """
    from cluster import submit as jobs
    from cluster.durable import write_atomic

    store, key = _store_and_key(config)
    path = store.root / "_submitted" / f"{key}.yaml"
    if store.mirror is not None:
        lease_url(config)
    write_atomic(path, portable_yaml(config))
    store.publish(path)
    pipeline = str(path) if store.mirror is None else store.mirror.uri_of(path)
    entrypoint = f"python -m pipelines.cli run {shlex.quote(pipeline)} --address auto"
    on_line = print if follow else None
    submission = jobs.submit(address, entrypoint, key, token=_token(config), on_line=on_line)
    return {"submission_id": submission, "status": "SUCCEEDED" if follow else "SUBMITTED", "exit_code": 0}


def attempts(config: PipelineConfig, address: str) -> list[dict[str, Any]]:
    """Every submission of this run that the cluster knows, oldest first: `submission_id`, `status`, `message`.

    Raises:
        cluster.errors.ClusterError: unreachable, or refused.
    """
    found = _attempts(config, address)[1]
    return [{"submission_id": one.submission_id, "status": one.status, "message": one.message} for one in found]


def logs(config: PipelineConfig, address: str) -> dict[str, Any]:
    """What the newest submission of this run has printed: `submission_id`, `status`, `log`.

    Raises:
        cluster.errors.ClusterError: unreachable, refused, or this run was never submitted there.
    """
    from cluster import submit as jobs

    client, newest = _newest(config, address)
    log = jobs.logs(client, newest.submission_id)
    return {"submission_id": newest.submission_id, "status": newest.status, "log": log}


def cancel(config: PipelineConfig, address: str) -> dict[str, Any]:
    """Stop the live submission of this run; what it has committed stays: `submission_id`, `status`.

    Raises:
        cluster.errors.ClusterError: unreachable, refused, never submitted, or no longer live.
    """
    from cluster import submit as jobs
    from cluster.errors import JobError

    client, newest = _newest(config, address)
    if not newest.live:
        raise JobError(f"cancel {newest.submission_id}: it has ended as {newest.status} already.")
    return {"submission_id": newest.submission_id, "status": jobs.cancel(client, newest.submission_id)}


def _newest(config: PipelineConfig, address: str) -> tuple[Any, Attempt]:
    from cluster.errors import JobError

    client, found = _attempts(config, address)
    if not found:
        raise JobError(
            f"find {config.name} on {address}: this pipeline, with these settings and sources, was never submitted "
            "there. `rankline submit` it, or give the YAML and the --set that it was submitted with."
        )
    return client, found[-1]


def _attempts(config: PipelineConfig, address: str) -> tuple[Any, list[Attempt]]:
    from cluster import submit as jobs

    client = jobs.open_client(address, token=_token(config))
    return client, jobs.list_attempts(client, _store_and_key(config)[1])


def _store_and_key(config: PipelineConfig) -> tuple[Store, str]:
    store = Store.of(config.store)
    store.root.mkdir(parents=True, exist_ok=True)
    return store, run_key(stage_keys(config, hash_sources(config, store.root / "_hashes.json")))


def _token(config: PipelineConfig) -> str | None:
    file = config.cluster.token_file
    return Path(file).expanduser().read_text().strip() if file else None
