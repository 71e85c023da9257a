"""Truncated SVDs against scikit-learn, torch, scipy, LAPACK and dask; on one machine, on Ray, and out of core."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import THREADS, Row, paired, row
from torch import Tensor

RANK = 64
#: Share of the optimal error that counts as a tie: the floor of fp32.
ALLOWANCE = 3e-4
#: Fixed before timing: what reaches scikit-learn's error, and what reaches half of svd_lowrank's excess.
ACCURATE = {"n_iter": 6, "block_size": 24}
FAST = {"n_iter": 4, "block_size": 24}


def known_spectrum(m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """U diag(σ) Vᵀ with random orthonormal U and V, fp32."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(k, len(sigma), generator=generator)).Q for k in (m, n))
    return ((u * sigma.float()) @ v.T).contiguous()


def ours(dense: Tensor, method: str = "block_krylov", rank: int = RANK, **options: Any) -> Callable[[], Any]:
    """Our decomposition in this process, front and error report included."""
    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose
    from lowrank.executor import SerialExecutor
    from lowrank.rank import RankRule

    matrix = BlockMatrix.from_tensor("w", dense)
    return lambda: (
        decompose(matrix, method=method, rule=RankRule(rank=rank), executor=SerialExecutor(), **options).factors
    )


def as_triplet(found: Any) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᴴ of whatever a library returned."""
    if hasattr(found, "vh"):
        return found.u, found.s, found.vh
    u, s, v = (torch.as_tensor(part.copy() if hasattr(part, "copy") else part) for part in found)
    return (u, s, v) if v.shape[0] == len(s) else (u, s, v.T)


def error(dense: Tensor, found: Any) -> float:
    """‖A − UΣVᴴ‖_F in fp64."""
    u, s, vh = as_triplet(found)
    return float((dense.double() - (u.double() * s.double()) @ vh.double()).norm())


def squares() -> list[Row]:
    """3072² and 4096², σᵢ = i^-0.5 and i^-1, rank 64."""
    rows = []
    for n in (3072, 4096):
        for power in (0.5, 1.0):
            sigma = torch.arange(1, n + 1, dtype=torch.float64) ** -power
            rows += _square(known_spectrum(n, n, sigma), f"{n}², i^-{power:g}, rank {RANK}")
    return rows


def _square(dense: Tensor, job: str) -> list[Row]:
    from scipy.sparse.linalg import svds
    from sklearn.utils.extmath import randomized_svd

    array = dense.numpy()
    calls: dict[str, Callable[[], Any]] = {
        "ours": ours(dense, **ACCURATE),
        "sklearn": lambda: randomized_svd(array, RANK, random_state=0),
        "fast": ours(dense, **FAST),
        "lowrank": lambda: torch.svd_lowrank(dense, q=RANK, niter=2),
        "arpack": lambda: svds(array, RANK, solver="arpack", random_state=0),
    }
    seconds, found = paired(calls, 5)
    once, exact = paired({"full": lambda: torch.linalg.svd(dense, full_matrices=False)}, 1)
    optimum = float(exact["full"][1][RANK:].double().norm())
    errors = {name: error(dense, value) / optimum for name, value in found.items()}
    products = _product_seconds(dense, ACCURATE["n_iter"], ACCURATE["block_size"])
    tie = errors["ours"] <= errors["sklearn"] + ALLOWANCE
    half = errors["fast"] - 1 <= 0.5 * (errors["lowrank"] - 1)

    def against(name: str, target: float, mine: str = "ours", valid: bool = True) -> Row:
        return row(
            job,
            name,
            seconds[_PEERS[name]] / seconds[mine],
            target,
            valid=valid,
            error_ours=errors[mine],
            error_peer=errors[_PEERS[name]],
            note=f"{seconds[mine] * 1e3:.0f} ms against {seconds[_PEERS[name]] * 1e3:.0f}; errors over the optimum",
        )

    return [
        against("scikit-learn randomized_svd", 4, valid=tie),
        against("torch.svd_lowrank(niter=2)", 1.3, "fast", half),
        against("scipy svds (ARPACK)", 2, valid=errors["ours"] <= errors["arpack"] + ALLOWANCE),
        row(job, "torch.linalg.svd", once["full"] / seconds["ours"], 25, error_ours=errors["ours"], error_peer=1.0),
        row(
            job,
            "the GEMM time of our own passes",
            seconds["ours"] / products,
            1.5,
            "<=",
            note=f"{products * 1e3:.0f} ms of products",
        ),
    ]


_PEERS = {
    "scikit-learn randomized_svd": "sklearn",
    "torch.svd_lowrank(niter=2)": "lowrank",
    "scipy svds (ARPACK)": "arpack",
}


def _product_seconds(dense: Tensor, n_iter: int, width: int) -> float:
    """The 2 (n_iter + 1) products with W alone, on random vectors."""
    x, y = torch.randn(dense.shape[1], width), torch.randn(dense.shape[0], width)
    best, _ = paired({"down": lambda: dense @ x, "up": lambda: y.T @ dense}, 20)
    return (n_iter + 1) * (best["down"] + best["up"])


def smollm() -> list[Row]:
    """All 210 linear weights of SmolLM2-135M at rank 64, two tensors at a time on one thread each."""
    weights = smollm_weights()
    peer, theirs = _each(weights, lambda w: torch.linalg.svd(w, full_matrices=False), workers=1)
    optimum = [float(found[1][RANK:].double().norm()) for found in theirs]
    rows = []
    for method, target, options in (("exact_svd", 1.5, {}), ("block_krylov", 6, {"n_iter": 10, "block_size": 24})):
        seconds, found = _each(weights, lambda w, m=method, o=options: ours(w, m, **o)(), workers=THREADS)
        excess = [error(w, f) / best - 1 for w, f, best in zip(weights.values(), found, optimum)]
        rows.append(
            row(
                f"210 weights of SmolLM2-135M, rank {RANK}, {method}",
                "torch.linalg.svd per tensor",
                peer / seconds,
                target,
                valid=max(excess) <= 1e-3,
                error_ours=1 + max(excess),
                error_peer=1.0,
                note=f"{seconds:.1f} s against {peer:.1f} s; worst error over the optimum",
            )
        )
    return rows


def _each(weights: dict[str, Tensor], run: Callable[[Tensor], Any], workers: int) -> tuple[float, list[Any]]:
    """Seconds and results of `run` over all weights; `workers` at a time on THREADS / workers threads each."""
    torch.set_num_threads(THREADS // workers)
    best, found = float("inf"), []
    try:
        for _ in range(2):
            began = time.perf_counter()
            if workers == 1:  # a pool of one would give torch a second set of threads
                found = [run(weight) for weight in weights.values()]
            else:
                with ThreadPoolExecutor(workers) as pool:
                    found = list(pool.map(run, weights.values()))
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(THREADS)
    return best, found


def smollm_weights(only: str = "") -> dict[str, Tensor]:
    """The linear weights of SmolLM2-135M in fp32, by name; those whose name contains `only`."""
    from line import shard_set

    from cluster.architecture import select_targets
    from cluster.artifacts import ShardSet

    with tempfile.TemporaryDirectory() as directory:
        _, path = shard_set(Path(directory))
        shards = ShardSet(path)
        names = [spec.name for spec in select_targets(shards.architecture, "all-linear") if only in spec.name]
        return {name: shards.load(f"{name}.weight").float().clone() for name in names}


def tall(m: int = 16384, n: int = 2048) -> Tensor:
    """256 directions of signal over noise, a spectrum that decays and then is flat."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(m, 256, generator=generator), torch.randn(256, n, generator=generator)
    scale = torch.arange(1, 257) ** -0.5
    return (left * scale) @ right / 16 + 0.02 * torch.randn(m, n, generator=generator)


