"""Where rows come from: files, directories and globs of JSONL and Parquet on any file system of pyarrow."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from cluster.errors import DataError
from cluster.rows import RowProblem, encode_row

if TYPE_CHECKING:
    import pyarrow as pa

    from cluster.tokens import EncodeBatch

_EXTENSIONS = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Source:
    """The sorted files behind `data.train` or `data.heldout`."""

    name: str
    filesystem: Any
    files: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(info.size or 0 for info in self.filesystem.get_file_info(list(self.files)))


def open_source(source: str) -> Source:
    """List the files of a path, directory, glob or URI.

    Raises:
        DataError: nothing there, or no file of a known kind.
    """
    from pyarrow import fs

    if "://" in source:
        filesystem, path = fs.FileSystem.from_uri(source)
    else:
        filesystem, path = fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(source))
    files = tuple(sorted(file for file in _list(filesystem, path) if file.endswith(_EXTENSIONS)))
    if not files:
        raise DataError(
            f"read {source}: no file with {', '.join(_EXTENSIONS)} is there. Give a file, a directory or a glob."
        )
    return Source(source, filesystem, files)


def _list(filesystem: Any, path: str) -> Iterator[str]:
    from pyarrow import fs

    if glob.has_magic(path):
        base = path[: min(path.index(char) for char in "*?[" if char in path)].rpartition("/")[0]
        selector = fs.FileSelector(base, recursive=True, allow_not_found=True)
        found = (info.path for info in filesystem.get_file_info(selector) if info.is_file)
        # A star stays within one directory, as in a shell, unless it is doubled.
        yield from (file for file in found if fnmatch.fnmatch(file, path) and ("**" in path or _depth(file, path)))
        return
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        yield path
    elif info.type == fs.FileType.Directory:
        selector = fs.FileSelector(path, recursive=True)
        yield from (entry.path for entry in filesystem.get_file_info(selector) if entry.is_file)


def _depth(file: str, pattern: str) -> bool:
    return file.count("/") == pattern.count("/")


def parse_options() -> Any:
    """Arrow's JSON options: fixed types, for inference by block would make dates of some answers and not of others."""
    import pyarrow as pa
    import pyarrow.json as pj

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    fields = [(name, pa.string()) for name in ("prompt", "completion", "text")]
    schema = pa.schema([*fields, ("messages", pa.list_(message))])
    return pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")


def read_table(where: Source, file: str, encode: EncodeBatch) -> pa.Table:
    """One file as a table.

    Raises:
        DataError: it cannot be parsed; the message names the row.
    """
    import pyarrow as pa
    import pyarrow.json as pj
    import pyarrow.parquet as pq

    try:
        if file.endswith(".parquet"):
            return pq.read_table(file, filesystem=where.filesystem)
        if _is_array(where, file):
            return pa.Table.from_pylist(list(_raw_rows(where, file)))
        with where.filesystem.open_input_stream(file) as handle:
            data = handle.read()
        if not data.strip():
            return pa.table({"text": pa.array([], pa.string())})
        options = pj.ReadOptions(block_size=max(1 << 20, len(data) + 1))
        return pj.read_json(pa.BufferReader(data), read_options=options, parse_options=parse_options())
    except (pa.ArrowException, ValueError, OSError) as error:
        _find_bad_row(where, file, encode)
        raise DataError(f"read {file}: {error}. Give JSON lines or Parquet.") from error


def _is_array(where: Source, file: str) -> bool:
    if not file.endswith(".json"):
        return False
    with where.filesystem.open_input_stream(file) as handle:
        return bool(handle.read(4096).lstrip().startswith(b"["))


def _raw_rows(where: Source, file: str) -> Iterator[Any]:
    """The rows of a file as Python reads them, with every field."""
    import pyarrow.parquet as pq

    if file.endswith(".parquet"):
        for batch in pq.ParquetFile(file, filesystem=where.filesystem).iter_batches():
            yield from batch.to_pylist()
        return
    with where.filesystem.open_input_stream(file) as handle:
        data = handle.read()
    if _is_array(where, file):
        yield from json.loads(data)
        return
    for number, line in enumerate((line for line in data.splitlines() if line.strip()), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataError(f"read {file}, row {number}: it is no JSON ({error}). Correct the row.") from error


def numbered_rows(where: Source) -> Iterator[tuple[str, int, Any]]:
    """(file, number within it, row) of every row as Python reads it.

    Raises:
        DataError: a line that is no JSON.
    """
    for file in where.files:
        for number, row in enumerate(_raw_rows(where, file), start=1):
            yield file, number, row


def first_row(where: Source, expected: str) -> dict[str, Any]:
    """The non-null fields of the first row.

    Raises:
        DataError: no rows at all, or the first one is no object.
    """
    for file in where.files:
        for row in _raw_rows(where, file):
            if not isinstance(row, dict):
                raise DataError(f"read {file}, row 1: it is {type(row).__name__}; allowed is an object with fields.")
            return {name: value for name, value in row.items() if value is not None}
    raise DataError(f"read {where.name}: the data set has no rows ({expected} rows expected). Give at least one row.")


def _find_bad_row(where: Source, file: str, encode: EncodeBatch) -> None:
    from cluster.tokens import _tokenizer

    if file.endswith(".parquet"):
        return
    tokenizer = _tokenizer(encode.tokenizer_dir)
    for number, row in enumerate(_raw_rows(where, file), start=1):
        if not isinstance(row, dict):
            raise DataError(f"read {file}, row {number}: it is {type(row).__name__}; allowed is an object with fields.")
        try:
            encode_row(row, tokenizer, encode.row_format, encode.max_length)
        except RowProblem as problem:
            raise_for_row(where, file, number, str(problem), encode)


def raise_for_row(where: Source, file: str, number: int, problem: str, encode: EncodeBatch) -> NoReturn:
    """Report one bad row with everything that helps to find it."""
    row: Any = next((row for at, row in enumerate(_raw_rows(where, file), start=1) if at == number), None)
    fields = sorted(row) if isinstance(row, dict) else []
    raise DataError(
        f"read {file}, row {number} as {encode.row_format}: {problem}. The row has the fields {fields}. "
        f"Correct or remove the row, or set data.format and data.max_length (now {encode.max_length}) to fit."
    )
