"""A fitted model of sparse ratings: mean, biases and factors; predictions, scores and files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lowrank.errors import CheckpointError, DecompositionError
from lowrank.factors import LowRankFactors

_FORMAT = "rankline.ratings.v1"
#: Entries that are predicted at once.
_SLICE_ENTRIES = 2**18


@dataclass(frozen=True, kw_only=True)
class RatingsReport:
    """What one fit did.

    Attributes:
        rank: of the factors, the biases not counted.
        n_iter: sweeps that were run.
        objective: of the training ratings after every sweep; it never rises.
        train_rmse: √(Σ e² / number of ratings) after the last sweep.
        converged: whether the last sweep lowered the objective by less than `tol` of it.
        empty_rows: rows without any rating: factor and bias are 0, predictions fall back to μ + c_i.
        empty_columns: likewise, μ + b_u.
        bytes_per_sweep: factors that one sweep collects from the blocks and broadcasts to them.
        seed: of the start.
        seconds: wall time of the fit.
        sweep_seconds: of that, the sweeps; the rest sorts the ratings by row and by column and places the blocks.
    """

    rank: int
    n_iter: int
    objective: tuple[float, ...]
    train_rmse: float
    converged: bool
    empty_rows: int
    empty_columns: int
    bytes_per_sweep: int
    seed: int
    seconds: float
    sweep_seconds: float


@dataclass(frozen=True)
class RatingsModel:
    """μ + b_u + c_i + x_uᵀ z_i.

    Attributes:
        mean: μ, of the training ratings.
        row_factors: (m, r) fp32, x.
        row_biases: (m,) fp32, b; zeros when fitted without biases.
        column_factors: (n, r) fp32, z.
        column_biases: (n,) fp32, c.
        report: of the fit; None for a model that was loaded.
    """

    mean: float
    row_factors: NDArray[np.float32]
    row_biases: NDArray[np.float32]
    column_factors: NDArray[np.float32]
    column_biases: NDArray[np.float32]
    report: RatingsReport | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the ratings."""
        return len(self.row_biases), len(self.column_biases)

    def predict(self, rows: ArrayLike, columns: ArrayLike) -> NDArray[np.float32]:
        """The ratings of pairs (rows[p], columns[p]), fp32; integers within `shape`.

        Raises:
            IndexError: when a row or column is not one of the training matrix.
        """
        u, i = np.broadcast_arrays(np.asarray(rows, np.int64), np.asarray(columns, np.int64))
        for what, numbers, count in (("row", u, self.shape[0]), ("column", i, self.shape[1])):
            if numbers.size and (numbers.min() < 0 or numbers.max() >= count):
                raise IndexError(
                    f"predict ratings: {what}s {numbers.min()} to {numbers.max()}, the model has 0 to {count - 1}."
                )
        found = np.empty(u.size, np.float32)
        for low in range(0, u.size, _SLICE_ENTRIES):
            part = slice(low, low + _SLICE_ENTRIES)
            found[part] = self._predict(u.flat[part], i.flat[part])
        return found.reshape(u.shape)

    def rmse(self, ratings: Any) -> float:
        """√(mean e²) over the stored entries of a scipy sparse matrix, explicit zeros included."""
        entries = ratings.tocoo()
        if entries.shape != self.shape or not entries.nnz:
            raise DecompositionError(
                f"score ratings: got {entries.shape} with {entries.nnz} entries, the model is {self.shape}. "
                "Give entries of the same rows and columns."
            )
        errors = self.predict(entries.row, entries.col).astype(np.float64) - entries.data
        return float(np.sqrt(np.mean(np.square(errors))))

    def to_factors(self) -> LowRankFactors:
        """The full prediction matrix (m, n) as factors of rank r + 2: biases and mean are two more columns."""
        (m, n), ones = self.shape, np.ones
        left = np.column_stack([self.row_factors, self.row_biases + np.float32(self.mean), ones(m, np.float32)])
        right = np.column_stack([self.column_factors, ones(n, np.float32), self.column_biases])
        return LowRankFactors(torch.from_numpy(left), torch.from_numpy(np.ascontiguousarray(right.T)))

    def save(self, path: str | Path) -> None:
        """Write the model as safetensors; the same model gives the same bytes."""
        from safetensors.numpy import save_file

        save_file(self._tensors(), str(path), {"format": _FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> RatingsModel:
        """Read what `save` wrote, bit for bit.

        Raises:
            CheckpointError: when the file is missing, damaged or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="np") as file:
                found = str((file.metadata() or {}).get("format", ""))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if found != _FORMAT:
                raise CheckpointError(f"load ratings model {path}: got format {found!r}, need {_FORMAT}. Fit it again.")
            return cls(float(tensors.pop("mean")[0]), **tensors)
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise CheckpointError(f"load ratings model {path}: {error}. Fit it again.") from error

    def _tensors(self) -> dict[str, NDArray[Any]]:
        return {
            "mean": np.array([self.mean], np.float64),
            "row_factors": self.row_factors,
            "row_biases": self.row_biases,
            "column_factors": self.column_factors,
            "column_biases": self.column_biases,
        }

    def _predict(self, u: NDArray[np.int64], i: NDArray[np.int64]) -> NDArray[np.float32]:
        products = np.einsum("pr,pr->p", self.row_factors[u], self.column_factors[i])
        found: NDArray[np.float32] = products + self.row_biases[u] + self.column_biases[i] + np.float32(self.mean)
        return found
