"""Masked ALS against per-row numpy and soft-impute, and sparse and weighted ALS on 2 Ray workers against 1.

The settings of both sides are chosen on a validation part of the known pixels before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
from harness import Row, paired, row

# ---- a photograph with half of its pixels missing ---------------------------------------------------------------


class Photograph:
    """`brick`, 512², in [0, 1] less its mean: half of the pixels known, a tenth of those for choosing settings."""

    def __init__(self) -> None:
        from skimage import data

        generator = np.random.default_rng(0)
        image = (data.brick() / 255).astype(np.float32)
        self.known = generator.random(image.shape) < 0.5
        self.truth = image - image[self.known].mean()
        self.train = self.known & (generator.random(image.shape) < 0.9)

    def values(self, mask: Any) -> tuple[Any, Any]:
        """Pixels with 0 where the mask is not, and the mask, in fp32."""
        return np.where(mask, self.truth, np.float32(0)), mask.astype(np.float32)

    def psnr(self, found: Any, mask: Any) -> float:
        """Of the pixels in `mask`, in dB."""
        return float(-10 * np.log10(np.mean((found.astype(np.float64) - self.truth)[mask] ** 2)))

    def best(self, fill: Callable[..., Any], grid: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The settings with the best PSNR on the known pixels that were kept apart."""
        apart = self.known & ~self.train
        scores = [self.psnr(fill(*self.values(self.train), **settings), apart) for settings in grid]
        return grid[int(np.argmax(scores))]


def masked_als(values: Any, mask: Any, rank: int, ridge: float, n_iter: int = 15) -> Any:
    """Our own completion."""
    import torch

    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose
    from lowrank.executor import SerialExecutor
    from lowrank.rank import RankRule

    found = decompose(
        BlockMatrix.from_tensor("photograph", torch.from_numpy(values)),
        method="als",
        rule=RankRule(rank=rank),
        weights=BlockMatrix.from_tensor("mask", torch.from_numpy(mask)),
        executor=SerialExecutor(),
        ridge=ridge,
        weighted_ridge=False,
        n_iter=n_iter,
        tol=0.0,
    )
    return found.factors.reconstruct().numpy()


def rowwise_als(values: Any, mask: Any, rank: int, ridge: float, n_iter: int = 15) -> Any:
    """The same sweeps from the same start, one numpy solve per row and per column."""
    from sklearn.utils.extmath import randomized_svd

    _, s, vh = randomized_svd(values / np.float32(mask.mean()), rank, random_state=0)
    right = (np.sqrt(s)[:, None] * vh).T.astype(np.float32)
    left = np.zeros((len(values), rank), np.float32)
    identity = ridge * np.eye(rank, dtype=np.float32)
    for _ in range(n_iter):
        for solved, basis, a, p in ((left, right, values, mask > 0), (right, left, values.T, mask.T > 0)):
            for k in range(len(solved)):
                z = basis[p[k]]
                solved[k] = np.linalg.solve(z.T @ z + identity, z.T @ a[k][p[k]])
    return left @ right.T


def soft_impute(values: Any, mask: Any, ridge: float, rank: int | None = None, n_iter: int = 150) -> Any:
    """Soft-impute by a full SVD per step, its rank cut where one is given, until a step moves by less than 1e-4."""
    filled = np.zeros_like(values)
    for _ in range(n_iter):
        u, s, vh = np.linalg.svd(values + (1 - mask) * filled, full_matrices=False)
        keep = min(int((s > ridge).sum()), rank or len(s))
        after = (u[:, :keep] * (s[:keep] - np.float32(ridge))) @ vh[:keep]
        moved = np.linalg.norm(after - filled) / max(float(np.linalg.norm(filled)), 1e-9)
        filled = after
        if moved < 1e-4:
            break
    return filled


def photograph() -> list[Row]:
    """512², half of the pixels missing: per-row solves; soft-impute at the same ranks, and both at any rank to 64."""
    image = Photograph()
    ranked = [{"rank": rank, "ridge": ridge} for rank in (16, 24, 32) for ridge in (0.1, 0.2, 0.4)]
    mine = image.best(masked_als, ranked)
    rows = [_filled(image, "per-row numpy solves", rowwise_als, mine, mine, 8, same=True)]
    capped = image.best(soft_impute, [{"rank": rank, "ridge": ridge} for rank in (16, 32) for ridge in (0.1, 0.3, 1.0)])
    longer = image.best(masked_als, [mine | {"n_iter": sweeps} for sweeps in (15, 40)])
    rows.append(_filled(image, "soft-impute by full SVDs, rank 16-32", soft_impute, capped, longer, 1))
    wide = image.best(masked_als, [{"rank": rank, "ridge": ridge} for rank in (48, 64) for ridge in (0.1, 0.2)])
    free = image.best(soft_impute, [{"ridge": ridge} for ridge in (0.15, 0.3, 0.6)])
    return [*rows, _filled(image, "soft-impute by full SVDs, any rank", soft_impute, free, wide, 1)]