@contextmanager
def ray_workers(count: int) -> Any:
    """An embedded head whose tasks take a whole CPU of `count`, and an executor on it."""
    from cluster import session
    from cluster.executor import RayExecutor

    with tempfile.TemporaryDirectory() as store:
        head = session.start_or_adopt(Path(store), num_cpus=count)
        try:
            session.connect(head)
            yield RayExecutor(num_cpus=1.0, spread=True)
        finally:
            session.disconnect()
            session.stop(Path(store))


def on_ray() -> list[Row]:
    """16384×2048 in row blocks: 2 Ray workers against dask.distributed, and against one worker of our own."""
    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose
    from lowrank.rank import RankRule

    dense = tall()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        blocks = stored_blocks(dense, Path(directory) / "w.safetensors", block_bytes=2**25)
        found = None
        for workers in (1, 2):
            with ray_workers(workers) as executor:
                placed: BlockMatrix = blocks.hold(executor)
                run = partial(
                    decompose, placed, method="block_krylov", rule=RankRule(rank=RANK), n_iter=5, executor=executor
                )
                run()
                best, results = paired({"ours": run}, 5)
                seconds[f"{workers}"], found = best["ours"], results["ours"].factors
    optimum = float(torch.linalg.svdvals(dense.double())[RANK:].norm())
    seconds["dask"], theirs = _dask(dense)
    mine, peer = error(dense, found) / optimum, error(dense, theirs) / optimum
    job = "16384x2048 in row blocks, rank 64"
    return [
        row(
            job,
            "dask.distributed svd_compressed",
            seconds["dask"] / seconds["2"],
            2,
            valid=mine < peer,
            error_ours=mine,
            error_peer=peer,
            note=f"{seconds['2']:.2f} s against {seconds['dask']:.2f} s, 2 workers of one thread each",
        ),
        row(
            job,
            "ourselves, 1 worker (efficiency)",
            seconds["1"] / seconds["2"] / 2,
            0.8,
            error_ours=mine,
            error_peer=mine,
            note=f"{seconds['1']:.2f} s on one, {seconds['2']:.2f} s on two",
        ),
    ]


