"""The files of one symbol and day on their way into the lake, all or none.

Everything is written under hidden names and becomes visible in one commit, together with the manifest
and `dim_symbol`.  The first blocks of all files are encoded first, to learn the increments from them;
if a later value needs a finer increment the group starts again with it, and rows that the lake already
has from that day on are rescaled in the same commit.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.lake.csv_blocks import CsvBlock, read_blocks, read_header
from clusterlob_gpu.lake.encode import Encoder, MisfitError, Steps, column_types
from clusterlob_gpu.lake.increments import decimal_increment
from clusterlob_gpu.lake.layout import (
    SNAPSHOT_ROW_GROUP_ROWS,
    PartitionWriter,
    day_of_us,
    day_start_us,
    file_stem,
    symbol_files,
)
from clusterlob_gpu.lake.manifest import Commit, ManifestRow, recover
from clusterlob_gpu.lake.periods import (
    WHOLE_NUMBERS,
    Periods,
    Units,
    from_dim_rows,
    refine,
    rescaled,
    same_units,
    to_dim_rows,
)
from clusterlob_gpu.lake.runs import FileOutput
from clusterlob_gpu.lake.symbols import read_dim_symbol, symbol_id
from clusterlob_gpu.schema import US_PER_DAY

BOOK_TABLES = ("book_snapshot_25", "quotes")
INTEGER_TABLES = (*BOOK_TABLES, "trades", "liquidations")


@dataclass(frozen=True)
class GroupFile:
    """A source file; `row` is its manifest row with the new content's sha256 and size, the old outputs."""

    path: Path
    row: ManifestRow
    tell: Callable[[int], None]
    """Called with the rows read so far."""


@dataclass(frozen=True)
class StagedFile:
    """A source file that is written; `row` is its manifest row to be."""

    row: ManifestRow
    rows_in: int
    latency: tuple[float, int] | None
    writers: list[PartitionWriter]


def ingest_group(lake: Path, files: list[GroupFile], given: Periods | None) -> list[StagedFile]:
    """Bring the files of one symbol and day into the lake in one commit; the caller holds the symbol's lock.

    given : units from a symbol table, which every value must fit.  Raises LakeError if a file cannot be
    used, and then the lake is as it was.
    """
    return _Group(lake, files, given).ingest()


def remove_leftovers(lake: Path, exchange: str, symbol: str) -> None:
    """Finish an interrupted commit, then delete what a killed ingest of this symbol left behind."""
    recover(lake)
    left = re.compile(rf"\.{re.escape(symbol)}-\d{{6,}}\.[0-9a-f]{{12}}\.tmp")
    for path in lake.glob(f"*/exchange={exchange}/date=*/.*.tmp"):
        if left.fullmatch(path.name):
            path.unlink(missing_ok=True)


