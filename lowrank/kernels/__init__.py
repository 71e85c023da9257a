"""Loops that are too small or too narrow for BLAS: compiled C where a compiler is there, torch and numpy elsewhere."""

from lowrank.kernels.packed import solve_packed as solve_packed
from lowrank.kernels.products import both_products as both_products
