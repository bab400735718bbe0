"""Tasks of one (symbol, day): each reads its day, calls the pure steps, writes and returns little.

A task takes one picklable argument, so that it runs alike in a thread and on a Dask worker.  Tables
stay where they are written; what returns is a record, a few sums, or a table of 288 buckets.  What a
task makes is named before it is made (`book_artefact` and its like), so that a plan can ask what exists.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, Self, TypeVar
from urllib.parse import quote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from clusterlob_gpu import backend, context, cores, features, kernels, returns, schema
from clusterlob_gpu.backend import Backend, Columns
from clusterlob_gpu.config import ClusterConfig, Config, RunConfig
from clusterlob_gpu.context import BookCarry, BookSummary
from clusterlob_gpu.errors import ClusterlobError
from clusterlob_gpu.features import MetTrades, Piece
from clusterlob_gpu.files import Location
from clusterlob_gpu.lake import layout, native, symbols
from clusterlob_gpu.lake.native import SymbolLake
from clusterlob_gpu.schema import FEATURES, Context, Trades
from clusterlob_gpu.store import Artefact, Made, Store, array_hash, load_column, save_columns, source_hash

_HERE = Path(__file__).parent
_READING: list[ModuleType | Path] = [
    backend,
    native,
    symbols,
    layout,
    schema,
    _HERE / "lake/decode.py",
    _HERE / "lake/device_decode.py",
    _HERE / "lake/pages.py",
]
_KERNELS: list[ModuleType | Path] = [kernels, _HERE / "device_kernels.py"]
CONTEXT_CODE = source_hash(__file__, [*_KERNELS, context, *_READING])
FEATURE_CODE = source_hash(__file__, [*_KERNELS, context, features, *_READING])
MID_CODE = source_hash(__file__, [*_KERNELS, context, returns, schema])

_BOOK_GROUP_ROWS = 65_536

_TAIL_ROWS = 20_000
"""Trades read at first for the tail of a day; all of them if these do not suffice."""


def symbol_folder(exchange: str, name: str) -> str:
    """Name of a symbol's folders in the store."""
    return f"{quote(exchange, safe='')}-{quote(name, safe='')}"


@dataclass(frozen=True)
class DayJob(Generic[Config]):
    """What every task of a symbol's day needs to know."""

    lake: SymbolLake
    store: Location
    config: Config
    day: date
    backend: backend.Name = "cpu"

    @property
    def on(self) -> Backend:
        """What computes, in this process."""
        return backend.of(self.backend)

    @property
    def machine(self) -> dict[str, str]:
        """What names artefacts whose floats or files differ between backends; nothing on the CPU."""
        return {} if self.backend == "cpu" else {"backend": self.backend}

    def artefact(self, stage: str, **inputs: Any) -> Artefact:
        """The artefact of a stage that is made of these inputs."""
        return Artefact(stage, self.symbol_folder, self.day.isoformat(), inputs)

    def require_unchanged(self, table: str, artefact: Artefact) -> None:
        """Raise if the day's files are no longer those that the artefact is named after."""
        self.require_same(table, self.day, artefact.inputs["files"])

    def require_same(self, table: str, day: date, fingerprint: str) -> None:
        """Raise if a day's files are no longer those of the fingerprint."""
        # A copy of the lake looks again.
        if replace(self.lake).fingerprint(table, day) != fingerprint:
            raise ClusterlobError(
                f"{self.lake.symbol.name} {day}: {table} was changed in the lake while it was read; "
                "give the same command again"
            )

    @property
    def symbol_folder(self) -> str:
        """Name of the symbol's folders in the store."""
        return symbol_folder(self.lake.symbol.exchange, self.lake.symbol.name)


ClusterDay = DayJob[ClusterConfig]
Answer = TypeVar("Answer")


def with_room(on: Backend, work: Callable[[], Answer]) -> Answer:
    """What `work` gives, with less and less memory as long as the backend finds that there is too little."""
    for attempt in count():
        try:
            return work()
        except MemoryError:
            if not on.make_room(attempt):
                raise
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class BookDay:
    """A day's reduced book: where it is, and what it adds to the carry."""

    day: date
    made: Made
    rows: int
    skipped: dict[str, int]
    summary: BookSummary

    @classmethod
    def of(cls, day: date, made: Made) -> Self:
        """From what the store has kept."""
        kept = made.record
        summary = BookSummary.from_record(kept["summary"])
        return cls(day, made.brief(), kept["rows"], kept["skipped"], summary)


