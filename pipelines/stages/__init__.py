"""The stages of the line, in order. `serve` is not among them: an endpoint is a state of the world, not an artifact."""

from __future__ import annotations

from pipelines.stages import decompose, evaluate, finetune, quantize, register, shard
from pipelines.stages.base import Stage

STAGES: tuple[Stage, ...] = (
    shard.STAGE,
    decompose.STAGE,
    quantize.STAGE,
    finetune.STAGE,
    evaluate.STAGE,
    register.STAGE,
)
