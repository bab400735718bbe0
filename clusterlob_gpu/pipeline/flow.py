"""Taker flow: size thresholds, bars, controls, targets, evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clusterlob_gpu import controls, evaluation, flow_bars, flow_days, flow_evaluation, returns
from clusterlob_gpu.config import FlowConfig
from clusterlob_gpu.days import BookDay, next_day, previous_day
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.flow_days import BarJob, TradeDay
from clusterlob_gpu.lake.layout import day_of_us, day_start_us
from clusterlob_gpu.lake.native import days_between, open_symbol
from clusterlob_gpu.pipeline.carry import carry_books, reduce_books
from clusterlob_gpu.pipeline.run import (
    Clock,
    Outcome,
    RunRequest,
    SymbolRun,
    added,
    check_range,
    execute,
    fingerprint,
    missing_notes,
)
from clusterlob_gpu.portfolio import Costs
from clusterlob_gpu.schema import US_PER_DAY
from clusterlob_gpu.store import RunDirectory
from clusterlob_gpu.workers import Workers

FlowRequest = RunRequest[FlowConfig]

_SIZED = (flow_evaluation.LARGE, flow_evaluation.SMALL)

_LOOKBACK = timedelta(days=-(-controls.LOOKBACK_US // US_PER_DAY))
"""Whole days before the range that its controls look at."""


@dataclass
class FlowRun(SymbolRun):
    """A symbol on its way through the stages of the taker-flow experiment."""

    trades: dict[str, dict[date, TradeDay]] = field(default_factory=dict)
    """Reduced days by unit."""


def run_flow(request: FlowRequest, workers: Workers) -> Path:
    """Run the whole experiment and return the output directory."""
    runs = [FlowRun(run.lake, run.wanted, run.missing) for run in check_range(request)]

    def compute(_: RunDirectory, clock: Clock) -> Outcome:
        markets = _markets(request, workers, clock)
        mids = {name: series for name, (_, series) in markets.items()}
        bars = pd.concat([_bars(run, request, mids, workers, clock) for run in runs], ignore_index=True)
        with clock.stage("evaluate"):
            tables = flow_evaluation.flow_tables(bars, _plan(request.config))
            if request.config.variants:
                tables["variants"] = _variant_ics(bars, request.config)
        summary = {
            "sample": "out_of_sample",
            "rows": {run.name: _row_counts(run, request) for run in runs},
            "large_set": _large_sets(bars, runs, request, workers),
            "notes": _notes(request, runs, mids),
            "markets": {name: fingerprint(run) for name, (run, _) in markets.items()},
        }
        return Outcome({"features": bars} | tables, summary, _headline(tables["ic"]))

    return execute(request, "flow", runs, workers, compute)


def _plan(config: FlowConfig) -> flow_evaluation.FlowPlan:
    return flow_evaluation.FlowPlan(
        width_us=config.bar,
        horizons_us=config.horizons,
        controls=config.controls,
        costs=Costs(fee_bps=config.fee_bps, slippage_bps=config.slippage_bps),
        seed=config.seed,
    )


def _variant_ics(bars: pd.DataFrame, config: FlowConfig) -> pd.DataFrame:
    """IC of large and small flow under every threshold setting, the main one first, against total flow.

    `evaluation.ic_table` with symbol and setting in front; corrected over all of them.
    """
    total = flow_evaluation.TOTAL
    columns = {(flow_days.variant_name(config.settings[0]), name): name for name in _SIZED}
    for setting in config.variants:
        label = flow_days.variant_name(setting)
        columns |= {(label, name): f"{name}:{label}" for name in _SIZED}
    signals = [evaluation.Signal(column, column, 1, total) for column in columns.values()]
    signals.append(evaluation.Signal(total, total))
    settings = dict(zip(columns.values(), columns, strict=True)) | {total: ("", total)}
    plan, tables = _plan(config), []
    for symbol, panel in bars.groupby("symbol", sort=True):
        panel = panel.rename(columns={"bar_ts": "bucket_ts"})
        table = evaluation.ic_table(panel, signals, plan.targets, width_us=config.bar, seed=config.seed)
        table.insert(0, "setting", [settings[name][0] for name in table["signal"]])
        table["signal"] = [settings[name][1] for name in table["signal"]]
        table.insert(0, "symbol", symbol)
        tables.append(table)
    return evaluation.judge(pd.concat(tables, ignore_index=True))


def _bars(
    run: FlowRun,
    request: FlowRequest,
    markets: Mapping[str, pd.Series],
    workers: Workers,
    clock: Clock,
) -> pd.DataFrame:
    """Bars of the range with thresholds, rolled sums, targets and controls."""
    config = request.config
    with clock.stage("trades"):
        table = _bar_table(run, request, config.unit, workers)
    with clock.stage("book"):
        _reduce_books(run, request, workers)
        states = _states(run, request, table["bar_ts"].to_numpy(), workers)
    with clock.stage("controls"):
        mids = states["mid2"]
        prices = mids if config.price == "mid" else controls.vwap_prices(table, config.bar)
        starts = table["bar_ts"].to_numpy()
        table = table.join(flow_bars.rolled_columns(table, width=config.bar))
        known = controls.control_columns(table, prices, states, markets, width=config.bar)
        ahead = controls.forward_returns(starts, prices, config.bar, config.horizons)
        mid = mids.reindex(starts + config.bar).to_numpy() * float(run.lake.symbol.price_unit / 2)
        table = pd.concat([table, ahead, known], axis=1).assign(mid=mid)
    inside = table["bar_ts"] >= day_start_us(request.start)
    inside &= table["bar_ts"] < day_start_us(next_day(request.end))
    table = table[inside].reset_index(drop=True)
    table.insert(0, "symbol", run.name)
    return table


def _bar_table(run: FlowRun, request: FlowRequest, unit: str, workers: Workers) -> pd.DataFrame:
    """Bars from LOOKBACK_US before the range to as far as its targets reach; flow only where needed.

    Large and small flow is summed over three hours, so the day before the range has it too.
    """
    config, first = request.config, previous_day(request.start)
    longest = max(window for window, _, _ in config.settings)
    earliest = request.start - _LOOKBACK
    sized_from = day_of_us(day_start_us(first) - longest)
    last = _last_priced(request) if config.price == "vwap" else request.end
    asked = days_between(min(earliest, sized_from), last)
    held = [day for day in asked if run.lake.has("trades", day)]
    tasks = [(run.job(request, day), unit) for day in held]
    run.has_read("trades", held)
    made = workers.map("trades", flow_days.reduce_trades, tasks)
    trades = run.trades[unit] = {day.day: day for day in made}
    jobs = []
    for day in held:
        if day >= earliest:
            touched = days_between(day_of_us(day_start_us(day) - longest), day)
            near = {d: trades[d] for d in touched if d in trades}
            sized = first <= day <= request.end
            jobs.append(BarJob(run.job(request, day), near if sized else {day: trades[day]}, sized))
    made_bars = workers.map("bars", flow_days.bars_of_day, jobs)
    tables = {job.job.day: table for job, table in zip(jobs, made_bars, strict=True)}
    for day in days_between(earliest, last):
        if day not in tables:
            tables[day] = flow_bars.empty_bar_table(start=day_start_us(day), width=config.bar)
    return pd.concat([tables[day] for day in sorted(tables)], ignore_index=True)


def _last_priced(request: FlowRequest) -> date:
    """Last day at whose prices a target looks."""
    return day_of_us(day_start_us(next_day(request.end)) + max(request.config.horizons))


def _reduce_books(run: SymbolRun, request: FlowRequest, workers: Workers) -> None:
    """Reduce the books that controls and targets look at, and carry the state over midnights."""
    first = previous_day(request.start - _LOOKBACK)
    reduce_books(run, request, days_between(first, _last_priced(request)), "book", workers)
    if run.books:
        carry_books(run, min(run.books))


def _states(run: SymbolRun, request: FlowRequest, starts: np.ndarray, workers: Workers) -> pd.DataFrame:
    """Book and ticker states by time, at every time at which bars need a price or a state."""
    config = request.config
    prices = controls.price_times(starts, config.bar, config.horizons)
    times = np.union1d(prices, controls.state_times(starts, config.bar))
    return _book_states(run, request, times, workers).join(_ticker_states(run, request, times, workers))


def _book_states(run: SymbolRun, request: FlowRequest, times: np.ndarray, workers: Workers) -> pd.DataFrame:
    tasks = [
        (run.job(request, day), run.books[day], run.carries.get(day), mine)
        for day, mine in _by_deciding_day(times)
        if day in run.books
    ]
    parts = workers.map("states", flow_days.book_states, tasks)
    columns = ["mid2", *controls.BOOK_CONTROLS]
    table = pd.concat(parts) if parts else pd.DataFrame(columns=columns, dtype=np.float64)
    return table.reindex(times)


def _ticker_states(run: SymbolRun, request: FlowRequest, times: np.ndarray, workers: Workers) -> pd.DataFrame:
    table = "derivative_ticker"
    tasks = [
        (run.job(request, day), mine) for day, mine in _by_deciding_day(times) if run.lake.has(table, day)
    ]
    for job, _ in tasks:
        run.has_read(table, [d for d in (previous_day(job.day), job.day) if run.lake.has(table, d)])
    parts = workers.map("states", flow_days.ticker_states, tasks)
    names = list(controls.TICKER_CONTROLS)
    states = pd.concat(parts) if parts else pd.DataFrame(columns=names, dtype=np.float64)
    return states.reindex(times)


def _by_deciding_day(times: np.ndarray) -> list[tuple[date, np.ndarray]]:
    """Sorted times (us), cut by the day that decides what is known at them."""
    deciding = returns.day_before(times)
    return [(day_of_us(int(n) * US_PER_DAY), times[deciding == n]) for n in np.unique(deciding)]


def _markets(request: FlowRequest, workers: Workers, clock: Clock) -> dict[str, tuple[SymbolRun, pd.Series]]:
    """The market symbols that the lake has, and their mids by time."""
    found = {}
    start, stop = day_start_us(request.start), day_start_us(next_day(request.end))
    starts = np.arange(start, stop, request.config.bar, dtype=np.int64)
    times = controls.price_times(starts, request.config.bar, ())
    # One day more than the times ask for: the book that stood at the first midnight.
    days_ = days_between(previous_day(day_of_us(int(times[0]) - 1)), request.end)
    for name in request.config.markets:
        try:
            run = _market_run(request, name)
        except LakeError:
            continue
        with clock.stage("book"):
            reduce_books(run, request, days_, "book", workers)
            if run.books:
                carry_books(run, min(run.books))
            found[name] = (run, _book_states(run, request, times, workers)["mid2"])
    return found


def _market_run(request: FlowRequest, name: str) -> SymbolRun:
    return SymbolRun(open_symbol(request.lake, request.exchange, name), [], [])


def _row_counts(run: FlowRun, request: FlowRequest) -> dict[str, Any]:
    inside = [day for day in request.days if day in run.trades[request.config.unit]]
    made = [run.trades[request.config.unit][day] for day in inside]
    books: list[BookDay] = [run.books[day] for day in request.days if day in run.books]
    trades, unknown = sum(day.trades for day in made), sum(day.unknown for day in made)
    return {
        "trades": trades,
        "kept": trades,
        "dropped": {},
        "side_unknown": unknown,
        "orders": sum(day.takers for day in made),
        "book_rows": sum(book.rows + sum(book.skipped.values()) for book in books),
        "book_skipped": added([book.skipped for book in books]) if books else {},
        "reused_artefacts": sum(day.reused for day in made) + sum(book.reused for book in books),
    }


def _large_sets(
    bars: pd.DataFrame, runs: Sequence[FlowRun], request: FlowRequest, workers: Workers
) -> dict[str, dict[str, dict[str, float]]]:
    """What is large under the run's unit; with unit = order, beside the same for trades as given."""
    config = request.config
    found: dict[str, dict[str, dict[str, float]]] = {}
    for run in runs:
        mine = bars[bars["symbol"] == run.name]
        found[run.name] = {config.unit: flow_bars.large_set(mine)}
        if config.unit == "order":
            plain = _bar_table(run, request, "trade", workers)
            both = mine[mine["large_count"].notna()].merge(plain[plain["large_count"].notna()], on="bar_ts")
            for unit, table in ((config.unit, mine), ("trade", plain)):
                found[run.name][unit] = flow_bars.large_set(table[table["bar_ts"].isin(both["bar_ts"])])
    return found


def _notes(request: FlowRequest, runs: Sequence[FlowRun], markets: Mapping[str, pd.Series]) -> list[str]:
    notes = missing_notes(runs)
    absent = [name for name in request.config.markets if name not in markets]
    if absent:
        notes.append(f"the lake has no {', '.join(absent)} of {request.exchange}: no such market control")
    for run in runs:
        gaps = [day for day in request.days if not run.lake.has("derivative_ticker", day)]
        if gaps:
            when = "" if len(gaps) == len(request.days) else f" on {', '.join(map(str, gaps))}"
            notes.append(f"{run.name}: no derivative_ticker{when}, so open interest and funding are null")
    return notes


def _headline(ic: pd.DataFrame) -> dict[str, float | None]:
    """What the ledger says of a finished run: IC of large, small and total flow."""
    flows = (flow_evaluation.LARGE, flow_evaluation.SMALL, flow_evaluation.TOTAL)
    main = ic[ic["signal"].isin(flows)]
    columns = (main[name].tolist() for name in ("symbol", "signal", "target", "ic"))
    return {
        f"{symbol} ic {target} {signal}": round(ic, 6) if np.isfinite(ic) else None
        for symbol, signal, target, ic in zip(*columns, strict=True)
    }
