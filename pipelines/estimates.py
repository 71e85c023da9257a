"""What a run will cost, roughly: sizes from headers, rows from the data, speed from a few products on this machine.

The constants were fitted to the demo on two quiet CPU cores (README); `assumed` says what a figure rests on. A GPU is
not taken into account: a run on one is faster than this says.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from lowrank.headers import TensorHeader
from pipelines.config import PipelineConfig
from pipelines.rowcheck import RowStats
from pipelines.sources import Sources

#: A quantized weight, its block maxima and its factors, in bytes per weight (an upper bound for r <= 64).
PACKED_BYTES = 0.75
#: What a process holds before any weight: Python, torch, Ray; bytes.
PROCESS_BYTES = 400 * 2**20
#: The same with transformers, DeepSpeed and activations of short rows.
TRAINER_BYTES = int(1.2 * 2**30)
#: Share of the speed of a bare product that training (dequantizing twice, small batches) and scoring reach.
TRAIN_EFFICIENCY, SCORE_EFFICIENCY = 0.5, 1.0
#: Bytes of fp32 weights that greedy decoding reads per second and core.
DECODE_BYTES_PER_S = 5e9
NUM_VARIANTS, NUM_SAMPLES, SAMPLE_TOKENS = 4, 3, 24


_MEASURE = """
import time
import numpy as np
matrix = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)
best, began = 1e9, time.perf_counter()
while time.perf_counter() - began < 0.25:
    start = time.perf_counter()
    matrix @ matrix
    best = min(best, time.perf_counter() - start)
