"""Hadamard factors: against an SVD of as many numbers, gradient descent, per-column solves, and for inpainting."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Row, paired, row
from inpainting import GRIDS, IMAGES, biharmonic, inpaint, load_image
from torch import Tensor

#: Ranks of the comparison with an SVD of rank 2r; the target is asked of each.
RANKS = (8, 4, 16, 32)
#: The descent that peers have to match: camera, r = 8, this many sweeps. Fixed before timing.
RANK, SWEEPS = 8, 50
#: Peers that are slower than this many times our time are stopped, and their ratio is a lower bound.
CAP = 40.0
#: Step sizes tried for the peers from both starts, for an eighth of the limit each; the best goes on.
ADAM_STEPS = (3e-3, 1e-2, 3e-2)
DESCENT_STEPS = (0.1, 0.3, 1.0)


def ours(image: Tensor, rank: int, **options: Any) -> Any:
    """Our Hadamard decomposition, front and error report included."""
    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose
    from lowrank.executor import SerialExecutor
    from lowrank.rank import RankRule

    matrix = BlockMatrix.from_tensor("image", image)
    return decompose(matrix, method="hadamard", rule=RankRule(rank=rank), executor=SerialExecutor(), **options)


def relative_error(image: Tensor, factors: Any) -> float:
    """‖A − Â‖ / ‖A‖ in fp64."""
    f = {name: factor.double() for name, factor in factors.tensors().items()}
    fitted = (f["c1"] @ f["d1"]) * (f["c2"] @ f["d2"])
    return float((fitted - image.double()).norm() / image.double().norm())


def svd_error(image: Tensor, rank: int) -> float:
    """The least relative error of that rank, from the fp64 spectrum."""
    energy = torch.linalg.svdvals(image.double()).square()
    return float((energy[rank:].sum() / energy.sum()).sqrt())


def images() -> list[Row]:
    """Relative error at equal parameters: Hadamard r against the optimal SVD of rank 2r, default options."""
    rows = []
    for rank in RANKS:
        pairs = {}
        for name in IMAGES:
            image = load_image(name)
            pairs[name] = relative_error(image, ours(image, rank).factors), svd_error(image, 2 * rank)
        ratios = {name: a / b for name, (a, b) in pairs.items()}
        worst = max(ratios, key=ratios.__getitem__)
        note = ", ".join(f"{name} {a:.5f}/{b:.5f} = {ratios[name]:.3f}" for name, (a, b) in pairs.items())
        rows.append(
            row(
                f"Hadamard r={rank}, worst of three 512² images",
                f"optimal SVD of rank {2 * rank}",
                ratios[worst],
                0.94,
                "<=",
                error_ours=pairs[worst][0],
                error_peer=pairs[worst][1],
                note=note,
            )
        )
    return rows


def start_of(image: Tensor, noisy: bool = False) -> list[Tensor]:
    """Our starts: from √|A|, or from A beside noisy ones."""
    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions.hadamard_steps import Target, noisy_start, root_start
    from lowrank.executor import SerialExecutor

    m, n = image.shape
    target = Target(
        matrix=BlockMatrix.from_tensor("image", image),
        weights=None,
        scale=1.0,
        rows=torch.full((m,), float(n), dtype=torch.float64),
        columns=torch.full((n,), float(m), dtype=torch.float64),
        ridge=0.0,
        executor=SerialExecutor(),
    )
    found = noisy_start(target, RANK, 0, 1) if noisy else root_start(target, RANK, 0)
    return list(found.tensors().values())


def gradients(image: Tensor, f: list[Tensor], grads: list[Tensor]) -> float:
    """∇ ½‖A − (C₁D₁)∘(C₂D₂)‖² written into `grads`; returns the residual norm. By hand: no autograd tape to pay for."""
    c1, d1, c2, d2 = f
    h1, h2 = c1 @ d1, c2 @ d2
    residual = (h1 * h2).sub_(image)
    g1, g2 = residual * h2, h1.mul_(residual)
    torch.mm(g1, d1.T, out=grads[0])
    torch.mm(c1.T, g1, out=grads[1])
    torch.mm(g2, d2.T, out=grads[2])
    torch.mm(c2.T, g2, out=grads[3])
    return float(residual.norm())


def descend(image: Tensor, goal: float, limit_s: float, step: float, adam: bool, noisy: bool) -> tuple[float, float]:
    """Seconds until the relative error is `goal` (inf when `limit_s` passes first), and the least error seen.

    Both factors of the √|A| start of a photograph are alike, and gradients keep them so: it gets 10 % of noise. The
    other start is A cut to rank r beside noisy ones.
    """
    f = start_of(image, noisy)
    if not noisy:
        generator = torch.Generator().manual_seed(0)
        f = [x * (1 + 0.1 * torch.randn(x.shape, generator=generator)) for x in f]
    grads = [torch.empty_like(x) for x in f]
    for x, grad in zip(f, grads):
        x.grad = grad
    optimizer = torch.optim.Adam(f, lr=step, foreach=True) if adam else torch.optim.SGD(f, lr=step / len(image))
    norm, least, began = float(image.norm()), math.inf, time.perf_counter()
    while True:
        error = gradients(image, f, grads) / norm
        least = min(least, error)
        elapsed = time.perf_counter() - began
        if error <= goal:
            return elapsed, least
        if elapsed > limit_s or not math.isfinite(error):
            return math.inf, least
        optimizer.step()


def column_sweeps(image: Tensor, goal: float, limit_s: float, extrapolate: bool) -> tuple[float, float, int]:
    """The same block steps by a numpy loop over rows and columns: seconds, least error, sweeps."""
    a, norm = image.numpy(), float(image.norm())
    current = [x.numpy() for x in start_of(image)]
    previous, beta, least, began = None, 0.5, math.inf, time.perf_counter()
    for count in range(1, 10_000):
        trial = current if previous is None else [x + beta * (x - y) for x, y in zip(current, previous)]
        c1, d1, c2, d2 = trial
        c1 = solve_rows(a, c2 @ d2, d1)
        d1 = solve_rows(a.T, (c2 @ d2).T, c1.T).T
        c2 = solve_rows(a, c1 @ d1, d2)
        d2 = solve_rows(a.T, (c1 @ d1).T, c2.T).T
        error = float(np.linalg.norm(a - (c1 @ d1) * (c2 @ d2))) / norm
        if extrapolate and error > least:
            previous, beta = None, 0.5
        else:
            previous = current if extrapolate else None
            current, beta = [c1, d1, c2, d2], min(1.0, 1.05 * beta)
        least, elapsed = min(least, error), time.perf_counter() - began
        if least <= goal:
            return elapsed, least, count
        if elapsed > limit_s:
            break
    return math.inf, least, count


def solve_rows(values: Any, other: Any, basis: Any) -> Any:
    """min ‖a_i − (c D)∘h_i‖ row by row: normal equations and one small solve each (faster here than lstsq)."""
    r = len(basis)
    found = np.empty((len(values), r), dtype=values.dtype)
    for i, (a, h) in enumerate(zip(values, other)):
        design = basis * h
        gram = design @ design.T
        gram[np.diag_indices(r)] += 1e-5 * len(a)  # our default λ, in the same units up to ‖A‖²
        found[i] = np.linalg.solve(gram, design @ a)
    return found


def equal_error() -> list[Row]:
    """Time to the error of our first sweeps: Adam, plain gradient descent, and the numpy loop of the same steps."""
    image = load_image("camera")
    image = image / image.square().mean().sqrt()
    mine = partial(ours, image, RANK, n_iter=SWEEPS, tol=0.0)
    goal = relative_error(image, mine().factors)
    loop = partial(column_sweeps, image, goal, math.inf, extrapolate=True)
    best, found = paired({"ours": mine, "columns": loop}, repeats=3)
    seconds = best["ours"]
    limit, job = CAP * seconds, f"Hadamard r={RANK} of camera to the error of {SWEEPS} sweeps"
    rows = []

    def add(peer: str, took: float, least: float, target: float, note: str = "") -> None:
        reached = math.isfinite(took)
        bound = "" if reached else f"stopped after {limit:.1f} s at error {least:.5f}: a lower bound; "
        ratio = (took if reached else limit) / seconds
        facts = {"error_ours": goal, "error_peer": least, "note": f"ours {seconds:.3f} s; {bound}{note}"}
        rows.append(row(job, peer, ratio, target, **facts))

    # Adam is no plain gradient descent: its row is for information.
    sides = ("plain gradient descent", DESCENT_STEPS, False, 20.0), ("Adam, tuned", ADAM_STEPS, True, 0.0)
    for peer, steps, adam, target in sides:
        trials = {k: descend(image, goal, limit / 8, *k[:1], adam, k[1]) for k in product(steps, (False, True))}
        step, noisy = min(trials, key=lambda k: trials[k])
        took = descend(image, goal, limit, step, adam, noisy)
        add(peer, *took, target, f"best of {len(trials)} steps and starts: {step}, {'noisy' if noisy else 'root'}")
    _, least, count = found["columns"]
    add("per-column least squares, with our extrapolation", best["columns"], least, 10.0, f"{count} sweeps")
    took, least, count = column_sweeps(image, goal, limit, extrapolate=False)
    add("per-column least squares, plain sweeps", took, least, 10.0, f"{count} sweeps")
    return rows


def filling() -> list[Row]:
    """RMSE of the missing pixels, peer over Hadamard: our ALS and Kronecker, and scikit-image's biharmonic."""
    rows = []
    for name in IMAGES:
        image = load_image(name)
        mine, *others = [*(inpaint(image, method) for method in GRIDS), biharmonic(image)]
        for peer in others:
            note = f"PSNR {mine.psnr:.2f} / {peer.psnr:.2f} dB, fit {mine.fit_s:.2f} / {peer.fit_s:.2f} s"
            rows.append(
                row(
                    f"50 % of {name} missing, Hadamard: RMSE of the missing pixels",
                    f"our {peer.method}" if peer.rank else "scikit-image inpaint_biharmonic",
                    peer.rmse / mine.rmse,
                    0.0,
                    error_ours=mine.rmse,
                    error_peer=peer.rmse,
                    note=f"{note}, {mine.setting}" + (f" against {peer.setting}" if peer.rank else ""),
                )
            )
    return rows


JOBS: dict[str, Callable[[], list[Row]]] = {
    "hadamard-images": images,
    "hadamard-equal-error": equal_error,
    "hadamard-inpainting": filling,
}

if __name__ == "__main__":
    from harness import keep_memory

    keep_memory()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    for name in sys.argv[1:] or list(JOBS):
        for found in JOBS[name]():
            print(name, found, flush=True)
