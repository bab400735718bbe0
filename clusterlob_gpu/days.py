"""Tasks of one (symbol, day): each reads its day, calls the pure steps, writes and returns little.

A task takes one picklable argument, so that it runs alike in a thread and on a Dask worker.  Tables
stay where they are written; what returns is a record, a few sums, or a table of 288 buckets.  What a
task makes is named before it is made (`book_artefact` and its like), so that a plan can ask what exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Generic, Self
from urllib.parse import quote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from clusterlob_gpu import context, features, kernels, returns, schema
from clusterlob_gpu.config import ClusterConfig, Config, RunConfig
from clusterlob_gpu.context import BookCarry, BookSummary
from clusterlob_gpu.errors import ClusterlobError
from clusterlob_gpu.features import MetTrades
from clusterlob_gpu.files import Location
from clusterlob_gpu.lake import layout, native, symbols
from clusterlob_gpu.lake.native import SymbolLake
from clusterlob_gpu.schema import FEATURES, Context
from clusterlob_gpu.store import Artefact, Made, Store, array_hash, load_column, save_columns, source_hash

CONTEXT_CODE = source_hash(__file__, [kernels, context, native, symbols, layout, schema])
FEATURE_CODE = source_hash(__file__, [kernels, context, features, native, symbols, layout, schema])
MID_CODE = source_hash(__file__, [kernels, context, returns, schema])

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
        rows, skipped = context.valid_rows(job.lake.read_book(job.day, book, depth))
        _write_rows(rows, folder / "rows.parquet")
        job.require_unchanged(book, artefact)
        return {"rows": len(rows), "skipped": skipped, "summary": context.summarise(rows).as_record()}

    return BookDay.of(job.day, Store(job.store).make(artefact, fill))


def _write_rows(rows: pd.DataFrame, path: Path) -> None:
    integers = [name for name in context.ROW_COLUMNS if name != "tick"]
    pq.write_table(
        pa.Table.from_pandas(rows, preserve_index=False),
        path,
        row_group_size=_BOOK_GROUP_ROWS,
        compression="zstd",
        use_dictionary=["tick"],
        column_encoding=dict.fromkeys(integers, "DELTA_BINARY_PACKED"),
    )


def book_rows(job: DayJob[RunConfig], book: BookDay | None, until: int | None = None) -> pd.DataFrame:
    """A day's valid book rows, those before `until` (us) if it is given; none for a day without a book."""
    if book is None:
        return pd.DataFrame({name: np.empty(0, np.int64) for name in context.ROW_COLUMNS})
    path = Store(job.store).folder(book.made.address) / "rows.parquet"
    with pq.ParquetFile(path) as file:
        if until is None:
            return file.read(use_threads=False).to_pandas()
        first = [file.metadata.row_group(at).column(0).statistics.min for at in range(file.num_row_groups)]
        groups = [at for at, ts in enumerate(first) if ts < until]
        rows = file.read_row_groups(groups, use_threads=False).to_pandas()
    return rows[rows["ts"] < until]


def day_context(job: ClusterDay, book: BookDay | None, carry: BookCarry | None) -> Context:
    """The book that a day's trades meet: its own rows and the state before them."""
    qty_unit = job.lake.symbol.qty_unit
    return context.make_context(book_rows(job, book), carry, qty_unit, job.config.spread)


def _meet(job: ClusterDay, book: Context, last: int | None = None) -> tuple[MetTrades, int]:
    """The day's trades (or the last ones) with the book they met, and how many were read."""
    config = job.config
    trades = job.lake.read_trades(job.day, last)
    met = features.meet(
        trades,
        book,
        max_staleness=config.max_staleness,
        inclusive=config.asof == "inclusive",
        own_side=config.same_side == "own",
    )
    return met, len(trades.ts)


TailTask = tuple[ClusterDay, BookDay | None, BookCarry | None]


def tail_artefact(task: TailTask) -> Artefact | None:
    """Name of a day's tail: of its trades, its book, and the book before it; none without any book."""
    job, book, carry = task
    if book is None and carry is None:
        return None
    return job.artefact("tail", **_met_inputs(job, book, carry), config=_feature_settings(job.config))


def _met_inputs(job: ClusterDay, book: BookDay | None, carry: BookCarry | None) -> dict[str, Any]:
    return {
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
        around, wanted = day_context(job, book, carry), job.config.window - 1
        met, _ = _meet(job, around, max(_TAIL_ROWS, 2 * wanted))
        if met.raw.shape[1] < wanted:
            met, _ = _meet(job, around)
        save_columns(folder, raw=features.last_columns(nothing, met.raw, job.config.window))
        job.require_unchanged("trades", artefact)
        return {}

    store = Store(job.store)
    made = store.make(artefact, fill)
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
    """Features of a day's trades: z-scores as float32, and what labelling needs besides."""
    job, book, state = task
    artefact = feature_artefact(task)

    def fill(folder: Path) -> dict[str, Any]:
        met, z, n = scored_day(job, book, state, np.float32)
        save_columns(
            folder,
            ts=met.ts,
            sign=met.sign,
            price=met.price,
            qty=met.qty,
            row=met.row.astype(np.int32),
            z=z,
        )
        job.require_unchanged("trades", artefact)
        return {"trades": n, "kept": len(met.ts), "dropped": met.dropped}

    made = Store(job.store).make(artefact, fill)
    kept = made.record
    return FeatureDay(job.day, made.brief(), kept["trades"], kept["kept"], kept["dropped"])


def scored_day(
    job: ClusterDay, book: BookDay, state: State, dtype: type[np.floating]
) -> tuple[MetTrades, np.ndarray, int]:
    """A day's trades that have z-scores, these scores (6, n), and how many trades the day has."""
    met, n = _meet(job, day_context(job, book, state.book))
    met, z = features.scored(met, state.tail, job.config.window, dtype)
    return met, z, n


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
        rows = context.with_carry(book_rows(job, book), carry)
        mid2 = rows["bid"].to_numpy(np.int64) + rows["ask"].to_numpy(np.int64)
        mids = returns.mids_at(times, rows["ts"].to_numpy(np.int64), mid2, job.config.max_staleness)
        save_columns(folder, ts=times, mid2=mids)
        return {}

    return MidsDay(Store(job.store).make(mids_artefact(task), fill).brief())


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
