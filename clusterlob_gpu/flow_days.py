"""Tasks of one (symbol, day) of the taker-flow experiment; see `days` for what a task is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from clusterlob_gpu import (
    backend,
    context,
    controls,
    flow_bars,
    flow_kernels,
    kernels,
    schema,
    thresholds,
)
from clusterlob_gpu.backend import Columns
from clusterlob_gpu.config import FlowConfig, format_duration
from clusterlob_gpu.context import BookCarry
from clusterlob_gpu.days import BookDay, DayJob, book_rows, previous_day, with_room
from clusterlob_gpu.flow_bars import DayBars, DayClasses, Takers
from clusterlob_gpu.lake import decode, layout, native, symbols
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.schema import SIDE_SELL, Trades
from clusterlob_gpu.store import (
    Artefact,
    Made,
    Store,
    array_hash,
    load_column,
    read_frame,
    save_columns,
    source_hash,
)
from clusterlob_gpu.thresholds import Cuts, Sizes, ThresholdRule

_HERE = Path(__file__).parent
_READING: list[ModuleType | Path] = [
    backend,
    decode,
    _HERE / "lake" / "device_decode.py",
    native,
    symbols,
    layout,
    schema,
]
_KERNELS: list[ModuleType | Path] = [kernels, _HERE / "device_kernels.py"]
_FLOW_KERNELS: list[ModuleType | Path] = [flow_kernels, _HERE / "device_flow_kernels.py"]
FLOW_CODE = source_hash(__file__, [*_KERNELS, *_FLOW_KERNELS, flow_bars, thresholds, *_READING])
STATE_CODE = source_hash(__file__, [*_KERNELS, context, controls, *_READING])

FlowDay = DayJob[FlowConfig]


Setting = tuple[int, float, float]
"""Thresholds: trailing window (us), quantile of large, quantile of small."""


@dataclass(frozen=True)
class TradeDay:
    """A day's trades, reduced: where they are, of what they were made, and how many there were."""

    day: date
    made: Made
    unit: str
    files: str
    """Fingerprint of the lake's files."""
    trades: int
    takers: int
    unknown: int


TradeTask = tuple[FlowDay, str]
"""A day, and its unit: trades as they are, or the orders rebuilt from them."""


def trade_artefact(task: TradeTask) -> Artefact:
    """Name of a day's reduced trades: of its files, the unit, and where bars and windows may begin."""
    job, unit = task
    bar = job.config.bar
    return job.artefact(
        "trades",
        **job.machine,
        code=FLOW_CODE,
        files=job.lake.fingerprint("trades", job.day),
        unit=unit,
        bar=bar,
        phases=thresholds.phases(bar, _windows(job.config)),
    )


def _windows(config: FlowConfig) -> list[int]:
    """Lengths of the settings' windows, rising."""
    return sorted({window for window, _, _ in config.settings})


def reduce_trades(task: TradeTask) -> TradeDay:
    """Reduce a day's trades, or the orders rebuilt from them, to bar sums and notionals."""
    (job, unit), artefact = task, trade_artefact(task)
    on = job.on

    def fill(folder: Path) -> dict[str, Any]:
        trades, takers = _takers(task)
        sizes = _sizes(task, takers)
        bars = flow_bars.day_bars(trades, takers, **_cut(job), on=on)
        edges = {"edges": flow_bars.bar_edges(takers.ts, **_cut(job), on=on)}
        job.require_unchanged("trades", artefact)
        on.keep(folder, artefact.address, _per_taker(takers, sizes))
        edges |= {name: getattr(sizes, name) for name in _WINDOWS}
        save_columns(folder, **edges, **_columns(bars, "bar_"))
        unknown = int(on.xp.count_nonzero(trades.side > SIDE_SELL))
        return {"trades": len(trades.ts), "takers": len(takers.ts), "unknown": unknown}

    made = with_room(on, lambda: Store(job.store).make(artefact, fill))
    return TradeDay(job.day, made.brief(), unit, artefact.inputs["files"], **made.record)


def _cut(job: FlowDay) -> dict[str, int]:
    """How a day is cut into bars."""
    return {"start": day_start_us(job.day), "width": job.config.bar}


def _takers(task: TradeTask) -> tuple[Trades, Takers]:
    """A day's trades, and the trades again or their orders."""
    job, unit = task
    if unit == "trade":
        trades = job.lake.read_trades(job.day, on=job.on)
        return trades, flow_bars.trade_takers(trades, on=job.on)
    fills = job.lake.read_fills(job.day, on=job.on)
    trades = fills.trades
    return trades, flow_bars.order_takers(trades, fills.ts_exch, fills.trade_id, **_cut(job), on=job.on)


