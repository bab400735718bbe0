"""Columns of Parquet row groups as NumPy arrays; `device_decode` gives CuPy arrays of the same.

The lists of snapshots are reduced, as soon as they are decoded, to the few integers that are needed, so that
memory stays small: by `pages` where they are as this lake writes them, else by Arrow in small batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clusterlob_gpu import kernels
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.files import Location
from clusterlob_gpu.lake import pages
from clusterlob_gpu.schema import LAKE_TABLES, NO_ID

SNAPSHOT_BATCH = 16_384
_STORE_BATCH = 16_384
_FLOATS = {f.name for f in LAKE_TABLES["derivative_ticker"] if pa.types.is_floating(f.type)}
LISTS = {
    "bids_px": ("bid", "unused"),
    "bids_sz": ("bid_sz", "bid_depth"),
    "asks_px": ("ask", "unused"),
    "asks_sz": ("ask_sz", "ask_depth"),
}
"""List columns of a snapshot: what their first entry is, and what the sum of the first ones."""
NULLABLE = {"bid_px_int", "bid_sz_int", "ask_px_int", "ask_sz_int"}
"""Integer columns that may have nulls, which become NO_LEVEL."""
AS_STORED = {"side", "file_id", "file_line_number"}
"""Integer columns that are only compared."""


def parquet(where: Location, source: pa.NativeFile, meta: pq.FileMetaData) -> pq.ParquetFile:
    """A Parquet reader that finds damage where the file has checksums.

    On S3 it joins the reads of neighbouring columns into few requests; a disk needs no such buffers.
    """
    return pq.ParquetFile(
        source, metadata=meta, pre_buffer=where.path is None, page_checksum_verification=True
    )


def flat(
    where: Location, source: pa.NativeFile, meta: pq.FileMetaData, groups: list[int], names: list[str]
) -> dict[str, Any]:
    """Flat columns of row groups: trade ids as numbers, floats with NaN for null, integers as they are.

    Raises LakeError for a column of another kind, or with nulls where it may have none.
    """
    table = parquet(where, source, meta).read_row_groups(groups, columns=names, use_threads=False)
    return {name: _column(table[name], where, name) for name in names}


def levels(
    where: Location, source: pa.NativeFile, meta: pq.FileMetaData, groups: list[int], depth: int
) -> dict[str, Any]:
    """First entries and depth sums of a snapshot's list columns, by the names in `LISTS`."""
    file = parquet(where, source, meta)
    expect_lists(file.schema_arrow, where)
    rows = sum(meta.row_group(group).num_rows for group in groups)
    return _reduced(file, source, groups, rows, depth)


def columns(path: Path, groups: list[int] | None, names: Sequence[str], room: int) -> dict[str, Any]:
    """Columns without nulls of a Parquet file of the store, or of some row groups, after `room` free entries.

    Without threads: those of Arrow may outlive the interpreter and abort it.
    """
    with pq.ParquetFile(path) as file:
        chosen = list(range(file.num_row_groups)) if groups is None else groups
        rows = room + sum(file.metadata.row_group(group).num_rows for group in chosen)
        kinds = {name: file.schema_arrow.field(name).type.to_pandas_dtype() for name in names}
        found, at = {name: np.empty(rows, kind) for name, kind in kinds.items()}, room
        # Small batches: Arrow's memory is used again and again.
        for batch in file.iter_batches(_STORE_BATCH, chosen, list(names), use_threads=False):
            for name, column in found.items():
                column[at : at + len(batch)] = batch[name].to_numpy()
            at += len(batch)
    return found


def expect_lists(schema: pa.Schema, where: Location) -> None:
    """Raise LakeError unless the list columns are lists of integers."""
    for name in LISTS:
        kind = schema.field(name).type
        _expect(_lists_integers(kind), kind, "list of integers", where, name)


def _column(column: pa.ChunkedArray, where: Location, name: str) -> np.ndarray:
    """A flat column as NumPy: trade ids as numbers, floats with NaN for null, integers as int64."""
    if name == "trade_id":
        return numeric_ids(column)
    if name in _FLOATS:
        _expect(pa.types.is_floating(column.type), column.type, "float", where, name)
        return column.to_numpy().astype(np.float64, copy=False)
    return _int_column(column, where, name)


def _expect(ok: bool, kind: pa.DataType, wanted: str, where: Location, name: str) -> None:
    if not ok:
        raise LakeError(f"{where}: column {name} is {kind}, it must be {wanted}; ingest it again")


