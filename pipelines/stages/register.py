"""register: the adapter becomes a model version in MLflow's registry, with its card, lineage, plots and report.

The alias moves only when the gate passed and this version is no worse than the present holder on the same evaluation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cluster.durable import canonical, sha256_bytes
from pipelines.config import PipelineConfig, result_fields
from pipelines.report import model_card, write_plots
from pipelines.report_files import bring_for_report
from pipelines.sources import Sources
from pipelines.stages.base import Context, Outcome, Stage


def settings(config: PipelineConfig, sources: Sources) -> dict[str, Any]:
    """What decides the version: its name and alias, and where the registry is."""
    name = config.register.name or config.name
    return result_fields(config.register) | {"name": name, "tracking_uri": config.register.tracking_uri}


def evaluation_hash(config: PipelineConfig, sources: Sources) -> str:
    """What two versions must share for their figures to be comparable: model, held-out rows and how they are read."""
    values = {
        "model": sources.model_sha256,
        "heldout": sources.heldout_sha256,
        "data": result_fields(config.data),
        "max_rows": config.evaluate.max_rows,
        "metric": config.evaluate.metric,
    }
    return sha256_bytes(canonical(values))[:20]


def run(ctx: Context) -> Outcome:
    """Bundle, register, move the alias or say why not."""
    evaluation = json.loads(ctx.input("evaluate").file("summary", "evaluation.json").read_text())
    ctx.progress.total(2)
    tags = _tags(ctx, evaluation)
    ctx.commit("bundle", partial(_write_bundle, ctx, evaluation, tags))
    registered = ctx.tracker.register(
        ctx.config.register.name or ctx.config.name,
        ctx.store.fetch("bundle"),
        tags,
        ctx.config.register.alias,
        partial(refusal, evaluation, tags, ctx.config.evaluate.metric),
    )
    facts = {
        "name": registered.name,
        "version": registered.version,
        "run_id": registered.run_id,
        "source": registered.source,
        "alias": ctx.config.register.alias if ctx.config.register.alias in registered.aliases else None,
        "reason": registered.reason,
    }
    ctx.commit("version", lambda _directory: facts)
    return Outcome(["bundle", "version"], facts)


STAGE = Stage(
    "register",
    2,
    ("shard", "decompose", "quantize", "finetune", "evaluate"),
    settings,
    run,
    "adapter -> MLflow model version",
)


def _tags(ctx: Context, evaluation: Mapping[str, Any]) -> dict[str, str]:
    from importlib import metadata

    keys = {f"rankline.key.{stage}": key for stage, key in ctx.input_keys.items()}
    return keys | {
        "rankline.key": ctx.key,
        "rankline.base_sha256": ctx.sources.model_sha256,
        "rankline.train_sha256": ctx.sources.train_sha256,
        "rankline.heldout_sha256": ctx.sources.heldout_sha256,
        "rankline.code_version": metadata.version("rankline"),
        "rankline.evaluation_hash": evaluation_hash(ctx.config, ctx.sources),
        "rankline.loss": repr(evaluation["adapter"]["loss"]),
        "rankline.accuracy": repr(evaluation["adapter"]["accuracy"]),
        "rankline.passed": str(evaluation["passed"]),
    }


def refusal(evaluation: Mapping[str, Any], tags: Mapping[str, str], metric: str, holder: Mapping[str, str]) -> str:
    """Why the alias must stay with its holder; empty to move it."""
    if not evaluation["passed"]:
        return "the gate did not pass"
    if not holder:
        return ""
    if holder.get("rankline.evaluation_hash") != tags["rankline.evaluation_hash"]:
        return "it was evaluated on other data or by another metric, so the two cannot be compared"
    ours, theirs = tags[f"rankline.{metric}"], holder.get(f"rankline.{metric}", "None")
    if "None" in (ours, theirs):
        return ""
    worse = float(ours) < float(theirs) if metric == "accuracy" else float(ours) > float(theirs)
    return f"its {metric} {float(theirs):.4f} is better than {float(ours):.4f}" if worse else ""


def _plain_losses(ctx: Context, plain: Path) -> dict[str, Any]:
    """What `plain_lora/` costs over the original weights, on held-out rows."""
    from cluster.export import losses_over_original

    tokens = ctx.input("evaluate").file("tokens", "tokens.parquet")
    adapter = ctx.input("finetune").fetch("adapter")
    return losses_over_original(ctx.model_source(), adapter, plain, tokens)


def _write_bundle(
    ctx: Context, evaluation: Mapping[str, Any], tags: Mapping[str, str], directory: Path
) -> dict[str, Any]:
    finetune = ctx.input("finetune")
    for unit, name in (("adapter", "adapter"), ("plain-lora", "plain_lora")):
        if not finetune.is_committed(unit):
            continue
        left_out = shutil.ignore_patterns("unit.json", "sidecar.json")
        shutil.copytree(finetune.fetch(unit), directory / name, ignore=left_out)
    if (directory / "plain_lora").is_dir() and ctx.config.finetune.base == "nf4":
        evaluation = {**evaluation, "plain_lora": _plain_losses(ctx, directory / "plain_lora")}
    (directory / "lineage.json").write_text(json.dumps(dict(tags), indent=2, sort_keys=True))
    (directory / "evaluation.json").write_text(json.dumps(evaluation, indent=2, sort_keys=True))
    (directory / "README.md").write_text(model_card(ctx.config, evaluation, tags))
    bring_for_report(ctx.inputs, ctx.mirror)
    write_plots(ctx.inputs, directory / "plots")
    return {"num_files": sum(1 for path in directory.rglob("*") if path.is_file())}
