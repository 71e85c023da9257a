"""`rankline submit`: the same YAML as a Ray job; one id per attempt, and a live attempt is followed, not doubled."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from pipelines.config import PipelineConfig
from pipelines.sources import hash_sources
from pipelines.workflow import portable_yaml, run_key, stage_keys


def submit(config: PipelineConfig, address: str, follow: bool) -> dict[str, Any]:
    """Submit a pipeline to the cluster whose dashboard is at `address`.

    The YAML goes to the store, which the cluster's nodes must share; the job runs `rankline run` on it there.

    Returns:
        `submission_id`, `status` and `exit_code`.

    Raises:
        cluster.errors.ClusterError: unreachable, refused, or the followed job failed.
    """
    from cluster import submit as jobs
    from cluster.durable import write_atomic

    store = Path(config.store.path).resolve()
    store.mkdir(parents=True, exist_ok=True)
    key = run_key(stage_keys(config, hash_sources(config, store / "_hashes.json")))
    path = store / "_submitted" / f"{key}.yaml"
    write_atomic(path, portable_yaml(config))
    token = Path(config.cluster.token_file).expanduser().read_text().strip() if config.cluster.token_file else None
    entrypoint = f"python -m pipelines.cli run {shlex.quote(str(path))} --address auto"
    on_line = print if follow else None
    submission = jobs.submit(address, entrypoint, key, token=token, on_line=on_line)
    return {"submission_id": submission, "status": "SUCCEEDED" if follow else "SUBMITTED", "exit_code": 0}
