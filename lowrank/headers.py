"""Names and shapes of a checkpoint's tensors, read from file headers alone: no torch, no weights, milliseconds.

`rankline plan` and the hashing of sources use it; `lowrank.checkpoint` reads the weights on top of it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lowrank.errors import CheckpointError
from lowrank.reading import parse_json, read_json, shown

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('DIR').save_pretrained('DIR-safetensors')\" (only for a file that you trust)"
)
#: Longest header that is believed; the largest models have a few MB.
_MAX_HEADER = 100_000_000
_MOST_DIMENSIONS, _MOST_GGUF_DIMENSIONS = 64, 4
#: Bytes of an element by safetensors' name, of the types that this project reads.
ITEMSIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its file describes it; `dtype` by its safetensors name, (begin, end) within the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def safetensors_files(path: Path) -> list[Path]:
    """The weight files of a `.safetensors` file or of a Hugging Face directory.

    Raises:
        CheckpointError: nothing readable there, a pickle, or a missing part.
    """
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
        names = sorted(set(read_json(index)["weight_map"].values()))
        if not all(isinstance(name, str) and 0 < len(name.encode()) <= 255 for name in names):
            raise ValueError("weight_map must give the name of a file to every tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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


def safetensors_headers(file: Path) -> list[TensorHeader]:
    """The tensors of one safetensors file, its length checked against its header.

    Raises:
        CheckpointError: truncated or damaged.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size, _MAX_HEADER):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            found = parse_safetensors_header(handle.read(length))
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"read {file}: damaged safetensors header ({error}). Copy the file again.") from error
    end = 8 + length + max((tensor.end for tensor in found), default=0)
    if end != size:
        raise CheckpointError(f"read {file}: {size} bytes, but its header describes {end}. Copy the file again.")
    return found


def parse_safetensors_header(text: bytes) -> list[TensorHeader]:
    """The tensors of a safetensors header.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    header = parse_json(text)
    header.pop("__metadata__", None)
    found = [_header(name, entry) for name, entry in header.items()]
    _require_tiling(found)
    return found


def _header(name: str, entry: dict[str, Any]) -> TensorHeader:
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    sizes = [begin, end, *shape]
    if len(shape) > _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise ValueError(f"tensor {shown(name)} has the shape {shown(shape)} and the offsets {shown([begin, end])}")
    header = TensorHeader(name, str(entry["dtype"]), tuple(shape), begin, end)
    if end - begin != header.numel * ITEMSIZES.get(header.dtype, 0) and header.dtype in ITEMSIZES:
        raise ValueError(f"tensor {shown(name)} has {end - begin} bytes for the shape {header.shape} of {header.dtype}")
    return header


def _require_tiling(tensors: Sequence[TensorHeader]) -> None:
    """Safetensors allows neither holes nor overlaps."""
    at = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != at:
            raise ValueError(f"tensor {shown(tensor.name)} begins at {tensor.begin}, the one before it ends at {at}")
        at = tensor.end


#: GGUF architecture -> (Hugging Face model_type, class, whether q and k rows are interleaved).
GGUF_ARCHITECTURES = {"llama": ("llama", "LlamaForCausalLM", True), "qwen2": ("qwen2", "Qwen2ForCausalLM", False)}
#: Versions that are read, and the struct codes of GGUF's scalar metadata types; 8 is a string, 9 an array.
_GGUF_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def gguf_headers(file: Path) -> list[TensorHeader]:
    """The tensors of a GGUF file under their GGUF names; sizes are those of the dequantized fp32 tensors.

    Raises:
        CheckpointError: not a GGUF file, or cut off within its header or before its last tensor,
            or an architecture that `lowrank.gguf` does not read.
    """
    try:
        with file.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise ValueError("it does not begin with 'GGUF'")
            version, num_tensors, num_fields = _unpack(handle, "IQQ")
            if version not in _GGUF_VERSIONS:
                raise ValueError(f"version {version}, allowed are {_GGUF_VERSIONS}")
            fields = dict(_field(handle) for _ in range(num_fields))
            tensors = [_gguf_tensor(handle) for _ in range(num_tensors)]
            data = handle.tell()
        last = max((tensor.begin for tensor in tensors), default=0)
        if data + last >= file.stat().st_size:
            raise ValueError(f"{file.stat().st_size} bytes, its last tensor begins at {data + last}")
    except (OSError, ValueError, struct.error, KeyError) as error:
        raise CheckpointError(f"read GGUF {file}: damaged or truncated ({error}). Download it again.") from error
    architecture = str(fields.get("general.architecture"))
    if architecture not in GGUF_ARCHITECTURES:
        raise CheckpointError(
            f"read GGUF {file}: architecture {shown(architecture)}; allowed are {sorted(GGUF_ARCHITECTURES)}. "
            "Convert the model to a Hugging Face directory with safetensors."
        )
    return tensors


def _unpack(handle: BinaryIO, codes: str) -> tuple[Any, ...]:
    layout = struct.Struct("<" + codes)
    return layout.unpack(handle.read(layout.size))


def _string(handle: BinaryIO) -> str:
    (length,) = _unpack(handle, "Q")
    if length > _MAX_HEADER:
        raise ValueError(f"a text of {length} bytes")
    text = handle.read(length)
    if len(text) < length:
        raise ValueError(f"a text of {length} bytes is cut off")
    return text.decode("utf-8", "replace")


def _field(handle: BinaryIO) -> tuple[str, Any]:
    name = _string(handle)
    (kind,) = _unpack(handle, "I")
    if kind != 9:
        return name, _string(handle) if kind == 8 else _unpack(handle, _SCALARS[kind])[0]
    item, count = _unpack(handle, "IQ")
    if item == 8:
        for _ in range(count):
            _string(handle)
    else:
        nbytes = count * struct.calcsize("<" + _SCALARS[item])
        if nbytes > os.fstat(handle.fileno()).st_size:
            raise ValueError(f"an array of {nbytes} bytes is cut off")
        handle.seek(nbytes, 1)
    return name, None  # vocabularies: nothing here needs them


def _gguf_tensor(handle: BinaryIO) -> TensorHeader:
    name = _string(handle)
    (dimensions,) = _unpack(handle, "I")
    if not 1 <= dimensions <= _MOST_GGUF_DIMENSIONS:
        raise ValueError(f"tensor {shown(name)} has {dimensions} dimensions")
    shape = tuple(int(size) for size in reversed(_unpack(handle, "Q" * dimensions)))
    _kind, offset = _unpack(handle, "IQ")
    tensor = TensorHeader(name, "F32", shape, offset, offset)
    return TensorHeader(name, "F32", shape, offset, offset + 4 * tensor.numel)
