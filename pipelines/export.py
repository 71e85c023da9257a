"""`rankline export`: the adapter of a finished run as plain LoRA, or merged into a whole model."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from cluster.model import ModelSource
from pipelines.artifacts import Store
from pipelines.config import PipelineConfig, parse, read_yaml
from pipelines.errors import ArtifactError, ConfigError
from pipelines.model_source import model_source


def export(store: Store, run: str, out: Path, format: str, max_rank: int | None, onto: str) -> dict[str, Any]:
    """Write the adapter of `run` to the new directory `out`.

    Args:
        store: where the run is.
        run: name of a run whose finetune stage is finished.
        out: directory that does not exist yet.
        format: `lora` (over the original model, for stock PEFT and vLLM) or `merged` (a model of its own).
        max_rank: of `lora`: largest rank; larger changes are cut and the retained energy is reported.
        onto: of `merged`: `trained` or `original`; see `cluster.export.export_merged`.

    Returns:
        What was written, for the table or `--json`.

    Raises:
        ConfigError: no such run, `out` exists, or `max_rank` is below 1.
        ArtifactError: the run has no finished adapter.
        AdapterError: the adapter's family cannot be written as LoRA.
    """
    if out.exists():
        raise ConfigError(f"export {run!r}: {out} exists. Give --out a new directory.")
    if max_rank is not None and max_rank < 1:
        raise ConfigError(f"export {run!r}: --max-rank {max_rank}. Set --max-rank >= 1.")
    config, source, adapter = _finished(store, run)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        written = Path(scratch) / "export"
        if format == "lora":
            facts = _lora(config, source, adapter, written, max_rank)
        else:
            from cluster.export import export_merged

            facts = export_merged(source, adapter, written, "original" if onto == "original" else "trained")
        if source.base == "nf4" and (format == "lora" or onto == "original"):
            facts |= _losses(store, run, source, adapter, written)
        shutil.move(written, out)
    return {"run": run, "format": format, "out": str(out)} | facts


def _finished(store: Store, run: str) -> tuple[PipelineConfig, ModelSource, Path]:
    record = store.read_record(run)
    if "keys" not in record:
        raise ConfigError(f"export {run!r}: no such run in {store.name}. `rankline status` lists the runs.")
    config, keys = parse(read_yaml(store.obtain(store.run_dir(run) / "pipeline.yaml"))), record["keys"]
    if (
        not {"shard", "quantize", "finetune"} <= keys.keys()
        or store.read_manifest("finetune", keys["finetune"]) is None
    ):
        raise ArtifactError(f"export {run!r}: its finetune stage is not finished. Run `rankline resume {run}`.")
    for stage in ("shard", "quantize", "finetune"):
        store.check(stage, keys[stage])
    return config, model_source(config, store, keys), store.units("finetune", keys["finetune"]).fetch("adapter")


def _losses(store: Store, run: str, source: ModelSource, adapter: Path, written: Path) -> dict[str, Any]:
    """Held-out losses of the trained and the exported model; nothing before `evaluate` has read held-out rows."""
    from cluster.export import losses_over_original

    units = store.units("evaluate", store.read_record(run)["keys"].get("evaluate", "none"))
    if not units.is_committed("tokens"):
        return {}
    try:
        units.fetch("tokens")
        units.read("tokens", verify=True)
    except ValueError as error:
        raise ArtifactError(f"export {run!r}: {error}. Delete that unit and run `rankline resume {run}`.") from error
    return losses_over_original(source, adapter, written, units.path("tokens") / "tokens.parquet")


def _lora(
    config: PipelineConfig, source: ModelSource, adapter: Path, out: Path, max_rank: int | None
) -> dict[str, Any]:
    from cluster.export import export_lora

    if config.decompose.mode == "replace":
        raise ConfigError("export: decompose.mode 'replace' has no original weights to add to. Use --format merged.")
    facts = {**source.base_facts, "run": config.name}
    return export_lora(source, adapter, out, max_rank, facts)