def _sizes(task: TradeTask, takers: Takers) -> Sizes:
    job, _ = task
    windows = _windows(job.config)
    return thresholds.day_sizes(takers.ts, takers.notional, **_cut(job), windows=windows, on=job.on)


_WINDOWS = ("totals", "times", "rows")
"""The parts of `Sizes` that do not grow with the day; the others are columns."""
_PER_TAKER = ("side", "notional", "bins")
"""What grows with the day.  Times are told by the edges of bars and of windows."""


def _per_taker(takers: Takers, sizes: Sizes) -> Columns:
    return dict(zip(_PER_TAKER, (takers.side, takers.notional, sizes.bins), strict=True))


def _kept(job: FlowDay, folder: Path, day: TradeDay) -> Columns:
    """Columns of the takers of a reduced day, made again where they are held no longer."""
    task = replace(job, day=day.day), day.unit

    def again() -> Columns:
        _, takers = _takers(task)
        columns = _per_taker(takers, _sizes(task, takers))
        job.require_same("trades", day.day, day.files)
        return columns

    return job.on.kept(folder, day.made.address, _PER_TAKER, again)


def _columns(value: DayBars, prefix: str) -> dict[str, np.ndarray]:
    return {prefix + part.name: getattr(value, part.name) for part in fields(value)}


@dataclass(frozen=True)
class BarJob:
    """Make the bars of one day, which must be in `trades`, from it and the days before it."""

    job: FlowDay
    trades: dict[date, TradeDay]
    """The days that the windows touch and the lake has, the day itself included."""
    sized: bool
    """Whether large and small flow are wanted; a day that only gives history goes without."""

    def artefact(self) -> Artefact:
        """Name of the bars: of the reduced days that they look at, and of the thresholds."""
        config = self.job.config
        settings = {"refresh", "min_trades", "require_full_window"} if self.sized else set()
        return self.job.artefact(
            "bars",
            code=FLOW_CODE,
            trades={str(day): made.made.address for day, made in self.trades.items()},
            day=str(self.job.day),
            config=config.model_dump(include={"bar", *settings}),
            settings=config.settings if self.sized else len(config.settings),
        )


@dataclass(frozen=True)
class BarDay:
    """Bars of a day under every threshold setting of the config: where they are."""

    day: date
    made: Made

    def table(self, store: Store, setting: int) -> pd.DataFrame:
        """Bars under the setting of that number, the main one being 0."""
        return read_frame(store.folder(self.made.address) / f"{setting}.parquet")


def bars_of_day(task: BarJob) -> BarDay:
    """Bars of a day under every setting: `flow_bars.bar_table`, thresholds q_large and q_small (quote
    units), and the number of trades in their window (window_trades).
    """
    store = Store(task.job.store)

    def fill(folder: Path) -> dict[str, Any]:
        for number, table in enumerate(_bar_tables(task, store)):
            table.to_parquet(folder / f"{number}.parquet", index=False)
        return {}

    made = with_room(task.job.on, lambda: store.make(task.artefact(), fill))
    return BarDay(task.job.day, made.brief())


def _bar_tables(task: BarJob, store: Store) -> Iterator[pd.DataFrame]:
    job, config, symbol = task.job, task.job.config, task.job.lake.symbol
    folder = store.folder(task.trades[job.day].made.address)
    sums = DayBars(**{part.name: load_column(folder, f"bar_{part.name}") for part in fields(DayBars)})
    nothing = [flow_bars.no_classes(config.bar)] * len(config.settings)
    cuts, classes = _sized(task, store) if task.sized else ({}, nothing)
    price_unit, qty_unit = symbol.price_unit, symbol.qty_unit
    for (window, large, small), split in zip(config.settings, classes, strict=True):
        table = flow_bars.bar_table(sums, split, price_unit=price_unit, qty_unit=qty_unit, **_cut(job))
        if cuts:
            unit, held = price_unit * qty_unit, cuts[window]
            table["q_large"] = held.real(_exact(large), unit)
            table["q_small"] = held.real(_exact(small), unit)
            table["window_trades"] = held.n
        yield table


