"""What machines do per second: published figures of some GPUs, this machine's own, or a file of measured ones.

`Rates` is all that a time of `pipelines.scale` rests on. A figure of a GPU is its data sheet's; shares of it that
programs reach, and everything about hosts, disks and networks, are assumptions, and are told as such.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import ConfigError

GIB = 2**30
#: Seconds that no size changes, as `pipelines.estimates` has them from the demo on two quiet CPU cores; rough.
#: `benchmarks/scale.py` measures each on its own.
FIXED_S = {
    "start": 10.0,  # the driver's imports, a Ray head, MLflow's run
    "shard": 10.0,  # the first task's process, its imports, a model on the meta device
    "decompose": 5.0,  # first calls and imports of every stage's tasks, from here on
    "quantize": 5.0,
    "ray_data": 7.0,  # where rows are many
    "finetune": 25.0,  # Ray Train's group, DeepSpeed's engine
    "evaluate": 10.0,
    "register": 5.0,  # plots and the registry
    "unit": 0.005,  # one commit: files synced, hashed and renamed
    "tensor": 0.0016,  # operators on a weight that is too small to matter, decompose and quantize each
    "checkpoint": 0.1,
}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Figures of one kind of cluster.

    A *rank* is what trains one replica (a GPU, or a worker's threads); a *core* is what works on one unit of shard,
    decompose or quantize, which never use a GPU; a *link* joins two ranks of a node, the *network* is what one node
    has to all others.
    """

    device: str
    """What the figures are of."""
    memory_bytes: int | None = None
    """Memory of a GPU; None where ranks share the node's memory."""
    rank_flops: float
    """Products of the training dtype, FLOP/s as reached."""
    rank_bytes_per_s: float
    """Memory of a rank, read and written, as reached."""
    rank_dequantize_per_s: float
    """NF4 weights that a rank dequantizes per second."""
    rank_op_s: float
    """Seconds that an operator takes however little it does."""
    core_flops: float
    """fp32 products with as many columns as a decomposition has, FLOP/s of one core."""
    core_bytes_per_s: float
    """Memory of one core while all work."""
    core_quantize_per_s: float
    """Weights to NF4 by one core, per second."""
    core_hash_bytes_per_s: float
    """sha256 by one core."""
    disk_read_bytes_per_s: float
    """Of a node's disk, or of what a node gets from shared storage."""
    disk_write_bytes_per_s: float
    """The same, synced."""
    link_bytes_per_s: float
    """One direction, between two ranks of a node."""
    network_bytes_per_s: float
    """One direction, between a node and the others."""
    cores: int
    """Cores of a node."""
    process_bytes: int = int(1.0 * GIB)
    """What a training process holds on the host, or a GPU for its context, before any weight."""
    fixed_s: Mapping[str, float] = field(default_factory=lambda: dict(FIXED_S))
    """Seconds that do not depend on the model; the keys of `FIXED_S`."""
    notes: tuple[str, ...] = ()
    """Where the figures come from."""


#: Shares of a data sheet's figures that large products and copies usually reach (an assumption, not measured by us).
PRODUCT_SHARE, MEMORY_SHARE = 0.45, 0.8
#: Bytes that dequantizing one NF4 weight moves on a GPU: half a byte and its absmax in, fp32 out, cast to bf16.
_DEQUANTIZE_BYTES = 0.56 + 4 + 4 + 2
#: bf16 FLOP/s without sparsity, bytes/s, bytes, link bytes/s in one direction, by the makers' data sheets.
_GPUS: dict[str, tuple[float, float, int, float]] = {
    "h200": (989e12, 4.8e12, 141 * 10**9, 450e9),
    "h100": (989e12, 3.35e12, 80 * GIB, 450e9),
    "a100": (312e12, 2.04e12, 80 * GIB, 300e9),
    "l40s": (362e12, 0.864e12, 48 * GIB, 32e9),
}
#: Of a host with GPUs, per GPU or per node; assumed.
_HOST_CORES_PER_GPU, _CORE_FLOPS, _NETWORK = 12, 40e9, 50e9
PRESETS = (*sorted(_GPUS), "cpu")


