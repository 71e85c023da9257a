"""Kronecker and Khatri-Rao products: against SVD at equal numbers on real weights, against numpy on planted ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import Row, paired, row
from torch import Tensor

#: Rank of the truncated SVD whose numbers the other forms may use.
RANK = 16
LAYERS, TYPES = (0, 15, 29), ("q_proj", "up_proj", "down_proj")
#: Near-square first factors of a 576-row or 1536-row weight.
SQUARE = (24, 24)


def fit(dense: Tensor, method: str, rank: int | None, weights: Tensor | None = None, **options: Any) -> Any:
    """Our decomposition in this process, front and error report included."""
    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose
    from lowrank.executor import SerialExecutor
    from lowrank.rank import RankRule

    rule = None if rank is None else RankRule(rank=rank)
    under = None if weights is None else BlockMatrix.from_tensor("p", weights)
    matrix = BlockMatrix.from_tensor("w", dense)
    return decompose(matrix, method=method, rule=rule, weights=under, executor=SerialExecutor(), **options)


def true_error(dense: Tensor, found: Any) -> float:
    """‖W − Ŵ‖ / ‖W‖ in fp64."""
    return float((dense.double() - found.factors.reconstruct().double()).norm() / dense.double().norm())


def real_weights() -> list[Row]:
    """The table, win or lose: mean relative error over three layers, at no more numbers than the SVD has."""
    from jobs_svd import smollm_weights

    weights = smollm_weights()
    rows = []
    for kind in TYPES:
        chosen = [next(w for name, w in weights.items() if f".{layer}." in name and kind in name) for layer in LAYERS]
        spectra = [torch.linalg.svdvals(w) for w in chosen]
        for form, make in FORMS.items():
            rows.append(_against_svd(form, kind, chosen, spectra, make))
    return rows


def _against_svd(
    form: str, kind: str, weights: list[Tensor], spectra: list[Tensor], make: Callable[[Tensor, int], Any]
) -> Row:
    ours, peers, notes = [], [], []
    for layer, w, s in zip(LAYERS, weights, spectra):
        found = make(w, RANK * sum(w.shape))
        rank = math.ceil(found.report.num_parameters / sum(w.shape))
        ours.append(true_error(w, found))
        peers.append(float(s[rank:].double().norm() / s.double().norm()))
        notes.append(f"layer {layer} {ours[-1]:.3f}/{peers[-1]:.3f}")
    ratio = sum(ours) / sum(peers)
    note = f"ratio of errors, below 1 wins; {', '.join(notes)}; {found.report.num_parameters} numbers, SVD rank {rank}"
    mean = {"error_ours": sum(ours) / len(ours), "error_peer": sum(peers) / len(peers)}
    return row(
        f"{form} on {kind} of SmolLM2-135M", "truncated SVD, at least as many numbers", ratio, 0, **mean, note=note
    )


def _square(w: Tensor, budget: int, inner: int | None = None) -> Any:
    (m1, n1), m2, n2 = SQUARE, w.shape[0] // SQUARE[0], w.shape[1] // SQUARE[1]
    term = m1 * n1 + (m2 * n2 if inner is None else inner * (m2 + n2))
    return fit(w, "kronecker", budget // term, shape=SQUARE, inner_rank=inner)


def _any_shape(w: Tensor, budget: int) -> Any:
    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import kronecker_shapes
    from lowrank.executor import SerialExecutor

    table = kronecker_shapes(BlockMatrix.from_tensor("w", w), rank=RANK, executor=SerialExecutor())
    inside = [shape for shape in table if shape.num_parameters <= budget]
    best = min(inside, key=lambda shape: shape.relative_error)
    return fit(w, "kronecker", budget // (best.num_parameters // best.rank), shape=best.first)


def _low_rank(w: Tensor, budget: int) -> Any:
    from lowrank.decompositions.shapes import middle_divisors

    return fit(w, "khatri_rao_low_rank", budget // (sum(middle_divisors(w.shape[0])) + 2 * w.shape[1]))


FORMS: dict[str, Callable[[Tensor, int], Any]] = {
    "Kronecker (24, 24)": _square,
    "Kronecker, best shape": _any_shape,
    "Kronecker (24, 24), inner rank 4": lambda w, budget: _square(w, budget, 4),
    "Khatri-Rao, low rank": _low_rank,
    "Khatri-Rao, two free factors": lambda w, budget: fit(w, "khatri_rao", None),
}


def planted() -> list[Row]:
    """2048² of four planted Kronecker terms, and of planted Khatri-Rao columns, against numpy's dense SVDs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    terms = sum((torch.kron(normal(64, 64), normal(32, 32)) for _ in range(4)), torch.zeros(()))
    kronecker = (terms + 0.1 * normal(2048, 2048)).contiguous()
    b, c = normal(32, 2048), normal(64, 2048)
    khatri_rao = ((b[:, None] * c).reshape(2048, 2048) + 0.1 * normal(2048, 2048)).contiguous()
    return [
        _planted(
            "Kronecker, 4 terms of 64²⊗32²", kronecker, lambda: fit(kronecker, "kronecker", 4, shape=(64, 64)), _svd
        ),
        _planted("Khatri-Rao of 32 and 64 rows", khatri_rao, lambda: fit(khatri_rao, "khatri_rao", None), _columns),
    ]


def _planted(job: str, dense: Tensor, ours: Callable[[], Any], peer: Callable[[np.ndarray], np.ndarray]) -> Row:
    array = dense.numpy()
    best, found = paired({"peer": lambda: peer(array), "ours": ours}, repeats=2)
    exact = float(np.linalg.norm(array.astype(np.float64) - found["peer"]) / np.linalg.norm(array))
    error = true_error(dense, found["ours"])
    return row(
        f"{job}, 2048² with noise",
        "numpy.linalg.svd, dense",
        best["peer"] / best["ours"],
        0,
        valid=error <= exact * (1 + 3e-4),
        error_ours=error,
        error_peer=exact,
        note=f"{best['ours']:.3f} s against {best['peer']:.3f} s",
    )


def _svd(array: np.ndarray) -> np.ndarray:
    """Four leading terms of the rearrangement, multiplied out."""
    blocks = array.reshape(64, 32, 64, 32).transpose(0, 2, 1, 3).reshape(4096, 1024)
    u, s, vh = np.linalg.svd(blocks, full_matrices=False)
    nearest = (u[:, :4] * s[:4]) @ vh[:4]
    return nearest.reshape(64, 64, 32, 32).transpose(0, 2, 1, 3).reshape(2048, 2048)


def _columns(array: np.ndarray) -> np.ndarray:
    """The leading triplet of every column as a 32 x 64 matrix, multiplied out."""
    u, s, vh = np.linalg.svd(array.T.reshape(2048, 32, 64), full_matrices=False)
    return (u[:, :, :1] * s[:, None, :1] @ vh[:, :1]).reshape(2048, 2048).T


JOBS: dict[str, Callable[[], list[Row]]] = {
    "kronecker_real": real_weights,
    "kronecker_planted": planted,
}
