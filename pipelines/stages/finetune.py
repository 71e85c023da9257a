"""finetune: packed weights and rows become a trained adapter, under Ray Train and DeepSpeed ZeRO.

Checkpoints are units of the same store, so a run that dies anywhere goes on from the last one. Units of the result:
`train-tokens` (and `heldout-tokens` with `eval_every`), `adapter` (PEFT format, over the quantized base) and
`plain-lora` (the same change as a LoRA over the original dense model, of twice the rank where training started from a
split; not under `decompose.mode: replace`, where the adapter is the layer, and not for families that are no LoRA).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cluster.config import FinetuneConfig
from cluster.model import ModelSource
from pipelines.config import PipelineConfig, result_fields
from pipelines.errors import Interrupted
from pipelines.sources import Sources
from pipelines.stages.base import Context, Outcome, Stage


def settings(config: PipelineConfig, sources: Sources) -> dict[str, Any]:
    """What decides the adapter; held-out rows only where they choose the checkpoint."""
    values = result_fields(config.finetune) | {"data": result_fields(config.data), "train": sources.train_sha256}
    return values | ({"heldout": sources.heldout_sha256} if config.finetune.eval_every else {})


def run(ctx: Context) -> Outcome:
    """Tokenise, refuse rows that stand on both sides, train, check, export."""
    from cluster.trainer import TrainJob, train

    tune = ctx.config.finetune
    train_tokens, heldout_tokens = _prepare(ctx)
    source = ctx.model_source()
    job = TrainJob(
        source=source,
        config=tune,
        train_tokens=train_tokens,
        heldout_tokens=heldout_tokens,
        root=ctx.store.root,
        storage=ctx.store.root / "ray-train",
        name=f"finetune-{ctx.key}",
        use_gpu=_has_gpu(ctx.use_ray),
        mirror=ctx.mirror,
        resources=ctx.config.cluster.stage_resources.get("finetune", {}),
        node_wait_s=ctx.config.cluster.node_wait_s,
    )
    outcome = train(job, on_progress=_reporter(ctx, _total_steps(tune, train_tokens)), say=ctx.say)
    units = ["train-tokens", *(["heldout-tokens"] if tune.eval_every else []), "adapter"]
    replaced = ctx.config.decompose.mode == "replace"
    adapter = ctx.store.fetch("adapter")
    if not replaced and _is_lora(adapter):  # factors in W's place are no change of W
        ctx.commit("plain-lora", partial(_export_plain, source, adapter), False)
        units.append("plain-lora")
    facts = {
        "global_step": outcome.global_step,
        "epoch": outcome.epoch,
        "zero_stage": outcome.zero_stage,
        "dtype": outcome.dtype,
        **ctx.store.read("adapter").facts,
    }
    return Outcome(units, facts)


STAGE = Stage("finetune", 1, ("shard", "quantize"), settings, run, "packed weights, rows -> trained adapter")


def _is_lora(adapter: Path) -> bool:
    """Whether every layer is a LoRA exactly; other adapters are written by `rankline export`, cut or merged."""
    from lowrank.adapters.peft_format import load_adapter

    return all(layer.export == "exact" for layer in load_adapter(adapter).values())


def _prepare(ctx: Context) -> tuple[Path, Path | None]:
    from cluster.data import prepare_tokens, refuse_duplicates

    data, meta = ctx.config.data, ctx.input("shard")

    def tokens(part: Literal["train", "heldout"], use_ray: bool = ctx.use_ray) -> Callable[[Path], dict[str, Any]]:
        def write(out: Path) -> dict[str, Any]:
            facts = prepare_tokens(getattr(data, part), meta, data, out, use_ray=use_ray)
            ctx.sources.require_data(part)
            return facts

        return write

    ctx.commit("train-tokens", tokens("train"), False)
    train_tokens = ctx.store.fetch("train-tokens") / "tokens.parquet"
    if ctx.config.finetune.eval_every:
        ctx.commit("heldout-tokens", tokens("heldout"), False)
        heldout = ctx.store.fetch("heldout-tokens") / "tokens.parquet"
        refuse_duplicates(train_tokens, heldout)
        return train_tokens, heldout
    with tempfile.TemporaryDirectory() as scratch:
        tokens("heldout", use_ray=False)(Path(scratch))
        refuse_duplicates(train_tokens, Path(scratch) / "tokens.parquet")
    return train_tokens, None


def _total_steps(config: FinetuneConfig, tokens: Path) -> int:
    import pyarrow.parquet as pq

    steps: int = -(-pq.read_metadata(tokens).num_rows // config.global_batch_size) * config.epochs
    return min(steps, config.max_steps or steps)


def _reporter(ctx: Context, total: int) -> Callable[[dict[str, Any]], None]:
    """Forward every step to the progress bar and to the tracking server; stop at a checkpoint when asked to."""
    every = ctx.config.finetune.checkpoint_every

    def report(line: dict[str, Any]) -> None:
        step = int(line["step"])
        ctx.progress.total(total, step)
        ctx.progress.advance(0, f"loss {line['loss']:.4f}" if "loss" in line else "")
        numbers = {k: float(v) for k, v in line.items() if isinstance(v, int | float) and k not in ("step", "time")}
        ctx.tracker.log(numbers, step)
        if ctx.stopping() and step % every == 0 and step < total:
            raise Interrupted(f"stopped at step {step} of {total}; its checkpoint stays.")

    return report


def _has_gpu(use_ray: bool) -> bool:
    if not use_ray:
        return False
    import ray

    return bool(ray.cluster_resources().get("GPU", 0))


def _export_plain(source: ModelSource, trained: Path, directory: Path) -> dict[str, Any]:
    """What training changed, as a LoRA that stock PEFT applies to the original model."""
    from cluster.export import export_lora

    return export_lora(source, trained, directory, None, source.base_facts)
