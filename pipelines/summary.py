"""What a finished run tells tools: `summary.json`, and the figures that head its MLflow run."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.workflow import RunResult, StageRecord


def shown(record: StageRecord) -> dict[str, Any]:
    """How a stage went, without its facts."""
    return {k: v for k, v in asdict(record).items() if k not in ("facts", "name")}


def summarise(result: RunResult) -> dict[str, Any]:
    """What tools read: losses, accuracies, stages, registered version, endpoint."""
    facts: dict[str, dict[str, Any]] = {record.name: record.facts for record in result.stages}
    evaluation = facts["evaluate"]
    variants = ("dense", "nf4", "nf4_init", "adapter")
    accuracy = {v: evaluation[v]["accuracy"] for v in variants}
    return {
        "name": result.name,
        "run_key": result.run_key,
        "seconds": result.seconds,
        "losses": {v: evaluation[v]["loss"] for v in variants},
        "perplexity": {v: evaluation[v]["perplexity"] for v in variants},
        "accuracy": accuracy | {"majority": evaluation.get("majority", {}).get("accuracy")},
        "calibrated_log_loss": {v: evaluation[v].get("calibrated_log_loss") for v in variants},
        "gains": evaluation.get("gains"),
        "passed": evaluation["passed"],
        "stages": {record.name: shown(record) | {"facts": record.facts} for record in result.stages},
        "registered": {k: facts["register"][k] for k in ("name", "version", "alias", "reason")},
        "endpoint": result.endpoint,
        "mlflow": {"uri": result.mlflow_uri, "run_id": result.mlflow_run_id},
    }


def headline(summary: dict[str, Any]) -> dict[str, float]:
    """The figures that show in the table of MLflow's runs."""
    numbers = {f"loss_{v}": value for v, value in summary["losses"].items()}
    numbers |= {f"accuracy_{v}": value for v, value in summary["accuracy"].items() if value is not None}
    return numbers | {"seconds": summary["seconds"]}
