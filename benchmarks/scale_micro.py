"""Micro-benchmarks that `benchmarks/scale.py` predicts from: what one core, one rank, one commit and one start cost.

No stage is run on a model here, and none of the widths is one of a model that the prediction is judged by. Run as a
program with the name of a part, it prints that part's figures as JSON; the parts of cores run in as many processes
at once as the machine has cores, because that is how the stages use them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
#: Width and depth of what is timed; the models that are predicted have others.
WIDTH, FEED, TOKENS = 512, 1408, 704
RANK = 16


def least(call: Callable[[], Any], seconds: float = 1.0, clock: Callable[[], float] = time.process_time) -> float:
    """The least time of one call within some seconds, after one that warms up.

    The clock is that of this process: on one thread it is the wall's, less what other programs take. What waits for a
    disk is timed by `time.perf_counter`.
    """
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = clock()
        call()
        best = min(best, clock() - began)
    return best


def core() -> dict[str, float]:
    """One thread beside others of its kind: products, memory, NF4, hashing, commits, operators of a small weight."""
    import torch

    from lowrank.quantization.nf4 import quantize_nf4

    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(FEED, WIDTH)
    thin = torch.randn(WIDTH, RANK + 8)
    back = torch.randn(FEED, RANK + 8)
    skinny = least(lambda: (weight @ thin, weight.T @ back))
    rows = torch.randn(TOKENS, WIDTH)
    other = torch.randn(FEED, WIDTH)
    large = torch.randn(2**26)  # beyond any cache
    out = torch.empty_like(large)
    packed = quantize_nf4(weight, 64, True)
    data = os.urandom(2**24)
    return {
        "rank_flops": 2 * TOKENS * WIDTH * FEED / least(lambda: rows @ other.T),
        "core_flops": 2 * 2 * weight.numel() * (RANK + 8) / skinny,
        "core_bytes_per_s": 12 * large.numel() / least(lambda: torch.sub(large, large, out=out)),
        "core_quantize_per_s": weight.numel() / least(lambda: quantize_nf4(weight, 64, True)),
        "rank_dequantize_per_s": weight.numel() / least(lambda: packed.dequantize()),
        "core_hash_bytes_per_s": len(data) / least(lambda: hashlib.sha256(data)),
        **_layer(TOKENS),
        **_units(),
    }


def _layer(tokens: int) -> dict[str, float]:
    """Seconds of one LoRA-adapted decoder layer forward and backward: nearly without tokens, and with many."""
    import torch

    small, large = _decoder(64, 176), _decoder(WIDTH, FEED)

    def step(layer: Any, x: Any) -> None:
        layer(x).sum().backward()

    def many() -> None:
        step(large, torch.randn(4, tokens // 4, WIDTH, requires_grad=True))

    def few() -> None:
        step(small, torch.randn(1, 4, 64, requires_grad=True))

    return {"layer_small_s": least(few), "layer_large_s": least(many, 3.0)}


def _decoder(width: int, feed: int) -> Any:
    """A decoder layer of transformers with an adapter of ours on every linear layer, over dense frozen weights."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaModel

    from lowrank.adapters.base import Layer
    from lowrank.adapters.registry import initial_adapters
    from lowrank.config import AdapterConfig
    from lowrank.inject import inject

    config = LlamaConfig(vocab_size=8, hidden_size=width, intermediate_size=feed, num_hidden_layers=1,
                         num_attention_heads=max(1, width // 64), attn_implementation="sdpa")  # fmt: skip
    model = LlamaModel(config).requires_grad_(False)
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    layers = [Layer(name, (m.out_features, m.in_features), i) for i, (name, m) in enumerate(linears)]
    made = initial_adapters(layers, AdapterConfig(r=RANK, init="kaiming"))
    inject(model, {name: {"one": adapter} for name, adapter in made.items()}, "one")
    return lambda x: model(inputs_embeds=x, use_cache=False).last_hidden_state


def _units() -> dict[str, float]:
    """A commit of a small file, and both numerics on a weight that is too small to matter."""
    import torch

    from cluster.durable import UnitStore
    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose, spectral_error
    from lowrank.executor import SerialExecutor
    from lowrank.quantization.residual import split_weight
    from lowrank.rank import RankRule

    matrix, executor = torch.randn(96, 64), SerialExecutor()
    block = BlockMatrix.from_tensor("small", matrix)

    def fit() -> Any:
        found = decompose(block, rule=RankRule(rank=4), executor=executor).factors
        spectral_error(block, found, executor)
        return found

    factors = fit()
    with tempfile.TemporaryDirectory(dir=ROOT) as directory:
        store, count = UnitStore(Path(directory)), iter(range(10**6))
        commit = least(lambda: _commit(store, next(count)), 0.5, time.perf_counter)
    return {
        "unit_s": commit,
        "tensor_decompose_s": least(fit),
        "tensor_quantize_s": least(lambda: split_weight("small", matrix, factors)),
    }


def _commit(store: Any, index: int) -> None:
    def write(directory: Path) -> dict[str, Any]:
        (directory / "factors.safetensors").write_bytes(bytes(4096))
        (directory / "spectrum.safetensors").write_bytes(bytes(256))
        return {}

    store.commit(f"unit-{index}", write)


def disk() -> dict[str, float]:
    """A file of 128 MB: written and synced, and read back (from the page cache, as the stages read each other's)."""
    data = os.urandom(2**27)
    with tempfile.TemporaryDirectory(dir=ROOT) as directory:
        path = Path(directory) / "file"

        def write() -> None:
            with path.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())

        written = least(write, clock=time.perf_counter)
        return {
            "disk_write_bytes_per_s": len(data) / written,
            "disk_read_bytes_per_s": len(data) / least(path.read_bytes, clock=time.perf_counter),
        }


def starts() -> dict[str, float]:
    """What happens once whatever the size: driver, cluster, first calls in its workers, trainer, tracking."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        from scale_starts import measure  # its functions must be importable in Ray's workers

        found = measure(root)
    return found | {"whole_s": time.perf_counter() - began}


def run(part: str, copies: int = 1) -> dict[str, float]:
    """The figures of a part, from processes of their own at once; their mean."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if part == "core" else dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")])
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, __file__, part]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(copies)
    ]
    found = []
    for process in started:
        out, error = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{part} ended with {process.returncode}:\n{error[-3000:]}")
        found.append(json.loads(out.splitlines()[-1]))
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


if __name__ == "__main__":
    print(json.dumps({"core": core, "disk": disk, "starts": starts}[sys.argv[1]]()))
