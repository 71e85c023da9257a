"""Typed readers of what `shard` and `quantize` leave on disk: any process opens them from a path.

Of an object store they bring the units that are asked for into the mirror at that path; of shards not the files, only
the byte ranges of the rows that are read (`cluster.ranges`), because a node needs few tensors of many files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.durable import UnitStore, reading, units_at
from lowrank.reading import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from cluster.architecture import Architecture
    from cluster.mirrored import MirroredUnits
    from cluster.objects import Mirror
    from lowrank.blocks import TensorSlice
    from lowrank.quantization.residual import SplitWeight


@dataclass(frozen=True)
class ShardPiece:
    """Rows [row_start, row_stop) of one tensor, stored under `key` in `file` (relative to the shard set).

    `sha256` is that of their bytes.
    """

    file: str
    key: str
    row_start: int
    row_stop: int
    sha256: str = ""


@dataclass(frozen=True)
class ShardedTensor:
    """One tensor of a shard set; `transposed` says that the model stores the transpose of this shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    nbytes: int
    pieces: tuple[ShardPiece, ...]


@dataclass(frozen=True)
class ShardSet:
    """The output of `shard`: row blocks in safetensors, an index in Parquet, config and tokenizer beside them."""

    path: Path
    mirror: Mirror | None = None

    @cached_property
    def units(self) -> UnitStore:
        """The units it is made of."""
        return units_at(self.path, self.mirror)

    @cached_property
    def meta_dir(self) -> Path:
        """Directory with config.json and the tokenizer."""
        return self.units.fetch("meta")

    @cached_property
    def architecture(self) -> Architecture:
        """Parameters and linear layers of the model."""
        from cluster.architecture import Architecture

        return Architecture.load(self.meta_dir / "architecture.json")

    @cached_property
    def tensors(self) -> dict[str, ShardedTensor]:
        """Every tensor by name.

        Raises:
            DamagedError: the index is not what `shard` writes.
        """
        import pyarrow.parquet as pq

        index = self.units.fetch("index") / "index.parquet"
        grouped: dict[str, list[dict[str, Any]]] = {}
        with reading(index):
            for row in pq.read_table(index).to_pylist():
                grouped.setdefault(row["tensor"], []).append(row)
            return {name: _sharded(name, rows) for name, rows in grouped.items()}

    def slices(self, name: str, start: int, stop: int) -> tuple[TensorSlice, ...]:
        """Where rows [start, stop) of a tensor lie."""
        from lowrank.blocks import TensorSlice

        found = []
        for piece in self.tensors[name].pieces:
            low, high = max(start, piece.row_start), min(stop, piece.row_stop)
            if low < high:
                file, base = str(self.path / piece.file), piece.row_start
                rows = TensorSlice(file, piece.key, low - base, high - base)
                found.append(rows if self.mirror is None else self._remote(rows, piece))
        return tuple(found)

    def _remote(self, rows: TensorSlice, piece: ShardPiece) -> TensorSlice:
        """Rows that are read from the object store where the mirror has not got their file."""
        from cluster.ranges import RemoteSlice

        assert self.mirror is not None
        _, unit, name = piece.file.split("/", 2)
        number = piece.row_stop - piece.row_start
        if piece.file not in self._objects:
            self._objects[piece.file] = self._units_there.object_of(unit, name)
        file = self._objects[piece.file]
        return RemoteSlice(rows.path, rows.key, rows.start, rows.stop, self.mirror, file, number, piece.sha256)

    @cached_property
    def _objects(self) -> dict[str, Path]:
        """What the objects of files are mirrored by, as far as they were asked for."""
        return {}

    @property
    def _units_there(self) -> MirroredUnits:
        from cluster.mirrored import MirroredUnits

        assert isinstance(self.units, MirroredUnits)
        return self.units

    def load(self, name: str) -> Tensor:
        """A whole tensor in its stored dtype.

        Raises:
            DamagedError: a shard is not what the index says.
        """
        import torch
        from safetensors import safe_open

        parts = []
        for piece in self.tensors[name].pieces:
            if self.mirror is not None and not (self.path / piece.file).is_file():
                parts += [rows.read() for rows in self.slices(name, piece.row_start, piece.row_stop)]
                continue
            with reading(self.path / piece.file), safe_open(self.path / piece.file, framework="pt") as handle:
                parts.append(handle.get_tensor(piece.key))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sharded(name: str, rows: list[dict[str, Any]]) -> ShardedTensor:
    rows = sorted(rows, key=lambda row: int(row["row_start"]))
    return ShardedTensor(
        name=name,
        dtype=rows[0]["dtype"],
        shape=tuple(rows[0]["shape"]),
        transposed=bool(rows[0]["transposed"]),
        nbytes=sum(int(row["nbytes"]) for row in rows),
        pieces=tuple(
            ShardPiece(row["file"], row["key"], row["row_start"], row["row_stop"], row.get("sha256", ""))
            for row in rows
        ),
    )