def _sized(task: BarJob, store: Store) -> tuple[dict[int, Cuts], list[DayClasses]]:
    """Thresholds by window, and the flow under every setting, from one pass over the trades each."""
    job, config = task.job, task.job.config
    folders = {day: store.folder(reduced.made.address) for day, reduced in task.trades.items()}
    held = {day: _kept(job, folders[day], reduced) for day, reduced in task.trades.items()}
    sizes = {
        day_start_us(day): Sizes(
            columns["notional"],
            columns["bins"],
            **{name: load_column(folders[day], name) for name in _WINDOWS},
        )
        for day, columns in held.items()
    }
    cuts = thresholds.day_cuts(sizes, day_start_us(job.day), _rule(config), on=job.on)
    bounds = [
        (cuts[window].large_from(_exact(large)), cuts[window].small_to(_exact(small)))
        for window, large, small in config.settings
    ]
    edges, own = load_column(folders[job.day], "edges"), held[job.day]
    return cuts, flow_bars.day_classes(edges, own["side"], own["notional"], bounds, on=job.on)


def _exact(quantile: float) -> Fraction:
    """A quantile as it was written: 0.85 is 17/20."""
    return Fraction(repr(quantile))


def _rule(config: FlowConfig) -> ThresholdRule:
    """Thresholds of every setting."""
    quantiles = {_exact(q) for _, *pair in config.settings for q in pair}
    return ThresholdRule(
        width=config.bar,
        windows=tuple(_windows(config)),
        quantiles=tuple(sorted(quantiles)),
        refresh=config.refresh,
        min_trades=config.min_trades,
        require_full_window=config.require_full_window,
    )


def variant_name(setting: Setting) -> str:
    """Name of a threshold setting, such as 3d/0.85/0.5."""
    window, large, small = setting
    return f"{format_duration(window)}/{large!r}/{small!r}"


@dataclass(frozen=True)
class StateDay:
    """States at sorted times (us) that one day decides: where they are."""

    made: Made


BookStateTask = tuple[FlowDay, BookDay, BookCarry | None, np.ndarray]
TickerStateTask = tuple[FlowDay, np.ndarray]


def book_state_artefact(task: BookStateTask) -> Artefact:
    """Name of book states: of the day's book, the book before it, and the times."""
    job, book, carry, times = task
    return job.artefact(
        "states",
        code=STATE_CODE,
        book=book.made.address,
        carry=asdict(carry) if carry else None,
        times=array_hash(times),
        max_staleness=job.config.max_staleness,
    )


def book_states(task: BookStateTask) -> StateDay:
    """`controls.book_at` at the times asked of a day."""
    job, book, carry, times = task

    def fill(folder: Path) -> dict[str, Any]:
        names = [name for name in context.ROW_COLUMNS if name != "tick"]
        held = book_rows(job, book, carry, names)
        rows, unit = {name: job.on.to_host(held[name]) for name in names}, job.lake.symbol.qty_unit
        states = controls.book_at(times, rows, max_staleness=job.config.max_staleness, qty_unit=unit)
        states.to_parquet(folder / "states.parquet")
        return {}

    return StateDay(Store(job.store).make(book_state_artefact(task), fill).brief())


def ticker_state_artefact(task: TickerStateTask) -> Artefact:
    """Name of ticker states: of the files of the day and the day before, and of the times."""
    job, times = task
    files = {str(day): job.lake.fingerprint("derivative_ticker", day) for day in _ticker_days(job)}
    return job.artefact("ticker", code=STATE_CODE, files=files, times=array_hash(times))


def _ticker_days(job: FlowDay) -> list[date]:
    return [d for d in (previous_day(job.day), job.day) if job.lake.has("derivative_ticker", d)]


def ticker_states(task: TickerStateTask) -> StateDay:
    """`controls.ticker_at` at the times asked of a day."""
    job, times = task
    artefact = ticker_state_artefact(task)

    def fill(folder: Path) -> dict[str, Any]:
        names = list(controls.TICKER_CONTROLS.values())
        parts = [job.lake.read_ticker(day, names) for day in _ticker_days(job)]
        ts = np.concatenate([part.pop("ts_local_us") for part in parts] + [np.empty(0, np.int64)])
        nothing = [np.empty(0)]
        values = {name: np.concatenate([part[name] for part in parts] + nothing) for name in names}
        controls.ticker_at(times, ts, values).to_parquet(folder / "states.parquet")
        for day, fingerprint in artefact.inputs["files"].items():
            job.require_same("derivative_ticker", date.fromisoformat(day), fingerprint)
        return {}

    return StateDay(Store(job.store).make(artefact, fill).brief())


def read_states(store: Store, held: Sequence[StateDay], columns: Sequence[str]) -> pd.DataFrame:
    """States of many days by time (us); no rows where there are none."""
    tables = [read_frame(store.folder(day.made.address) / "states.parquet") for day in held]
    if tables:
        return pd.concat(tables)
    return pd.DataFrame(
        np.empty((0, len(columns))), columns=list(columns), index=pd.Index([], dtype=np.int64)
    )
