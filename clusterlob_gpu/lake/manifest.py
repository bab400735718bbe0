"""The lake's list of ingested files, and the commit that changes files, manifest and dim_symbol as one.

A source file is known by (exchange, table, symbol, day) and keeps its file_id for ever.  What an ingest
has written waits under hidden names until `Commit.apply`: the list of renames and removals goes to a
journal first, in one step.  A crash before that leaves the lake as it was; a crash after it is finished
by `recover`, which every ingest calls first.  While `pending(lake)` holds, files of two states may lie
side by side.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock

from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.files import Location
from clusterlob_gpu.lake.symbols import DIM_SYMBOL_FILE, dim_symbol_table, read_dim_symbol

MANIFEST_FILE = "manifest.parquet"
JOURNAL_FILE = ".commit.json"
LOCK_DIR = ".locks"

_HIDDEN = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_NEVER = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

MANIFEST = pa.schema(
    [
        pa.field("file_id", pa.int32(), nullable=False),
        pa.field("exchange", pa.string(), nullable=False),
        pa.field("table", pa.string(), nullable=False),
        pa.field("symbol", pa.string(), nullable=False),
        pa.field("day", pa.date32(), nullable=False),
        pa.field("source_type", pa.string(), nullable=False, metadata={"meaning": "the vendor's data type"}),
        pa.field(
            "source", pa.string(), nullable=False, metadata={"meaning": "path below the ingested folder"}
        ),
        pa.field("size", pa.int64(), nullable=False, metadata={"meaning": "bytes as stored"}),
        pa.field(
            "sha256",
            pa.string(),
            nullable=False,
            metadata={"meaning": "of the stored bytes; empty: never finished"},
        ),
        pa.field("rows", pa.int64(), nullable=False, metadata={"meaning": "rows in the lake"}),
        pa.field("last_line", pa.int64(), nullable=False, metadata={"meaning": "line of the last row"}),
        pa.field("anomalies", pa.string(), nullable=False, metadata={"meaning": "counts by name, JSON"}),
        pa.field(
            "outputs", pa.list_(pa.string()), nullable=False, metadata={"meaning": "paths below the lake"}
        ),
        pa.field("ingested_at", pa.timestamp("us", "UTC"), nullable=False),
    ]
)


class FileKey(NamedTuple):
    """What makes a source file the same file, wherever it lies and whatever it is called."""

    exchange: str
    table: str
    symbol: str
    day: dt.date


@dataclass(frozen=True)
class ManifestRow:
    """One source file; `sha256` is empty while the file has an id but no rows in the lake."""

    file_id: int
    key: FileKey
    source_type: str
    source: str
    size: int = 0
    sha256: str = ""
    rows: int = 0
    last_line: int = 0
    anomalies: dict[str, int] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    ingested_at: dt.datetime = _NEVER

    def is_current(self, lake: Path, sha256: str) -> bool:
        """Whether the lake holds exactly this content."""
        return self.sha256 == sha256 and all((lake / output).exists() for output in self.outputs)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes as they are stored."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(
    lake: Path, exchange: str | None = None, symbol: str | None = None
) -> dict[FileKey, ManifestRow]:
    """The source files that the lake knows: all, or those of an exchange and symbol."""
    table = _read(lake)
    for name, value in (("exchange", exchange), ("symbol", symbol)):
        if value is not None:
            table = table.filter(pc.equal(table[name], value))
    return {row.key: row for row in map(_from_record, table.to_pylist())}


def lake_lock(lake: Path) -> FileLock:
    """Held for the moment of a change to the lake's shared files; reentrant."""
    return _lock(lake, "lake")


def symbol_lock(lake: Path, exchange: str, symbol: str) -> FileLock:
    """Held while a symbol's files are ingested: its increments must not change under way."""
    return _lock(lake, f"{exchange}-{symbol}")


def _lock(lake: Path, name: str) -> FileLock:
    folder = lake / LOCK_DIR
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock", is_singleton=True)


def reserve(lake: Path, wanted: Sequence[tuple[FileKey, str, str]]) -> dict[FileKey, ManifestRow]:
    """Manifest rows of the wanted (key, source type, source); new files get the next free ids."""
    with lake_lock(lake):
        recover(lake)
        known = read_manifest(lake)
        next_id = max((row.file_id for row in known.values()), default=0) + 1
        new = [
            ManifestRow(next_id + i, key, source_type, source)
            for i, (key, source_type, source) in enumerate(w for w in wanted if w[0] not in known)
        ]
        if new:
            _staged_manifest(lake, new).replace(lake / MANIFEST_FILE)
    return {key: known[key] for key, _, _ in wanted if key in known} | {row.key: row for row in new}


