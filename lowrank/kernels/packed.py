"""Many small symmetric systems from their packed upper triangles."""

import ctypes

import torch
from torch import Tensor

from lowrank.kernels.build import kernel

#: λ_i + δ_i >= this many roundings of tr G_i: what the products that made G_i may have lost.
_DAMPING = 4.0
#: δ_i rises tenfold at most so often; beyond, the numbers were not finite.
_ATTEMPTS = 12


def solve_packed(grams: Tensor, rhs: Tensor, shifts: Tensor, start: Tensor) -> Tensor:
    """x_i = s_i + (G_i + (λ_i + δ_i) I)⁻¹ (b_i − (G_i + λ_i I) s_i) for every row, in fp64; 0 where G_i = 0.

    δ_i is what λ_i lacks of a few roundings of tr G_i, raised tenfold until the Cholesky factorisation exists.

    Args:
        grams: (rows, r(r+1)/2), upper triangles of the positive semidefinite G_i, fp32 or fp64.
        rhs: (rows, r), b_i, of the same dtype.
        shifts: (rows,), λ_i >= 0, fp64.
        start: (rows, r), s_i, of the same dtype as `grams`.

    Returns:
        (rows, r) in the dtype of `grams`.
    """
    compiled = kernel()
    if compiled is None:
        return _solve_batched(grams, rhs, shifts, start)
    rows, r = rhs.shape
    found = torch.empty(rows, r, dtype=grams.dtype)
    solve = compiled.solve_packed_f32 if grams.dtype == torch.float32 else compiled.solve_packed_f64
    held = [t.contiguous() for t in (grams, rhs, shifts, start)]
    if solve(*_integers(rows, r), *map(_address, (*held, found)), torch.get_num_threads()):
        raise MemoryError(f"solve {rows} systems of {r} unknowns: out of memory. Use a smaller rank.")
    return found


def _solve_batched(grams: Tensor, rhs: Tensor, shifts: Tensor, start: Tensor) -> Tensor:
    rows, r = rhs.shape
    upper = torch.triu_indices(r, r)
    full = torch.zeros(rows, r, r, dtype=torch.float64)
    full[:, upper[0], upper[1]] = grams.double()
    full[:, upper[1], upper[0]] = grams.double()
    diagonal = full.diagonal(dim1=1, dim2=2)
    trace = diagonal.sum(1)
    diagonal += shifts[:, None]
    current = start.double()
    residual = rhs.double() - torch.einsum("iab,ib->ia", full, current)
    rounding = torch.where(trace > 0, _DAMPING * torch.finfo(grams.dtype).eps * trace, 1.0)
    damping = (rounding - shifts).clamp(min=0)
    diagonal += damping[:, None]
    factor, failed = torch.linalg.cholesky_ex(full)
    for _ in range(_ATTEMPTS):
        if not bool(failed.any()):
            break
        raised = torch.where(failed > 0, 10 * torch.maximum(damping, rounding), damping)
        diagonal += (raised - damping)[:, None]
        damping = raised
        factor, failed = torch.linalg.cholesky_ex(full)
    found = torch.where(failed[:, None] > 0, 0.0, torch.cholesky_solve(residual[:, :, None], factor)[:, :, 0])
    return torch.where(trace[:, None] > 0, current + found, 0.0).to(grams.dtype)


def _integers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