@dataclass(frozen=True)
class State:
    """What a day starts from: the book at midnight, and the raw features of the last trades."""

    book: BookCarry | None
    tail: np.ndarray


@dataclass(frozen=True)
class TailDay:
    """Raw features (6, m) of the last window - 1 trades of a day, fewer if the day has fewer."""

    day: date
    made: Made | None
    """None where a day without any book before it needs no computing."""
    raw: np.ndarray


@dataclass(frozen=True)
class FeatureDay:
    """A day's feature artefact and its counts."""

    day: date
    made: Made
    trades: int
    kept: int
    """Trades that have z-scores."""
    dropped: dict[str, int]


def book_artefact(job: DayJob[RunConfig]) -> Artefact:
    """Name of a day's reduced book: it depends on the lake's files, the table and the depth alone."""
    config = job.config
    return job.artefact(
        "book",
        code=CONTEXT_CODE,
        files=job.lake.fingerprint(config.book, job.day),
        book=config.book,
        depth=config.depth if config.book == "book_snapshot_25" else 1,
    )


def reduce_book(job: DayJob[RunConfig]) -> BookDay:
    """Reduce a day's book rows to valid flat rows, once per lake."""
    artefact = book_artefact(job)

    def fill(folder: Path) -> dict[str, Any]:
        book, depth = artefact.inputs["book"], artefact.inputs["depth"]
        rows, skipped = context.valid_rows(job.lake.read_book(job.day, book, depth, on=job.on), job.on)
        _write_rows(rows, folder / "rows.parquet", job.on)
        job.require_unchanged(book, artefact)
        summary = context.summarise(rows, job.on).as_record()
        return {"rows": len(rows["ts"]), "skipped": skipped, "summary": summary}

    return BookDay.of(job.day, with_room(job.on, lambda: Store(job.store).make(artefact, fill)))


_ROWS = pa.schema(
    [pa.field(name, pa.float64() if name == "tick" else pa.int64(), False) for name in context.ROW_COLUMNS]
)


def _write_rows(rows: Columns, path: Path, on: Backend) -> None:
    """Write book rows from the host: nothing of trades, and a tenth of what was read."""
    pq.write_table(
        pa.table([on.to_host(rows[name]) for name in _ROWS.names], _ROWS),
        path,
        row_group_size=_BOOK_GROUP_ROWS,
        compression="none",  # packed deltas leave nothing to compress
        write_statistics=["ts"],
        use_dictionary=["tick"],
        column_encoding={name: "DELTA_BINARY_PACKED" for name in _ROWS.names if name != "tick"},
    )


def book_rows(
    job: DayJob[RunConfig],
    book: BookDay | None,
    carry: BookCarry | None = None,
    names: Sequence[str] = context.ROW_COLUMNS,
) -> Columns:
    """Columns of a day's valid book rows, none without a book, after the row that is carried into it."""
    room = int(carry is not None)
    if book is not None:
        rows: Columns = job.on.decode.columns(_rows_path(job, book), None, names, room)
    else:
        rows = {name: job.on.xp.empty(room, _ROWS.field(name).type.to_pandas_dtype()) for name in names}
    if carry is not None:
        for name in names:
            rows[name][0] = getattr(carry, name)
    return rows


def first_rows(job: DayJob[RunConfig], book: BookDay, names: Sequence[str], until: int) -> Columns:
    """Columns of the valid book rows before `until` (us) of a day."""
    # Without any, all: cuDF takes no empty list of row groups.
    groups = [at for at, ts in enumerate(_group_starts(job, book)) if ts < until] or None
    rows: Columns = job.on.decode.columns(_rows_path(job, book), groups, names, 0)
    soon = rows["ts"] < until
    return {name: values[soon] for name, values in rows.items()}


def _rows_path(job: DayJob[RunConfig], book: BookDay) -> Path:
    return Store(job.store).folder(book.made.address) / "rows.parquet"


def _group_starts(job: DayJob[RunConfig], book: BookDay) -> list[int]:
    """Time (us) of the first row of every row group of a day's book."""
    if not book.rows:
        return []  # its file has a row group all the same, which begins nowhere
    with pq.ParquetFile(_rows_path(job, book)) as file:
        return [file.metadata.row_group(at).column(0).statistics.min for at in range(file.num_row_groups)]


def day_context(job: ClusterDay, book: BookDay | None, carry: BookCarry | None) -> Context:
    """The book that a day's trades meet: its own rows and the state before them."""
    return _context_of(job, book_rows(job, book, carry), carry)


