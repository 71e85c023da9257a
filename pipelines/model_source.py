"""Where the parts of a run's model lie in the store, and which base its adapters belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.model import ModelSource
from pipelines.artifacts import Store
from pipelines.config import PipelineConfig


def model_source(
    config: PipelineConfig, store: Store, keys: Mapping[str, str], adapter_dir: Path | None = None
) -> ModelSource:
    """The source of a run whose `shard` and `quantize` are finished.

    Args:
        config: of the run.
        store: its store.
        keys: of its stages.
        adapter_dir: the trained adapter, where there is one.
    """
    tune = config.finetune
    shard = store.read_manifest("shard", keys["shard"])
    return ModelSource(
        shards=store.artifact("shard", keys["shard"]),
        splits=store.artifact("quantize", keys["quantize"]),
        adapter=tune.adapter,
        adapter_dir=adapter_dir,
        base=tune.base,
        base_facts={
            "name": config.model.source,
            "base_sha256": None if shard is None else shard.config["model"],
            "split_key": keys["quantize"],
            "base": "factors" if config.decompose.mode == "replace" else tune.base,
        },
        mirror=store.mirror,
    )