print(2 * 512**3 / best)
"""


@dataclass(frozen=True)
class ModelSize:
    """Sizes read from headers; `num_features` sums inputs and outputs of the linear layers (activations per token)."""

    num_parameters: int
    num_linear: int
    num_features: int
    vocab_size: int
    dense_bytes: int
    largest_tensor_bytes: int


def model_size(headers: list[TensorHeader]) -> ModelSize:
    """Count parameters and bytes of a model from its headers."""
    linear = [header for header in headers if is_linear(header)]
    others = [max(header.shape) for header in headers if len(header.shape) == 2 and not is_linear(header)]
    return ModelSize(
        num_parameters=sum(header.numel for header in headers),
        num_linear=sum(header.numel for header in linear),
        num_features=sum(sum(header.shape) for header in linear),
        vocab_size=max(others, default=0),
        dense_bytes=sum(header.end - header.begin for header in headers),
        largest_tensor_bytes=max((header.end - header.begin for header in headers), default=0),
    )


def is_linear(header: TensorHeader) -> bool:
    """Whether a tensor looks like the weight of a linear layer, by the names of Hugging Face and of GGUF."""
    leaf = header.name.removesuffix(".weight").rpartition(".")[2]
    other = ("embed" in leaf, "embd" in leaf, leaf in ("wte", "wpe", "lm_head", "output"))
    return len(header.shape) == 2 and not any(other)


def disk_bytes(size: ModelSize) -> int:
    """Shards, packed weights, factors and checkpoints, roughly."""
    return int(size.dense_bytes + 2 * PACKED_BYTES * size.num_parameters)


def estimates(config: PipelineConfig, size: ModelSize, rows: dict[str, RowStats]) -> dict[str, Any]:
    """Memory per process, disk and time per stage, and what they assume."""
    speed = flops_per_second()
    heldout = min(rows["heldout"].num_rows, config.evaluate.max_rows or 1 << 60)
    trained = rows["train"].num_rows * config.finetune.epochs
    if config.finetune.max_steps:
        trained = min(trained, config.finetune.max_steps * config.finetune.global_batch_size)
    return {
        "disk_bytes": disk_bytes(size),
        "memory_bytes": memory_bytes(config, size),
        "seconds": _seconds(config, size, rows, speed, trained, heldout),
        "assumed": {
            "num_parameters": size.num_parameters,
            "gflops_per_second": round(speed / 1e9),
            "cores": os.cpu_count() or 1,
            "training_rows": trained,
            "heldout_rows": heldout,
            "tokens_per_training_row": round(rows["train"].tokens_per_row),
            "tokens_per_heldout_row": round(rows["heldout"].tokens_per_row),
        },
    }


#: What makes a stage need less memory.
_SMALLER = {
    "decompose": "decompose.block_bytes",
    "finetune": "finetune.micro_batch_size or data.max_length, or set finetune.gradient_checkpointing",
    "evaluate": "evaluate.batch_size",
}


def memory_advice(config: PipelineConfig, sources: Sources, stage: str) -> str:
    """What a stage was estimated to need, what this node has, and what to change."""
    import psutil

    wanted = memory_bytes(config, model_size(sources.model.headers())).get(stage, PROCESS_BYTES)
    free = psutil.virtual_memory().available
    lower = f"lower {_SMALLER[stage]}, or " if stage in _SMALLER else ""
    return (
        f"A process of this stage is estimated at {wanted / 2**30:.1f} GiB; this node has {free / 2**30:.1f} GiB free. "
        f"To go on, {lower}use nodes with more memory."
    )


def memory_bytes(config: PipelineConfig, size: ModelSize) -> dict[str, int]:
    """Bytes per process of every stage, roughly."""
    block = min(size.largest_tensor_bytes, config.decompose.block_bytes)
    tune = config.finetune
    tokens = tune.micro_batch_size * config.data.max_length
    kept = size.num_features / (8 if tune.gradient_checkpointing else 1)
    # fp32 activations of every layer, and the logits with their log-softmax and gradient
    batch = 4 * tokens * (kept + 3 * size.vocab_size)
    return {
        "shard": 2 * 32 * 2**20 + PROCESS_BYTES,
        "decompose": 3 * block + PROCESS_BYTES,
        "quantize": 4 * size.largest_tensor_bytes + PROCESS_BYTES,
        "finetune": int(PACKED_BYTES * size.num_parameters + TRAINER_BYTES + batch),
        "evaluate": 4 * size.num_parameters + TRAINER_BYTES,
    }


def _seconds(
    config: PipelineConfig, size: ModelSize, rows: dict[str, RowStats], speed: float, trained: int, heldout: int
) -> dict[str, float]:
    cores = os.cpu_count() or 1
    tune, n = config.finetune, size.num_parameters
    share = min(1.0, tune.num_workers * tune.threads_per_worker / cores) if tune.threads_per_worker else 1.0
    rank = (config.decompose.rank or 64) + config.decompose.options.get("oversampling", 8)
    products = 2 * (config.decompose.options.get("n_iter", 2) + 1)
    train_tokens = trained * rows["train"].tokens_per_row
    score_tokens = NUM_VARIANTS * heldout * rows["heldout"].tokens_per_row
    decoded = NUM_VARIANTS * NUM_SAMPLES * SAMPLE_TOKENS
    if config.evaluate.exact_match:
        decoded += NUM_VARIANTS * heldout * config.evaluate.max_new_tokens
    return {
        "shard": 10 + size.dense_bytes / 50e6,
        "decompose": 5 + n / 50e6 + 2 * size.num_linear * rank * products / speed,
        "quantize": 5 + n / 13e6,
        "finetune": 30 + 4 * n * train_tokens / (TRAIN_EFFICIENCY * share * speed),
        "evaluate": 10
        + NUM_VARIANTS * n / 40e6
        + 2 * size.num_linear * score_tokens / (SCORE_EFFICIENCY * speed)
        + decoded * 4 * n / (DECODE_BYTES_PER_S * cores),
        "register": 5.0,
        "serve": 20.0 if config.serve.enabled else 0.0,
    }


def flops_per_second() -> float:
    """Speed of fp32 matrix products on all cores, from one core's best, so that other programs hardly show.

    In a process of its own: threads of a BLAS are chosen when it is loaded, and two that wait for each other on a busy
    machine measure the neighbours.
    """
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    command = [sys.executable, "-c", _MEASURE]
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=True)
    return float(done.stdout) * (os.cpu_count() or 1)
