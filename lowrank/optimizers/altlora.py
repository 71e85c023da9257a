"""AltLoRA: each factor follows the projection of the full gradient onto what it can change, A before B.

Source: Yu et al., arXiv 2505.12455, algorithm 1; as in its authors' code, B is stepped with the gradient of the one
backward pass, at the old A, but preconditioned by the new A, and the momentum's bias is corrected. s of ΔW = s·B·A is
left in the learning rate.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from lowrank.optimizer_options import AltLoRAOptions
from lowrank.optimizers.base import Optimizer, Pair, State, gram, inverse


class AltLoRA(Optimizer):
    """M_A ← β (BᵀB+δ)⁻¹BᵀB_old M_A + (1−β)(BᵀB+δ)⁻¹g_A, then M_B likewise with the new A.

    The state of a pair is M_A (r, n), M_B (m, r) and B_old (m, r), the B that M_A was last written for.
    """

    plain: ClassVar[Literal["AdamW", "SGD"]] = "SGD"
    redirects: ClassVar[bool] = True

    def __init__(self, options: AltLoRAOptions, betas: tuple[float, float]) -> None:
        self.options = options
        self.beta = betas[0]

    def directions(self, pair: Pair, state: State, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """Both momenta with their bias corrected; see `Optimizer.directions`."""
        beta, damping, floor = self.beta, self.options.damping, self.options.floor
        a, b = pair.a.double(), pair.b.double()
        inverse_b = inverse(gram(b, damping, floor))
        moment_a = (1.0 - beta) * inverse_b @ pair.grad_a.double()
        if state:
            moment_a += beta * (inverse_b @ (b.T @ state["b_old"].double())) @ state["moment_a"].double()
        unbiased = 1.0 - beta ** (step + 1)
        new_a = a - (rate / unbiased) * moment_a
        inverse_a = inverse(gram(new_a.T, damping, floor))
        moment_b = (1.0 - beta) * pair.grad_b.double() @ inverse_a
        if state:
            # The last step wrote M_B for the A that now is the old one.
            moment_b += beta * state["moment_b"].double() @ (a @ new_a.T @ inverse_a)
        dtype = pair.a.dtype
        state.update(moment_a=moment_a.to(dtype), moment_b=moment_b.to(dtype), b_old=pair.b.detach().clone())
        return (moment_a / unbiased).to(dtype), (moment_b / unbiased).to(dtype)
