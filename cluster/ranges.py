"""Rows of a tensor by byte ranges of its safetensors file in an object store: the header once, then those rows alone.

A product over row blocks reads each block again at every pass, so a range that was read stays in the mirror. Rows that
are a whole piece of a shard are checked against its sha256; fewer rows have none.

Only `ShardSet.slices` imports this, where torch is needed anyway.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.durable import write_atomic
from cluster.errors import DamagedError
from cluster.objects import Mirror
from lowrank.blocks import TensorSlice
from lowrank.headers import TensorHeader, parse_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

#: Headers that a process keeps.
_HEADERS = 256


@lru_cache(maxsize=_HEADERS)
def _header(mirror: Mirror, file: Path) -> tuple[int, dict[str, TensorHeader]]:
    """Where the data of a safetensors object begins, and its tensors; an object of that name never changes."""
    size = mirror.size(file) or 0
    try:
        (length,) = struct.unpack("<Q", mirror.get_range(file, 0, 8))
        if length > size:
            raise ValueError(f"header of {length} bytes in an object of {size}")
        tensors = parse_safetensors_header(mirror.get_range(file, 8, length))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"read {mirror.url(file)}: damaged safetensors header ({error}).") from error
    return 8 + length, {tensor.name: tensor for tensor in tensors}


@dataclass(frozen=True)
class RemoteSlice(TensorSlice):
    """Rows of a tensor in the safetensors object that `file` mirrors; from `path` where the mirror has it.

    Attributes:
        mirror: the object store.
        file: what the object is mirrored by.
        rows: of the stored tensor.
        sha256: of all its bytes, or ''.
    """

    mirror: Mirror
    file: Path
    rows: int
    sha256: str = ""

    def read(self) -> Tensor:
        """Read only these rows, in their storage dtype.

        Raises:
            CheckpointError: as `TensorSlice.read`. DamagedError: the object is not what the index says.
            StorageError: the object store refuses.
        """
        import torch

        from lowrank.checkpoint import DTYPES

        if Path(self.path).is_file():
            return super().read()
        try:
            begin, tensors = _header(self.mirror, self.file)
            tensor = tensors[self.key]
        except (KeyError, FileNotFoundError) as error:
            raise DamagedError(f"read rows of {self.key} from {self.mirror.url(self.file)}: not there.") from error
        stored = tensor.shape[0] if tensor.shape else 1
        if not 0 <= self.start < self.stop <= stored or tensor.dtype not in DTYPES:
            raise DamagedError(
                f"read rows {self.start}:{self.stop} of {self.key} from {self.mirror.url(self.file)}: it holds rows "
                f"0:{stored} of {tensor.dtype}. Delete the stage that holds it and run again."
            )
        size = (tensor.end - tensor.begin) // stored
        data = self._bytes(begin + tensor.begin + self.start * size, (self.stop - self.start) * size)
        shape = (self.stop - self.start, *tensor.shape[1:]) if tensor.shape else ()
        if not math.prod(shape):
            return torch.empty(shape, dtype=DTYPES[tensor.dtype])
        return torch.frombuffer(bytearray(data), dtype=DTYPES[tensor.dtype]).reshape(shape)

    def _sound(self, data: bytes) -> bool:
        """Whether bytes are those that were stored, as far as that is known."""
        if (self.start, self.stop) != (0, self.rows) or not self.sha256:
            return True
        return hashlib.sha256(data).hexdigest() == self.sha256

    def _bytes(self, start: int, length: int) -> bytes:
        kept = self.file.parents[2] / "ranges" / f"{self.file.name[:32]}-{start}-{length}"
        if kept.is_file() and len(data := kept.read_bytes()) == length and self._sound(data):
            return data
        data = self.mirror.get_range(self.file, start, length)
        if not self._sound(data):
            raise DamagedError(
                f"{self.mirror.url(self.file)} is damaged: the bytes of {self.key} are not those of the index. Delete "
                "the stage that holds it and run again: it is made anew."
            )
        write_atomic(kept, data)
        return data
