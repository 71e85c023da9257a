"""The contract of an optimiser: what it makes of a pair's whole gradients, and which plain optimiser then steps.

An optimiser of pairs turns the gradients of A and B into directions. A plain optimiser subtracts them: AdamW, whose
moments follow the directions, or SGD where the optimiser keeps moments of its own. Only the plain one needs to know
how parameters are cut over ranks, so that every optimiser here is a function of whole tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

#: Moments of one pair by name, in the dtype of its parameters; empty before the first step.
State = dict[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """A (r, n) and B (m, r) of one layer with the gradients of the loss, all fp32 or fp64."""

    a: Tensor
    b: Tensor
    grad_a: Tensor
    grad_b: Tensor


class Optimizer:
    """Plain AdamW on every parameter; the others derive from it.

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """

    plain: ClassVar[Literal["AdamW", "SGD"]] = "AdamW"
    """What subtracts the directions. SGD without momentum: its weight decay is decoupled like AdamW's."""
    redirects: ClassVar[bool] = False
    """Whether `directions` differ from the gradients; only then must anyone gather whole gradients."""
    lr_ratio_b: float = 1.0
    """Learning rate of B over that of every other parameter."""

    def directions(self, pair: Pair, state: State, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """What the plain optimiser gets in place of the gradients of A (r, n) and B (m, r).

        Args:
            pair: parameters and gradients, left as they are.
            state: the pair's moments, replaced in place.
            step: steps taken before, >= 0.
            rate: learning rate of this step.
        """
        del state, step, rate
        return pair.grad_a, pair.grad_b


def gram(columns: Tensor, damping: float, floor: float) -> Tensor:
    """XᵀX + δI (r, r) in fp64 for X (k, r), with δ = damping · mean diag XᵀX + floor."""
    columns = columns.double()
    product = columns.T @ columns
    product.diagonal().add_(damping * product.diagonal().mean() + floor)
    return product


def inverse(matrix: Tensor) -> Tensor:
    """The pseudo-inverse of a symmetric matrix (r, r): directions in which a factor is 0 get no step."""
    inverted: Tensor = torch.linalg.pinv(matrix, hermitian=True)
    return inverted


def state_tensors(states: Mapping[str, State]) -> dict[str, Tensor]:
    """The moments of every owner as `owner:optimizer.name`, for a checkpoint."""
    return {f"{owner}:optimizer.{name}": value for owner, state in states.items() for name, value in state.items()}


def load_states(states: Mapping[str, State], tensors: Mapping[str, Tensor]) -> None:
    """Put what `state_tensors` gave back into `states`; `tensors` may hold others too."""
    for key, value in tensors.items():
        owner, _, name = key.rpartition(":optimizer.")
        if owner in states:
            states[owner][name] = value.clone()
