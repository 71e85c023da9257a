"""y[t] += vec(W1 X W2ᵀ) for tokens that have different Kronecker factors, which are never multiplied out.

Compiled, for fp32 on a CPU; `GroupedKroneckers.fits` says where that is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.kernels.build import kernel

#: W1 (up, uq) with s, and W2 (vp, vq) as one factor or as W2a (vp, r) and W2b (r, vq).
Factors = tuple[Tensor, ...]
#: Multiplications that make another thread worth its while.
_WORK_PER_THREAD = 2**19


class GroupedKroneckers:
    """Which tokens of a batch take which factors; prepared once, applied while the batch stays the same."""

    def __init__(self, factors: Sequence[Factors], tokens: Sequence[Sequence[int]]) -> None:
        """Args: factors: of every adapter, fp32 on the CPU, as `prepared` gives them. tokens: of every adapter."""
        self._kept = factors
        sizes: list[int] = []
        work: list[int] = []
        self._most = 0
        for w1, first, *second in factors:
            (up, uq), (vq, wide) = w1.shape, first.shape
            vp, r = (second[0].shape[1], wide) if second else (wide, 0)
            sizes += [up, uq, vp, vq, r]
            work.append(uq * vq * wide + up * uq * wide + up * r * vp)
            self._most = max(self._most, uq * wide, up * r)
        owners = [owner for owner, own in enumerate(tokens) for _ in own]
        self._units, self._work = len(owners), sum(work[owner] for owner in owners)
        pointers = [[own[part].data_ptr() if part < len(own) else 0 for own in factors] for part in range(3)]
        tables = [sizes, *pointers, owners, [token for own in tokens for token in own]]
        self._tables = [(ctypes.c_int64 * len(table))(*table) for table in tables]

    @staticmethod
    def prepared(factors: Factors) -> Factors:
        """W1, and the factors of W2 as rows to add: W2ᵀ (vq, vp), or W2bᵀ (vq, r) and W2aᵀ (r, vp)."""
        w1, *second = (part.detach() for part in factors)
        return (w1.contiguous(), *(part.T.contiguous() for part in reversed(second)))

    @staticmethod
    def fits(x: Tensor) -> bool:
        """Whether x can be taken."""
        return x.is_cpu and x.dtype == torch.float32 and kernel() is not None

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add every token's change to y (tokens, m), in place, for x (tokens, n); y may be columns of a wider tensor.

        Raises:
            MemoryError: there was none for the inner products.
        """
        compiled = kernel()
        assert compiled is not None
        x = x.contiguous()
        sizes = (self._units, y.shape[-1], x.shape[-1], y.stride(0), self._most)
        threads = max(1, min(torch.get_num_threads(), self._work // _WORK_PER_THREAD))
        data = [ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())]
        if compiled.add_kronecker(*(ctypes.c_int64(size) for size in sizes), *data, *self._tables, threads):
            raise MemoryError("add Kronecker products: no memory for the inner ones")