def _context_of(job: ClusterDay, rows: Columns, carry: BookCarry | None) -> Context:
    return context.make_context(rows, carry, job.lake.symbol.qty_unit, job.config.spread, job.on)


def _late_context(job: ClusterDay, book: BookDay | None, carry: BookCarry | None, since: int) -> Context:
    """`day_context` for trades from `since` (us) on, of the last rows alone where those know enough."""
    starts = _group_starts(job, book) if book is not None else []
    # Of the row groups that begin before `since` the last but one: changes may lie further back.
    first = bisect_left(starts, since) - 2
    if first > 0 and book is not None:
        late_groups = list(range(first, len(starts)))
        rows = job.on.decode.columns(_rows_path(job, book), late_groups, context.ROW_COLUMNS, 0)
        late = _context_of(job, rows, None)
        met = int(job.on.xp.count_nonzero(late.ts < since)) - 1
        if met >= 0 and kernels.NO_TIME not in [int(changes[met]) for changes in late.changes]:
            return late
    return day_context(job, book, carry)


class Meetings:
    """A day's trades with the book they met, read and joined as they are asked for; their counts so far."""

    def __init__(self, job: ClusterDay, book: Context) -> None:
        self._job, self._book = job, book
        self.trades = 0
        self.met = 0
        self.dropped = dict.fromkeys(features.DROPS.values(), 0)

    def __iter__(self) -> Iterator[MetTrades]:
        job = self._job
        for trades in job.lake.trade_stretches(job.day, job.on.rows_read, on=job.on):
            met = _meet(job, trades, self._book)
            self.trades += len(trades.ts)
            self.met += len(met)
            for why, number in met.dropped.items():
                self.dropped[why] += number
            yield met


def _meet(job: ClusterDay, trades: Trades, book: Context) -> MetTrades:
    config = job.config
    return features.meet(
        trades,
        book,
        max_staleness=config.max_staleness,
        inclusive=config.asof == "inclusive",
        on=job.on,
    )


TailTask = tuple[ClusterDay, BookDay | None, BookCarry | None]


def tail_artefact(task: TailTask) -> Artefact | None:
    """Name of a day's tail: of its trades, its book, and the book before it; none without any book."""
    job, book, carry = task
    if book is None and carry is None:
        return None
    return job.artefact("tail", **_met_inputs(job, book, carry), config=_feature_settings(job.config))


def _met_inputs(job: ClusterDay, book: BookDay | None, carry: BookCarry | None) -> dict[str, Any]:
    return job.machine | {
        "code": FEATURE_CODE,
        "files": job.lake.fingerprint("trades", job.day),
        "book": book.made.address if book else None,
        "carry": asdict(carry) if carry else None,
    }


def _feature_settings(config: ClusterConfig) -> dict[str, Any]:
    return config.model_dump(include={"window", "max_staleness", "same_side", "spread", "asof"})


def own_tail(task: TailTask) -> TailDay:
    """Raw features of the last window - 1 trades of a day."""
    job, book, carry = task
    artefact, nothing = tail_artefact(task), np.empty((len(FEATURES), 0))
    if artefact is None:
        return TailDay(job.day, None, nothing)

    def fill(folder: Path) -> dict[str, Any]:
        wanted = job.config.window - 1
        for last in (max(_TAIL_ROWS, 2 * wanted), None):
            trades = job.lake.read_trades(job.day, last, on=job.on)
            around = _late_context(job, book, carry, int(trades.ts[0]))
            met = _meet(job, trades, around)
            if len(met) >= wanted:
                break
        met = met.part(slice(max(0, len(met) - wanted), None))
        raw = job.on.xp.empty((len(FEATURES), len(met)))
        features.raw_features(met, around, raw, own_side=job.config.same_side == "own", on=job.on)
        save_columns(folder, raw=job.on.to_host(raw))
        job.require_unchanged("trades", artefact)
        return {}

    store = Store(job.store)
    made = with_room(job.on, lambda: store.make(artefact, fill))
    return TailDay(job.day, made.brief(), np.array(load_column(store.folder(made.address), "raw")))


FeatureTask = tuple[ClusterDay, BookDay, State]


def feature_artefact(task: FeatureTask) -> Artefact:
    """Name of a day's features: of its trades, its book, and the state it starts from."""
    job, book, state = task
    return job.artefact(
        "features",
        **_met_inputs(job, book, state.book),
        tail=array_hash(state.tail),
        config=_feature_settings(job.config),
    )


