"""y = x Wᵀ in fp32 for few tokens, reading W once.

MKL takes about twice as long for 16 tokens on an AMD EPYC.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowrank.kernels.build import kernel

#: Most tokens of one pass over W; more take several, up to `MOST_TOKENS`, beyond which libraries are as good.
_WIDTH, MOST_TOKENS = 16, 64
#: Entries of W that make another thread worth its start.
_ENTRIES_PER_THREAD = 2**17


def product(x: Tensor, weight: Tensor) -> Tensor | None:
    """y (tokens, m) = x (tokens, n) Wᵀ of W (m, n), or None where the compiled product does not fit.

    It fits where both are fp32 on the CPU, W is contiguous, and there are 1 to `MOST_TOKENS` tokens.
    """
    tokens, n = x.shape
    if not (0 < tokens <= MOST_TOKENS and x.is_cpu and x.dtype == weight.dtype == torch.float32):
        return None
    compiled = kernel() if weight.is_contiguous() else None
    if compiled is None:
        return None
    m, held = len(weight), x.contiguous()
    y = torch.empty(tokens, m)
    threads = max(1, min(torch.get_num_threads(), weight.numel() // _ENTRIES_PER_THREAD))
    for start in range(0, tokens, _WIDTH):
        count = min(_WIDTH, tokens - start)
        sizes = [ctypes.c_int64(size) for size in (count, m, n)]
        parts = (held.data_ptr() + 4 * start * n, weight.data_ptr(), y.data_ptr() + 4 * start * m)
        if compiled.product_dense(*sizes, *(ctypes.c_void_p(part) for part in parts), threads):
            return None
    return y
