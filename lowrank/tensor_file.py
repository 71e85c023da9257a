"""Read a safetensors file with hundreds of small tensors into memory of our own: one read, and views of it."""

from __future__ import annotations

import json
import math
import mmap
import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
}
#: Bytes of data that get pages of their own.
_WORTH_PAGES = 2**20
#: Longest header that is remembered.
_MOST_REMEMBERED = 2**20


def load_tensors(path: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Every tensor of a file by its name, and the flat tensors, of one dtype each, that they are views of.

    `safetensors.torch.load_file` maps the file, whose pages then come one by one and are gone where somebody cuts it
    short; what is read here stays, and takes less than half the time.

    Raises:
        OSError: the file cannot be read.
        ValueError, SafetensorError: it is damaged, or holds other dtypes than `DTYPES`.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = _Header(file.read(min(size, int.from_bytes(file.read(8), "little"))))
        header.path = path
        data = _own_pages(size - file.tell())
        if file.readinto(data.numpy().data) != len(data):
            raise ValueError("the file changes while it is read")
    found: dict[str, Tensor] = {}
    flats = []
    layout = _layout if len(header) <= _MOST_REMEMBERED else _layout.__wrapped__
    for run in layout(header, len(data)):
        flats.append(_typed(data[run.start : run.stop], run.dtype))
        parts = torch.split(flats[-1], run.sizes)
        found |= {name: part.view(shape) for (name, shape), part in zip(run.shapes, parts, strict=True)}
    return found, flats


def _own_pages(num_bytes: int) -> Tensor:
    """Bytes that go back to the system as soon as nobody holds them: of what comes and goes, a heap keeps the holes."""
    if num_bytes < _WORTH_PAGES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)


@dataclass(frozen=True)
class _Run:
    """Tensors of one dtype that lie one after another, in bytes [start, stop) of the data."""

    dtype: torch.dtype
    start: int
    stop: int
    shapes: list[tuple[str, list[int]]]
    sizes: list[int]


class _Header(bytes):
    """Its file's name does not tell it from an equal one."""

    path: Path


@lru_cache(maxsize=16)
def _layout(header: _Header, data_bytes: int) -> list[_Run]:
    """What lies where; files of one training recipe all have the same header.

    `data_bytes` tells a file that was cut short from a whole one.
    """
    from safetensors import safe_open

    del data_bytes
    with safe_open(header.path, framework="pt"):  # the library's check of everything that a header can get wrong
        pass
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    other = {entry["dtype"] for _, entry in ordered} - set(DTYPES)
    if other:
        raise ValueError(f"it holds {', '.join(sorted(other))}; allowed are {', '.join(DTYPES)}")
    runs = []
    for kind, group in groupby(ordered, key=lambda item: item[1]["dtype"]):
        own = list(group)
        shapes = [(name, entry["shape"]) for name, entry in own]
        sizes = [math.prod(shape) for _, shape in shapes]
        start, stop = own[0][1]["data_offsets"][0], own[-1][1]["data_offsets"][1]
        runs.append(_Run(DTYPES[kind], start, stop, shapes, sizes))
    return runs


def _typed(data: Tensor, dtype: torch.dtype) -> Tensor:
    aligned = data if data.storage_offset() % dtype.itemsize == 0 else data.clone()
    return aligned.view(dtype)
