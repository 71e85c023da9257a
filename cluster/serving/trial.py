"""Which steps a model is asked by: the fastest that give its own logits in a short trial."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cluster.serving.fused import FusedSteps, may_fuse
from cluster.serving.steps import BatchedSteps, Chunk, SingleSteps, Steps
from lowrank.inject import replace_module
from lowrank.linear import DenseLinear

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

# A child of Serve's logger, so that inside a replica its lines reach the replica's log file.
logger = logging.getLogger("ray.serve.rankline")


def steps_for(model: PreTrainedModel, rows: int) -> Steps:
    """The fastest steps that give the logits of `SingleSteps` in a short trial.

    The model's dense layers become `DenseLinear`.
    """
    quicken(model)
    kinds: list[type[BatchedSteps | FusedSteps]] = [FusedSteps, BatchedSteps] if may_fuse(model) else [BatchedSteps]
    for kind in kinds:
        if _fits(kind, model):
            return kind(model, rows)
        logger.warning("%s does not fit %s: its requests take a slower way", kind.__name__, type(model).__name__)
    return SingleSteps(model)


def quicken(model: nn.Module) -> None:
    """Let every dense layer take few tokens by the compiled product."""
    from torch import nn

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            replace_module(model, name, DenseLinear.of(module))


def _fits(kind: type[BatchedSteps | FusedSteps], model: PreTrainedModel) -> bool:
    import torch

    try:
        with torch.inference_mode():
            return _same_logits(kind(model, 2), SingleSteps(model), model.dtype)
    except Exception:
        logger.warning("%s fails in %s", kind.__name__, type(model).__name__, exc_info=True)
        return False


def _same_logits(batched: Steps, single: Steps, dtype: torch.dtype) -> bool:
    """Whether two requests of different lengths get the same logits together as each alone."""
    import torch

    passes = [
        [Chunk(0, None, (1, 2, 3, 4, 5), 0), Chunk(1, None, (6, 7), 0)],
        [Chunk(1, None, (3,), 2), Chunk(0, None, (2,), 5)],
        [Chunk(0, None, (5,), 6), Chunk(1, None, (4, 9, 8), 3)],
    ]
    found = [
        torch.stack([own for chunks in passes for own in steps.step(chunks)]).float() for steps in (batched, single)
    ]
    difference = (found[0] - found[1]).abs().max()
    return bool(difference <= max(1e-3, 8 * torch.finfo(dtype).eps) * found[1].abs().max())
