"""Random test matrices whose entries depend on the seed and their own row alone, so that no blocking changes them."""

import torch
from torch import Tensor

#: Rows that one generator serves; row i comes from generator i // CHUNK whatever asks for it.
CHUNK = 1024
#: Streams of one seed, so that matrices drawn side by side are independent.
_STREAMS = 2**20


def gaussian_rows(start: int, stop: int, columns: int, seed: int, dtype: torch.dtype, stream: int = 0) -> Tensor:
    """Rows start:stop of a standard normal matrix with `columns` columns, drawn in fp64 and cast to `dtype`.

    Counter-based: chunk c of `CHUNK` rows has a generator of its own, seeded by (seed, stream, c).

    Example:
        >>> whole = gaussian_rows(0, 3000, 2, seed=7, dtype=torch.float64)
        >>> torch.equal(gaussian_rows(1000, 1100, 2, seed=7, dtype=torch.float64), whole[1000:1100])
        True
    """
    parts = []
    for chunk in range(start // CHUNK, -(-stop // CHUNK)):
        generator = torch.Generator().manual_seed((seed * _STREAMS + stream) * _STREAMS + chunk & (2**63 - 1))
        rows = torch.randn(CHUNK, columns, generator=generator, dtype=torch.float64)
        low, high = max(start - chunk * CHUNK, 0), min(stop - chunk * CHUNK, CHUNK)
        parts.append(rows[low:high])
    return torch.cat(parts).to(dtype)