class _Group:
    def __init__(self, lake: Path, files: list[GroupFile], given: Periods | None) -> None:
        self.lake, self.files, self.given = lake, files, given
        self.exchange, _, self.symbol, self.day = files[0].row.key
        self.stored = _stored_periods(lake, self.exchange, self.symbol)
        self.first_day = next((day for day, _, _ in self._stored_files(INTEGER_TABLES)), None)
        if given and self.stored and self.first_day and not same_units(given, self.stored):
            raise LakeError(
                f"{lake}: increments of {self.exchange} {self.symbol} differ from those of the symbol table; "
                "correct the table, or ingest into a new lake"
            )
        self.periods: Periods = given or self.stored or WHOLE_NUMBERS

    def ingest(self) -> list[StagedFile]:
        staged, steps = self._stage_all()
        commit = Commit(self.lake)
        try:
            if not self.given:
                self._learn_steps(steps)
            self._fill(commit, staged)
        except BaseException:
            commit.discard()
            raise
        commit.apply()
        return staged

    def _stage_all(self) -> tuple[list[StagedFile], Steps]:
        while True:
            steps = Steps()
            staged: list[StagedFile] = []
            try:
                for file in self.files:
                    self._encode_head(file)
                for file in self.files:
                    staged.append(self._stage(file, steps))
                return staged, steps
            except BaseException as error:
                for item in staged:
                    _abort(item.writers)
                if not isinstance(error, MisfitError):
                    raise
                misfit = error
            self.periods = self._finer_periods(misfit)

    def _encode_head(self, file: GroupFile) -> None:
        encoder = self._encoder(file, Steps())
        with closing(self._blocks(file)) as blocks:
            for block in blocks:
                for _ in encoder.encode(block):
                    pass
                return

    def _stage(self, file: GroupFile, steps: Steps) -> StagedFile:
        key = file.row.key
        encoder = self._encoder(file, steps)
        output = FileOutput(self.lake, key.table, key.exchange, file_stem(key.symbol, file.row.file_id))
        last_line = 1
        try:
            with closing(self._blocks(file)) as blocks:
                for block in blocks:
                    for day, rows in encoder.encode(block):
                        output.add(day, rows)
                        encoder.counts["rows_other_day"] += len(rows) * (day != key.day)
                    last_line = int(block.lines[-1]) if len(block.lines) else last_line
                    file.tell(encoder.rows_in)
            writers, repeats = output.finish()
        except BaseException:
            output.abort()
            raise
        encoder.counts.update(repeats)
        row = replace(
            file.row,
            rows=sum(writer.rows for writer in writers),
            last_line=last_line,
            anomalies={name: int(count) for name, count in sorted(encoder.counts.items()) if count},
            outputs=tuple(writer.path.relative_to(self.lake).as_posix() for writer in writers),
            ingested_at=dt.datetime.now(dt.UTC),
        )
        return StagedFile(row, encoder.rows_in, encoder.latency(), writers)

    def _encoder(self, file: GroupFile, steps: Steps) -> Encoder:
        row = file.row
        return Encoder(
            file.path, row.source_type, self.exchange, self.symbol, row.file_id, self.periods, steps
        )

    def _blocks(self, file: GroupFile) -> Generator[CsvBlock, None, None]:
        header = read_header(file.path)
        return read_blocks(file.path, header, column_types(file.path, file.row.source_type, header))

    def _finer_periods(self, misfit: MisfitError) -> Periods:
        """Periods in which the misfits are whole, from the day of the first of them on."""
        where = f"{misfit.path}, line {misfit.line}: {misfit.unit} {float(misfit.values[0])!r}"
        if self.given:
            raise LakeError(
                f"{where} is no multiple of the symbol table's {misfit.unit}_increment "
                f"{float(misfit.increment)!r}; correct the table or the file"
            )
        needed = decimal_increment(misfit.values)
        if needed is None:
            raise LakeError(f"{where} has more digits than an integer of 53 bits holds; mend the line")
        periods = refine(
            self.periods, self._period_start(day_of_us(misfit.ts)), Units(**{misfit.unit: needed})
        )
        if periods == self.periods:
            raise LakeError(
                f"{where} cannot be held with 53 bits in increments of {float(misfit.increment)!r}, which "
                "other values need; mend the line, or the finer ones"
            )
        return periods

    def _learn_steps(self, steps: Steps) -> None:
        """Tick and lot from the values of the files' own day; other days count only if it has no rows."""
        days = [self.day] if self.day in steps.days() else steps.days()
        start = self._period_start(self.day)
        for day in days:
            self.periods = refine(self.periods, start, steps.units(day, self._has_book(), bool(self.stored)))

    def _period_start(self, day: dt.date) -> int:
        """Midnight of `day`, or the beginning of time where no earlier rows would be affected."""
        return 0 if self.first_day is None or day <= self.first_day else day_start_us(day)

    def _has_book(self) -> bool:
        in_group = any(file.row.key.table in BOOK_TABLES for file in self.files)
        return in_group or any(True for _ in self._stored_files(BOOK_TABLES))

    def _stored_files(self, tables: tuple[str, ...]) -> Iterator[tuple[dt.date, str, Path]]:
        """Files of the symbol that the lake has, in the order of days."""
        name = f"exchange={self.exchange}"
        days = {
            dt.date.fromisoformat(folder.name.removeprefix("date="))
            for table in tables
            for folder in (self.lake / table / name).glob("date=*")
        }
        for day in sorted(days):
            for table in tables:
                for path in symbol_files(self.lake, table, self.exchange, day, self.symbol):
                    yield day, table, path

    def _fill(self, commit: Commit, staged: list[StagedFile]) -> None:
        """What the commit renames, removes and records."""
        for item in staged:
            commit.renames += [(writer.staged_path, writer.path) for writer in item.writers]
            commit.manifest_rows.append(item.row)
        new = {final for _, final in commit.renames}
        old = {self.lake / output for file in self.files for output in file.row.outputs}
        commit.removals = sorted(old - new)
        if self.stored and not same_units(self.stored, self.periods):
            for day, table, path in self._stored_files(INTEGER_TABLES):
                if path not in new | old and self._units_differ(day):
                    commit.renames.append((self._rescale(day, table, path), path))
        if self.periods != self.stored:
            commit.dim_rows = to_dim_rows(self.exchange, self.symbol, self.periods)

    def _units_differ(self, day: dt.date) -> bool:
        start = day_start_us(day)
        return not same_units(self.stored, self.periods, start, start + US_PER_DAY)

    def _rescale(self, day: dt.date, table: str, path: Path) -> Path:
        """A copy of a lake file in the new units, under a hidden name."""
        writer = PartitionWriter(self.lake, table, self.exchange, day, path.stem)
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(SNAPSHOT_ROW_GROUP_ROWS):
                    rows = pa.Table.from_batches([batch])
                    writer.write(rescaled(rows, self.stored, self.periods, str(path)))
            return writer.stage()
        except BaseException:
            writer.abort()
            raise


def _abort(writers: list[PartitionWriter]) -> None:
    for writer in writers:
        writer.abort()


def _stored_periods(lake: Path, exchange: str, symbol: str) -> Periods:
    """Periods that `dim_symbol` has of the symbol; none if it is new."""
    rows = read_dim_symbol(lake)
    mine = rows[(rows["exchange"] == exchange) & (rows["exchange_symbol"] == symbol)]
    ids = set(mine["symbol_id"].tolist())
    if ids - {symbol_id(exchange, symbol)}:
        raise LakeError(
            f"{lake}: {exchange} {symbol} has symbol_id {min(ids)}, not made by this program; "
            "ingest into a new lake"
        )
    return from_dim_rows(mine)
