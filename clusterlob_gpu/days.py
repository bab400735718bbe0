"""Tasks of one (symbol, day): each reads its day, calls the pure steps, writes and returns little.

A task takes one picklable argument, so that it runs alike in a thread and on a Dask worker.  Tables
stay where they are written; what returns is a record, a few sums, or a table of 288 buckets.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Generic

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from clusterlob_gpu import bars, clustering, context, features, kernels, returns, schema
from clusterlob_gpu.clustering import Bounds, Model, Partial
from clusterlob_gpu.config import ClusterConfig, Config, RunConfig
from clusterlob_gpu.context import BookCarry, BookSummary
from clusterlob_gpu.features import MetTrades
from clusterlob_gpu.lake import layout, native, symbols
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.lake.native import SymbolLake
from clusterlob_gpu.schema import FEATURES, US_PER_DAY, Z_FEATURES, Context
from clusterlob_gpu.store import Store, array_hash, artefact_key, load_column, save_columns, source_hash

CONTEXT_CODE = source_hash(__file__, [kernels, context, native, symbols, layout, schema])
FEATURE_CODE = source_hash(__file__, [kernels, context, features, native, symbols, layout, schema])

_TAIL_ROWS = 20_000
"""Trades read at first for the tail of a day; all of them if these do not suffice."""


@dataclass(frozen=True)
class DayJob(Generic[Config]):
    """What every task of a symbol's day needs to know."""

    lake: SymbolLake
    store: Path
    config: Config
    day: date


ClusterDay = DayJob[ClusterConfig]


@dataclass(frozen=True)
class BookDay:
    """A day's reduced book: where it is, and what it adds to the carry."""

    day: date
    key: str
    rows: int
    skipped: dict[str, int]
    summary: BookSummary
    reused: bool


@dataclass(frozen=True)
class State:
    """What a day starts from: the book at midnight, and the raw features of the last trades."""

    book: BookCarry | None
    tail: np.ndarray


@dataclass(frozen=True)
class FeatureDay:
    """A day's feature artefact and its counts."""

    day: date
    key: str
    trades: int
    kept: int
    dropped: dict[str, int]
    reused: bool


def reduce_book(job: DayJob[RunConfig]) -> BookDay:
    """Reduce a day's book rows to valid flat rows, once per lake."""
    config, store = job.config, Store(job.store)
    depth = config.depth if config.book == "book_snapshot_25" else 1
    key = artefact_key(
        code=CONTEXT_CODE,
        files=job.lake.fingerprint(config.book, job.day),
        day=job.day,
        book=config.book,
        depth=depth,
    )

    def fill(folder: Path) -> dict[str, Any]:
        rows, skipped = context.valid_rows(job.lake.read_book(job.day, config.book, depth))
        _write_rows(rows, folder / "rows.parquet")
        return {"rows": len(rows), "skipped": skipped, "summary": context.summarise(rows).as_record()}

    record, reused = store.reuse_or_write("book", key, fill)
    summary = BookSummary.from_record(record["summary"])
    return BookDay(job.day, key, record["rows"], record["skipped"], summary, reused)


def _write_rows(rows: pd.DataFrame, path: Path) -> None:
    integers = [name for name in context.ROW_COLUMNS if name != "tick"]
    pq.write_table(
        pa.Table.from_pandas(rows, preserve_index=False),
        path,
        compression="zstd",
        use_dictionary=["tick"],
        column_encoding=dict.fromkeys(integers, "DELTA_BINARY_PACKED"),
    )


def book_rows(job: DayJob[RunConfig], book: BookDay | None) -> pd.DataFrame:
    """A day's valid book rows, none for a day without a book."""
    if book is None:
        return pd.DataFrame({name: np.empty(0, np.int64) for name in context.ROW_COLUMNS})
    path = Store(job.store).path("book", book.key) / "rows.parquet"
    return pq.read_table(path, use_threads=False).to_pandas()


def _context(job: ClusterDay, book: BookDay | None, carry: BookCarry | None) -> Context:
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


