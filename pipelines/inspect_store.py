"""What a store holds and what can be chosen, for `rankline status` and `rankline methods`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.artifacts import Store
from pipelines.errors import ConfigError, PipelineError
from pipelines.run_lease import driver_of
from pipelines.stages import STAGES


def status(store: Store, run: str | None) -> dict[str, Any]:
    """Runs with their stages, the embedded cluster and the endpoints of a store.

    Raises:
        ConfigError: there is no run of that name.
    """
    from dataclasses import asdict

    from cluster import session

    names = store.run_names()
    if run is not None and run not in names:
        raise ConfigError(f"status {run!r}: no such run in {store.name}. Runs there: {', '.join(names) or 'none'}.")
    records = [_run(store, name) for name in names if run in (None, name)]
    head = session.status(store.root) if store.root.is_dir() else None
    cluster = {k: v for k, v in asdict(head).items() if k in ("address", "dashboard_url", "num_cpus")} if head else None
    endpoints = [_endpoint(record["endpoint"]) for record in records if record.get("endpoint")]
    return {"store": store.name, "runs": records, "cluster": cluster, "endpoints": endpoints}


def _run(store: Store, name: str) -> dict[str, Any]:
    record, driver, unknown = store.read_record(name), None, ""
    try:
        driver = driver_of(store, name)
    except PipelineError as error:
        unknown = str(error)
    if not {"status", "keys", "stages"} <= record.keys():
        record = {"name": name, "status": "DAMAGED (`rankline run` with its pipeline.yaml writes run.json anew)"}
        record |= {"keys": {}, "stages": {}}
    if record["status"] == "RUNNING" and unknown:
        record["status"] = f"RUNNING, or lost: {unknown}"
    elif record["status"] == "RUNNING" and driver is None:
        record["status"] = "LOST (its driver died; run it again to go on)"
    record["driver"] = driver["pid"] if driver else None
    keys, known = record["keys"], record["stages"]
    order = [stage.name for stage in STAGES if stage.name in keys]
    record["stages"] = [_stage(store, stage, keys[stage], known.get(stage)) for stage in order]
    return record


def _stage(store: Store, name: str, key: str, known: dict[str, Any] | None) -> dict[str, Any]:
    """Finished stages from the run record; others from the units that are committed."""
    committed = len(store.units(name, key).all_committed())
    if known is not None:
        state, seconds = "cached" if known["cached"] else "done", known["seconds"]
    else:
        finished = store.read_manifest(name, key) is not None
        state, seconds = ("done" if finished else "partly done" if committed else "to do"), None
    return {"name": name, "key": key, "state": state, "units": committed, "seconds": seconds}


def _endpoint(recorded: dict[str, Any]) -> dict[str, Any]:
    from pipelines.endpoint import served_models

    path = Path(recorded["token_file"])
    token = path.read_text().strip() if path.is_file() else ""
    return {"url": recorded["url"], "models": sorted(served_models(recorded["url"], token))}


def methods() -> dict[str, list[dict[str, str]]]:
    """Every decomposition, quantization and adapter by the name that a pipeline YAML takes, from their registries."""
    from lowrank.adapters.registry import FAMILIES
    from lowrank.decompositions import METHODS as DECOMPOSITIONS
    from lowrank.quantization.residual import METHODS as QUANTIZATIONS

    sections: dict[str, Mapping[str, Any]] = {
        "decompose.method": DECOMPOSITIONS,
        "quantize.method": QUANTIZATIONS,
        "finetune.adapter.method": FAMILIES,
    }
    return {section: [_row(name, made) for name, made in table.items()] for section, table in sections.items()}


def _row(name: str, made: Any) -> dict[str, str]:
    summary = getattr(made, "summary", "") or (made.__doc__ or "").strip().splitlines()[0]
    return {"name": name, "summary": summary} | _decomposition_facts(made)


def _decomposition_facts(made: Any) -> dict[str, str]:
    """What a decomposition can do; nothing for the other registries."""
    if not hasattr(made, "rules"):
        return {}
    return {
        "family": made.family,
        "rules": ", ".join(sorted(made.rules)) or "-",
        "options": ", ".join(item.name for item in dataclasses.fields(made.options)) or "-",
        "weights": "yes" if made.weighted else "no",
        "low-rank form": made.low_rank,
    }
