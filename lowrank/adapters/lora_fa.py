"""LoRA-FA: a LoRA whose A stays as it was drawn; B alone is trained, and no input of size n must be kept for A.

Source: Zhang et al., arXiv 2308.03303, eq. 3. The trained adapter is a plain LoRA on disk.
"""

from __future__ import annotations

from torch import Tensor

from lowrank.adapters.lora import LoRA


class LoRAFA(LoRA):
    """ΔW = s·B·A with A (r, n) frozen."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0) -> None:
        """Args: a: (r, n), frozen. b: (m, r). scaling: s. dropout: on the input while training, in [0, 1)."""
        super().__init__(a, b, scaling, dropout)
        self.lora_a.requires_grad_(False)
