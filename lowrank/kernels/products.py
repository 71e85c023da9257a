"""W X and WᵀW X of a dense block in one walk over it."""

import ctypes

import torch
from torch import Tensor

from lowrank.kernels.build import kernel

#: Widths that the compiled walk knows; others take two products.
_WIDTHS = (8, 16, 24)
#: Rows multiplied both ways before the next ones, so that the second product finds them in the cache.
_PANEL = 512


def both_products(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Y = W X and Z = WᵀY.

    Args:
        w: (rows, n), contiguous, fp32 or fp64.
        x: (n, width), of the same dtype.

    Returns:
        Y (rows, width) and Z (n, width). The bits depend on the number of threads, as those of any product do.
    """
    width, compiled = x.shape[1], None
    if w.dtype == torch.float32 and width in _WIDTHS:
        compiled = kernel()
    if compiled is None:
        return _by_panels(w, x)
    held, right = w.contiguous(), x.contiguous()
    y, z = torch.empty(w.shape[0], width), torch.empty(w.shape[1], width)
    sizes = [ctypes.c_int64(size) for size in (*w.shape, width)]
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (held, right, y, z)]
    if compiled.both_products_f32(*sizes, *addresses, torch.get_num_threads()):
        return _by_panels(w, x)
    return y, z


def _by_panels(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty(w.shape[0], x.shape[1], dtype=w.dtype)
    z = torch.zeros(x.shape[1], w.shape[1], dtype=w.dtype)
    for start in range(0, w.shape[0], _PANEL):
        panel = w[start : start + _PANEL]
        product = torch.mm(panel, x, out=y[start : start + _PANEL])
        z.addmm_(product.T, panel)
    return y, z.T.contiguous()
