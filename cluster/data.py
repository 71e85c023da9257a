"""Rows → tokens: JSONL and Parquet through Ray Data (or in process), one deterministic `tokens.parquet` out.

A row's number is its place in the sorted list of files and within its file, so that neither the number of blocks nor
the order in which Ray finishes them can change a byte of the output.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.durable import UnitStore
from cluster.errors import ClusterError, DataError
from cluster.failures import translate
from cluster.rows import FIELDS, RowFormat, detect_format
from cluster.sources import Source, first_row, open_source, raise_for_row, read_table
from cluster.tokens import EncodeBatch, TokenTable, write_tokens

if TYPE_CHECKING:
    import pyarrow as pa

    from cluster.config import DataConfig

_BATCH_ROWS = 256
#: Bytes of files, as they are stored, from which Ray Data is worth its start, which takes seconds.
WORTH_RAY_BYTES = 4 * 2**20


def prepare_tokens(
    source: str, tokenizer_dir: Path | UnitStore, config: DataConfig, out: Path, *, use_ray: bool
) -> dict[str, Any]:
    """Tokenise `source` into `out/tokens.parquet`.

    Args:
        source: JSONL (.jsonl, .json) or Parquet: a file, a directory or a glob; a path or a pyarrow.fs URI.
        tokenizer_dir: Directory with the tokenizer, or the units of `shard`, of which each node brings `meta`.
        config: Format and longest row.
        out: Directory of the result.
        use_ray: Read and tokenise with Ray Data (needs a joined cluster) where files are not so small that its start
            takes longer than the work; else in this process. The bytes are equal.

    Returns:
        rows, tokens, answer_tokens, truncated (rows whose prompt lost its beginning), longest, format, max_length.

    Raises:
        DataError: no such file, no rows, or a row that cannot be used; the message names file and row.
    """
    import pyarrow as pa

    where = open_source(source)
    row_format = format_of(where, config)
    if isinstance(tokenizer_dir, UnitStore):
        encode = EncodeBatch(str(tokenizer_dir.fetch("meta")), row_format, config.max_length, tokenizer_dir)
    else:
        encode = EncodeBatch(str(tokenizer_dir), row_format, config.max_length)
    by_ray = use_ray and where.num_bytes >= WORTH_RAY_BYTES
    parts = list(_map_with_ray(where, encode) if by_ray else _map_in_process(where, encode))
    mapped = _in_file_order(where, pa.concat_tables(parts) if parts else None)
    _raise_for_problems(where, mapped, encode)
    facts = _facts(mapped, row_format, config)
    write_tokens(mapped, out, facts)
    return facts


def format_of(where: Source, config: DataConfig) -> RowFormat:
    """The configured format, or with `auto` the one that the first row's fields make.

    Raises:
        DataError: no rows, or fields of no known format.
    """
    fields = sorted(first_row(where, str(config.format)))
    if config.format != "auto":
        return config.format
    found = detect_format(fields)
    if found is None:
        wanted = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FIELDS.items())
        raise DataError(
            f"read {where.files[0]}, row 1: the fields are {fields}, which is no known format. Allowed are {wanted}. "
            "Rename the fields."
        )
    return found


def _map_in_process(where: Source, encode: EncodeBatch) -> Iterator[pa.Table]:
    import pyarrow as pa

    for file in where.files:
        table = read_table(where, file, encode)
        table = table.append_column("path", pa.array([file] * table.num_rows, pa.string()))
        for start in range(0, table.num_rows, _BATCH_ROWS):
            yield encode(table.slice(start, _BATCH_ROWS))


def _map_with_ray(where: Source, encode: EncodeBatch) -> Iterator[pa.Table]:
    """The same map as a Ray Data pipeline; `preserve_order` keeps the rows of a file in their order."""
    import ray.data
    from ray.exceptions import RayError

    # Importing it sets its loggers up; it announces every execution, and a failed one raises.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    before = context.execution_options.preserve_order, context.enable_progress_bars
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    try:
        for dataset in _datasets(where):
            mapped = dataset.map_batches(encode, batch_format="pyarrow", batch_size=_BATCH_ROWS)
            yield from mapped.iter_batches(batch_format="pyarrow", batch_size=None)
    except (RayError, OSError, ValueError) as error:
        # Arrow names a block, not a row: read again here, where the row can be found.
        for file in where.files:
            read_table(where, file, encode)
        if isinstance(error, RayError) and isinstance(lost := translate(error, f"read {where.name}"), ClusterError):
            raise lost from error
        raise DataError(f"read {where.name}: {str(error).strip().splitlines()[-1][:300]}") from error
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before


def _datasets(where: Source) -> Iterator[Any]:
    import ray.data

    from cluster.sources import parse_options

    text = [file for file in where.files if not file.endswith(".parquet")]
    binary = [file for file in where.files if file.endswith(".parquet")]
    if text:
        yield ray.data.read_json(
            text, filesystem=where.filesystem, include_paths=True, file_extensions=None, parse_options=parse_options()
        )
    if binary:
        yield ray.data.read_parquet(binary, filesystem=where.filesystem, include_paths=True, file_extensions=None)


def _in_file_order(where: Source, mapped: pa.Table | None) -> pa.Table:
    """Sort by file, keeping the order within one."""
    import pyarrow as pa

    if mapped is None or mapped.num_rows == 0:
        raise DataError(f"read {where.name}: the data set has no rows. Give at least one row.")
    place = {file: index for index, file in enumerate(where.files)}
    order = [(place[path], index) for index, path in enumerate(mapped["path"].to_pylist())]
    return mapped.take(pa.array([index for _, index in sorted(order)], pa.int64()))


def _raise_for_problems(where: Source, mapped: pa.Table, encode: EncodeBatch) -> None:
    numbers: Counter[str] = Counter()
    for path, problem in zip(mapped["path"].to_pylist(), mapped["problem"].to_pylist(), strict=True):
        numbers[path] += 1
        if problem is not None:
            raise_for_row(where, path, numbers[path], problem, encode)


def _facts(mapped: pa.Table, row_format: RowFormat, config: DataConfig) -> dict[str, Any]:
    import pyarrow.compute as pc

    lengths = pc.list_value_length(mapped["input_ids"])
    return {
        "rows": mapped.num_rows,
        "tokens": pc.sum(lengths).as_py(),
        "answer_tokens": pc.sum(mapped["num_answer_tokens"]).as_py(),
        "truncated": pc.sum(mapped["truncated"]).as_py(),
        "longest": pc.max(lengths).as_py(),
        "format": row_format,
        "max_length": config.max_length,
    }


def refuse_duplicates(train: Path, heldout: Path) -> None:
    """Refuse a held-out row that also stands in the training rows.

    Raises:
        DataError: at least one (prompt, answer) stands in both.
    """
    seen: dict[tuple[str, str], int] = {}
    for number, pair in enumerate(TokenTable.read(train).pairs(), start=1):
        seen.setdefault(pair, number)
    shared = [
        (seen[pair], number) for number, pair in enumerate(TokenTable.read(heldout).pairs(), start=1) if pair in seen
    ]
    if shared:
        rows = ", ".join(f"{first} = {second}" for first, second in shared[:5])
        raise DataError(
            f"compare data.train with data.heldout: {len(shared)} held-out row(s) also stand in the training rows "
            f"(training row = held-out row: {rows}{', ...' if len(shared) > 5 else ''}). None may. "
            "Remove them from one of the two."
        )


def label_set(tokens: Sequence[Path], config: DataConfig) -> list[str] | None:
    """The closed set of answers that accuracy is measured over, or None for free text.

    Args:
        tokens: The `tokens.parquet` of training and held-out rows.
        config: `labels`, or `max_labels` for the distinct answers.

    Raises:
        DataError: a row's answer is not one of `labels`.
    """
    tables = [TokenTable.read(path) for path in tokens]
    if any(table.facts.get("format") == "text" for table in tables):
        return None
    answers = {answer for table in tables for _, answer in table.pairs()}
    if config.labels is None:
        return sorted(answers) if len(answers) <= config.max_labels else None
    unknown = sorted(answers - set(config.labels))
    if unknown:
        raise DataError(
            f"check data.labels: {len(unknown)} answer(s) are not among the {len(config.labels)} labels, the first is "
            f"{unknown[0][:60]!r}. Add it to data.labels, correct the rows, or set data.labels to null."
        )
    return list(config.labels)
