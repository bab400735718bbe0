"""Tasks of one (symbol, day): each reads its day, calls the pure steps, writes and returns little.

A task takes one picklable argument, so that it runs alike in a thread and on a Dask worker.  Tables
stay where they are written; what returns is a record, a few sums, or a table of 288 buckets.  What a
task makes is named before it is made (`book_artefact` and its like), so that a plan can ask what exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Generic, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from clusterlob_gpu import bars, clustering, context, features, kernels, returns, schema
from clusterlob_gpu.clustering import Bounds, Fit, Model, Partial
from clusterlob_gpu.config import ClusterConfig, Config, RunConfig
from clusterlob_gpu.context import BookCarry, BookSummary
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.features import MetTrades
from clusterlob_gpu.files import Folder
from clusterlob_gpu.lake import layout, native, symbols
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.lake.native import SymbolLake
from clusterlob_gpu.schema import FEATURES, US_PER_DAY, Z_FEATURES, Context
from clusterlob_gpu.store import Artefact, Made, Store, array_hash, load_column, save_columns, source_hash

CONTEXT_CODE = source_hash(__file__, [kernels, context, native, symbols, layout, schema])
FEATURE_CODE = source_hash(__file__, [kernels, context, features, native, symbols, layout, schema])

_TAIL_ROWS = 20_000
"""Trades read at first for the tail of a day; all of them if these do not suffice."""


@dataclass(frozen=True)
class DayJob(Generic[Config]):
    """What every task of a symbol's day needs to know."""

    lake: SymbolLake
    store: Folder
    config: Config
    day: date

    def artefact(self, stage: str, **inputs: Any) -> Artefact:
        """The artefact of a stage that is made of these inputs."""
        return Artefact(stage, self.lake.symbol.folder_name, self.day.isoformat(), inputs)


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
        return {"rows": len(rows), "skipped": skipped, "summary": context.summarise(rows).as_record()}

    return BookDay.of(job.day, Store(job.store).make(artefact, fill))


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
    path = Store(job.store).folder(book.made.address) / "rows.parquet"
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


TailTask = tuple[ClusterDay, BookDay | None, BookCarry | None]


def tail_artefact(task: TailTask) -> Artefact:
    """Name of a day's tail: of its trades, its book, and the book before it."""
    job, book, carry = task
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
    nothing = np.empty((len(FEATURES), 0))
    if book is None and carry is None:
        return TailDay(job.day, None, nothing)

    def fill(folder: Path) -> dict[str, Any]:
        around, wanted = _context(job, book, carry), job.config.window - 1
        met, _ = _meet(job, around, max(_TAIL_ROWS, 2 * wanted))
        if met.raw.shape[1] < wanted:
            met, _ = _meet(job, around)
        save_columns(folder, raw=features.last_columns(nothing, met.raw, job.config.window))
        return {}

    store = Store(job.store)
    made = store.make(tail_artefact(task), fill)
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

    made = Store(job.store).make(feature_artefact(task), fill)
    kept = made.record
    return FeatureDay(job.day, made.brief(), kept["trades"], kept["kept"], kept["dropped"])


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

    @property
    def whole(self) -> bool:
        """Whether every row of the day may be trained on."""
        return self.until >= day_start_us(self.features.day) + US_PER_DAY

    def z(self) -> np.ndarray:
        """z-scores (6, n) float32 of the rows that may be trained on."""
        folder = Store(self.job.store).folder(self.features.made.address)
        z = load_column(folder, "z")
        if self.whole:
            return z
        rows = int(np.searchsorted(load_column(folder, "ts"), self.until))
        return np.ascontiguousarray(z[:, :rows])


def train_rows(train: TrainDay) -> int:
    """Rows of a training day."""
    return train.z().shape[1]


@dataclass(frozen=True)
class FitJob:
    """One fit: the rows of its training days, `total` in all, clipped to the bounds."""

    train: tuple[TrainDay, ...]
    total: int
    bounds: Bounds
    config: ClusterConfig


def start_fit(fit: FitJob) -> np.ndarray | InputError:
    """Starting centres (k, 6) from a seeded sample of the training rows, or why there are none."""
    config, sample = fit.config, []
    for train in fit.train:
        z, number = train.z(), (train.features.day - date(1970, 1, 1)).days
        sample.append(z[:, clustering.sample_rows(z.shape[1], fit.total, config.seed, number)])
    rows = fit.bounds.clip(np.concatenate(sample, axis=1))
    try:
        return clustering.starting_centres(rows, config.k, config.seed, config.n_init)
    except InputError as error:
        return error


def fit_merged(task: tuple[FitJob, np.ndarray]) -> Fit:
    """scikit-learn's fit from given centres, on all training rows in the memory of one worker."""
    fit, centres = task
    rows = np.concatenate([train.z() for train in fit.train], axis=1)
    return clustering.fit_sklearn(fit.bounds.clip(rows), centres)


