"""LoKH: ΔW = s·(F1 ⊙ … ⊙ FL), a column-wise Kronecker (Khatri-Rao) product; and KRAdapter, its chain of two factors.

The product stands on the larger side of W (m, n): with k = max(m, n) and d = min(m, n) the factors are F_i (p_i, d)
and p₁·…·p_L = k, or more, and rows beyond k are left out. ΔW is that (k, d) product, transposed where n > m. A split
W ≈ Q + S is continued as it was found, on the rows of W: k = m and d = n there. The file holds (m, n), which together
with the shapes of the factors is the whole policy of sides and trimming.

| form | factors | s | ΔW |
|---|---|---|---|
| low-rank | F_i = B_i A_i, B_i (p_i, r), A_i (r, d), L = 2 | α/r, α/√r | (B1 ⊗ B2)(A1 ⊙ A2), a LoRA of rank r² |
| chain | F_i free, L = 2 to 4 | α | of full rank: no LoRA, and every pass costs as much as one of W |

Exactly one matrix starts at zero; the others are uniform with columns of expected norm 1, so that their product is
neither too large nor too small however many there are.

Source: Lu, arXiv 2408.05883 (the chain, without code or experiments; scaling and start are ours); KRAdapter, arXiv
2508.00230, and the authors' code, which also trims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowrank.adapter_options import KRAdapterOptions, LoKHOptions, options_of
from lowrank.adapters.base import Adapter, Export, Layer, kaiming, matched
from lowrank.adapters.continued import divided, extended
from lowrank.adapters.file_config import pattern_value
from lowrank.adapters.products import column_products, refuse_rslora
from lowrank.adapters.settings import dropout_of, rank_of, scaling_for, scaling_from
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.factors import KhatriRaoFactors, LowRankKhatriRaoFactors

_SIZE = "lokh_size"
#: Numbers that a chain may hold beside its result: p₁·d for every token of a slice.
_SLICE_ENTRIES = 2**22


class LoKH(Adapter):
    """ΔW = s·(F1 ⊙ … ⊙ FL), the factors free or of rank r."""

    peft_type: ClassVar[str] = "LOKH"
    prefix: ClassVar[str] = "lokh_"
    takes_split: ClassVar[frozenset[str]] = frozenset({"khatri_rao", "khatri_rao_low_rank"})

    def __init__(
        self, factors: Mapping[str, Tensor], shape: tuple[int, int], scaling: float, dropout: float = 0.0
    ) -> None:
        """Args: factors: lokh_a1, lokh_b1, lokh_a2, lokh_b2, or lokh_f1, lokh_f2, .... shape: (m, n). scaling: s.

        Raises:
            AdapterError: the factors do not fit each other or the shape.
        """
        super().__init__(shape, scaling, dropout)
        for name in sorted(factors):
            self.register_parameter(name, nn.Parameter(factors[name]))
        self._check(sorted(factors))

    def _check(self, names: list[str]) -> None:
        low_rank = ["lokh_a1", "lokh_a2", "lokh_b1", "lokh_b2"]
        free = [f"lokh_f{index + 1}" for index in range(len(names))]
        sizes = {name: tuple(self.get_parameter(name).shape) for name in names}
        fits = names in (low_rank, free) and len(names) >= 2 and all(len(size) == 2 for size in sizes.values())
        if fits and names == low_rank:
            fits = all(sizes[f"lokh_b{i}"][1] == sizes[f"lokh_a{i}"][0] for i in (1, 2))
        if fits:
            rows = math.prod(size[0] for name, size in sizes.items() if "_a" not in name)
            columns = {size[1] for name, size in sizes.items() if "_b" not in name}
            fits = len(columns) == 1 and columns <= set(self.shape) and rows >= self._rows
        if not fits:
            raise AdapterError(
                f"LoKH factors do not fit {self.shape[0]}x{self.shape[1]}: got {sizes}; allowed are lokh_f1, lokh_f2, "
                "... of (p, d), or lokh_b1, lokh_b2 of (p, r) and lokh_a1, lokh_a2 of (r, d), with d = n and the "
                "product of all p >= m, or d = m and the product >= n."
            )

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """The split that `quantize` took out; without one no change: the last factor is zero.

        Raises:
            AdapterError: max(m, n) is no product of such factors, or the rank is larger than they allow, or smaller
                than that of the split, or the split is of the other form.
        """
        options, columns = LoKHOptions(**config.options), min(layer.shape)
        if layer.split is not None:
            return cls._continued(layer, config, options)
        rows, generator = rows_of(layer, options), layer.generator(config.seed)
        if options.form == "low-rank":
            r = rank_of(layer, config, min(*rows, columns))
            factors = {f"lokh_a{i}": _unit_columns(r, columns, generator) for i in (1, 2)}
            factors |= {"lokh_b1": _unit_columns(rows[0], r, generator), "lokh_b2": torch.zeros(rows[1], r)}
            return cls(factors, layer.shape, scaling_for(layer, config, r), config.lora_dropout)
        _refuse_rank(layer, config)
        factors = {f"lokh_f{i}": _unit_columns(p, columns, generator) for i, p in enumerate(rows[:-1], 1)}
        factors[f"lokh_f{len(rows)}"] = torch.zeros(rows[-1], columns)
        alpha = matched(config.alpha_pattern, layer.name, config.lora_alpha)
        return cls(factors, layer.shape, float(alpha), config.lora_dropout)

    @classmethod
    def _continued(cls, layer: Layer, config: AdapterConfig, options: LoKHOptions) -> Self:
        split, generator = layer.split, layer.generator(config.seed)
        if options.form == "low-rank" and isinstance(split, LowRankKhatriRaoFactors) and len(split.left) == 2:
            r = rank_of(layer, config)
            scaling, pairs = scaling_for(layer, config, r), list(zip(split.left, split.right, strict=True))
            factors: dict[str, Tensor] = {}
            for i, pair in enumerate(pairs, 1):
                parts = extended(layer, r, generator, *divided(scaling**0.5, *pair))
                factors |= {f"lokh_b{i}": parts[0], f"lokh_a{i}": parts[1]}
            return cls(factors, layer.shape, scaling, config.lora_dropout)
        if options.form == "chain" and isinstance(split, KhatriRaoFactors) and len(split.factors) > 1:
            _refuse_rank(layer, config)
            alpha = float(matched(config.alpha_pattern, layer.name, config.lora_alpha))
            return cls(_chain_of(split, alpha), layer.shape, alpha, config.lora_dropout)
        kind = "none" if split is None else split.kind
        raise AdapterError(
            f"initialise {layer.what}: the form {options.form!r} cannot continue its split ({kind}). Take form "
            "low-rank for khatri_rao_low_rank of two factors, form chain for khatri_rao of two or more."
        )

    @property
    def r(self) -> int:
        """Rank of the factors; 1 of a chain, whose columns are one product each."""
        return 1 if self._is_chain else int(self.get_parameter("lokh_a1").shape[0])

    @property
    def export(self) -> Export:
        """A LoRA of rank r², unless that is no less than min(m, n); a chain is no LoRA at all."""
        if self._is_chain:
            return "merge-only"
        return "exact" if self.r**2 < min(self.shape) else "truncated"

    @property
    def _is_chain(self) -> bool:
        return "lokh_f1" in self._parameters

    @property
    def _wide(self) -> bool:
        """Whether the product stands on the input's side."""
        factor = "lokh_f1" if self._is_chain else "lokh_a1"
        return int(self.get_parameter(factor).shape[1]) != self.shape[1]

    @property
    def _rows(self) -> int:
        """k, the side that the product stands on."""
        return self.shape[1] if self._wide else self.shape[0]

    def _named(self, letter: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """All factors of a letter, in order; the first of f, or of b, carries s."""
        found: list[Tensor] = [part for name, part in self.named_parameters() if name.startswith(f"lokh_{letter}")]
        if letter in "fb":
            found[0] = self.scaling * found[0]
        return [part.to(dtype or part.dtype) for part in found]

    def delta(self, x: Tensor) -> Tensor:
        """s·(B1 ⊗ B2)((A1 ⊙ A2) x), or the chain applied factor by factor, for x (..., n): (..., m)."""
        flat = x.reshape(-1, x.shape[-1])
        if self._is_chain:
            y = _chain(flat, self._named("f", x.dtype), self._wide)
        else:
            y = _low_rank(flat, self._named("b", x.dtype), self._named("a", x.dtype), self._wide)
        return y[:, : self.shape[0]].reshape(*x.shape[:-1], self.shape[0])

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """s·(F1 ⊙ … ⊙ FL) (m, n), trimmed, and transposed where it stands on the input's side."""
        del weight
        if self._is_chain:
            factors = self._named("f")
        else:
            factors = [b @ a for b, a in zip(self._named("b"), self._named("a"), strict=True)]
        whole = reduce(column_products, factors)[: self._rows]
        return whole.T if self._wide else whole

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(s·B1 ⊗ B2, A1 ⊙ A2), transposed on the input's side; None for a chain or where r² >= min(m, n)."""
        if self.export != "exact":
            return None
        left = torch.kron(*self._named("b"))[: self._rows]
        right = column_products(*self._named("a"))
        return (right.T, left.T) if self._wide else (left, right)

    def tensors(self) -> dict[str, Tensor]:
        """The factors, and (m, n)."""
        return {name: part.detach() for name, part in self.named_parameters()} | {_SIZE: torch.tensor(self.shape)}

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """The factors on disk, with the scaling that the configuration gives the module."""
        factors = {name: part.float() for name, part in tensors.items() if name != _SIZE}
        m, n = (int(size) for size in tensors[_SIZE])
        if "lokh_a1" in factors:
            scaling = scaling_from(config, module, len(factors["lokh_a1"]))
        else:
            scaling = float(pattern_value(config, "alpha_pattern", module, config["lora_alpha"]))
        return cls(factors, (m, n), scaling, dropout_of(config))

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """α (of KRAdapter its scale), the scaling rule and the dropout; PEFT has not this family."""
        options = options_of(config.method, config.options)
        return {
            "lora_alpha": getattr(options, "scale", config.lora_alpha),
            "use_rslora": config.use_rslora,
            "lora_dropout": config.lora_dropout,
        }


class KRAdapter(LoKH):
    """ΔW = s·U ⊙ V, two free factors of nearly √max(m, n) rows, trimmed: of full rank, merge-only."""

    takes_split: ClassVar[frozenset[str]] = frozenset({"khatri_rao"})

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """The split that `quantize` took out; without one U Kaiming with fan p₁ and V = 0; s = `options.scale`."""
        _refuse_rank(layer, config)
        scale = matched(config.alpha_pattern, layer.name, KRAdapterOptions(**config.options).scale)
        if isinstance(layer.split, KhatriRaoFactors):
            if len(layer.split.factors) != 2:
                raise AdapterError(
                    f"initialise {layer.what}: its split is a chain of {len(layer.split.factors)}; a kradapter has two "
                    "factors. Set decompose.options.shape to two sizes, or take lokh of form chain."
                )
            return cls(_chain_of(layer.split, float(scale)), layer.shape, float(scale), config.lora_dropout)
        rows, columns = rows_of(layer, LoKHOptions(form="chain", trim=True)), min(layer.shape)
        u = kaiming(columns, rows[0], layer.generator(config.seed)).T.contiguous()
        factors = {"lokh_f1": u, "lokh_f2": torch.zeros(rows[1], columns)}
        return cls(factors, layer.shape, float(scale), config.lora_dropout)


def _chain_of(split: KhatriRaoFactors, scaling: float) -> dict[str, Tensor]:
    """The factors of a chain with s·(F1 ⊙ … ⊙ FL) = S."""
    return {f"lokh_f{i}": factor for i, factor in enumerate(divided(scaling, *split.factors), 1)}


def rows_of(layer: Layer, options: LoKHOptions) -> tuple[int, ...]:
    """(p₁, …, p_L): those of `options.shape`, or near the L-th root of k = max(m, n); divisors of k unless trimmed.

    Raises:
        AdapterError: their product is not k (or less than k, where `trim` is set), or k has no such divisors.
    """
    size = max(layer.shape)
    rows = options.shape or _near_root(size, options.num_factors, options.trim)
    product = math.prod(rows)
    if product < size or (product > size and not options.trim) or min(rows) < 2:
        allowed = f">= {size}" if options.trim else f"= {size}"
        raise AdapterError(
            f"initialise {layer.what}: factors of {rows} rows have the product {product}; allowed are factors of 2 "
            f"rows or more with the product {allowed}. Set finetune.adapter.options.shape, or trim: true."
        )
    return tuple(rows)


def _near_root(size: int, count: int, trim: bool) -> tuple[int, ...]:
    rows, rest = [], size
    for left in range(count, 1, -1):
        most = int(rest ** (1 / left) + 1e-9)
        rows.append(most if trim else max(p for p in range(1, most + 1) if rest % p == 0))
        rest = -(-rest // rows[-1])
    return (*rows, rest)


def _refuse_rank(layer: Layer, config: AdapterConfig) -> None:
    refuse_rslora(layer, config)
    if matched(config.rank_pattern, layer.name, config.r) is not None:
        raise AdapterError(f"initialise {layer.what}: a chain has no rank. Leave finetune.adapter.r out.")


def _unit_columns(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """U(±√(3/rows)) of (rows, columns): Kaiming with fan `rows`, rescaled to columns of expected squared norm 1."""
    return kaiming(columns, rows, generator).T.contiguous() * math.sqrt(3)


def _low_rank(x: Tensor, b: list[Tensor], a: list[Tensor], wide: bool) -> Tensor:
    """(B1 ⊗ B2)(A1 ⊙ A2) applied to x (T, d), or its transpose to x (T, <= p₁p₂)."""
    (b1, b2), right = b, column_products(*a)
    if wide:
        whole = F.pad(x, (0, len(b1) * len(b2) - x.shape[1])).view(-1, len(b1), len(b2))
        return (b1.T @ (whole @ b2)).flatten(1) @ right
    core = F.linear(x, right).view(-1, b1.shape[1], b2.shape[1])
    return ((b1 @ core) @ b2.T).flatten(1)


def _chain(x: Tensor, factors: list[Tensor], wide: bool) -> Tensor:
    """(F1 ⊙ … ⊙ FL) applied to x (T, d), or its transpose to x (T, <= p₁·…·p_L).

    The chain is cut in two halves U and V: (U ⊙ V) x = vec(U diag(x) Vᵀ), one product a token. The backward pass
    computes U diag(x) again, a slice of the tokens at a time, because it is far larger than x and y.
    """
    half = len(factors) // 2
    u, v = reduce(column_products, factors[:half]), reduce(column_products, factors[half:])
    if wide:
        x = F.pad(x, (0, len(u) * len(v) - x.shape[1]))
    step = max(1, _SLICE_ENTRIES // u.numel())
    if len(x) <= step:
        return _two_factors(x, u, v, wide)
    parts = [
        checkpoint(_two_factors, part, u, v, wide, use_reentrant=False, preserve_rng_state=False)
        for part in torch.split(x, step)
    ]
    return torch.cat(parts)


def _two_factors(x: Tensor, u: Tensor, v: Tensor, wide: bool) -> Tensor:
    if wide:
        return ((x.view(-1, len(u), len(v)) @ v) * u).sum(1)
    return ((x[:, None] * u) @ v.T).flatten(1)
