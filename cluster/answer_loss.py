"""The loss over answer tokens, with logits only where there are answers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from cluster.rows import IGNORE

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cluster.batches import Batch


def answer_nll(model: nn.Module, batch: Batch, device: str = "cpu") -> Tensor:
    """Σ −log p(answer token) of a batch, differentiable even where it holds no answer token.

    The sum, not the mean: only the caller knows how many answer tokens the whole global batch has.

    Args:
        model: A causal language model of transformers, adapted or not, or the DeepSpeed engine around one.
        batch: Tokens and labels.
        device: Where the model is.
    """
    from torch.nn import functional as F

    targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE).to(device)
    chosen = targets != IGNORE
    if batch.num_answer_tokens == 0:
        # One unscored position keeps the graph alive: DeepSpeed counts on a backward pass of every micro-batch.
        chosen = chosen.clone()
        chosen[:, 0] = True
    logits = _logits(model, batch, chosen, device)
    return F.cross_entropy(logits.float(), targets[chosen], ignore_index=IGNORE, reduction="sum")


def _logits(model: nn.Module, batch: Batch, chosen: Tensor, device: str) -> Tensor:
    """Logits at the chosen positions, (num_chosen, vocabulary)."""
    # use_cache=False is what makes transformers see the restarts of position_ids as separate documents.
    inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(device), "use_cache": False}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids.to(device)
    if _selects_positions(model):
        inputs["logits_to_keep"] = chosen
    logits: Tensor = model(**inputs).logits
    # A model that knows no mask here returns all positions.
    return logits if logits.ndim == 2 else logits[chosen]


def _selects_positions(model: Any) -> bool:
    """Whether the model's own forward takes a mask of the positions whose logits are wanted."""
    inner = getattr(model, "module", model)
    module = inspect.getmodule(type(inner))
    return "logits_to_keep" in inspect.signature(inner.forward).parameters and hasattr(module, "slice_logits_to_keep")