def numeric_ids(ids: pa.ChunkedArray) -> np.ndarray:
    """Trade ids as int64; NO_ID for one that is not a plain decimal number of 1 to 18 digits."""
    if not pa.types.is_string(ids.type):
        ids = ids.cast(pa.string())
    short = pc.less_equal(pc.binary_length(ids), 18)
    plain = pc.fill_null(pc.and_(short, pc.and_(pc.string_is_ascii(ids), pc.utf8_is_decimal(ids))), False)
    return pc.if_else(plain, ids, str(NO_ID)).cast(pa.int64()).to_numpy()


def _int_column(column: pa.ChunkedArray, where: Location, name: str) -> np.ndarray:
    """An integer column, prices and sizes as int64; nulls become NO_LEVEL (allowed in quotes only)."""
    expect_integers(column.type, column.null_count, where, name)
    if column.null_count:
        column = pc.fill_null(column.cast(pa.int64()), pa.scalar(kernels.NO_LEVEL, pa.int64()))
    values = column.to_numpy()
    return values if name in AS_STORED else values.astype(np.int64, copy=False)


def expect_integers(kind: pa.DataType, nulls: int, where: Location, name: str) -> None:
    """Raise LakeError unless a column is of integers, without nulls where it may have none."""
    _expect(pa.types.is_integer(kind), kind, "integer", where, name)
    if nulls and name not in NULLABLE:
        raise LakeError(f"{where}: column {name} has {nulls} nulls; it may have none")


def _reduced(
    file: pq.ParquetFile, source: pa.NativeFile, groups: list[int], rows: int, depth: int
) -> dict[str, np.ndarray]:
    """First entries and depth sums of the list columns; ArrowInvalid unless they have `rows` rows."""
    found = {name: np.empty(rows, np.int64) for names in LISTS.values() for name in names}
    reader, at = pages.ListReader(source, depth), 0
    leaves = {file.schema.column(leaf).path.split(".")[0]: leaf for leaf in range(len(file.schema))}
    for group in groups:
        meta = file.metadata.row_group(group)
        part = slice(at, at := at + meta.num_rows)
        into = {name: [found[column][part] for column in columns] for name, columns in LISTS.items()}
        chunks = {name: meta.column(leaves[name]) for name in LISTS}
        if not _reduce_pages(reader, file.schema_arrow, chunks, into):
            _reduce_with_arrow(file, group, depth, into)
    del found["unused"]
    return found


Into = dict[str, list[np.ndarray]]
"""Where the first entries and the depth sums of each list column go."""


def _reduce_pages(reader: pages.ListReader, schema: pa.Schema, chunks: dict[str, Any], into: Into) -> bool:
    """Reduce the list columns of a row group by their pages; False where Arrow has to do it."""
    found = {name: pages.list_levels(schema.field(name)) for name in chunks}
    levels = {name: one for name, one in found.items() if one is not None}
    if len(levels) < len(chunks) or not reader.fetch(list(chunks.values())):
        return False
    return all(reader.reduce(chunk, levels[name], *into[name]) for name, chunk in chunks.items())


def _reduce_with_arrow(file: pq.ParquetFile, group: int, depth: int, into: Into) -> None:
    """`kernels.reduce_levels` of the list columns of a row group, whatever their encoding."""
    at, rows = 0, file.metadata.row_group(group).num_rows
    for batch in file.iter_batches(SNAPSHOT_BATCH, [group], list(into), use_threads=False):
        upto = at + len(batch)
        if upto > rows:
            raise pa.ArrowInvalid(f"more rows of lists than the {rows} of the other columns")
        for name, columns in into.items():
            best, total = (column[at:upto] for column in columns)
            kernels.reduce_levels(*_list_buffers(batch[name]), depth, best, total)
        at = upto
    if at != rows:
        raise pa.ArrowInvalid(f"{at} rows of lists beside {rows} of the other columns")


def _lists_integers(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_integer(kind.value_type)


def _list_buffers(lists: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and end-to-end values of a list column; a null list is empty, a null entry NO_LEVEL."""
    if pa.types.is_fixed_size_list(lists.type) or lists.null_count:
        lists = pc.fill_null(lists.cast(pa.list_(pa.int64())), [])
    values = lists.values
    if values.null_count:
        values = pc.fill_null(values, pa.scalar(kernels.NO_LEVEL, pa.int64()))
    return lists.offsets.to_numpy(), values.to_numpy()
