"""One half step of alternating least squares over sparse rows: compiled, or the same steps in numpy."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank.kernels.build import kernel

Floats = NDArray[np.float32]
_LANES = 8
_DAMPING = 4 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class SparseRows:
    """Some rows of a ratings matrix (or some of its columns, as rows).

    Attributes:
        start: (rows + 1,) int64; row i holds entries start[i]:start[i + 1].
        index: (entries,) int32, the columns.
        value: (entries,) fp32.
        order: (rows,) int64, row numbers by falling number of entries: threads take the long rows first.
    """

    start: NDArray[np.int64]
    index: NDArray[np.int32]
    value: Floats
    order: NDArray[np.int64]

    @classmethod
    def from_csr(cls, matrix: Any) -> SparseRows:
        """Rows of a scipy CSR matrix; explicit zeros stay entries."""
        start = np.asarray(matrix.indptr, np.int64)
        order = np.argsort(-np.diff(start), kind="stable").astype(np.int64)
        return cls(start, np.asarray(matrix.indices, np.int32), np.asarray(matrix.data, np.float32), order)


@dataclass(frozen=True)
class Side:
    """Factors (count, rank) and biases (count,) of the rows, or of the columns, in fp32."""

    factors: Floats
    biases: Floats


@dataclass(frozen=True, kw_only=True)
class HalfStep:
    """What a half step minimises, and how.

    Row i solves Σ_j (v_ij − mean − c_j − b − x z_j)² + s λ ‖x‖² + s λ_b b² over x and b, s = entries of the row when
    `per_entry`, else 1.

    Attributes:
        mean: subtracted from all values.
        ridge: λ >= 0.
        bias_ridge: λ_b >= 0.
        per_entry: whether both are multiplied by the number of entries.
        bias: whether rows have a bias b; 0 otherwise.
        cg_steps: conjugate gradient steps from the present x; 0 solves exactly by Cholesky.
        threads: of this call.
    """

    mean: float
    ridge: float
    bias_ridge: float
    per_entry: bool
    bias: bool
    cg_steps: int
    threads: int = 1

    def __call__(self, rows: SparseRows, present: Side | None, other: Side) -> tuple[Side, float]:
        """The new factors and biases of `rows` against the `other` side, and their sum of squared errors."""
        count, rank = len(rows.start) - 1, other.factors.shape[1]
        if present is None:
            present = Side(np.zeros((count, rank), np.float32), np.zeros(count, np.float32))
        compiled = kernel()
        if compiled is None:
            return _numpy_step(self, rows, present, other)
        return _compiled_step(self, compiled, rows, present, other)


def _compiled_step(
    step: HalfStep, compiled: ctypes.CDLL, rows: SparseRows, present: Side, other: Side
) -> tuple[Side, float]:
    (count, rank), width = present.factors.shape, -(-other.factors.shape[1] // _LANES) * _LANES
    z, c = _padded(other.factors, width), np.ascontiguousarray(other.biases)
    x, b, loss = _padded(present.factors, width, copy=True), present.biases.copy(), np.zeros(count)
    failed = compiled.solve_ratings(
        *map(ctypes.c_int64, (count, rank, width)),
        *map(_address, (rows.start, rows.index, rows.value, rows.order)),
        ctypes.c_float(step.mean),
        *map(_address, (z, c)),
        *map(ctypes.c_double, (step.ridge, step.bias_ridge)),
        *(int(step.per_entry), int(step.bias), step.cg_steps),
        *map(_address, (x, b, loss)),
        step.threads,
    )
    if failed:
        raise MemoryError(
            f"solve {count} sparse rows at rank {rank}: out of memory. Use a smaller rank or fewer threads."
        )
    return Side(np.ascontiguousarray(x[:, :rank]), b), float(loss.sum())


def _numpy_step(step: HalfStep, rows: SparseRows, present: Side, other: Side) -> tuple[Side, float]:
    x, b = np.zeros_like(present.factors), np.zeros_like(present.biases)
    loss = 0.0
    for i in range(len(x)):
        entries = slice(rows.start[i], rows.start[i + 1])
        index = rows.index[entries]
        if not len(index):
            continue
        z = other.factors[index].astype(np.float64)
        targets = rows.value[entries].astype(np.float64) - step.mean - other.biases[index]
        scale = len(index) if step.per_entry else 1
        share: float = 1 / (len(index) + scale * step.bias_ridge) if step.bias else 0.0
        # Without its bias, which is `share` times the sum of what is left.
        centred = z - share * z.sum(0)
        start, ridge = present.factors[i].astype(np.float64), scale * step.ridge
        left = centred.T @ (targets - z @ start) - ridge * start
        gram = centred.T @ z + ridge * np.eye(z.shape[1])
        direct = step.cg_steps == 0 or _is_short(step, len(index), z.shape[1])
        solved = start + (_solve(gram, left, z, ridge) if direct else _conjugate(gram, left, step.cg_steps))
        x[i], b[i] = solved, share * (targets - z @ solved).sum()
        loss += float(np.square(targets - z @ solved - b[i]).sum())
    return Side(x, b), loss


def _is_short(step: HalfStep, degree: int, rank: int) -> bool:
    """Whether the compiled path solves the row through its own degree, exactly, even where others iterate."""
    exact = step.ridge > 0 and (not step.bias or step.bias_ridge > 0)
    return exact and 2 * degree <= rank and degree <= 4 * (step.cg_steps + 1)


def _solve(gram: Any, left: Any, z: Any, ridge: float) -> Any:
    rounding = max(_DAMPING * float(np.square(z).sum()), float(np.finfo(np.float32).tiny))
    return np.linalg.solve(gram + max(rounding - ridge, 0.0) * np.eye(len(gram)), left)


def _conjugate(gram: Any, left: Any, steps: int) -> Any:
    found, way, norm = left * 0, left, float(left @ left)
    for _ in range(steps):
        image = gram @ way
        curvature = float(way @ image)
        if norm <= 1e-20 or curvature <= 0:
            break
        length = norm / curvature
        found += length * way
        left = left - length * image
        norm, previous = float(left @ left), norm
        way = left + norm / previous * way
    return found


def _padded(values: Floats, width: int, copy: bool = False) -> Floats:
    """Rows of `width` numbers, zeros behind the given ones, contiguous."""
    if values.shape[1] == width and not copy:
        return np.ascontiguousarray(values)
    wide = np.zeros((len(values), width), np.float32)
    wide[:, : values.shape[1]] = values
    return wide


def _address(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