def own_tail(task: tuple[ClusterDay, BookDay | None, BookCarry | None]) -> np.ndarray:
    """Raw features (6, m) of the last window - 1 trades of a day, fewer if the day has fewer."""
    job, book, carry = task
    nothing = np.empty((len(FEATURES), 0))
    if book is None and carry is None:
        return nothing
    around, wanted = _context(job, book, carry), job.config.window - 1
    last = max(_TAIL_ROWS, 2 * wanted)
    met, _ = _meet(job, around, last)
    if met.raw.shape[1] < wanted:
        met, _ = _meet(job, around)
    return features.last_columns(nothing, met.raw, job.config.window)


def make_features(task: tuple[ClusterDay, BookDay, State]) -> FeatureDay:
    """Features of a day's trades: z-scores as float32, and what labelling needs besides."""
    job, book, state = task
    config, store = job.config, Store(job.store)
    key = artefact_key(
        code=FEATURE_CODE,
        files=job.lake.fingerprint("trades", job.day),
        day=job.day,
        book=book.key,
        carry=None if state.book is None else asdict(state.book),
        tail=array_hash(state.tail),
        config=config.model_dump(include={"window", "max_staleness", "same_side", "spread", "asof"}),
    )

    def fill(folder: Path) -> dict[str, Any]:
        met, z, n = _scored(job, book, state, np.float32)
        save_columns(
            folder,
            ts=met.ts,
            sign=met.sign,
            price=met.price,
            qty=met.qty,
            row=met.row.astype(np.int32),
            z=z,
        )
        return {"trades": n, "kept": len(met.ts), "dropped": met.dropped}

    record, reused = store.reuse_or_write("features", key, fill)
    return FeatureDay(job.day, key, record["trades"], record["kept"], record["dropped"], reused)


def _scored(
    job: ClusterDay, book: BookDay, state: State, dtype: type[np.floating]
) -> tuple[MetTrades, np.ndarray, int]:
    met, n = _meet(job, _context(job, book, state.book))
    met, z = features.scored(met, state.tail, job.config.window, dtype)
    return met, z, n


@dataclass(frozen=True)
class TrainDay:
    """A training day: its features, up to the time at which the purge begins."""

    job: ClusterDay
    features: FeatureDay
    until: int

    def z(self) -> np.ndarray:
        """z-scores (6, n) float32 of the rows that may be trained on."""
        folder = Store(self.job.store).path("features", self.features.key)
        z = load_column(folder, "z")
        if self.until >= day_start_us(self.features.day) + US_PER_DAY:
            return z
        rows = int(np.searchsorted(load_column(folder, "ts"), self.until))
        return np.ascontiguousarray(z[:, :rows])


def train_rows(train: TrainDay) -> int:
    """Rows of a training day."""
    return train.z().shape[1]


def sample_day(task: tuple[TrainDay, int, int]) -> np.ndarray:
    """A seeded sample (6, m) of a training day's rows, given all rows of the training."""
    train, total, seed = task
    z = train.z()
    number = (train.features.day - date(1970, 1, 1)).days
    return z[:, clustering.sample_rows(z.shape[1], total, seed, number)]


def all_rows(train: TrainDay) -> np.ndarray:
    """Every training row (6, n) of a day, for the engines that need them merged."""
    return np.array(train.z())


def lloyd_day(task: tuple[TrainDay, Bounds, np.ndarray]) -> Partial:
    """One Lloyd pass over a training day."""
    train, bounds, centroids = task
    return clustering.partial(train.z(), bounds, centroids)


def high_counts_day(train: TrainDay) -> np.ndarray:
    """Counts of the upper halves of a training day's z-scores."""
    return clustering.high_counts(train.z())


def low_counts_day(task: tuple[TrainDay, np.ndarray]) -> np.ndarray:
    """Counts of the lower halves inside the bins asked for."""
    train, bins = task
    return clustering.low_counts(train.z(), bins)


@dataclass(frozen=True)
class LabelJob:
    """Label one day with a model."""

    job: ClusterDay
    book: BookDay
    next_book: BookDay | None
    state: State
    features: FeatureDay
    model: Model
    trades_file: Path | None


@dataclass(frozen=True)
class LabelledDay:
    """What a day's labelled trades add up to, clusters in the order of the model."""

    day: date
    flow: pd.DataFrame
    markouts: pd.DataFrame
    counts: np.ndarray
    z_sums: np.ndarray
    raw_sums: np.ndarray


