"""The one table of tolerances, tied to dtype and conditioning, that every test uses.

A tolerance is a rule, not a number per test: `tol(dtype, cond)` is a small multiple of the unit roundoff of the
dtype in which a quantity is *computed* (fp32 for bf16 and fp16 storage), times the condition number of the problem.
"""

import torch

#: Relative error of one well-conditioned fp32 or fp64 computation over a few hundred terms.
BASE: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-5,  # stored in bf16, computed in fp32 from the stored values
    torch.float16: 1e-5,
}


def tol(dtype: torch.dtype, cond: float = 1.0) -> float:
    """Relative tolerance for a quantity computed from `dtype` input with condition number `cond`."""
    return BASE[dtype] * max(1.0, cond)
