"""A first look at the rows, before anything expensive: every row has its fields, and no row stands on both sides.

The stages check again with the tokenizer in hand; here a bad row costs seconds instead of the stages before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import DataConfig
from cluster.durable import canonical
from cluster.errors import DataError
from cluster.rows import FIELDS, RowFormat

#: Larger sources are looked at in their first row only; their rows are then judged by the stages alone.
MAX_BYTES = 256 * 1024 * 1024
#: Bytes of JSON per token, roughly, for English text and the usual tokenizers.
BYTES_PER_TOKEN = 4.0


@dataclass(frozen=True)
class RowStats:
    """What the first look found; `tokens_per_row` is bytes / 4, at most the longest row."""

    num_rows: int
    tokens_per_row: float


def check_rows(config: DataConfig) -> dict[str, RowStats]:
    """Look at `train` and `heldout`.

    Raises:
        DataError: no rows, a row without its field, or a held-out row that also stands in the training rows.
    """
    train, stats = _read(config.train, config)
    heldout, heldout_stats = _read(config.heldout, config)
    shared = [(train[key], number) for key, number in heldout.items() if key in train]
    if shared:
        pairs = ", ".join(f"{first} = {second}" for first, second in shared[:5])
        raise DataError(
            f"compare data.train with data.heldout: {len(shared)} held-out row(s) also stand in the training rows "
            f"(training row = held-out row: {pairs}{', ...' if len(shared) > 5 else ''}). None may. "
            "Remove them from one of the two."
        )
    return {"train": stats, "heldout": heldout_stats}


def _read(source: str, config: DataConfig) -> tuple[dict[bytes, int], RowStats]:
    """Every row's identity with its number, and the statistics."""
    from cluster.data import format_of
    from cluster.sources import numbered_rows, open_source

    where = open_source(source)
    row_format = format_of(where, config)
    size = sum(Path(file).stat().st_size for file in where.files)
    if size > MAX_BYTES:
        return {}, RowStats(size // 400, min(100.0, config.max_length))
    seen: dict[bytes, int] = {}
    total = count = 0
    for file, number, row in numbered_rows(where):
        _check_row(where, file, number, row, row_format, config)
        identity = canonical([row[name] for name in FIELDS[row_format]])
        count += 1
        total += min(len(identity), int(BYTES_PER_TOKEN * config.max_length))
        seen.setdefault(identity, count)
    return seen, RowStats(count, total / BYTES_PER_TOKEN / max(count, 1))


def _check_row(where: Any, file: str, number: int, row: Any, row_format: RowFormat, config: DataConfig) -> None:
    from cluster.sources import raise_for_row
    from cluster.tokens import EncodeBatch

    if not isinstance(row, Mapping):
        raise DataError(f"read {file}, row {number}: it is {type(row).__name__}; allowed is an object with fields.")
    for name in FIELDS[row_format]:
        value = row.get(name)
        if value is None:
            raise_for_row(
                where, file, number, f"the field {name!r} is missing", EncodeBatch("", row_format, config.max_length)
            )