Share = tuple[TrainDay, Bounds, np.ndarray]
"""What one fit asks of one of its days in one pass: rows, bounds and centroids."""


def lloyd_day(shares: Sequence[Share]) -> list[Partial]:
    """One Lloyd pass over a day for every fit that trains on it."""
    held: dict[int, np.ndarray] = {}
    for train, _, _ in shares:
        if train.until not in held:
            held[train.until] = train.z()
    return [clustering.partial(held[train.until], bounds, centres) for train, bounds, centres in shares]


def high_counts_day(train: TrainDay) -> np.ndarray:
    """Counts of the upper halves of a training day's z-scores."""
    return clustering.high_counts(train.z())


def low_counts_day(task: tuple[TrainDay, np.ndarray]) -> np.ndarray:
    """Counts of the lower halves inside the bins asked for."""
    train, bins = task
    return clustering.low_counts(train.z(), bins)


@dataclass(frozen=True)
class LabelJob:
    """Label one day with models, and sum each labelling up in buckets of its own width."""

    job: ClusterDay
    book: BookDay
    next_book: BookDay | None
    state: State
    features: FeatureDay
    asked: tuple[tuple[Model, int], ...]
    """Models and widths of buckets (us)."""
    trades_file: Path | None
    """Where the trades labelled by the first model are written, if anywhere."""


@dataclass(frozen=True)
class LabelledDay:
    """What a day's labelled trades add up to, clusters in the order of the model."""

    day: date
    flow: pd.DataFrame
    markouts: pd.DataFrame
    counts: np.ndarray
    z_sums: np.ndarray
    raw_sums: np.ndarray


@dataclass(frozen=True)
class _Kept:
    """A day's trades with features, as the store has them, and the book they met."""

    ts: np.ndarray
    sign: np.ndarray
    price: np.ndarray
    qty: np.ndarray
    row: np.ndarray
    z: np.ndarray
    raw: np.ndarray
    around: Context


def label_day(task: LabelJob) -> list[LabelledDay]:
    """Label a day's trades with every model and sum them up; writes the trades themselves if asked to."""
    job = task.job
    folder = Store(job.store).folder(task.features.made.address)
    ts, sign, price, qty, row, z = (
        load_column(folder, name) for name in ("ts", "sign", "price", "qty", "row", "z")
    )
    around = _context(job, task.book, task.state.book)
    raw = features.raw_features(ts, sign, qty, row, around, job.config.same_side == "own")
    trades = _Kept(ts, sign, price, qty, row, z, raw, around)
    made = []
    for at, (model, width) in enumerate(task.asked):
        label = model.label(z)
        made.append(_labelled(task, trades, model, width, label))
        if at == 0 and task.trades_file is not None:
            _write_trades(task, label, raw)
    return made


def _labelled(task: LabelJob, trades: _Kept, model: Model, width: int, label: np.ndarray) -> LabelledDay:
    symbol, start = task.job.lake.symbol, day_start_us(task.job.day)
    k = len(model.numbers)
    z_sums, raw_sums = np.zeros((k, len(FEATURES))), np.zeros((k, len(FEATURES)))
    kernels.cluster_sums(trades.z, label, z_sums)
    kernels.cluster_sums(trades.raw, label, raw_sums)
    flow = bars.day_flow(
        trades.ts, trades.sign, trades.price, trades.qty, label, start=start, width=width, k=k
    )
    table = bars.flow_table(
        flow,
        start=start,
        width=width,
        numbers=model.numbers,
        price_unit=symbol.price_unit,
        qty_unit=symbol.qty_unit,
    )
    return LabelledDay(
        day=task.job.day,
        flow=table,
        markouts=_markouts(task, trades, model, width, label),
        counts=np.bincount(label, minlength=k),
        z_sums=z_sums,
        raw_sums=raw_sums,
    )


def _markouts(task: LabelJob, trades: _Kept, model: Model, width: int, label: np.ndarray) -> pd.DataFrame:
    """Mark-outs of a day, with the first minutes of the next day's book where the lake has it."""
    job = task.job
    stop = day_start_us(job.day) + US_PER_DAY
    book_ts, mid2 = trades.around.ts, trades.around.mid2
    if task.next_book is not None:
        rows = book_rows(job, task.next_book)
        soon = rows[rows["ts"] < stop + max(returns.MARKOUTS_US)]
        book_ts = np.concatenate([book_ts, soon["ts"].to_numpy(np.int64)])
        mid2 = np.concatenate([mid2, (soon["bid"] + soon["ask"]).to_numpy(np.int64)])
        stop += US_PER_DAY
    return returns.day_markouts(
        trades.ts,
        trades.sign,
        trades.row,
        label,
        book_ts,
        mid2,
        covered_until=stop,
        max_staleness=job.config.max_staleness,
        start=day_start_us(job.day),
        width=width,
        numbers=model.numbers,
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
    columns["cluster"] = np.array(task.asked[0][0].numbers, np.int8)[label]
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
