"""The record of a run, `run.json`: written by its driver, read by every command; it carries its own hash."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cluster.durable import canonical, sha256_bytes, write_json
from lowrank.reading import is_number, is_texts, read_json


def read_record(directory: Path) -> dict[str, Any]:
    """The record of a run; an empty mapping where there is none, or where it is damaged."""
    try:
        record = read_json(directory / "run.json")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and _fits(record) else {}


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Replace the record of a run, with its own hash."""
    write_json(directory / "run.json", record | {"sha256": record_hash(record)})


def record_hash(record: dict[str, Any]) -> str:
    """Hash of a run's record but for that entry itself."""
    return sha256_bytes(canonical({name: value for name, value in record.items() if name != "sha256"}))


def _fits(record: dict[str, Any]) -> bool:
    """Whether what is there has the types that the commands count on."""
    stages, endpoint = record.get("stages", {}), record.get("endpoint")
    return (
        all(isinstance(record.get(name, ""), str) for name in ("name", "run_key", "status"))
        and all(record.get(name) is None or isinstance(record[name], str) for name in ("mlflow_uri", "mlflow_run_id"))
        and all(is_texts(record.get(name, {})) for name in ("keys", "manifests"))
        and all(re.fullmatch(r"\w{1,64}", key) for key in record.get("keys", {}).values())
        and is_number(record.get("updated", 0.0))
        and isinstance(stages, dict)
        and all(_is_stage(stage) for stage in stages.values())
        and (not endpoint or (isinstance(endpoint, dict) and _has_address(endpoint)))
    )


def _has_address(endpoint: dict[str, Any]) -> bool:
    return all(isinstance(endpoint.get(name), str) for name in ("url", "token_file"))


def _is_stage(stage: Any) -> bool:
    return isinstance(stage, dict) and "cached" in stage and is_number(stage.get("seconds"))
