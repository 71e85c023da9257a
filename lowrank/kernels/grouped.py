"""y[t] += Bᵀ(A x[t]) for tokens that have different low-rank pairs, each pair read once and where it lies.

Compiled for fp32 on a CPU where a compiler is there; elsewhere two products per pair.

Source: the segmented gather of Punica, arXiv 2310.18547, section 3.2.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.kernels.build import kernel

#: Tokens of one pair that share a pass over it; TOKENS of the C source.
_TOKENS = 4
#: Bytes of pairs that make another thread worth its start.
_BYTES_PER_THREAD = 2**20


class GroupedPairs:
    """Which tokens of a batch take which pair; prepared once, applied at every step while the batch stays the same."""

    def __init__(
        self, pairs: Sequence[tuple[Tensor, Tensor]], parts: Sequence[tuple[Sequence[slice], Sequence[int]]]
    ) -> None:
        """Args:
        pairs: A (r, n) and Bᵀ (r, m), s included, ranks may differ.
        parts: which tokens are of each pair: long runs, which take two products of a library, and the others.
        """
        self._pairs = [(a.contiguous(), b.contiguous()) for a, b in pairs]
        self._runs = [(*pair, run) for pair, (runs, _) in zip(self._pairs, parts, strict=True) for run in runs]
        self._tokens = [list(own) for _, own in parts]
        starts, owners, tokens = [0], [], []
        for pair, own in enumerate(self._tokens):
            for i in range(0, len(own), _TOKENS):
                owners.append(pair)
                tokens += own[i : i + _TOKENS]
                starts.append(len(tokens))
        self._units = len(owners)
        self._bytes = sum(a.nbytes + b.nbytes for (a, b), own in zip(self._pairs, self._tokens) if own)
        tables = [
            [len(a) for a, _ in self._pairs],
            [a.data_ptr() for a, _ in self._pairs],
            [b.data_ptr() for _, b in self._pairs],
            owners,
            starts,
            tokens,
        ]
        self._tables = [(ctypes.c_int64 * len(table))(*table) for table in tables]

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add every token's change to y (tokens, m), in place, for x (tokens, n) of the same dtype.

        y may be some columns of a wider tensor.
        """
        for a, b, run in self._runs:
            y[run].addmm_(x[run] @ a.to(x.dtype).T, b.to(x.dtype))
        if self._units == 0:
            return
        compiled = kernel() if x.is_cpu and x.dtype == y.dtype == self._pairs[0][0].dtype == torch.float32 else None
        if compiled is None or y.stride(-1) != 1:
            for (a, b), own in zip(self._pairs, self._tokens, strict=True):
                here = torch.tensor(own, dtype=torch.int64, device=x.device)
                y.index_add_(0, here, (x[here] @ a.to(x.dtype).T) @ b.to(x.dtype))
            return
        x = x.contiguous()
        sizes = [ctypes.c_int64(size) for size in (self._units, y.shape[-1], x.shape[-1], y.stride(0))]
        data = [ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())]
        threads = max(1, min(torch.get_num_threads(), self._bytes // _BYTES_PER_THREAD))
        compiled.add_grouped(*sizes, *data, *self._tables, threads)