def _filled(
    image: Photograph,
    peer: str,
    fill: Callable[..., Any],
    theirs: dict[str, Any],
    mine: dict[str, Any],
    target: float,
    same: bool = False,
) -> Row:
    known = image.values(image.known)
    best, found = paired({"ours": partial(masked_als, *known, **mine), "peer": partial(fill, *known, **theirs)}, 3)
    mine_db, peer_db = (image.psnr(found[side], ~image.known) for side in ("ours", "peer"))
    return row(
        f"brick 512x512, 50 % missing, rank {mine['rank']}",
        peer,
        best["peer"] / best["ours"],
        target,
        valid=abs(mine_db - peer_db) < 0.05 if same else mine_db > peer_db,
        error_ours=mine_db,
        error_peer=peer_db,
        note=f"PSNR of the missing pixels in dB; {best['ours']:.3f} s against {best['peer']:.3f} s; {mine}, {theirs}",
    )


# ---- two Ray workers against one --------------------------------------------------------------------------------

#: (workers) -> context of an executor with as many workers of one thread.
Workers = Callable[[int], AbstractContextManager[Any]]


def synthetic_ratings(users: int = 100_000, items: int = 20_000, count: int = 10_000_000, rank: int = 8) -> Any:
    """Ratings 1 to 5 from planted factors, biases and noise; popularity falls as a power."""
    import scipy.sparse as sp

    generator = np.random.default_rng(0)
    u = generator.integers(0, users, count)
    i = np.minimum((items * generator.random(count) ** 2).astype(np.int64), items - 1)
    x, z = (generator.standard_normal((size, rank), dtype=np.float32) * 0.5 for size in (users, items))
    values = np.empty(count, np.float32)
    for low in range(0, count, 2**20):
        part = slice(low, low + 2**20)
        values[part] = 3.5 + np.einsum("pr,pr->p", x[u[part]], z[i[part]])
    values += generator.standard_normal(count, dtype=np.float32) * 0.5
    ratings = sp.coo_matrix((np.clip(np.round(values * 2) / 2, 0.5, 5), (u, i)), shape=(users, items)).tocsr()
    ratings.data = np.clip(ratings.data, 0.5, 5)
    return ratings


def ratings_on(workers: Workers, sweeps: int = 3) -> Row:
    """10 million ratings at k = 32: seconds of the sweeps on 1 and on 2 workers."""
    from lowrank.decompositions import fit_ratings

    ratings = synthetic_ratings()
    seconds, errors, moved = {}, {}, 0
    for count in (1, 2):
        with workers(count) as executor:
            fit = partial(fit_ratings, ratings, rank=32, ridge=0.05, tol=0, executor=executor)
            fit(n_iter=1)
            report = fit(n_iter=sweeps).report
            assert report is not None
            seconds[count], errors[count], moved = report.sweep_seconds, report.train_rmse, report.bytes_per_sweep
    note = (
        f"{seconds[1]:.1f} s on one, {seconds[2]:.1f} s on two, {sweeps} sweeps; {moved / 1e6:.1f} MB moved per sweep"
    )
    return _efficiency(f"ALS, {ratings.nnz / 1e6:.1f} million ratings, k = 32", seconds, errors, note)


def weighted_on(workers: Workers, sweeps: int = 3, rank: int = 32) -> Row:
    """A 16384×2048 weight under importance weights, rank 32: seconds on 1 and on 2 workers, data placed before."""
    import torch

    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose
    from lowrank.rank import RankRule

    drawn = torch.Generator().manual_seed(0)
    m, n = 16384, 2048
    values = torch.randn(m, 64, generator=drawn) @ torch.randn(64, n, generator=drawn) / 8
    values += 0.3 * torch.randn(m, n, generator=drawn)
    under = torch.rand(m, n, generator=drawn).square() + 0.01
    seconds, errors = {}, {}
    for count in (1, 2):
        with workers(count) as executor:
            w, p = (BlockMatrix.from_tensor("w", t, 2**24).place(executor) for t in (values, under))
            fit = partial(decompose, w, method="als", rule=RankRule(rank=rank), weights=p, executor=executor, tol=0.0)
            fit(n_iter=1)
            began = time.perf_counter()
            found = fit(n_iter=sweeps)
            seconds[count], errors[count] = time.perf_counter() - began, found.report.relative_error
    moved = 4 * (len(w.blocks) * n * (rank * (rank + 3) // 2) + m * rank + n * rank)
    note = (
        f"{seconds[1]:.1f} s on one, {seconds[2]:.1f} s on two, {sweeps} sweeps; {moved / 1e6:.1f} MB moved per sweep"
    )
    return _efficiency(f"weighted ALS, {m}x{n}, rank {rank}", seconds, errors, note)


def _efficiency(job: str, seconds: dict[int, float], errors: dict[int, float], note: str) -> Row:
    return row(
        job,
        "ourselves, 1 worker (efficiency)",
        seconds[1] / seconds[2] / 2,
        0.7,
        valid=abs(errors[1] - errors[2]) <= 1e-4,
        error_ours=errors[2],
        error_peer=errors[1],
        note=note,
    )


def on_ray() -> list[Row]:
    """Both distributed jobs on an embedded Ray head."""
    from jobs_svd import ray_workers

    return [ratings_on(ray_workers), weighted_on(ray_workers)]


JOBS: dict[str, Callable[[], list[Row]]] = {"als-photograph": photograph, "als-ray": on_ray}
