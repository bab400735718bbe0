"""Columns of Parquet row groups as CuPy arrays, decoded by cuDF; the twin of `decode`.

cuDF does not look at page checksums: what they protect is as safe as the disk.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cudf
import cupy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clusterlob_gpu import device_kernels
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.files import Location
from clusterlob_gpu.kernels import NO_LEVEL
from clusterlob_gpu.lake import decode
from clusterlob_gpu.lake.decode import LISTS, expect_integers, expect_lists

_LIST_BYTES = 1 << 29
"""Decoded bytes of a list column that are on the device at a time, as far as row groups allow."""


def flat(
    where: Location, source: pa.NativeFile, meta: pq.FileMetaData, groups: list[int], names: list[str]
) -> dict[str, Any]:
    """`decode.flat`; trade ids, which are text, are read on the host."""
    columns: dict[str, Any] = {}
    if "trade_id" in names:
        ids = decode.flat(where, source, meta, groups, ["trade_id"])
        columns["trade_id"] = cupy.asarray(ids["trade_id"])
    integers = [name for name in names if name not in columns]
    frame, schema = _read(where, source, groups, integers), meta.schema.to_arrow_schema()
    for name in integers:
        column = frame[name]
        expect_integers(schema.field(name).type, column.null_count, where, name)
        values = (column.fillna(NO_LEVEL) if column.null_count else column).values
        columns[name] = values if name in decode.AS_STORED else values.astype(np.int64, copy=False)
    return {name: columns[name] for name in names}


def levels(
    where: Location, source: pa.NativeFile, meta: pq.FileMetaData, groups: list[int], depth: int
) -> dict[str, Any]:
    """`decode.levels`: one list column at a time, reduced where it was decoded."""
    expect_lists(meta.schema.to_arrow_schema(), where)
    found: dict[str, list[Any]] = {name: [] for names in LISTS.values() for name in names}
    for some in _batches(meta, groups):
        for name, (best, total) in LISTS.items():
            first, depths = _reduced(_read(where, source, some, [name])[name], depth)
            found[best].append(first)
            found[total].append(depths)
    del found["unused"]
    return {name: cupy.concatenate(parts) for name, parts in found.items()}


def columns(path: Path, groups: list[int] | None, names: Sequence[str], room: int) -> dict[str, Any]:
    """`decode.columns`."""
    frame, found = cudf.read_parquet(str(path), columns=list(names), row_groups=groups), {}
    for name in names:
        values = frame[name].values
        found[name] = cupy.empty(room + len(values), values.dtype)
        found[name][room:] = values
    return found


def _reduced(lists: Any, depth: int) -> tuple[Any, Any]:
    """First entry and depth sum of every list; a null list is empty, a null entry NO_LEVEL."""
    lengths = lists.list.len().fillna(0).values.astype(np.int64)
    offsets = cupy.concatenate([cupy.zeros(1, np.int64), cupy.cumsum(lengths)])
    entries = lists.list.leaves
    values = (entries.fillna(NO_LEVEL) if entries.null_count else entries).values
    best, total = cupy.empty(len(lengths), np.int64), cupy.empty(len(lengths), np.int64)
    device_kernels.reduce_levels(offsets, values.astype(np.int64, copy=False), depth, best, total)
    return best, total


def _batches(meta: pq.FileMetaData, groups: list[int]) -> Iterator[list[int]]:
    """Row groups in runs whose widest list column is about _LIST_BYTES once decoded."""
    run, held = list[int](), 0
    for group in groups:
        size = meta.row_group(group).total_byte_size // len(LISTS)
        if run and held + size > _LIST_BYTES:
            yield run
            run, held = [], 0
        run.append(group)
        held += size
    if run:
        yield run


def _read(where: Location, source: pa.NativeFile, groups: list[int], names: list[str]) -> Any:
    """The columns as a cuDF frame: from the file itself where it has a path, else from its bytes."""
    if where.path is not None:
        content: Any = str(where.path)
    else:
        source.seek(0)
        content = io.BytesIO(source.read())
    with _faults(where):
        return cudf.read_parquet(content, columns=names, row_groups=groups)


@contextmanager
def _faults(where: Location) -> Iterator[None]:
    """cuDF raises RuntimeError and ValueError for what it cannot decode."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        raise LakeError(f"{where}: not a readable Parquet file ({line}); ingest it again") from None