@dataclass(frozen=True)
class SplitSet:
    """The output of `quantize`: one packed residual, and the factors that were split off, per target layer."""

    path: Path
    mirror: Mirror | None = None

    @cached_property
    def units(self) -> UnitStore:
        """The units it is made of."""
        return units_at(self.path, self.mirror)

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """One record per target: module, shape, errors, bytes, fallback; in the model's order.

        Raises:
            DamagedError: the index is not what `quantize` writes.
        """
        import pyarrow.parquet as pq

        index = self.units.fetch("index") / "index.parquet"
        with reading(index):
            rows: list[dict[str, Any]] = pq.read_table(index).to_pylist()
            if not all(isinstance(row["module"], str) for row in rows):
                raise ValueError("a row names no module")
            return rows

    @property
    def modules(self) -> list[str]:
        """Module paths of the targets."""
        return [record["module"] for record in self.records]

    def load(self, module: str) -> SplitWeight:
        """The split of one layer."""
        return load_split(self.units.fetch(module))

    def items(self) -> Iterator[tuple[str, SplitWeight]]:
        """(module, split) of every target."""
        return ((module, self.load(module)) for module in self.modules)


#: Prefixes of Lᵀ and R where both are NF4.
_PACKED_FACTORS = ("left_transposed", "right")


def save_split(directory: Path, split: SplitWeight) -> None:
    """Write one layer's split as safetensors with a JSON header; the packed bytes, never a dequantized copy."""
    from safetensors.torch import save_file

    tensors = {} if split.residual is None else split.residual.to_tensors("residual")
    if split.packed_factors is not None:
        for name, factor in zip(_PACKED_FACTORS, split.packed_factors, strict=True):
            tensors |= factor.to_tensors(name)
    elif split.part is not None:
        tensors |= {name: factor.contiguous() for name, factor in split.part.tensors().items()}
    save_file(tensors, directory / "split.safetensors")
    record = {
        "name": split.name,
        "shape": list(split.shape),
        "residual": None if split.residual is None else split.residual.meta(),
        "quantization_error": split.quantization_error,
        "plain_error": split.plain_error,
        "fallback": split.fallback,
        "part": None if split.part is None else split.part.kind,
        "packed_factors": split.packed_factors and [factor.meta() for factor in split.packed_factors],
    }
    (directory / "split.json").write_text(json.dumps(record, sort_keys=True))


def load_split(directory: Path) -> SplitWeight:
    """Read what `save_split` wrote, now or before it kept other forms than L R.

    Raises:
        DamagedError: it is not that.
    """
    with reading(directory / "split.json"):
        return _load_split(directory)


def _load_split(directory: Path) -> SplitWeight:
    from safetensors.torch import load_file

    from lowrank.factors import LowRankFactors, StructuredFactors
    from lowrank.quantization.nf4 import NF4Tensor
    from lowrank.quantization.residual import SplitWeight

    record = read_json(directory / "split.json")
    tensors = load_file(directory / "split.safetensors")
    # Tensors of NF4 are named residual.packed and the like, those of factors have no point.
    factors = {name: tensor for name, tensor in tensors.items() if "." not in name}
    part: StructuredFactors | None = None
    packed = None
    if factors:
        part = StructuredFactors.FORMS[record.get("part", LowRankFactors.kind)].from_tensors(factors)
    if record.get("packed_factors"):
        first, second = (
            NF4Tensor.from_tensors(tensors, name, meta)
            for name, meta in zip(_PACKED_FACTORS, record["packed_factors"], strict=True)
        )
        part, packed = LowRankFactors(first.dequantize().T.contiguous(), second.dequantize()), (first, second)
    return SplitWeight(
        name=record["name"],
        shape=(record["shape"][0], record["shape"][1]),
        residual=record["residual"] and NF4Tensor.from_tensors(tensors, "residual", record["residual"]),
        part=part,
        quantization_error=record["quantization_error"],
        plain_error=record["plain_error"],
        fallback=record["fallback"],
        packed_factors=packed,
    )
