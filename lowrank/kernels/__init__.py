"""Row loops that are too small for BLAS: compiled C where a compiler is there, torch and numpy elsewhere."""

from lowrank.kernels.packed import solve_packed as solve_packed
