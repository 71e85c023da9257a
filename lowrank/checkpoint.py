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

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('DIR').save_pretrained('DIR-safetensors')\" (only for a file that you trust)"
)


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
        self._files = _safetensors_files(path)
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
        from safetensors import safe_open

        spec = self._specs[name]
        with safe_open(spec.file, framework="pt") as handle:
            return take(handle.get_slice(name))


def _safetensors_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix in _PICKLES:
            raise CheckpointError(
                f"read {path}: a pickle checkpoint can run code and is refused. Convert it: {_CONVERT}"
            )
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"read checkpoint {path}: there is no such file or directory. Check model.source.")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(index)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in sorted(path.iterdir()) if p.suffix in _PICKLES]
        hint = f"found pickles {pickles[:3]}, which are refused. Convert them: {_CONVERT}" if pickles else "found none."
        raise CheckpointError(f"read checkpoint {path}: no *.safetensors file; {hint}")
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"read {index}: not a safetensors index ({error}). Download the checkpoint again."
        ) from error
    files = [index.parent / Path(name).name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"read {index}: parts {missing[:3]} are missing ({len(missing)} of {len(files)}). Copy them."
        )
    return files


def read_header(file: Path) -> list[TensorSpec]:
    """The tensors of one safetensors file, its length checked against its header.

    Raises:
        CheckpointError: truncated or damaged, or a dtype that this project does not read.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size, 100_000_000):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"read {file}: damaged safetensors header ({error}). Copy the file again.") from error
    if end != size:
        raise CheckpointError(f"read {file}: {size} bytes, but its header describes {end}. Copy the file again.")
    return [_spec(file, name, entry) for name, entry in header.items()]


def _spec(file: Path, name: str, entry: dict[str, Any]) -> TensorSpec:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"read {file}: tensor {name!r} has dtype {entry['dtype']}; allowed are {sorted(DTYPES)}. "
            "Save the model in float32, bfloat16 or float16."
        )
    begin, end = entry["data_offsets"]
    return TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), str(file), end - begin)


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