def label_day(task: LabelJob) -> LabelledDay:
    """Label a day's trades and sum them up; writes the trades themselves if asked to."""
    job, model = task.job, task.model
    symbol, width, start = job.lake.symbol, job.config.bucket, day_start_us(job.day)
    folder = Store(job.store).path("features", task.features.key)
    ts, sign, price, qty, row, z = (
        load_column(folder, name) for name in ("ts", "sign", "price", "qty", "row", "z")
    )
    label = model.label(z)
    around = _context(job, task.book, task.state.book)
    own_side = job.config.same_side == "own"
    raw = features.raw_features(ts, sign, qty, row, around, own_side)
    k = len(model.numbers)
    z_sums, raw_sums = np.zeros((k, len(FEATURES))), np.zeros((k, len(FEATURES)))
    kernels.cluster_sums(z, label, z_sums)
    kernels.cluster_sums(raw, label, raw_sums)
    flow = bars.day_flow(ts, sign, price, qty, label, start=start, width=width, k=k)
    if task.trades_file is not None:
        _write_trades(task, label, raw)
    return LabelledDay(
        day=job.day,
        flow=bars.flow_table(
            flow,
            start=start,
            width=width,
            numbers=model.numbers,
            price_unit=symbol.price_unit,
            qty_unit=symbol.qty_unit,
        ),
        markouts=_markouts(task, around, ts, sign, row, label),
        counts=np.bincount(label, minlength=k),
        z_sums=z_sums,
        raw_sums=raw_sums,
    )


def _markouts(
    task: LabelJob, around: Context, ts: np.ndarray, sign: np.ndarray, row: np.ndarray, label: np.ndarray
) -> pd.DataFrame:
    """Mark-outs of a day, with the first minutes of the next day's book where the lake has it."""
    job = task.job
    stop = day_start_us(job.day) + US_PER_DAY
    book_ts, mid2 = around.ts, around.mid2
    if task.next_book is not None:
        rows = book_rows(job, task.next_book)
        soon = rows[rows["ts"] < stop + max(returns.MARKOUTS_US)]
        book_ts = np.concatenate([book_ts, soon["ts"].to_numpy(np.int64)])
        mid2 = np.concatenate([mid2, (soon["bid"] + soon["ask"]).to_numpy(np.int64)])
        stop += US_PER_DAY
    return returns.day_markouts(
        ts,
        sign,
        row,
        label,
        book_ts,
        mid2,
        covered_until=stop,
        max_staleness=job.config.max_staleness,
        start=day_start_us(job.day),
        width=job.config.bucket,
        numbers=task.model.numbers,
    )


def _write_trades(task: LabelJob, label: np.ndarray, raw: np.ndarray) -> None:
    """Write the kept trades of a day, z-scores in float64, computed anew from the lake."""
    assert task.trades_file is not None
    symbol = task.job.lake.symbol
    met, z, _ = _scored(task.job, task.book, task.state, np.float64)
    columns: dict[str, np.ndarray] = {
        "ts_local_us": met.ts,
        "sign": met.sign,
        "price": symbols.decode(met.price, symbol.price_unit),
        "qty": symbols.decode(met.qty, symbol.qty_unit),
    }
    columns |= dict(zip(FEATURES, raw, strict=True)) | dict(zip(Z_FEATURES, z, strict=True))
    columns["cluster"] = np.array(task.model.numbers, np.int8)[label]
    task.trades_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = task.trades_file.with_name(f".{task.trades_file.name}.tmp")
    pq.write_table(pa.table(columns), temporary, compression="zstd")
    temporary.replace(task.trades_file)


def mids_day(task: tuple[DayJob[RunConfig], BookDay, BookCarry | None, np.ndarray]) -> np.ndarray:
    """Twice the mid (integer price units, NaN = null) at sorted times that one covered day decides."""
    job, book, carry, times = task
    rows = context.with_carry(book_rows(job, book), carry)
    mid2 = rows["bid"].to_numpy(np.int64) + rows["ask"].to_numpy(np.int64)
    return returns.mids_at(times, rows["ts"].to_numpy(np.int64), mid2, job.config.max_staleness)


def next_day(day: date) -> date:
    """The day after."""
    return day + timedelta(days=1)


def previous_day(day: date) -> date:
    """The day before."""
    return day - timedelta(days=1)
