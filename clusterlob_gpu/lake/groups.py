"""The files of one symbol and day on their way into the lake, all or none.

Everything is written under hidden names and becomes visible in one commit, together with the manifest,
`dim_symbol` and the evidence from which the symbol's periods follow (see `evidence`).  The first blocks
of all files are encoded first, to learn the increments from them; if a later value needs a finer
increment the group starts again with it.  Rows whose increments change, here or in files that the lake
already has, are rescaled in the same commit.
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
from clusterlob_gpu.lake.encode import Encoder, MisfitError, column_types
from clusterlob_gpu.lake.evidence import (
    INTEGER_TABLES,
    FileName,
    FileValues,
    Seen,
    Step,
    Values,
    joined,
    read_seen,
    remove_staged,
    stage_seen,
)
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
from clusterlob_gpu.lake.periods import Periods, from_dim_rows, rescaled, same_units, to_dim_rows
from clusterlob_gpu.lake.runs import FileOutput
from clusterlob_gpu.lake.symbols import read_dim_symbol, symbol_id
from clusterlob_gpu.schema import US_PER_DAY


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
    values: FileValues
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
    remove_staged(lake, exchange, symbol)
    left = re.compile(rf"\.{re.escape(symbol)}-\d{{6,}}\.[0-9a-f]{{12}}\.tmp")
    for path in lake.glob(f"*/exchange={exchange}/date=*/.*.tmp"):
        if left.fullmatch(path.name):
            path.unlink(missing_ok=True)


class _Group:
    def __init__(self, lake: Path, files: list[GroupFile], given: Periods | None) -> None:
        self.lake, self.files, self.given = lake, files, given
        self.exchange, _, self.symbol, self.day = files[0].row.key
        self.stored = _stored_periods(lake, self.exchange, self.symbol)
        self.seen = self._known()
        if given and self.stored and self.seen.files and not same_units(given, self.stored):
            raise LakeError(
                f"{lake}: increments of {self.exchange} {self.symbol} differ from those of the symbol table; "
                "correct the table, or ingest into a new lake"
            )
        self.needs: FileValues = {self.day: Values()}
        self.periods = self._periods_with_needs()

    def ingest(self) -> list[StagedFile]:
        staged = self._stage_all()
        commit = Commit(self.lake)
        try:
            self._fill(commit, staged)
        except BaseException:
            commit.discard()
            raise
        commit.apply()
        return staged

    def _known(self) -> Seen:
        """Evidence of the files in the lake; periods that it does not explain are kept as they stand."""
        seen = read_seen(self.lake, self.exchange, self.symbol)
        explained = from_dim_rows(to_dim_rows(self.exchange, self.symbol, seen.periods()))
        if not self.stored or explained == self.stored:
            return seen
        stored = ((table, day) for day, table, _ in self._stored_files())
        return Seen.taken_as_given(self.stored, stored)

    def _periods_with_needs(self) -> Periods:
        """Periods of the other files and of what this group is known to need so far."""
        if self.given:
            return self.given
        replaced: dict[FileName, FileValues] = {_name(file.row): {} for file in self.files}
        return self.seen.updated(replaced | {("", self.day): self.needs}).periods()

    def _stage_all(self) -> list[StagedFile]:
        while True:
            staged: list[StagedFile] = []
            try:
                for file in self.files:
                    self._encode_head(file)
                for file in self.files:
                    staged.append(self._stage(file))
                return staged
            except BaseException as error:
                for item in staged:
                    _abort(item.writers)
                if not isinstance(error, MisfitError):
                    raise
                misfit = error
            self._take_into_account(misfit)

    def _encode_head(self, file: GroupFile) -> None:
        encoder = self._encoder(file)
        with closing(self._blocks(file)) as blocks:
            for block in blocks:
                for _ in encoder.encode(block):
                    pass
                return

    def _stage(self, file: GroupFile) -> StagedFile:
        key = file.row.key
        encoder = self._encoder(file)
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
        return StagedFile(row, encoder.rows_in, encoder.latency(), encoder.steps.values(), writers)

    def _encoder(self, file: GroupFile) -> Encoder:
        row = file.row
        return Encoder(file.path, row.source_type, self.exchange, self.symbol, row.file_id, self.periods)

    def _blocks(self, file: GroupFile) -> Generator[CsvBlock, None, None]:
        header = read_header(file.path)
        return read_blocks(file.path, header, column_types(file.path, file.row.source_type, header))

    def _take_into_account(self, misfit: MisfitError) -> None:
        """Make the periods so fine that the misfits are whole."""
        where = f"{misfit.path}, line {misfit.line}: {misfit.unit} {float(misfit.values[0])!r}"
        if self.given:
            raise LakeError(
                f"{where} is no multiple of the symbol table's {misfit.unit}_increment "
                f"{float(misfit.increment)!r}; correct the table or the file"
            )
        increment = decimal_increment(misfit.values)
        if increment is None:
            raise LakeError(f"{where} has more digits than an integer of 53 bits holds; mend the line")
        day, before = day_of_us(misfit.ts), self.periods
        needs = self.needs.get(day, Values())
        step = joined(getattr(needs, misfit.unit), Step(increment, False))
        self.needs[day] = needs._replace(**{misfit.unit: step})
        self.periods = self._periods_with_needs()
        if self.periods == before:
            raise LakeError(
                f"{where} cannot be held with 53 bits in increments of {float(misfit.increment)!r}, which "
                "other values need; mend the line, or the finer ones"
            )

    def _stored_files(self) -> Iterator[tuple[dt.date, str, Path]]:
        """Files with integers of the symbol that the lake has, in the order of days."""
        name = f"exchange={self.exchange}"
        days = {
            dt.date.fromisoformat(folder.name.removeprefix("date="))
            for table in INTEGER_TABLES
            for folder in (self.lake / table / name).glob("date=*")
        }
        for day in sorted(days):
            for table in INTEGER_TABLES:
                for path in symbol_files(self.lake, table, self.exchange, day, self.symbol):
                    yield day, table, path

    def _fill(self, commit: Commit, staged: list[StagedFile]) -> None:
        """What the commit renames, removes and records."""
        commit.manifest_rows = [item.row for item in staged]
        writers = [(item.row.key.table, writer) for item in staged for writer in item.writers]
        commit.renames = [(writer.staged_path, writer.path) for _, writer in writers]
        new = {final for _, final in commit.renames}
        old = {self.lake / output for file in self.files for output in file.row.outputs}
        commit.removals = sorted(old - new)
        seen = self._seen_with(staged)
        periods = seen.periods()
        for at, (table, writer) in enumerate(writers):
            if table in INTEGER_TABLES and _units_differ(self.periods, periods, _day(writer.path)):
                finished = self._rescale(table, writer.staged_path, writer.path, self.periods, periods)
                writer.staged_path.unlink()
                commit.renames[at] = (finished, writer.path)
        if self.stored and not same_units(self.stored, periods):
            for day, table, path in self._stored_files():
                if path not in new | old and _units_differ(self.stored, periods, day):
                    commit.renames.append((self._rescale(table, path, path, self.stored, periods), path))
        dim_rows = to_dim_rows(self.exchange, self.symbol, periods)
        if from_dim_rows(dim_rows) != self.stored:
            commit.dim_rows = dim_rows
        commit.renames.append(stage_seen(self.lake, self.exchange, self.symbol, seen))

    def _seen_with(self, staged: list[StagedFile]) -> Seen:
        """Evidence after this ingest; under a symbol table no value tells anything beyond it."""
        seen = self.seen.updated({_name(item.row): item.values for item in staged})
        return Seen.taken_as_given(self.given, seen.files) if self.given else seen

    def _rescale(self, table: str, source: Path, target: Path, old: Periods, new: Periods) -> Path:
        """A copy of a lake file in the new units, under a hidden name."""
        writer = PartitionWriter(self.lake, table, self.exchange, _day(target), target.stem)
        try:
            with pq.ParquetFile(source) as file:
                for batch in file.iter_batches(SNAPSHOT_ROW_GROUP_ROWS):
                    rows = pa.Table.from_batches([batch])
                    writer.write(rescaled(rows, old, new, str(target)))
            return writer.stage()
        except BaseException:
            writer.abort()
            raise


def _name(row: ManifestRow) -> FileName:
    return row.key.table, row.key.day


def _day(path: Path) -> dt.date:
    """UTC day of the partition in which a lake file lies."""
    return dt.date.fromisoformat(path.parent.name.removeprefix("date="))


def _units_differ(ours: Periods, theirs: Periods, day: dt.date) -> bool:
    start = day_start_us(day)
    return not same_units(ours, theirs, start, start + US_PER_DAY)


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