@dataclass
class Commit:
    """Changes that become visible together; all paths are absolute and lie in the lake."""

    lake: Path
    renames: list[tuple[Path, Path]] = field(default_factory=list)
    removals: list[Path] = field(default_factory=list)
    manifest_rows: list[ManifestRow] = field(default_factory=list)
    dim_rows: pd.DataFrame | None = None
    """All rows of one symbol; they replace those that `dim_symbol` has of it."""

    def apply(self) -> None:
        """Make the changes visible: after the journal is written there is no way back."""
        with lake_lock(self.lake):
            recover(self.lake)
            renames = list(self.renames)
            if self.dim_rows is not None:
                renames.append((_staged_dim_symbol(self.lake, self.dim_rows), self.lake / DIM_SYMBOL_FILE))
            if self.manifest_rows:
                staged = _staged_manifest(self.lake, self.manifest_rows)
                renames.append((staged, self.lake / MANIFEST_FILE))
            for staged, _ in renames:
                _sync(staged)
            _write_journal(self.lake, renames, self.removals)
            recover(self.lake)

    def discard(self) -> None:
        """Drop what was staged; the lake stays as it was."""
        for staged, _ in self.renames:
            staged.unlink(missing_ok=True)


def pending(lake: str | Path | Location) -> bool:
    """Whether a commit was interrupted; the next ingest, or `recover`, finishes it."""
    return (Location.of(lake) / JOURNAL_FILE).entry() is not None


def recover(lake: Path) -> None:
    """Finish an interrupted commit, if there is one, and drop what was staged beside it.

    Raises LakeError if the journal cannot be read.
    """
    journal = lake / JOURNAL_FILE
    with lake_lock(lake):
        if journal.exists():
            _apply_journal(lake, journal)
        for path in lake.glob(".*.tmp"):
            if _HIDDEN.fullmatch(path.name):
                path.unlink()


def _apply_journal(lake: Path, journal: Path) -> None:
    """Every step may be done already: an interrupted pass is repeated as a whole."""
    try:
        steps: dict[str, Any] = json.loads(journal.read_text())
    except ValueError:
        raise LakeError(f"{journal}: not readable; delete it and ingest the last files again") from None
    for staged, final in steps["renames"]:
        if (lake / staged).exists():
            os.replace(lake / staged, lake / final)
    for path in steps["removals"]:
        (lake / path).unlink(missing_ok=True)
    journal.unlink()


def _write_journal(lake: Path, renames: list[tuple[Path, Path]], removals: list[Path]) -> None:
    steps = {
        "renames": [[str(path.relative_to(lake)) for path in pair] for pair in renames],
        "removals": [str(path.relative_to(lake)) for path in removals],
    }
    staged = _hidden(lake / JOURNAL_FILE)
    staged.write_text(json.dumps(steps))
    _sync(staged)
    staged.replace(lake / JOURNAL_FILE)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.{uuid.uuid4().hex[:12]}.tmp")


def _staged_dim_symbol(lake: Path, rows: pd.DataFrame) -> Path:
    known = read_dim_symbol(lake)
    exchange, symbol = rows["exchange"].iloc[0], rows["exchange_symbol"].iloc[0]
    others = known[(known["exchange"] != exchange) | (known["exchange_symbol"] != symbol)]
    staged = _hidden(lake / DIM_SYMBOL_FILE)
    pq.write_table(dim_symbol_table(rows if others.empty else pd.concat([others, rows])), staged)
    return staged


def _staged_manifest(lake: Path, rows: list[ManifestRow]) -> Path:
    known = _read(lake)
    ids = pa.array([row.file_id for row in rows], pa.int32())
    others = known.filter(pc.invert(pc.is_in(known["file_id"], value_set=ids)))
    new = pa.Table.from_pylist([_to_record(row) for row in rows], schema=MANIFEST)
    staged = _hidden(lake / MANIFEST_FILE)
    pq.write_table(pa.concat_tables([others, new]).sort_by("file_id"), staged, compression="zstd")
    return staged


def _read(lake: Path) -> pa.Table:
    path = Path(lake) / MANIFEST_FILE
    if not path.exists():
        return MANIFEST.empty_table()
    table = pq.ParquetFile(path).read()
    missing = [name for name in MANIFEST.names if name not in table.column_names]
    if missing:
        raise LakeError(f"{path}: column {missing[0]} is missing; this is no manifest of this version")
    return table.select(MANIFEST.names).cast(MANIFEST)


def _to_record(row: ManifestRow) -> dict[str, Any]:
    record = {name: getattr(row, name) for name in MANIFEST.names if hasattr(row, name)}
    return record | row.key._asdict() | {"anomalies": json.dumps(row.anomalies, sort_keys=True)}


def _from_record(record: dict[str, Any]) -> ManifestRow:
    key = FileKey(**{name: record.pop(name) for name in FileKey._fields})
    anomalies, outputs = json.loads(record.pop("anomalies")), tuple(record.pop("outputs"))
    return ManifestRow(key=key, anomalies=anomalies, outputs=outputs, **record)