def make_features(task: FeatureTask) -> FeatureDay:
    """z-scores of a day's trades as float32; their trades are met again when they are labelled."""
    job, _, state = task
    artefact = feature_artefact(task)

    def fill(folder: Path) -> dict[str, Any]:
        shape = len(FEATURES), job.lake.size("trades", job.day)[0]
        with job.on.keeping(folder, artefact.address, "z", shape) as z:
            meetings, known = _score(task, z)
        job.require_unchanged("trades", artefact)
        counts = meetings.dropped, meetings.met, known, state.tail.shape[1]
        dropped = features.without_scores(*counts, job.config.window)
        return {"trades": meetings.trades, "kept": known, "dropped": dropped}

    made = with_room(job.on, lambda: Store(job.store).make(artefact, fill))
    kept = made.record
    return FeatureDay(job.day, made.brief(), **kept)


def _score(task: FeatureTask, z: Any) -> tuple[Meetings, int]:
    """Write z-scores of a day's met trades to the first columns of z, NaN to the rest.

    Gives the trades, and how many have z-scores.
    """
    job, book, state = task
    around, known = day_context(job, book, state.book), 0
    meetings = Meetings(job, around)
    for piece in day_pieces(task, meetings, around):
        scores = job.on.xp.empty((len(FEATURES), len(piece.met)), np.float32)
        known += features.z_scores(piece, job.config.window, scores, job.on)
        z[:, piece.rows] = scores
    none = slice(meetings.met, z.shape[1])
    z[:, none] = job.on.xp.full((len(FEATURES), z.shape[1] - meetings.met), np.nan, np.float32)
    return meetings, known


def day_pieces(task: FeatureTask, met: Iterable[MetTrades], around: Context) -> Iterator[Piece]:
    """`features.pieces` of a day."""
    job, _, state = task
    own_side = job.config.same_side == "own"
    met = met if job.backend == "gpu" else cores.ahead(met)
    return features.pieces(met, around, state.tail, window=job.config.window, own_side=own_side, on=job.on)


def day_scores(task: FeatureTask, made: FeatureDay) -> Any:
    """z-scores (6, n) float32 of a day's met trades, as `make_features` made them; NaN where one has none.

    A trade that met no book takes a column of NaN at the end.
    """
    job, address = task[0], made.made.address
    folder = Store(job.store).folder(address)

    def again() -> Columns:
        z = job.on.xp.empty((len(FEATURES), made.trades), np.float32)
        _score(task, z)
        return {"z": z}

    return job.on.kept(folder, address, ["z"], again)["z"]


MidsTask = tuple[DayJob[RunConfig], BookDay, BookCarry | None, np.ndarray]


@dataclass(frozen=True)
class MidsDay:
    """Mids at sorted times (us) that one covered day decides: where they are."""

    made: Made


def mids_artefact(task: MidsTask) -> Artefact:
    """Name of a day's mids: of its book, the book before it, and the times."""
    job, book, carry, times = task
    return job.artefact(
        "mids",
        code=MID_CODE,
        book=book.made.address,
        carry=asdict(carry) if carry else None,
        times=array_hash(times),
        max_staleness=job.config.max_staleness,
    )


def mids_day(task: MidsTask) -> MidsDay:
    """Twice the mid (integer price units, NaN = null) at the times asked of a day."""
    job, book, carry, times = task

    def fill(folder: Path) -> dict[str, Any]:
        rows = book_rows(job, book, carry, ("ts", "bid", "ask"))
        staleness = job.config.max_staleness
        mids = returns.mids_at(times, rows["ts"], rows["bid"] + rows["ask"], staleness, job.on)
        save_columns(folder, ts=times, mid2=mids)
        return {}

    return MidsDay(with_room(job.on, lambda: Store(job.store).make(mids_artefact(task), fill)).brief())


def read_mids(store: Store, held: Sequence[MidsDay]) -> pd.Series:
    """Twice the mid by time (us), from the mids of days."""
    folders = [store.folder(day.made.address) for day in held]
    ts = [np.empty(0, np.int64), *(load_column(folder, "ts") for folder in folders)]
    mid2 = [np.empty(0), *(load_column(folder, "mid2") for folder in folders)]
    return pd.Series(np.concatenate(mid2), index=np.concatenate(ts))


def next_day(day: date) -> date:
    """The day after."""
    return day + timedelta(days=1)


def previous_day(day: date) -> date:
    """The day before."""
    return day - timedelta(days=1)
