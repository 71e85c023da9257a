"""DyLoRA: a LoRA of rank r whose first b components are a good LoRA of rank b, for every b in r_min..r.

Every training forward of a layer draws b ~ U{r_min..r} from torch's generator and uses B[:, :b]·A[:b] alone, with the
scaling s(b) of rank b. `nested` trains all of these b components, `frozen` only the b-th.

Source: Valipour et al., arXiv 2210.07558, algorithm 1. On disk it is a LoRA of rank r; `truncate` gives the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.adapter_options import DyLoRAOptions, options_of
from lowrank.adapters.base import Adapter, Export, Layer, require_fit, scaling_of
from lowrank.adapters.lora import LoRA
from lowrank.adapters.pairs import initial_pair
from lowrank.adapters.settings import dropout_of, options_from, scaling_from
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError


class DyLoRA(Adapter):
    """ΔW = s(b)·B[:, :b]·A[:b], where b is drawn while training and fixed otherwise."""

    peft_type: ClassVar[str] = "LORA"
    prefix: ClassVar[str] = "lora_"
    export: ClassVar[Export] = "exact"
    takes_split: ClassVar[frozenset[str]] = frozenset({"low_rank"})

    def __init__(
        self, a: Tensor, b: Tensor, scaling: float, use_rslora: bool, options: DyLoRAOptions, dropout: float = 0.0
    ) -> None:
        """A pair of the largest rank.

        Args:
            a: (r, n).
            b: (m, r).
            scaling: s of rank r.
            use_rslora: whether s(b) falls as 1/√b instead of 1/b.
            options: which ranks are trained, how, and which one answers.
            dropout: on the input while training, in [0, 1).

        Raises:
            AdapterError: r_min or eval_rank is larger than r.
        """
        require_fit("DyLoRA", A=(a, "rn"), B=(b, "mr"))
        super().__init__((b.shape[0], a.shape[1]), scaling, dropout)
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(b)
        self.use_rslora = use_rslora
        self.options = options
        self._check(max(options.r_min, options.eval_rank or 1), "r_min and eval_rank")

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """A and B by `config.init`; see `initial_pair`."""
        a, b, scaling = initial_pair(layer, config)
        options = options_of(config.method, config.options)
        return cls(a, b, scaling, config.use_rslora, options, config.lora_dropout)

    @property
    def r(self) -> int:
        """The largest rank, which is the stored one."""
        return int(self.lora_a.shape[0])

    def scaling_at(self, rank: int) -> float:
        """s(b) = α/b, or α/√b with rank-stabilised scaling."""
        alpha = self.scaling / scaling_of(1.0, self.r, self.use_rslora)
        return scaling_of(alpha, rank, self.use_rslora)

    def truncate(self, rank: int) -> LoRA:
        """The LoRA of the first `rank` components.

        Raises:
            AdapterError: rank is not in 1..r.
        """
        self._check(rank, "rank")
        a, b = self.lora_a[:rank].detach().clone(), self.lora_b[:, :rank].detach().clone()
        return LoRA(a, b, self.scaling_at(rank), self.dropout)

    def _check(self, rank: int, name: str) -> None:
        if not 1 <= rank <= self.r:
            raise AdapterError(f"use a DyLoRA adapter of rank {self.r} at {rank}. Set 1 <= {name} <= {self.r}.")

    def delta(self, x: Tensor) -> Tensor:
        """s(b)·B[:, :b]·A[:b]·x for x (..., n): (..., m), with b drawn in training, else `eval_rank`."""
        left, right = self._drawn() if self.training else self.low_rank()
        return F.linear(F.linear(x, right.to(x.dtype)), left.to(x.dtype))

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """The pair at a random b."""
        rank = int(torch.randint(self.options.r_min, self.r + 1, ()))
        a, b = self.lora_a[:rank], self.lora_b[:, :rank]
        if self.options.train == "frozen":
            a = torch.cat([a[:-1].detach(), a[-1:]])
            b = torch.cat([b[:, :-1].detach(), b[:, -1:]], dim=1)
        return self.scaling_at(rank) * b, a

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(s(b)·B[:, :b], A[:b]) at b = `eval_rank`."""
        rank = self.options.eval_rank or self.r
        return self.scaling_at(rank) * self.lora_b[:, :rank], self.lora_a[:rank]

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """s(b)·B[:, :b]·A[:b] (m, n) at b = `eval_rank`."""
        del weight
        left, right = self.low_rank()
        return left @ right

    def tensors(self) -> dict[str, Tensor]:
        """All of A and B by PEFT's names."""
        return {"lora_A.weight": self.lora_a.detach(), "lora_B.weight": self.lora_b.detach()}

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """A stored pair, with the ranks of the configuration that wrote it."""
        a, b = tensors["lora_A.weight"].float(), tensors["lora_B.weight"].float()
        options = DyLoRAOptions(**options_from(config))
        scaling = scaling_from(config, module, len(a))
        return cls(a, b, scaling, bool(config.get("use_rslora")), options, dropout_of(config))

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """As `peft.LoraConfig` names them."""
        return LoRA.peft_settings(config)
