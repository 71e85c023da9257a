"""evaluate: dense, nf4, nf4_init and adapter on the same held-out tokens, and the gate's verdict.

dense is W, nf4 is NF4(W), nf4_init the quantized residual with the initial factors (before training), adapter the
result. A unit is one variant over some rows. The verdict is recorded here and acted on by the workflow.

What no training changes, dense and nf4, is scored once per base and rows: the records are kept in `_artifacts/scores`
and copied into the units of every later adapter on that base.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from cluster.artifacts import SplitSet
from cluster.durable import UnitStore, canonical, sha256_bytes, units_at
from cluster.errors import DamagedError
from cluster.evaluate import ScoreJob, majority, paired_interval, sample_answers, score, summarise
from cluster.model import ModelSource, Variant
from pipelines.config import PipelineConfig, result_fields
from pipelines.sources import Sources
from pipelines.stages.base import Context, Outcome, Stage

VARIANTS: tuple[Variant, ...] = get_args(Variant)
NUM_SAMPLES = 3
#: Variants that no training changes.
UNTRAINED: tuple[Variant, ...] = ("dense", "nf4")


@dataclass(frozen=True)
class EvaluateJob:
    """One unit: a scoring job and where its records go."""

    root: Path
    unit: str
    score: ScoreJob
    shared: Path | None = None
    """Where records that other runs may use are kept; None for what training changes."""

    @property
    def store(self) -> UnitStore:
        """Where the unit goes, and where its tokens are."""
        return units_at(self.root, self.score.source.mirror)


def settings(config: PipelineConfig, sources: Sources) -> dict[str, Any]:
    """What decides the figures."""
    return result_fields(config.evaluate) | {"data": result_fields(config.data), "heldout": sources.heldout_sha256}


def run(ctx: Context) -> Outcome:
    """Tokenise held-out rows, score every variant, then compare."""
    from cluster.data import label_set, prepare_tokens, refuse_duplicates

    source = ctx.model_source(ctx.inputs["finetune"] / "units" / "adapter")
    data = ctx.config.data
    meta = ctx.input("shard")

    def write_tokens(directory: Path) -> dict[str, Any]:
        facts = prepare_tokens(data.heldout, meta, data, directory, use_ray=ctx.use_ray)
        ctx.sources.require_data("heldout")
        return facts

    ctx.commit("tokens", write_tokens, counted=False)
    tokens = ctx.store.fetch("tokens") / "tokens.parquet"
    refuse_duplicates(ctx.input("finetune").fetch("train-tokens") / "tokens.parquet", tokens)
    labels = tuple(label_set([tokens], data) or ())
    jobs = plan_jobs(ctx, source, tokens, labels)
    ctx.run_units(evaluate_unit, jobs, extra=1)
    ctx.commit("summary", partial(_write_summary, ctx.store, list(jobs), labels, ctx.config.evaluate.metric))
    return Outcome(["tokens", *jobs, "summary"], ctx.store.read("summary").facts)


STAGE = Stage(
    "evaluate", 1, ("shard", "quantize", "finetune"), settings, run, "held-out loss and accuracy of four variants"
)


def plan_jobs(ctx: Context, source: ModelSource, tokens: Path, labels: tuple[str, ...]) -> dict[str, EvaluateJob]:
    """Units `<variant>-<chunk>`, variant by variant, so that a worker keeps its model; then `<variant>-samples`."""
    import pyarrow.parquet as pq

    config = ctx.config.evaluate
    total = min(pq.read_metadata(tokens).num_rows, config.max_rows or 1 << 60)
    jobs: dict[str, EvaluateJob] = {}
    for variant in VARIANTS:
        shared = _shared(ctx, variant) if variant in UNTRAINED else None
        base = ScoreJob(
            source=source,
            variant=variant,
            tokens=tokens,
            start=0,
            stop=min(NUM_SAMPLES, total),
            batch_size=config.batch_size,
            labels=labels,
            dtype=ctx.config.finetune.compute_dtype,
            max_new_tokens=config.max_new_tokens,
            exact_match=config.exact_match,
        )
        for index, start in enumerate(range(0, total, config.rows_per_unit)):
            unit = f"{variant}-{index:04d}"
            stop = min(start + config.rows_per_unit, total)
            jobs[unit] = EvaluateJob(ctx.store.root, unit, replace(base, start=start, stop=stop), shared)
        sample = replace(base, max_new_tokens=8 if labels else min(config.max_new_tokens, 48))
        jobs[f"{variant}-samples"] = EvaluateJob(ctx.store.root, f"{variant}-samples", sample, shared)
    return jobs


def _shared(ctx: Context, variant: Variant) -> Path:
    """The directory of a variant's scores, by all that decides them."""
    decisive: dict[str, Any] = {
        "format": STAGE.format_version,
        "variant": variant,
        "shard": ctx.input_keys["shard"],
        "data": result_fields(ctx.config.data),
        "heldout": ctx.sources.heldout_sha256,
        "answers": [ctx.config.evaluate.max_new_tokens, ctx.config.evaluate.exact_match],
        "dtype": ctx.config.finetune.compute_dtype,
    }
    if variant == "nf4":
        parts = ("module", "block_size", "double_quant")
        decisive["nf4"] = [
            [record[part] for part in parts] for record in SplitSet(ctx.inputs["quantize"], ctx.mirror).records
        ]
    return ctx.store.root.parents[1] / "scores" / sha256_bytes(canonical(decisive))[:20]


