"""GaLore: Adam on the projection of every gradient matrix onto its own leading singular subspace.

For G (m, n) with m <= n (`std`): G → PᵀG (r, n) with P = U_r(G) (m, r), computed anew every T steps; moments are kept
of PᵀG alone, and W −= η·α·P·Adam(PᵀG). A taller G is projected from the right. As in the authors' code the moments stay
as they are when P changes. What is no matrix, or has a side of at most r, is stepped by plain AdamW.

Source: Zhao et al., GaLore, arXiv 2403.03507, algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowrank.blocks import BlockMatrix
from lowrank.errors import AdapterError
from lowrank.executor import SerialExecutor
from lowrank.optimizer_options import GaLoreOptions
from lowrank.optimizers.base import Optimizer, Pair, State, load_states, state_tensors
from lowrank.rank import RankRule

#: Added to the root of the second moment, as torch's AdamW does.
_EPSILON = 1e-8


class GaLore(Optimizer):
    """α·P·Adam(PᵀG) in place of G; see the module. The state of a matrix is P, and two moments of PᵀG."""

    plain: ClassVar[Literal["AdamW", "SGD"]] = "SGD"
    redirects: ClassVar[bool] = True

    def __init__(self, options: GaLoreOptions, betas: tuple[float, float]) -> None:
        self.options = options
        self.betas = betas

    def directions(self, pair: Pair, state: State, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """A and B as two matrices that do not know of each other; see `Optimizer.directions`."""
        del rate
        return self.direction(pair.grad_a, state, step, "_a"), self.direction(pair.grad_b, state, step, "_b")

    def projects(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of this shape has smaller moments than AdamW's."""
        return len(shape) == 2 and min(shape) > self.options.rank

    def direction(self, gradient: Tensor, state: State, step: int, part: str = "") -> Tensor:
        """What SGD subtracts, times its learning rate, in place of `gradient`.

        Args:
            gradient: of one parameter, whole, of any shape.
            state: its moments, replaced in place.
            step: steps taken before, >= 0.
            part: end of the names in `state`.
        """
        if not self.projects(gradient.shape):
            return self._adam(gradient, state, step, part)
        left = self._left(gradient.shape)
        p = self._projector(gradient, left, state, step, part)
        low = self._adam(p.T @ gradient if left else gradient @ p, state, step, part)
        back: Tensor = self.options.scale * (p @ low if left else low @ p.T)
        return back

    def _left(self, shape: tuple[int, ...]) -> bool:
        kind = self.options.proj_type
        return shape[0] < shape[1] if kind == "std" else kind == "left"

    def _projector(self, gradient: Tensor, left: bool, state: State, step: int, part: str) -> Tensor:
        """P (m, r), or (n, r) from the right. A gradient of 0, as of A while B = 0, has none: then try again."""
        held = state.get(f"projector{part}")
        if held is None or step % self.options.update_proj_gap == 0 or not bool(held.any()):
            held = state[f"projector{part}"] = leading(gradient, left, self.options, step)
        return held

    def _adam(self, gradient: Tensor, state: State, step: int, part: str) -> Tensor:
        """Adam's direction, moving the moments on by one step."""
        moment, second = (state.get(f"{name}{part}", torch.zeros_like(gradient)) for name in ("moment", "second"))
        (beta1, beta2), count = self.betas, step + 1
        moment = beta1 * moment + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient.square()
        state[f"moment{part}"], state[f"second{part}"] = moment, second
        denominator = second.sqrt() / math.sqrt(1 - beta2**count) + _EPSILON
        return moment / (1 - beta1**count) / denominator


def leading(gradient: Tensor, left: bool, options: GaLoreOptions, seed: int) -> Tensor:
    """The leading left (m, r), or right (n, r), singular vectors of G (m, n); 0 where rounding is all there is of G.

    Adam would enlarge rounding to steps as long as all others.
    """
    # Not at the top: the decompositions import scipy.
    from lowrank.decompositions import decompose
    from lowrank.factors import SVDFactors

    matrix, rule = BlockMatrix.from_tensor("gradient", gradient.detach().cpu()), RankRule(rank=options.rank)
    factors = decompose(matrix, rule=rule, seed=seed, executor=SerialExecutor(), n_iter=options.n_iter).factors
    assert isinstance(factors, SVDFactors)
    rounding = factors.s[0] * torch.finfo(gradient.dtype).eps * math.sqrt(max(gradient.shape))
    vectors = factors.u if left else factors.vh.T
    return (vectors * (factors.s > rounding)).to(gradient).contiguous()


class GaLoreRule:
    """GaLore over all parameters of a model: whole gradients by parameter name in, directions by name out."""

    def __init__(self, optimizer: GaLore, parameters: Mapping[str, Tensor]) -> None:
        """Nothing is allocated before the first step.

        Args:
            optimizer: what steps every parameter.
            parameters: all that train, by name; only their shapes are read.

        Raises:
            AdapterError: no parameter is a matrix with both sides above the rank.
        """
        if not any(optimizer.projects(parameter.shape) for parameter in parameters.values()):
            largest = max((min(p.shape) for p in parameters.values() if p.ndim == 2), default=0)
            raise AdapterError(
                f"train {len(parameters)} parameters with GaLore: the smaller side of a matrix is at most {largest}, "
                f"so that rank {optimizer.options.rank} projects none. Set finetune.optimizer_options.rank below "
                f"{largest}, finetune.optimizer to 'adamw', or finetune.adapter.method to 'full'."
            )
        self.optimizer = optimizer
        self._states: dict[str, State] = {name: {} for name in parameters}

    def directions(
        self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], step: int, rate: float
    ) -> dict[str, Tensor]:
        """What SGD gets in place of `gradients`; see `lowrank.optimizers.pairs.PairRule.directions`."""
        del parameters, rate
        return {name: self.optimizer.direction(gradients[name], state, step) for name, state in self._states.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All projectors and moments as `parameter:optimizer.name`, for a checkpoint."""
        return state_tensors(self._states)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take them out of a checkpoint, which may hold other tensors too."""
        load_states(self._states, tensors)