def rates(device: str, gpus_per_node: int) -> Rates:
    """The figures of a preset, of this machine (`cpu`, measured in a second), or of a JSON file of `Rates`' fields.

    Args:
        device: a name in `PRESETS`, or the path of a file as `benchmarks/scale.py --rates FILE` writes it.
        gpus_per_node: GPUs of a node; its cores are assumed to grow with them.

    Raises:
        ConfigError: neither a preset nor a file of these fields.
    """
    if device in _GPUS:
        return _gpu(device, gpus_per_node)
    if device == "cpu":
        return _this_machine()
    path = Path(device).expanduser()
    if not path.is_file():
        raise ConfigError(f"--device: got {device!r}; allowed are {', '.join(PRESETS)}, or a JSON file of figures.")
    try:
        return Rates(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        known = ", ".join(item.name for item in dataclasses.fields(Rates))
        raise ConfigError(
            f"--device {device}: not a JSON object of figures ({error}). Its fields are {known}; "
            "`python benchmarks/scale.py --rates FILE` writes one."
        ) from error


def _gpu(name: str, gpus_per_node: int) -> Rates:
    flops, bandwidth, memory, link = _GPUS[name]
    return Rates(
        device=name,
        memory_bytes=memory,
        rank_flops=PRODUCT_SHARE * flops,
        rank_bytes_per_s=MEMORY_SHARE * bandwidth,
        rank_dequantize_per_s=MEMORY_SHARE * bandwidth / _DEQUANTIZE_BYTES,
        rank_op_s=5e-6,
        link_bytes_per_s=link,
        network_bytes_per_s=_NETWORK,
        cores=_HOST_CORES_PER_GPU * max(gpus_per_node, 1),
        notes=(
            f"{name}: {flops / 1e12:.0f} TFLOP/s bf16 and {bandwidth / 1e12:.2f} TB/s by its data sheet, of which "
            f"{PRODUCT_SHARE:.0%} and {MEMORY_SHARE:.0%} are assumed to be reached",
            f"{_HOST_CORES_PER_GPU} cores per GPU of {_CORE_FLOPS / 1e9:.0f} GFLOP/s, a disk of 2 GB/s, a network "
            f"of {_NETWORK / 1e9:.0f} GB/s per node, assumed",
        ),
        process_bytes=GIB,
        **_CORE | {"core_flops": _CORE_FLOPS},
    )


#: One core and a local disk of a server of these years, as measured on two cores of an AMD EPYC.
_CORE: dict[str, Any] = {
    "core_bytes_per_s": 17e9,
    "core_quantize_per_s": 1.3e9,
    "core_hash_bytes_per_s": 1.7e9,
    "disk_read_bytes_per_s": 2e9,
    "disk_write_bytes_per_s": 1e9,
}


def _this_machine() -> Rates:
    """A second's measurement of the products; the rest as two quiet cores had it."""
    from pipelines.estimates import flops_per_second

    cores = os.cpu_count() or 1
    flops = flops_per_second()
    return Rates(
        device="cpu",
        rank_flops=flops,
        rank_bytes_per_s=cores * _CORE["core_bytes_per_s"],
        rank_dequantize_per_s=cores * 3e9,
        rank_op_s=1e-5,
        core_flops=flops / cores / 2,
        link_bytes_per_s=1e9,
        network_bytes_per_s=1e9,
        cores=cores,
        notes=(
            f"products of {flops / 1e9:.0f} GFLOP/s on {cores} cores measured now, half of it with few columns; "
            "memory, disk and NF4 as of two cores of an AMD EPYC. `benchmarks/scale.py --rates FILE` measures all",
        ),
        **_CORE,
    )
