"""LoRA-RITE: Adam whose moments live in orthonormal bases of the factors, so that no choice of (A, B) matters.

Source: Yen et al., arXiv 2410.20625, algorithm 1, without the escaped mass, which its authors' code leaves out too.
What that code clips, the norm of all unmagnified gradients, is left to the clipping of the raw ones.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowrank.optimizer_options import LoRARITEOptions
from lowrank.optimizers.base import Optimizer, Pair, State


class LoRARITE(Optimizer):
    """Per factor, with Aᵀ = U R for B (and B = U R for A): ḡ = g R⁻¹, adaptive in the basis U, then back by R⁻ᵀ.

    The state of a factor (k, r) is the basis U of the other, M (k, r) and V (r, r), both in that basis.
    """

    plain: ClassVar[Literal["AdamW", "SGD"]] = "SGD"
    redirects: ClassVar[bool] = True

    def __init__(self, options: LoRARITEOptions, betas: tuple[float, float]) -> None:
        self.epsilon = options.epsilon
        self.betas = betas

    def directions(self, pair: Pair, state: State, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """Both factors by the same rule, A transposed; see `Optimizer.directions`."""
        del rate
        direction_a = self._factor(pair.grad_a.T, pair.b, state, "a", step)
        direction_b = self._factor(pair.grad_b, pair.a.T, state, "b", step)
        return direction_a.T.to(pair.a.dtype).contiguous(), direction_b.to(pair.b.dtype)

    def _factor(self, grad: Tensor, other: Tensor, state: State, factor: str, step: int) -> Tensor:
        """The direction (k, r) in fp64 of the factor whose gradient is `grad`; `other` (l, r) is its partner."""
        basis, upper = torch.linalg.qr(other.double())
        # The pseudo-inverse: where the partner is 0 (as B is where LoRA starts) but for rounding, the factor rests.
        inverse_upper = torch.linalg.pinv(upper, rtol=len(other) * torch.finfo(other.dtype).eps)
        unmagnified = grad.double() @ inverse_upper
        decay1, decay2 = (_unbiased(beta, step) for beta in self.betas)
        moment = torch.zeros_like(unmagnified)
        second = torch.zeros_like(upper)
        if state.get(f"basis_{factor}") is not None:
            turn = basis.T @ state[f"basis_{factor}"].double()
            moment = state[f"moment_{factor}"].double() @ turn.T
            second = turn @ state[f"second_{factor}"].double() @ turn.T
        second = decay2 * second + (1.0 - decay2) * (unmagnified.T @ unmagnified) / len(grad)
        values, vectors = torch.linalg.eigh((second + second.T) / 2)
        scale = 1.0 / (values.clamp(min=0.0).sqrt() + self.epsilon)
        moment = decay1 * moment + (1.0 - decay1) * unmagnified @ (vectors * scale) @ vectors.T
        for name, value in {"basis": basis, "moment": moment, "second": second}.items():
            state[f"{name}_{factor}"] = value.to(other.dtype)
        direction: Tensor = moment @ inverse_upper.T
        return direction


def _unbiased(beta: float, step: int) -> float:
    """The decay that makes a running mean unbiased at every step.

    Source: Adafactor, arXiv 1804.04235, section 7.1.
    """
    return float(beta * (1.0 - beta**step) / (1.0 - beta ** (step + 1)))
