"""Read checkpoints by rows and write shards by rows, so that no whole model is ever in memory.

A `Checkpoint` lists its tensors and reads any rows of one; `SafetensorsCheckpoint` is the Hugging Face layout (one
file, or many with an index), `lowrank.gguf.GGUFCheckpoint` the other. Pickles are refused: they run code on load.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank.errors import CheckpointError
from lowrank.headers import TensorHeader, safetensors_files, safetensors_headers
from lowrank.reading import shown

#: Largest piece of a tensor that is in memory while a shard is written.
CHUNK_BYTES = 32 * 1024 * 1024

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor: `shape` is (out_features, in_features) for the weight of a linear layer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    nbytes: int

    @property
    def rows(self) -> int:
        """Length of the first axis; a scalar has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // max(self.rows, 1)


class Checkpoint(Protocol):
    """A readable checkpoint."""

    def specs(self) -> list[TensorSpec]:
        """Every tensor, in file order."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor."""
        ...

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of a matrix."""
        ...

    def files(self) -> list[Path]:
        """The weight files, for hashing."""
        ...


class SafetensorsCheckpoint:
    """A `.safetensors` file, or a directory with one or with `model.safetensors.index.json`."""

    def __init__(self, path: Path) -> None:
        """Raises: CheckpointError: nothing readable there, a pickle, a missing part or a damaged header."""
        self._files = safetensors_files(path)
        self._specs: dict[str, TensorSpec] = {}
        for file in self._files:
            for spec in read_header(file):
                if spec.name in self._specs:
                    raise CheckpointError(
                        f"read {file}: tensor {spec.name!r} also stands in {self._specs[spec.name].file}."
                    )
                self._specs[spec.name] = spec

    def specs(self) -> list[TensorSpec]:
        """Every tensor, in file order."""
        return list(self._specs.values())

    def files(self) -> list[Path]:
        """The weight files."""
        return list(self._files)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop); a scalar is its own single row."""
        return self._read(name, lambda view: view[start:stop] if view.get_shape() else view[...])

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of a matrix."""
        return self._read(name, lambda view: view[:, start:stop])

    def _read(self, name: str, take: Callable[[Any], Tensor]) -> Tensor:
        from safetensors import SafetensorError, safe_open

        spec = self._specs[name]
        try:
            with safe_open(spec.file, framework="pt") as handle:
                return take(handle.get_slice(name))
        except SafetensorError as error:
            raise CheckpointError(f"read {name} of {spec.file}: {error}. Copy the file again.") from error


def read_header(file: Path) -> list[TensorSpec]:
    """The tensors of one safetensors file, its length checked against its header.

    Raises:
        CheckpointError: truncated or damaged, or a dtype that this project does not read.
    """
    return [_spec(file, header) for header in safetensors_headers(file)]


def _spec(file: Path, header: TensorHeader) -> TensorSpec:
    if header.dtype not in DTYPES:
        raise CheckpointError(
            f"read {file}: tensor {header.name!r} has dtype {shown(header.dtype)}; allowed are {sorted(DTYPES)}. "
            "Save the model in float32, bfloat16 or float16."
        )
    return TensorSpec(header.name, DTYPES[header.dtype], header.shape, str(file), header.end - header.begin)


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor to be written to a shard; `read(start, stop)` yields rows of the original tensor."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    read: Callable[[int, int], Tensor]


def write_shard(path: Path, pieces: Sequence[Piece]) -> list[tuple[int, str]]:
    """Write pieces as one safetensors file, a chunk of at most `CHUNK_BYTES` in memory at a time.

    Returns:
        (bytes, sha256) of every piece's data, in order. The file's bytes depend on nothing but the pieces.
    """
    header: dict[str, Any] = {}
    offset = 0
    for piece in pieces:
        nbytes = _numel(piece.shape) * piece.dtype.itemsize
        header[piece.key] = {
            "dtype": DTYPE_NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digests = []
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            digest, count = hashlib.sha256(), 0
            for chunk in _chunks(piece):
                handle.write(chunk)
                digest.update(chunk)
                count += len(chunk)
            if count != _numel(piece.shape) * piece.dtype.itemsize:
                raise CheckpointError(f"write {path}: {piece.key} gave {count} bytes for shape {piece.shape}.")
            digests.append((count, digest.hexdigest()))
    return digests


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _chunks(piece: Piece) -> Iterator[memoryview]:
    rows = piece.shape[0] if piece.shape else 1
    row_bytes = max(_numel(piece.shape[1:]) * piece.dtype.itemsize, 1)
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, rows, step):
        block = piece.read(piece.start + start, piece.start + min(start + step, rows))
        data = block.contiguous().flatten().view(torch.uint8) if block.numel() else torch.empty(0, dtype=torch.uint8)
        yield memoryview(data.numpy())  # type: ignore[arg-type]
