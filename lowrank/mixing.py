"""Many adapters in one pass: which tokens each speaks for, and what is made beforehand so that they go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapter
from lowrank.errors import AdapterError
from lowrank.kernels.grouped import GroupedPairs, Layout, Pair, PairSet, readable
from lowrank.kernels.kronecker import Factors, GroupedKroneckers

#: Ranks, and numbers over those of the adapter, up to which a change s B A is kept as a pair for a `Mix`.
_MOST_RANKS, _MOST_NUMBERS = 128, 4
#: Tokens side by side of one adapter that it takes by itself: libraries are fast at so many.
_RUN = 64


@dataclass(frozen=True, eq=False)
class Mix:
    """One adapter (None: the bare base) for every token of a batch; a layer that has no such adapter stays bare."""

    names: tuple[str | None, ...]

    @cached_property
    def rows(self) -> dict[str, list[int]]:
        """The rows of every adapter that speaks."""
        found: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            if name is not None:
                found.setdefault(name, []).append(row)
        return found

    @cached_property
    def parts(self) -> dict[str, tuple[list[slice], list[int]]]:
        """The same as runs of at least `_RUN` rows, and the others one by one."""
        found: dict[str, tuple[list[slice], list[int]]] = {}
        for name, rows in self.rows.items():
            runs, others = found.setdefault(name, ([], []))
            for _, group in groupby(enumerate(rows), lambda pair: pair[1] - pair[0]):
                own = [row for _, row in group]
                if len(own) < _RUN:
                    others += own
                else:
                    runs.append(slice(own[0], own[-1] + 1))
        return found

    @cached_property
    def layout(self) -> Layout:
        """The same for products."""
        return Layout(list(self.parts.values()))


@dataclass(frozen=True, eq=False)
class Ready:
    """An adapter with all that a `Mix` needs of it made beforehand, over the layer that it is for.

    Attributes:
        adapter: itself.
        pair: of ΔW = s B A, or of (W + ΔW) = diag(gain)·W + s B A.
        gain: (m,), or None where rows of W keep their length.
        kronecker: what `GroupedKroneckers` takes.
    """

    adapter: Adapter
    pair: Pair | None
    gain: Tensor | None
    kronecker: Factors | None

    @classmethod
    def of(cls, adapter: Adapter, base: nn.Module) -> Ready:
        """Make it.

        Raises:
            AdapterError: its factors do not fit each other, or the base.
        """
        gained = adapter.gain_and_low_rank(base)
        if gained is not None:
            gain, left, right = (part.detach() for part in gained)
            return cls(adapter, readable(Pair(right, left.T)), gain, None)
        pair = _pair_of(adapter)
        factors = adapter.kronecker() if pair is None else None
        return cls(adapter, pair, None, None if factors is None else GroupedKroneckers.prepared(factors))

    def tensors(self) -> list[Tensor]:
        """Of the adapter, and what was made of them."""
        made = (*(self.pair[:2] if self.pair else ()), *(self.kronecker or ()))
        gain = () if self.gain is None else (self.gain,)
        return [*self.adapter.numbers(), *made, *gain]


def bytes_of(ready: Iterable[Ready]) -> int:
    """Bytes of adapters; what they share, or see a part of, counts once."""
    sizes: dict[int, int] = {}
    for one in ready:
        for tensor in one.tensors():
            sizes[tensor.data_ptr()] = max(sizes.get(tensor.data_ptr(), 0), tensor.nbytes)
    return sum(sizes.values())


def _pair_of(adapter: Adapter) -> Pair | None:
    """The pair of an adapter whose change is one of few more numbers than its own, or None."""
    if 0 in adapter.shape:  # PEFT's VeRA, which learns n from its first input
        return None
    pair = adapter.pair() if adapter.export == "exact" else None
    if pair is None:
        return None
    (r, n), (ranks, m) = pair.a.shape, pair.bt.shape
    if r != ranks or (m, n) != adapter.shape:
        raise AdapterError(f"its low-rank form is {[(m, ranks), (r, n)]}, of a change of shape {adapter.shape}.")
    if r > _MOST_RANKS or r * (m + n) > _MOST_NUMBERS * sum(tensor.numel() for tensor in adapter.numbers()):
        return None
    return readable(pair)


class Mixable(Protocol):
    """A layer with adapters by name."""

    base: nn.Module
    mixers: list[ref[MixedLayers]]
    """Told when an adapter goes."""

    def ready(self, name: str) -> Ready | None:
        """The adapter of a name, if there is one."""


class MixedLayers:
    """Layers of one input whose outputs lie side by side; the pairs of all of them are one product."""

    def __init__(self, layers: Sequence[Mixable | None], sizes: Sequence[int]) -> None:
        """Args: layers: None for one that takes no adapters. sizes: m of each."""
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        columns = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self._width = sum(sizes)
        self._layers = [(layer, own) for layer, own in zip(layers, columns, strict=True) if layer is not None]
        for layer, _ in self._layers:
            layer.mixers = [held for held in layer.mixers if held() is not None] + [ref(self)]
        self._known: dict[str, _Known] = {}
        self._made: tuple[Mix, _Made] | None = None

    def forget(self, name: str) -> None:
        """Hold nothing of an adapter that goes, and that nobody uses; nor that there is none, of one that comes."""
        self._known.pop(name, None)
        made = self._made
        if made is not None and name in made[0].rows:
            self._made = None

    def change(self, y: Tensor, x: Tensor, mix: Mix) -> None:
        """Change what the bases made of x (rows, n), y (rows, Σ m), in place, each row by its own adapter.

        Raises:
            AdapterError: the mix is of other rows.
        """
        if len(x) != len(mix.names):
            raise AdapterError(f"mix adapters: {len(x)} rows came to a layer, the mix is of {len(mix.names)}.")
        made = self._made
        if made is None or made[0] is not mix:
            made = self._made = mix, self._make(mix, x)
        made[1].change(y, x)

    def _make(self, mix: Mix, x: Tensor) -> _Made:
        known = [self._known.get(name) or self._look_up(name) for name in mix.parts]
        made = _Made()
        if any(own.pairs is not None for own in known):
            made.pairs = GroupedPairs([own.pairs for own in known], len(self._layers), mix.layout)
        if any(own.gains for own in known):
            made.gains = self._gains(dict(zip(mix.parts, known, strict=True)), mix, x)
        if any(own.others for own in known):
            self._make_others(made, mix, x, known)
        return made

    def _look_up(self, name: str) -> _Known:
        """What an adapter does to these layers."""
        held = [(layer, columns, layer.ready(name)) for layer, columns in self._layers]
        pairs = [None if ready is None else ready.pair for _, _, ready in held]
        found = _Known(
            PairSet(pairs, [columns.start for _, columns, _ in held]) if any(pairs) else None,
            [
                (columns, ready.gain, getattr(layer.base, "bias", None))
                for layer, columns, ready in held
                if ready is not None and ready.gain is not None
            ],
            [
                (columns, ready, layer.base)
                for layer, columns, ready in held
                if ready is not None and ready.pair is None
            ],
        )
        if found.pairs is not None or found.others:
            self._known[name] = found
        return found

    def _gains(self, known: Mapping[str, _Known], mix: Mix, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Each row's place in two tables: y times that of the first plus that of the second, y = g (y − b) + b."""
        places = {name: place for place, name in enumerate((name for name, own in known.items() if own.gains), 1)}
        factors = torch.ones(len(places) + 1, self._width, dtype=x.dtype, device=x.device)
        shifts = torch.zeros_like(factors)
        for name, place in places.items():
            for columns, gain, bias in known[name].gains:
                factors[place, columns] = gain.to(x)
                if bias is not None:
                    shifts[place, columns] = (1 - gain.to(x)) * bias.to(x)
        owners = torch.tensor([0 if name is None else places.get(name, 0) for name in mix.names], device=x.device)
        biased = any(bias is not None for name in places for _, _, bias in known[name].gains)
        return owners, factors, shifts if biased else None

    def _make_others(self, made: _Made, mix: Mix, x: Tensor, known: Sequence[_Known]) -> None:
        """Adapters that are no pairs: Kronecker factors of a layer together, the others one by one."""
        factors: dict[int, tuple[slice, list[Factors], list[list[int]]]] = {}
        for own, (runs, rows) in zip(known, mix.parts.values(), strict=True):
            for columns, ready, base in own.others:
                alone: list[slice | Tensor] = [*runs]
                if rows and ready.kronecker is not None and GroupedKroneckers.fits(x):
                    _, held, tokens = factors.setdefault(columns.start, (columns, [], []))
                    held.append(ready.kronecker)
                    tokens.append(rows)
                elif rows:
                    alone.append(torch.tensor(rows, device=x.device))
                made.alone += [(ready.adapter, base, columns, own_rows) for own_rows in alone]
        made.kroneckers = [(columns, GroupedKroneckers(held, rows)) for columns, held, rows in factors.values()]


@dataclass(frozen=True, eq=False)
class _Known:
    """What one adapter does to layers of one input."""

    pairs: PairSet | None
    gains: list[tuple[slice, Tensor, Tensor | None]]
    others: list[tuple[slice, Ready, nn.Module]]


class _Made:
    """What a `MixedLayers` does to y for one mix."""

    def __init__(self) -> None:
        self.alone: list[tuple[Adapter, nn.Module, slice, slice | Tensor]] = []
        self.gains: tuple[Tensor, Tensor, Tensor | None] | None = None
        self.kroneckers: list[tuple[slice, GroupedKroneckers]] = []
        self.pairs: GroupedPairs | None = None

    def change(self, y: Tensor, x: Tensor) -> None:
        """See `MixedLayers.change`."""
        for adapter, base, columns, rows in self.alone:
            y[rows, columns] = adapter(x[rows], y[rows, columns], base)
        if self.gains is not None:
            owners, factors, shifts = self.gains
            y *= factors[owners]
            if shifts is not None:
                y += shifts[owners]
        for columns, group in self.kroneckers:
            group.add_to(y[:, columns], x)
        if self.pairs is not None:
            self.pairs.add_to(y, x)