def stored_blocks(dense: Tensor, path: Path, block_bytes: int) -> Any:
    """The matrix as slices of a safetensors file."""
    from safetensors.torch import save_file

    from lowrank.blocks import BlockMatrix, TensorSlice

    save_file({"w": dense}, path)
    pieces = (TensorSlice(str(path), "w", 0, dense.shape[0]),)
    return BlockMatrix.from_slices("w", pieces, tuple(dense.shape), dense.dtype, block_bytes)


def _dask(dense: Tensor) -> tuple[float, Any]:
    """dask.distributed with two workers of one thread, the matrix persisted on them."""
    import dask
    import dask.array as da
    from dask.distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as local,
        Client(local),
    ):
        held = da.from_array(dense.numpy(), chunks=(4096, 2048)).persist()
        dask.distributed.wait(held)

        def run() -> Any:
            return dask.compute(*da.linalg.svd_compressed(held, RANK, n_power_iter=2, seed=0))

        run()
        best, found = paired({"dask": run}, 3)
    return best["dask"], found["dask"]


def out_of_core() -> list[Row]:
    """65536×16384 fp32, 4.3 GB on disk, rank 32: the largest resident set of any process."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("RANKLINE_BENCH_DIR")) as directory:
        path = Path(directory) / "large.safetensors"
        subprocess.run([sys.executable, __file__, "write", str(path)], check=True)
        plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        command = [sys.executable, __file__, "read", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=plain)
    peak, seconds, relative, optimum = map(float, done.stdout.split()[-4:])
    return [
        row(
            "65536x16384 fp32 (4.3 GB) on disk, rank 32",
            "1.5 GB of memory",
            peak / 1.5e9,
            1.0,
            "<=",
            error_ours=relative,
            error_peer=optimum,
            note=f"peak anonymous memory {peak / 1e9:.2f} GB , {seconds:.0f} s; error of ours, of rank 32",
        )
    ]


def write_large(path: Path, m: int = 65536, n: int = 16384) -> None:
    """L R + noise, written a block of rows at a time."""
    from lowrank.checkpoint import Piece, write_shard
    from lowrank.decompositions.gaussian import gaussian_rows

    scale = torch.arange(1, 65) ** -0.5
    right = gaussian_rows(0, n, 64, 1, torch.float32).T.contiguous()

    def read(start: int, stop: int) -> Tensor:
        left = gaussian_rows(start, stop, 64, 2, torch.float32) * scale
        generator = torch.Generator().manual_seed(start)
        return torch.addmm(torch.randn(stop - start, n, generator=generator), left, right)

    write_shard(path, [Piece("w", torch.float32, (m, n), 0, read)])


def read_large(path: Path, m: int = 65536, n: int = 16384) -> None:
    """Decompose in this process with stored blocks, watching anonymous memory; prints peak, seconds and errors."""
    import threading

    from lowrank.blocks import BlockMatrix, TensorSlice
    from lowrank.decompositions import decompose
    from lowrank.executor import SerialExecutor
    from lowrank.rank import RankRule

    peak = 0

    def watch() -> None:
        nonlocal peak
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]) * 1024)
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    pieces = (TensorSlice(str(path), "w", 0, m),)
    matrix = BlockMatrix.from_slices("w", pieces, (m, n), torch.float32, 64 * 2**20)
    found = decompose(matrix, method="block_krylov", rule=RankRule(rank=32), n_iter=3, executor=SerialExecutor())
    scale = torch.arange(1, 65, dtype=torch.float64) ** -0.5
    signal = (scale**2)[32:].sum() * m * n
    expected = float(((signal + m * n) / ((scale**2).sum() * m * n + m * n)).sqrt())
    print(peak, time.perf_counter() - began, found.report.relative_error, expected)


JOBS: dict[str, Callable[[], list[Row]]] = {
    "squares": squares,
    "smollm": smollm,
    "ray": on_ray,
    "out_of_core": out_of_core,
}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    {"write": write_large, "read": read_large}[sys.argv[1]](Path(sys.argv[2]))
