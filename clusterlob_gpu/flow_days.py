"""Tasks of one (symbol, day) of the taker-flow experiment; see `days` for what a task is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clusterlob_gpu import context, controls, flow_bars, flow_kernels, kernels, schema, thresholds
from clusterlob_gpu.config import FlowConfig, format_duration
from clusterlob_gpu.context import BookCarry
from clusterlob_gpu.days import BookDay, DayJob, book_rows, previous_day
from clusterlob_gpu.flow_bars import DayBars, Takers
from clusterlob_gpu.lake import layout, native, symbols
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.schema import SIDE_SELL
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
from clusterlob_gpu.thresholds import NEVER_LARGE, NEVER_SMALL, Cuts, Sizes, ThresholdRule

FLOW_CODE = source_hash(
    __file__, [kernels, flow_kernels, flow_bars, thresholds, native, symbols, layout, schema]
)
STATE_CODE = source_hash(__file__, [kernels, context, controls, native, symbols, layout, schema])

FlowDay = DayJob[FlowConfig]


Setting = tuple[int, float, float]
"""Thresholds: trailing window (us), quantile of large, quantile of small."""


@dataclass(frozen=True)
class TradeDay:
    """A day's trades, reduced: where they are, and how many there were."""

    day: date
    made: Made
    trades: int
    takers: int
    unknown: int


def trade_artefact(task: tuple[FlowDay, str]) -> Artefact:
    """Name of a day's reduced trades: of its files, the unit, and where bars and windows may begin."""
    job, unit = task
    bar = job.config.bar
    return job.artefact(
        "trades",
        code=FLOW_CODE,
        files=job.lake.fingerprint("trades", job.day),
        unit=unit,
        bar=bar,
        phases=thresholds.phases(bar, [window for window, _, _ in job.config.settings]),
    )


def reduce_trades(task: tuple[FlowDay, str]) -> TradeDay:
    """Reduce a day's trades, or the orders rebuilt from them (`unit`), to bar sums and notionals."""
    job, unit = task
    config, artefact = job.config, trade_artefact(task)
    windows = sorted({window for window, _, _ in config.settings})

    def fill(folder: Path) -> dict[str, Any]:
        start, width = day_start_us(job.day), config.bar
        fills = job.lake.read_fills(job.day) if unit == "order" else None
        trades = fills.trades if fills else job.lake.read_trades(job.day)
        if fills:
            ids = fills.trade_id
            takers = flow_bars.order_takers(trades, fills.ts_exch, ids, start=start, width=width)
        else:
            takers = flow_bars.trade_takers(trades)
        sizes = thresholds.day_sizes(takers.ts, takers.notional, start=start, width=width, windows=windows)
        bars = flow_bars.day_bars(trades, takers, start=start, width=width)
        save_columns(folder, ts=takers.ts, side=takers.side, **_columns(sizes), **_columns(bars, "bar_"))
        unknown = int(np.count_nonzero(trades.side > SIDE_SELL))
        job.require_unchanged("trades", artefact)
        return {"trades": len(trades.ts), "takers": len(takers.ts), "unknown": unknown}

    made = Store(job.store).make(artefact, fill)
    return TradeDay(job.day, made.brief(), **made.record)


def _columns(value: Sizes | DayBars, prefix: str = "") -> dict[str, np.ndarray]:
    return {prefix + part.name: getattr(value, part.name) for part in fields(value)}


def _load(folder: Path, kind: type[Any], prefix: str = "") -> Any:
    return kind(**{part.name: load_column(folder, prefix + part.name) for part in fields(kind)})


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

    return BarDay(task.job.day, store.make(task.artefact(), fill).brief())


def _bar_tables(task: BarJob, store: Store) -> Iterator[pd.DataFrame]:
    job, config, symbol = task.job, task.job.config, task.job.lake.symbol
    start, width = day_start_us(job.day), config.bar
    folders = {day: store.folder(made.made.address) for day, made in task.trades.items()}
    folder = folders[job.day]
    takers = Takers(*(load_column(folder, name) for name in ("ts", "side", "notional")))
    sums = _load(folder, DayBars, "bar_")
    cuts = _cuts(config, start, folders) if task.sized else {}
    for setting in config.settings:
        bounds = _bounds(cuts, setting, len(sums.count))
        classes = flow_bars.day_classes(takers, *bounds, start=start, width=width)
        units = {"price_unit": symbol.price_unit, "qty_unit": symbol.qty_unit}
        table = flow_bars.bar_table(sums, classes, start=start, width=width, **units)
        if cuts:
            window, large, small = setting
            unit, held = symbol.price_unit * symbol.qty_unit, cuts[window]
            table["q_large"] = held.real(_exact(large), unit)
            table["q_small"] = held.real(_exact(small), unit)
            table["window_trades"] = held.n
        yield table


def _exact(quantile: float) -> Fraction:
    """A quantile as it was written: 0.85 is 17/20."""
    return Fraction(repr(quantile))


def _cuts(config: FlowConfig, start: int, folders: dict[date, Path]) -> dict[int, Cuts]:
    """Thresholds of every setting's windows, from one pass over the days."""
    windows = tuple(sorted({window for window, _, _ in config.settings}))
    quantiles = {_exact(q) for _, *pair in config.settings for q in pair}
    rule = ThresholdRule(
        width=config.bar,
        windows=windows,
        quantiles=tuple(sorted(quantiles)),
        refresh=config.refresh,
        min_trades=config.min_trades,
        require_full_window=config.require_full_window,
    )
    sizes = {day_start_us(day): _load(folder, Sizes) for day, folder in folders.items()}
    return thresholds.day_cuts(sizes, start, rule)


def _bounds(cuts: dict[int, Cuts], setting: Setting, n_bars: int) -> tuple[np.ndarray, np.ndarray]:
    if not cuts:
        return np.full(n_bars, NEVER_LARGE), np.full(n_bars, NEVER_SMALL)
    window, large, small = setting
    return cuts[window].large_from(_exact(large)), cuts[window].small_to(_exact(small))


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
        rows = context.with_carry(book_rows(job, book), carry)
        unit = job.lake.symbol.qty_unit
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
