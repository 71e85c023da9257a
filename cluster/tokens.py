"""`tokens.parquet`: the tokenised rows that training and evaluation read, and the map that makes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.durable import UnitStore, reading, write_atomic
from cluster.rows import EncodedRow, RowFormat, RowProblem, encode_row
from lowrank.reading import parse_json, shown

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

TOKENS_FILE = "tokens.parquet"
_META = b"rankline"


def tokens_schema() -> pa.Schema:
    """Columns of `tokens.parquet`."""
    import pyarrow as pa

    return pa.schema(
        [
            ("row", pa.int64()),
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
            ("num_answer_tokens", pa.int32()),
            ("prompt", pa.string()),
            ("prompt_ids", pa.list_(pa.int32())),
            ("answer", pa.string()),
        ]
    )


def _mapped_schema() -> pa.Schema:
    import pyarrow as pa

    columns = [field for field in tokens_schema() if field.name != "row"]
    extra = [("path", pa.string()), ("truncated", pa.bool_()), ("problem", pa.string())]
    return pa.schema([*columns, *(pa.field(name, kind) for name, kind in extra)])


@lru_cache(maxsize=2)
def _tokenizer(directory: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    # Long prompts are cut by us, at the front; the tokenizer's own warning about them would be wrong.
    tokenizer.model_max_length = 1 << 62
    return tokenizer


@lru_cache(maxsize=2)
def _bring_meta(shards: UnitStore) -> Path:
    return shards.fetch("meta")


@dataclass(frozen=True)
class EncodeBatch:
    """The map of Ray Data and of the in-process reader: a table of rows (with `path`) → a table of tokens.

    A bad row becomes a `problem`: only the driver knows the position of a row in its file, and reports it.
    """

    tokenizer_dir: str
    row_format: RowFormat
    max_length: int
    shards: UnitStore | None = None
    """Units of `shard`, where `tokenizer_dir` is their `meta` and may have to be brought to this node."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Tokenise a batch, row by row, in order."""
        import pyarrow as pa

        if self.shards is not None:
            _bring_meta(self.shards)
        tokenizer = _tokenizer(self.tokenizer_dir)
        rows = [self._encode(row, tokenizer) for row in batch.to_pylist()]
        return pa.Table.from_pylist(rows, schema=_mapped_schema())

    def _encode(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        try:
            encoded = encode_row(row, tokenizer, self.row_format, self.max_length)
        except RowProblem as problem:
            return {"path": row["path"], "problem": str(problem)}
        return {"path": row["path"], "truncated": encoded.truncated, **_columns(encoded)}


def _columns(row: EncodedRow) -> dict[str, Any]:
    names = ("input_ids", "labels", "num_answer_tokens", "prompt", "prompt_ids", "answer")
    return {name: getattr(row, name) for name in names}


def write_tokens(mapped: pa.Table, out: Path, facts: dict[str, Any]) -> Path:
    """Write rows in their order as one Parquet file with deterministic bytes; `facts` go into its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [field.name for field in tokens_schema() if field.name != "row"]
    table = mapped.select(columns).add_column(0, "row", pa.array(range(mapped.num_rows), pa.int64()))
    table = table.cast(tokens_schema()).combine_chunks()
    table = table.replace_schema_metadata({_META: json.dumps(facts, sort_keys=True).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=65536)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / TOKENS_FILE, sink.getvalue().to_pybytes())
    return out / TOKENS_FILE


def _require_whole(table: pa.Table) -> None:
    import pyarrow.compute as pc

    inner = [pc.list_flatten(table[name]) for name in ("input_ids", "labels", "prompt_ids")]
    if any(column.null_count for column in (*table.columns, *inner)):
        raise ValueError("a row holds nothing where a value must be")
    tokens, labels = (pc.list_value_length(table[name]) for name in ("input_ids", "labels"))
    if not tokens.equals(labels):
        raise ValueError("a row has not as many labels as tokens")


@dataclass(frozen=True)
class TokenTable:
    """The rows of a `tokens.parquet` in memory."""

    table: pa.Table

    @classmethod
    def read(cls, path: Path) -> TokenTable:
        """Open the file, or the directory that holds it.

        Raises:
            DamagedError: it is no table of tokens.
        """
        import pyarrow.parquet as pq

        file = path / TOKENS_FILE if path.is_dir() else path
        with reading(file):
            table = pq.read_table(file)
            table.validate(full=True)
            if not table.schema.equals(tokens_schema()):
                raise ValueError(f"its columns are {shown(table.schema.names)}")
            _require_whole(table)
        return cls(table)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What `prepare_tokens` wrote beside the rows: format, max_length, counts.

        Raises:
            DamagedError: they are no mapping.
        """
        with reading(Path(TOKENS_FILE)):
            facts = parse_json((self.table.schema.metadata or {}).get(_META, b"{}"))
            return dict(facts)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens per row."""
        import pyarrow.compute as pc

        values: list[int] = pc.list_value_length(self.table["input_ids"]).to_pylist()
        return values

    @cached_property
    def num_answer_tokens(self) -> list[int]:
        """Scored tokens per row."""
        values: list[int] = self.table["num_answer_tokens"].to_pylist()
        return values

    def input_ids(self, row: int) -> np.ndarray[Any, Any]:
        """Token ids of a row."""
        return self._values("input_ids", row)

    def labels(self, row: int) -> np.ndarray[Any, Any]:
        """Labels of a row, −100 where there is no loss; not shifted."""
        return self._values("labels", row)

    def _values(self, column: str, row: int) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = self.table[column][row].values.to_numpy()
        return values

    def pairs(self) -> Sequence[tuple[str, str]]:
        """(prompt, answer) of every row."""
        return list(zip(self.table["prompt"].to_pylist(), self.table["answer"].to_pylist(), strict=True))

    def head(self, rows: int) -> TokenTable:
        """The first rows."""
        return TokenTable(self.table.slice(0, rows))
