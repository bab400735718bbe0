"""Tasks of one (symbol, day) of the taker-flow experiment; see `days` for what a task is."""

from __future__ import annotations

from dataclasses import dataclass, fields
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
from clusterlob_gpu.store import Store, artefact_key, load_column, save_columns, source_hash
from clusterlob_gpu.thresholds import NEVER_LARGE, NEVER_SMALL, Cuts, Sizes, ThresholdRule

FLOW_CODE = source_hash(
    __file__, [kernels, flow_kernels, flow_bars, thresholds, native, symbols, layout, schema]
)

FlowDay = DayJob[FlowConfig]


@dataclass(frozen=True)
class TradeDay:
    """A day's trades, reduced: where they are, and how many there were."""

    day: date
    key: str
    trades: int
    takers: int
    unknown: int
    reused: bool


def reduce_trades(task: tuple[FlowDay, str]) -> TradeDay:
    """Reduce a day's trades, or the orders rebuilt from them (`unit`), to bar sums and notionals."""
    job, unit = task
    config, store = job.config, Store(job.store)
    windows = sorted({window for window, _, _ in config.settings})
    key = artefact_key(
        code=FLOW_CODE,
        files=job.lake.fingerprint("trades", job.day),
        day=job.day,
        unit=unit,
        bar=config.bar,
        windows=windows,
    )

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
        return {"trades": len(trades.ts), "takers": len(takers.ts), "unknown": unknown}

    record, reused = store.reuse_or_write("trades", key, fill)
    return TradeDay(job.day, key, record["trades"], record["takers"], record["unknown"], reused)


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


def bars_of_day(task: BarJob) -> pd.DataFrame:
    """Bars of a day: `flow_bars.bar_table`, thresholds q_large and q_small (quote units), the number of
    trades in their window (window_trades), and for each variant of the thresholds its VARIANT_COLUMNS.
    """
    job, config, symbol = task.job, task.job.config, task.job.lake.symbol
    start, width = day_start_us(job.day), config.bar
    store = Store(job.store)
    folders = {day: store.path("trades", made.key) for day, made in task.trades.items()}
    folder = folders[job.day]
    takers = Takers(*(load_column(folder, name) for name in ("ts", "side", "notional")))
    sums = _load(folder, DayBars, "bar_")
    cuts = _cuts(config, start, folders) if task.sized else {}

    def table_of(setting: tuple[int, float, float]) -> pd.DataFrame:
        bounds = _bounds(cuts, setting, len(sums.count))
        classes = flow_bars.day_classes(takers, *bounds, start=start, width=width)
        units = {"price_unit": symbol.price_unit, "qty_unit": symbol.qty_unit}
        return flow_bars.bar_table(sums, classes, start=start, width=width, **units)

    main, *variants = config.settings
    table = table_of(main)
    if cuts:
        unit, held = symbol.price_unit * symbol.qty_unit, cuts[main[0]]
        table["q_large"] = held.real(_exact(main[1]), unit)
        table["q_small"] = held.real(_exact(main[2]), unit)
        table["window_trades"] = held.n
    for setting in variants:
        made = table_of(setting)[list(VARIANT_COLUMNS)]
        table = table.join(made.add_suffix(f":{variant_name(setting)}"))
    return table


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


def _bounds(
    cuts: dict[int, Cuts], setting: tuple[int, float, float], n_bars: int
) -> tuple[np.ndarray, np.ndarray]:
    if not cuts:
        return np.full(n_bars, NEVER_LARGE), np.full(n_bars, NEVER_SMALL)
    window, large, small = setting
    return cuts[window].large_from(_exact(large)), cuts[window].small_to(_exact(small))


VARIANT_COLUMNS = ("flow_imbalance_large", "flow_imbalance_small", "flow_share_large")


def variant_name(setting: tuple[int, float, float]) -> str:
    """Name of a threshold setting, such as 3d/0.85/0.5."""
    window, large, small = setting
    return f"{format_duration(window)}/{large!r}/{small!r}"


def book_states(task: tuple[FlowDay, BookDay, BookCarry | None, np.ndarray]) -> pd.DataFrame:
    """`controls.book_at` at sorted times (us) that one day decides."""
    job, book, carry, times = task
    rows = context.with_carry(book_rows(job, book), carry)
    unit = job.lake.symbol.qty_unit
    return controls.book_at(times, rows, max_staleness=job.config.max_staleness, qty_unit=unit)


def ticker_states(task: tuple[FlowDay, np.ndarray]) -> pd.DataFrame:
    """`controls.ticker_at` at sorted times (us) that one day decides."""
    job, times = task
    held = [d for d in (previous_day(job.day), job.day) if job.lake.has("derivative_ticker", d)]
    names = list(controls.TICKER_CONTROLS.values())
    parts = [job.lake.read_ticker(day, names) for day in held]
    ts = np.concatenate([part.pop("ts_local_us") for part in parts] + [np.empty(0, np.int64)])
    nothing = [np.empty(0)]
    values = {name: np.concatenate([part[name] for part in parts] + nothing) for name in names}
    return controls.ticker_at(times, ts, values)
