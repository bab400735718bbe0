"""Tardis CSV files into the lake: `ingest_tardis`.

Files are taken by (exchange, symbol, day).  Each group is written under hidden names and becomes visible
in one commit together with its rows of the manifest and of `dim_symbol`: see `groups`.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from clusterlob_gpu.errors import InputError, LakeError
from clusterlob_gpu.lake.encode import TABLE_OF
from clusterlob_gpu.lake.groups import GroupFile, StagedFile, ingest_group, remove_leftovers
from clusterlob_gpu.lake.manifest import FileKey, ManifestRow, read_manifest, reserve, sha256_of, symbol_lock
from clusterlob_gpu.lake.periods import Periods, read_symbol_table
from clusterlob_gpu.lake.symbols import canonical_symbol

EXPECTED = "<exchange>/<type>/YYYY/MM/DD/<SYMBOL>.csv.gz or <exchange>_<type>_YYYY-MM-DD_<SYMBOL>.csv.gz"

_TREE = re.compile(
    r"(?:.*/)?(?P<exchange>[^/]+)/(?P<kind>[^/]+)/(?P<date>\d{4}/\d\d/\d\d)/(?P<symbol>[^/]+)\.csv(\.gz)?"
)
_FLAT = re.compile(
    r"(?:.*/)?(?P<exchange>[^/_]+)_(?P<kind>[^/]+)_(?P<date>\d{4}-\d\d-\d\d)_(?P<symbol>[^/]+)\.csv(\.gz)?"
)
_RANK = {kind: rank for rank, kind in enumerate(TABLE_OF)}


@dataclass(frozen=True)
class IngestProgress:
    """Where an ingest stands: `number` of `of` files, and the rows read of this one."""

    source: str
    number: int
    of: int
    rows: int


@dataclass(frozen=True)
class FileReport:
    """What became of one source file; `anomalies` holds only counts above zero."""

    source: str
    table: str
    exchange: str
    symbol: str
    day: dt.date
    rows_in: int
    rows_written: int
    unchanged: bool
    anomalies: dict[str, int] = field(default_factory=dict)
    negative_latency_share: float | None = None
    median_latency_us: int | None = None
    outputs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class IngestReport:
    """All files of an ingest, and those that it passed over, with the reason."""

    files: tuple[FileReport, ...]
    ignored: tuple[tuple[str, str], ...]
    seconds: float

    @property
    def rows_in(self) -> int:
        """Rows read from changed or new files."""
        return sum(file.rows_in for file in self.files)

    @property
    def rows_written(self) -> int:
        """Rows written to the lake."""
        return sum(file.rows_written for file in self.files)

    @property
    def unchanged(self) -> int:
        """Files that the lake already had."""
        return sum(file.unchanged for file in self.files)

    @property
    def anomalies(self) -> dict[str, int]:
        """Counts by name over the files that were read."""
        total: Counter[str] = Counter()
        for file in self.files:
            total.update(file.anomalies)
        return dict(sorted(total.items()))


@dataclass(frozen=True)
class _Source:
    path: Path
    name: str
    """Path below the ingested folder."""
    kind: str
    key: FileKey


def ingest_tardis(
    source: Path,
    lake: Path,
    *,
    exchanges: Collection[str] | None = None,
    symbols: Collection[str] | None = None,
    start: dt.date | None = None,
    end: dt.date | None = None,
    tables: Collection[str] | None = None,
    symbol_table: Path | None = None,
    progress: Callable[[IngestProgress], None] | None = None,
) -> IngestReport:
    """Bring Tardis CSV files into the lake; files that it has already are skipped.

    source : a file, or a folder at any depth of a tree of files named as in `EXPECTED`.  start, end :
    first and last day of the files, inclusive.  tables : lake tables or vendor data types.
    symbol_table : CSV or Parquet with tick_size, lot_size, price_increment and amount_increment by
    exchange and exchange_symbol; without it they are taken from the values.

    Prices and sizes become exact integers; a row goes to the partition of its own ts_local_us.  Of two
    data types for one table (book_snapshot_25 and _5, quotes and book_ticker) only the first is taken.
    Raises InputError for a missing source or a bad symbol table, and LakeError, naming file and line, for
    a file that cannot be used: nothing of its (exchange, symbol, day) becomes visible, what was ingested
    before it stays.
    """
    began = time.perf_counter()
    source, lake = Path(source), Path(lake)
    given = read_symbol_table(Path(symbol_table)) if symbol_table else {}
    found, ignored = _discover(source)
    wanted = _select(source, found, exchanges, symbols, start, end, tables)
    wanted, shadowed = _preferred(wanted)
    ignored += shadowed
    lake.mkdir(parents=True, exist_ok=True)
    reserve(lake, [(item.key, item.kind, item.name) for item in wanted])
    number = {item.name: n for n, item in enumerate(wanted, 1)}

    def tell(item: _Source, rows: int) -> None:
        if progress:
            progress(IngestProgress(item.name, number[item.name], len(wanted), rows))

    reports: list[FileReport] = []
    for (exchange, symbol), of_symbol in groupby(wanted, lambda item: (item.key.exchange, item.key.symbol)):
        with symbol_lock(lake, exchange, symbol):
            remove_leftovers(lake, exchange, symbol)
            known = read_manifest(lake, exchange, symbol)
            for _, of_day in groupby(of_symbol, lambda item: item.key.day):
                done, passed = _ingest_day(lake, list(of_day), known, given.get((exchange, symbol)), tell)
                reports += done
                ignored += passed
    return IngestReport(tuple(reports), tuple(ignored), time.perf_counter() - began)


def _discover(source: Path) -> tuple[list[_Source], list[tuple[str, str]]]:
    """Files to ingest, and the CSV files that are none of ours, with the reason."""
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; expected {EXPECTED}")
    root = source if source.is_dir() else source.parent
    found, ignored = [], []
    for path in _csv_files(source):
        name = path.relative_to(root).as_posix()
        match = _TREE.fullmatch(path.absolute().as_posix()) or _FLAT.fullmatch(path.name)
        if not match:
            ignored.append((name, f"not named {EXPECTED}"))
        elif match["kind"] not in TABLE_OF:
            ignored.append((name, f"data type {match['kind']} has no table in the lake"))
        else:
            try:
                day = dt.date.fromisoformat(match["date"].replace("/", "-"))
            except ValueError:
                raise LakeError(f"{path}: {match['date']} is no date; rename the file") from None
            key = FileKey(match["exchange"], TABLE_OF[match["kind"]], canonical_symbol(match["symbol"]), day)
            found.append(_Source(path, name, match["kind"], key))
    if not found:
        seen = f"found {ignored[0][0]} ({ignored[0][1]})" if ignored else "found no CSV file"
        raise LakeError(f"{source}: nothing to ingest; expected {EXPECTED}, {seen}")
    return found, ignored


def _csv_files(source: Path) -> Iterator[Path]:
    if source.is_file():
        yield source
        return
    for folder, folders, names in os.walk(source, followlinks=True):
        folders.sort()
        yield from (Path(folder) / name for name in sorted(names) if name.endswith((".csv", ".csv.gz")))


def _select(
    source: Path,
    found: list[_Source],
    exchanges: Collection[str] | None,
    symbols: Collection[str] | None,
    start: dt.date | None,
    end: dt.date | None,
    tables: Collection[str] | None,
) -> list[_Source]:
    names = {canonical_symbol(symbol) for symbol in symbols} if symbols else None
    wanted = [
        item
        for item in found
        if (not exchanges or item.key.exchange in exchanges)
        and (names is None or item.key.symbol in names)
        and (start is None or start <= item.key.day)
        and (end is None or item.key.day <= end)
        and (not tables or item.kind in tables or item.key.table in tables)
    ]
    if not wanted:
        has = sorted({f"{item.key.exchange} {item.key.symbol}" for item in found})
        days = sorted(item.key.day for item in found)
        raise LakeError(
            f"{source}: none of its {len(found)} files is asked for; it has {', '.join(has[:10])} "
            f"from {days[0]} to {days[-1]}. Widen exchange, symbol, dates or tables"
        )
    return wanted


def _preferred(wanted: list[_Source]) -> tuple[list[_Source], list[tuple[str, str]]]:
    """One source per key: the preferred data type."""
    best: dict[FileKey, _Source] = {}
    shadowed = []
    for item in wanted:
        other = best.setdefault(item.key, item)
        if other is item:
            continue
        if other.kind == item.kind:
            raise LakeError(
                f"{item.path} and {other.path} are both {item.kind} of {item.key.exchange} {item.key.symbol} "
                f"on {item.key.day}; keep one of them"
            )
        kept, passed = sorted((item, other), key=lambda source: _RANK[source.kind])
        best[item.key] = kept
        shadowed.append((passed.name, f"{kept.kind} of that day is taken"))
    return sorted(best.values(), key=_order), shadowed


def _order(item: _Source) -> tuple[str, str, dt.date, str]:
    return item.key.exchange, item.key.symbol, item.key.day, item.name


def _ingest_day(
    lake: Path,
    wanted: list[_Source],
    known: Mapping[FileKey, ManifestRow],
    given: Periods | None,
    tell: Callable[[_Source, int], None],
) -> tuple[list[FileReport], list[tuple[str, str]]]:
    """Files of one symbol and day: what became of each, and those passed over."""
    reports, passed, changed = [], [], []
    for source in wanted:
        row, sha256 = known[source.key], sha256_of(source.path)
        if row.is_current(lake, sha256):
            tell(source, row.rows)
            reports.append(_unchanged(lake, source, row))
        elif row.sha256 and _RANK[row.source_type] < _RANK[source.kind]:
            passed.append((source.name, f"the lake has {row.source_type} of that day"))
        else:
            row = replace(row, source_type=source.kind, source=source.name, sha256=sha256)
            row = replace(row, size=source.path.stat().st_size)
            changed.append(GroupFile(source.path, row, partial(tell, source)))
    if changed:
        reports += [_written(lake, staged) for staged in ingest_group(lake, changed, given)]
    return reports, passed


def _unchanged(lake: Path, source: _Source, row: ManifestRow) -> FileReport:
    key = source.key
    outputs = tuple(lake / output for output in row.outputs)
    return FileReport(source.name, key.table, key.exchange, key.symbol, key.day, 0, 0, True, outputs=outputs)


def _written(lake: Path, staged: StagedFile) -> FileReport:
    row, key, latency = staged.row, staged.row.key, staged.latency
    return FileReport(
        source=row.source,
        table=key.table,
        exchange=key.exchange,
        symbol=key.symbol,
        day=key.day,
        rows_in=staged.rows_in,
        rows_written=row.rows,
        unchanged=False,
        anomalies=row.anomalies,
        negative_latency_share=latency[0] if latency else None,
        median_latency_us=latency[1] if latency else None,
        outputs=tuple(lake / output for output in row.outputs),
    )