def evaluate_unit(job: EvaluateJob) -> None:
    """Score one unit and commit its records."""
    job.store.fetch("tokens")
    job.store.commit(job.unit, partial(_score, job))


def _score(job: EvaluateJob, directory: Path) -> dict[str, Any]:
    if job.shared is None:
        return _write_records(job, directory)
    kept, kind = units_at(job.shared, job.score.source.mirror), "samples" if job.unit.endswith("-samples") else "rows"
    unit = f"{kind}-{job.score.start:06d}-{job.score.stop:06d}"
    if kept.is_committed(unit):
        try:
            kept.fetch(unit)
            kept.read(unit, verify=True)
        except (ValueError, DamagedError):
            kept.discard(unit)
    facts = kept.commit(unit, partial(_write_records, job)).facts
    shutil.copyfile(kept.file(unit, "records.json"), directory / "records.json")
    return facts


def _write_records(job: EvaluateJob, directory: Path) -> dict[str, Any]:
    records = (sample_answers if job.unit.endswith("-samples") else score)(job.score)
    (directory / "records.json").write_text(json.dumps(records))
    return {"num_rows": len(records)}


def _write_summary(
    store: UnitStore, units: list[str], labels: tuple[str, ...], metric: str, directory: Path
) -> dict[str, Any]:
    records: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    samples: list[dict[str, Any]] = []
    for unit in units:
        found = json.loads(store.file(unit, "records.json").read_text())
        (samples if unit.endswith("-samples") else records[unit.rpartition("-")[0]]).extend(found)
    summary: dict[str, Any] = {variant: summarise(rows, labels) for variant, rows in records.items()}
    summary |= {"labels": list(labels), "metric": metric, "samples": samples}
    if labels:
        summary |= _compare(records)
    summary["improvement"] = _improvement(summary, metric)
    summary["passed"] = summary["improvement"] > 0
    (directory / "evaluation.json").write_text(json.dumps(summary, indent=2, sort_keys=True))
    return summary


def _compare(records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The majority class, and the adapter's gain in accuracy over each other variant and over it, row by row."""
    label, share = majority(record["answer"] for record in records["adapter"])
    right = {variant: [bool(record["correct"]) for record in rows] for variant, rows in records.items()}
    right["majority"] = [record["answer"].strip() == label for record in records["adapter"]]
    gains = {name: paired_interval(right["adapter"], rows) for name, rows in right.items() if name != "adapter"}
    return {"majority": {"label": label, "accuracy": share}, "gains": gains}


def _improvement(summary: dict[str, Any], metric: str) -> float:
    """How much better the adapter is than what it started from; positive is better.

    Free text without `exact_match` has no accuracy; the loss decides then.
    """
    before, after = summary["nf4_init"], summary["adapter"]
    if metric == "accuracy" and after["accuracy"] is not None:
        return float(after["accuracy"] - before["accuracy"])
    return float(before["loss"] - after["loss"])
