"""Optimisers that precondition gradients or learning rates and leave the moments to AdamW."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowrank.optimizer_options import LoRAPlusOptions, RefLoRAOptions, RiemannianOptions
from lowrank.optimizers.base import Optimizer, Pair, State, gram, inverse


class LoRAPlus(Optimizer):
    """AdamW with η_B = λ·η_A.

    Source: Hayou et al., arXiv 2402.12354, section 4.
    """

    def __init__(self, options: LoRAPlusOptions, betas: tuple[float, float]) -> None:
        del betas  # AdamW's own
        self.lr_ratio_b = options.lr_ratio


class Riemannian(Optimizer):
    """g_A ← (BᵀB + δI)⁻¹ g_A and g_B ← g_B (AAᵀ + δI)⁻¹: the gradient in the metric of the set of rank-r matrices.

    Source: Zhang and Pilanci, arXiv 2402.02347, eq. 2 and algorithm 2 (scaled AdamW).
    """

    redirects: ClassVar[bool] = True

    def __init__(self, options: RiemannianOptions, betas: tuple[float, float]) -> None:
        del betas  # AdamW's own
        self.options = options

    def directions(self, pair: Pair, state: State, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """Both scaled gradients; see `Optimizer.directions`."""
        del state, step, rate
        damping, floor = self.options.damping, self.options.floor
        direction_a = inverse(gram(pair.b, damping, floor)) @ pair.grad_a.double()
        direction_b = pair.grad_b.double() @ inverse(gram(pair.a.T, damping, floor))
        return direction_a.to(pair.a.dtype), direction_b.to(pair.b.dtype)


class RefLoRA(Optimizer):
    """g_A ← S⁻¹ g_A and g_B ← g_B S, where S AAᵀ S = BᵀB: the gradients of the pair with equal Grams, mapped back.

    Source: Zhang et al., arXiv 2505.18877, theorem 3 (S in closed form) and algorithm 1.
    """

    redirects: ClassVar[bool] = True

    def __init__(self, options: RefLoRAOptions, betas: tuple[float, float]) -> None:
        del betas  # AdamW's own
        self.options = options

    def directions(self, pair: Pair, state: State, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """Both refactored gradients; see `Optimizer.directions`."""
        del state, rate
        if step < self.options.warmup_steps:
            return pair.grad_a, pair.grad_b
        metric = balancing(pair.a, pair.b, self.options.damping, self.options.floor)
        direction_a = inverse(metric) @ pair.grad_a.double()
        return direction_a.to(pair.a.dtype), (pair.grad_b.double() @ metric).to(pair.b.dtype)


def balancing(a: Tensor, b: Tensor, damping: float, floor: float) -> Tensor:
    """S (r, r) in fp64 with S (AAᵀ) S = BᵀB, both damped: (AAᵀ)^-½ [(AAᵀ)^½ BᵀB (AAᵀ)^½]^½ (AAᵀ)^-½."""
    root, inverse_root = _roots(gram(a.T, damping, floor))
    middle, _ = _roots(root @ gram(b, damping, floor) @ root)
    return inverse_root @ middle @ inverse_root


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a symmetric positive semidefinite matrix, and the pseudo-inverse of that root."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    roots = values.clamp(min=0.0).sqrt()
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    inverted = torch.where(kept, 1.0 / roots, 0.0)
    return (vectors * roots) @ vectors.T, (vectors * inverted) @ vectors.T
