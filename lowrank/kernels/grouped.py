"""y[t] += s B(A x[t]) for tokens that have different low-rank pairs, each pair read once and where it lies.

Compiled for fp32 on a CPU where a compiler is there; elsewhere two products per pair.

Source: the segmented gather of Punica, arXiv 2310.18547, section 3.2.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.kernels.build import kernel

#: Tokens of one owner that share a pass over its pairs; TOKENS of the C source.
_TOKENS = 4
#: Bytes of pairs that make another thread worth its while.
_BYTES_PER_THREAD = 2**17
#: Of the C source: rank, first column, columns, A, B, whether that is (m, r), s.
_PAIR = struct.Struct("=6qd")
#: B is read as it lies where its rank is a multiple of this; TOGETHER of the C source.
_TOGETHER = 8


class Pair(NamedTuple):
    """A change s·B·A of a linear layer: A (r, n), contiguous, and Bᵀ (r, m), best a view of B where that lies."""

    a: Tensor
    bt: Tensor
    scaling: float = 1.0


class Layout:
    """Which tokens of a batch belong to whom."""

    def __init__(self, parts: Sequence[tuple[Sequence[slice], Sequence[int]]]) -> None:
        """Args: parts: of every owner: long runs, which take two products of a library, and the other tokens."""
        self.runs = [(owner, run) for owner, (runs, _) in enumerate(parts) for run in runs]
        self.tokens = [list(own) for _, own in parts]
        starts, tokens = [0], []
        self.owners: list[int] = []
        for owner, own in enumerate(self.tokens):
            for i in range(0, len(own), _TOKENS):
                self.owners.append(owner)
                tokens += own[i : i + _TOKENS]
                starts.append(len(tokens))
        self.tables = [(ctypes.c_int64 * len(table))(*table) for table in (self.owners, starts, tokens)]


class PairSet:
    """The pairs of one owner for layers that have one input."""

    def __init__(self, pairs: Sequence[Pair | None], columns: Sequence[int]) -> None:
        """Args: pairs: of every layer, as `readable` gives them. columns: where in y its m columns begin."""
        together = list(zip(pairs, columns, strict=True))
        self.parts = [(pair, slice(at, at + pair.bt.shape[1])) for pair, at in together if pair is not None]
        self.is_float32 = all(part.dtype == torch.float32 for (a, bt, _), _ in self.parts for part in (a, bt))
        self.num_bytes = sum(pair.a.nbytes + pair.bt.nbytes for pair, _ in self.parts)
        self.entries = b"".join(_EMPTY if pair is None else _entry(pair, at) for pair, at in together)


_EMPTY = bytes(_PAIR.size)


def _entry(pair: Pair, column: int) -> bytes:
    (rank, width), lies_turned = pair.bt.shape, pair.bt.is_contiguous()
    return _PAIR.pack(rank, column, width, pair.a.data_ptr(), pair.bt.data_ptr(), not lies_turned, pair.scaling)


def readable(pair: Pair) -> Pair:
    """The same as the compiled product reads it: a copy of what lies otherwise."""
    bt = pair.bt
    as_it_lies = bt.is_contiguous() or (bt.T.is_contiguous() and len(bt) % _TOGETHER == 0)
    return Pair(pair.a.contiguous(), bt if as_it_lies else bt.contiguous(), pair.scaling)


class GroupedPairs:
    """What tokens of a batch take which pairs; prepared once, applied at every step while the batch stays the same."""

    def __init__(self, owners: Sequence[PairSet | None], layers: int, layout: Layout) -> None:
        """Args: owners: of as many layers each, or None for one that has no pairs. layout: of the same owners."""
        self._owners, self._layers, self._layout = owners, layers, layout
        absent = _EMPTY * layers
        self._pairs = b"".join(absent if owner is None else owner.entries for owner in owners)
        sizes = [0 if owner is None else owner.num_bytes for owner in owners]
        self._bytes = sum(sizes[owner] for owner in layout.owners)
        self._is_float32 = all(owner.is_float32 for owner in owners if owner is not None)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add every token's change to y (tokens, Σ m), in place, for x (tokens, n) of the same dtype.

        y may be some columns of a wider tensor.
        """
        layout = self._layout
        for owner, run in layout.runs:
            for (a, bt, scaling), columns in self._parts(owner):
                y[run, columns].addmm_(x[run] @ a.to(x.dtype).T, bt.to(x.dtype), alpha=scaling)
        if self._bytes == 0:
            return
        compiled = kernel() if x.is_cpu and x.dtype == y.dtype == torch.float32 and self._is_float32 else None
        if compiled is None or y.stride(-1) != 1:
            self._add_by_products(y, x)
            return
        x = x.contiguous()
        sizes = [ctypes.c_int64(size) for size in (self._layers, len(layout.owners), x.shape[-1], y.stride(0))]
        data = [ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())]
        threads = max(1, min(torch.get_num_threads(), self._bytes // _BYTES_PER_THREAD))
        compiled.add_grouped(*sizes, *data, self._pairs, *layout.tables, threads)

    def _parts(self, owner: int) -> Sequence[tuple[Pair, slice]]:
        held = self._owners[owner]
        return () if held is None else held.parts

    def _add_by_products(self, y: Tensor, x: Tensor) -> None:
        for owner, own in enumerate(self._layout.tokens):
            here = torch.tensor(own, dtype=torch.int64, device=x.device)
            for (a, bt, scaling), columns in self._parts(owner):
                y[:, columns].index_add_(0, here, (x[here] @ a.to(x.dtype).T) @ bt.to(x.dtype), alpha=scaling)
