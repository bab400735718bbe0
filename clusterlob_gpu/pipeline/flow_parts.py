"""Taker flow for many configs at once: thresholds, bars, controls, targets, and the result tables of each.

A run has one config, a sweep has many that differ in thresholds and targets: the thresholds of all come
from one pass over the reduced trades, and books and tickers are asked once for all.  A `FlowPart` is one
symbol under one config, on its way to its tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from fractions import Fraction

import numpy as np
import pandas as pd

from clusterlob_gpu import beside, controls, cores, evaluation, flow_bars, flow_days, flow_evaluation, returns
from clusterlob_gpu.config import FlowConfig
from clusterlob_gpu.days import next_day, previous_day
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.files import Location
from clusterlob_gpu.flow_days import BarDay, BarJob, StateDay, TradeDay
from clusterlob_gpu.lake.layout import day_of_us, day_start_us
from clusterlob_gpu.lake.native import days_between
from clusterlob_gpu.pipeline.carry import carry_books, reduce_books
from clusterlob_gpu.pipeline.run import Bad, RunRequest, SymbolRun, Work, open_lake
from clusterlob_gpu.pipeline.stages import Stages
from clusterlob_gpu.portfolio import Costs
from clusterlob_gpu.schema import US_PER_DAY
from clusterlob_gpu.store import Store

FlowRequest = RunRequest[FlowConfig]

_SIZED = (flow_evaluation.LARGE, flow_evaluation.SMALL)

VARIANT_COLUMNS = (*_SIZED, "flow_share_large")
"""Columns of the bars that every variant of the thresholds adds."""

_LOOKBACK = timedelta(days=-(-controls.LOOKBACK_US // US_PER_DAY))
"""Whole days before the range that its controls look at."""


@dataclass
class FlowRun(SymbolRun):
    """A symbol on its way through the stages of the taker-flow experiment."""

    trades: dict[str, dict[date, TradeDay]] = field(default_factory=dict)
    """Reduced days by unit."""


@dataclass(frozen=True)
class FlowPart:
    """One symbol under one config: what its bars are made of, and where it is."""

    symbol: str
    exchange: str
    config: FlowConfig
    store: Location
    days: tuple[date, ...]
    """Days of the range."""
    price_unit: Fraction
    bars: tuple[tuple[date, BarDay | None], ...]
    """Bars of every day from the look-back on, None where the lake has no trades."""
    setting: int
    """Number of the config's thresholds among those of the bars."""
    book: tuple[StateDay, ...]
    ticker: tuple[StateDay, ...]
    markets: Mapping[str, tuple[StateDay, ...]]
    """Book states of the market symbols."""


def prepare_flow(
    request: FlowRequest, configs: Sequence[FlowConfig], runs: Sequence[FlowRun], work: Work
) -> tuple[list[list[FlowPart]], dict[str, SymbolRun]]:
    """Every symbol under every config, up to its bars, and the market symbols that the lake has.

    The configs may differ in thresholds, horizons, regressions and costs.
    """
    stages, clock = work.stages, work.clock
    shared = replace(request, config=together(configs))
    with clock.stage("book"):
        markets = _market_runs(shared, work.bad)
        market_days = _market_days(shared)
        wanted = days_between(previous_day(request.start - _LOOKBACK), _last_priced(shared))
        asked: list[tuple[SymbolRun, list[date]]] = [(run, wanted) for run in runs]
        reduce_books([*asked, *((run, market_days) for run in markets.values())], shared, stages)
        for run in (*markets.values(), *runs):
            if run.books:
                carry_books(run, min(run.books))
    with clock.stage("trades"):
        bars = bar_days(runs, shared, shared.config.unit, stages)
    with clock.stage("book"):
        starts = np.arange(
            day_start_us(request.start - _LOOKBACK),
            day_start_us(next_day(bars[runs[0].name][-1][0])),
            shared.config.bar,
        )
        prices = controls.price_times(starts, shared.config.bar, shared.config.horizons)
        times = np.union1d(prices, controls.state_times(starts, shared.config.bar))
        books = _book_states(runs, shared, times, stages)
        tickers = _ticker_states(runs, shared, times, stages)
        market_states = _book_states(list(markets.values()), shared, _market_times(shared), stages)
    parts = [
        [
            FlowPart(
                symbol=run.name,
                exchange=request.exchange,
                config=config,
                store=request.artefacts,
                days=tuple(request.days),
                price_unit=run.lake.symbol.price_unit,
                bars=tuple(bars[run.name]),
                setting=shared.config.settings.index(config.settings[0]),
                book=tuple(books[run.name]),
                ticker=tuple(tickers[run.name]),
                markets={name: tuple(states) for name, states in market_states.items()},
            )
            for run in runs
        ]
        for config in configs
    ]
    return parts, markets


def together(configs: Sequence[FlowConfig]) -> FlowConfig:
    """One config with the thresholds of all as its settings, and all their horizons."""
    settings = list(dict.fromkeys(setting for config in configs for setting in config.settings))
    (window, *quantiles), *rest = settings
    horizons = dict.fromkeys(horizon for config in configs for horizon in config.horizons)
    update = {
        "threshold_window": window,
        "quantiles": tuple(quantiles),
        "variants": tuple(rest),
        "horizons": tuple(horizons),
    }
    return configs[0].model_copy(update=update)


def flow_plan(config: FlowConfig) -> flow_evaluation.FlowPlan:
    """What a config asks of the bars."""
    return flow_evaluation.FlowPlan(
        width_us=config.bar,
        horizons_us=config.horizons,
        controls=config.controls,
        costs=Costs(fee_bps=config.fee_bps, slippage_bps=config.slippage_bps),
        seed=config.seed,
    )


def part_tables(part: FlowPart) -> dict[str, pd.DataFrame]:
    """Result tables of a part by name: its bars as `features`, `flow_evaluation.flow_tables`, and `variants`
    where its config has some."""
    bars, plan = with_variants(part), flow_plan(part.config)
    with cores.spare(flow_evaluation.AT_ONCE - 1) as more:
        tables = beside.ask("tables", flow_evaluation.flow_tables, bars, plan, hands=1 + more)
        variants = {"variants": _variant_ics(part, bars)} if part.config.variants else {}
        return {"features": bars} | tables() | variants


def part_ic(part: FlowPart) -> pd.DataFrame:
    """The `ic` table of a part alone."""
    bars, plan = part_bars(part), flow_plan(part.config)
    with cores.spare(len(plan.targets) - 1) as more:
        return beside.ask("tables", flow_evaluation.flow_ic, bars, plan, hands=1 + more)()


def _variant_ics(part: FlowPart, bars: pd.DataFrame) -> pd.DataFrame:
    """IC of large and small flow under every threshold setting, the main one first, against total flow.

    `evaluation.ic_table` with symbol and setting in front.
    """
    total, config = flow_evaluation.TOTAL, part.config
    columns = {(flow_days.variant_name(config.settings[0]), name): name for name in _SIZED}
    for setting in config.variants:
        label = flow_days.variant_name(setting)
        columns |= {(label, name): f"{name}:{label}" for name in _SIZED}
    signals = [evaluation.Signal(column, column, 1, total) for column in columns.values()]
    signals.append(evaluation.Signal(total, total))
    settings = dict(zip(columns.values(), columns, strict=True)) | {total: ("", total)}
    panel = bars.rename(columns={"bar_ts": "bucket_ts"})
    table = evaluation.ic_table(
        panel, signals, flow_plan(config).targets, width_us=config.bar, seed=config.seed
    )
    table.insert(0, "setting", [settings[name][0] for name in table["signal"]])
    table["signal"] = [settings[name][1] for name in table["signal"]]
    table.insert(0, "symbol", part.symbol)
    return table


def part_bars(part: FlowPart, setting: int | None = None) -> pd.DataFrame:
    """Bars of the range with thresholds, rolled sums, targets and controls, under the part's setting."""
    config, store = part.config, Store(part.store)
    number = part.setting if setting is None else setting
    table = pd.concat(
        [_day_table(part, store, day, made, number) for day, made in part.bars], ignore_index=True
    )
    columns = ["mid2", *controls.BOOK_CONTROLS]
    states = flow_days.read_states(store, part.book, columns)
    ticker = flow_days.read_states(store, part.ticker, list(controls.TICKER_CONTROLS))
    states = states.join(ticker, how="outer")
    mids = states["mid2"]
    markets = {
        name: flow_days.read_states(store, held, columns)["mid2"] for name, held in part.markets.items()
    }
    prices = mids if config.price == "mid" else controls.vwap_prices(table, config.bar)
    starts = table["bar_ts"].to_numpy()
    table = table.join(flow_bars.rolled_columns(table, width=config.bar))
    known = controls.control_columns(table, prices, states, markets, width=config.bar)
    ahead = controls.forward_returns(starts, prices, config.bar, config.horizons)
    mid = mids.reindex(starts + config.bar).to_numpy() * float(part.price_unit / 2)
    table = pd.concat([table, ahead, known], axis=1).assign(mid=mid)
    inside = table["bar_ts"] >= day_start_us(part.days[0])
    inside &= table["bar_ts"] < day_start_us(next_day(part.days[-1]))
    table = table[inside].reset_index(drop=True)
    table.insert(0, "symbol", part.symbol)
    return table


def _day_table(part: FlowPart, store: Store, day: date, made: BarDay | None, setting: int) -> pd.DataFrame:
    if made is None:
        return flow_bars.empty_bar_table(start=day_start_us(day), width=part.config.bar)
    return made.table(store, setting)


def with_variants(part: FlowPart) -> pd.DataFrame:
    """The part's bars, and beside them the VARIANT_COLUMNS of its variants."""
    table = part_bars(part)
    for number, setting in enumerate(part.config.variants, start=1):
        made = part_bars(part, number)[list(VARIANT_COLUMNS)]
        table = table.join(made.add_suffix(f":{flow_days.variant_name(setting)}"))
    return table


def bar_days(
    runs: Sequence[FlowRun], request: FlowRequest, unit: str, stages: Stages
) -> dict[str, list[tuple[date, BarDay | None]]]:
    """Bars from LOOKBACK_US before the range to as far as its targets reach; flow only where needed.

    Large and small flow is summed over three hours, so the day before the range has it too.
    """
    config, first = request.config, previous_day(request.start)
    longest = max(window for window, _, _ in config.settings)
    earliest = request.start - _LOOKBACK
    sized_from = day_of_us(day_start_us(first) - longest)
    last = _last_priced(request) if config.price == "vwap" else request.end
    asked = days_between(min(earliest, sized_from), last)
    held = [(run, day) for run in runs for day in run.held("trades", asked)]
    tasks = [(run.job(request, day), unit) for run, day in held]
    made = stages.make("trades", flow_days.trade_artefact, flow_days.reduce_trades, tasks)
    for run in runs:
        run.trades[unit] = {}
    for (run, day), reduced in zip(held, made, strict=True):
        run.trades[unit][day] = reduced
    jobs = []
    for run, day in held:
        if day >= earliest:
            trades = run.trades[unit]
            touched = days_between(day_of_us(day_start_us(day) - longest), day)
            near = {d: trades[d] for d in touched if d in trades}
            sized = first <= day <= request.end
            jobs.append((run, BarJob(run.job(request, day), near if sized else {day: trades[day]}, sized)))
    bars = stages.make("bars", BarJob.artefact, flow_days.bars_of_day, [job for _, job in jobs])
    of_day = {(run.name, day.day): day for (run, _), day in zip(jobs, bars, strict=True)}
    return {
        run.name: [(day, of_day.get((run.name, day))) for day in days_between(earliest, last)] for run in runs
    }


def _last_priced(request: FlowRequest) -> date:
    """Last day at whose prices a target looks."""
    return day_of_us(day_start_us(next_day(request.end)) + max(request.config.horizons))


def _book_states(
    runs: Sequence[SymbolRun], request: FlowRequest, times: np.ndarray, stages: Stages
) -> dict[str, list[StateDay]]:
    """States of the book at sorted times (us), by symbol."""
    asked = [
        (run, (run.job(request, day), run.books[day], run.carries.get(day), mine))
        for run in runs
        for day, mine in _by_deciding_day(times)
        if day in run.books
    ]
    tasks = [task for _, task in asked]
    name, function = flow_days.book_state_artefact, flow_days.book_states
    made = stages.make("states", name, function, tasks, request.config.book)
    return _by_symbol(runs, [run for run, _ in asked], made)


def _ticker_states(
    runs: Sequence[FlowRun], request: FlowRequest, times: np.ndarray, stages: Stages
) -> dict[str, list[StateDay]]:
    table, asked = "derivative_ticker", []
    for run in runs:
        deciding = dict(_by_deciding_day(times))
        run.held(table, [d for day in deciding for d in (previous_day(day), day)])
        for day in run.held(table, list(deciding)):
            asked.append((run, (run.job(request, day), deciding[day])))
    tasks = [task for _, task in asked]
    name, function = flow_days.ticker_state_artefact, flow_days.ticker_states
    made = stages.make("ticker", name, function, tasks, table)
    return _by_symbol(runs, [run for run, _ in asked], made)


def _by_symbol(
    runs: Sequence[SymbolRun], owners: Sequence[SymbolRun], made: Sequence[StateDay]
) -> dict[str, list[StateDay]]:
    found: dict[str, list[StateDay]] = {run.name: [] for run in runs}
    for run, day in zip(owners, made, strict=True):
        found[run.name].append(day)
    return found


def _by_deciding_day(times: np.ndarray) -> list[tuple[date, np.ndarray]]:
    """Sorted times (us), cut by the day that decides what is known at them."""
    deciding = returns.day_before(times)
    return [(day_of_us(int(n) * US_PER_DAY), times[deciding == n]) for n in np.unique(deciding)]


def _market_runs(request: FlowRequest, bad: Bad) -> dict[str, SymbolRun]:
    """The market symbols that the lake has."""
    found = {}
    for name in request.config.markets:
        try:
            found[name] = SymbolRun(open_lake(request, name, bad), [], [])
        except LakeError:
            continue
    return found


def _market_times(request: FlowRequest) -> np.ndarray:
    """Times (us) at which the past returns of the market symbols need a price."""
    start, stop = day_start_us(request.start), day_start_us(next_day(request.end))
    starts = np.arange(start, stop, request.config.bar, dtype=np.int64)
    return controls.price_times(starts, request.config.bar, ())


def _market_days(request: FlowRequest) -> list[date]:
    """Days whose books the market symbols need: the one that stood at the first midnight as well."""
    first = day_of_us(int(_market_times(request)[0]) - 1)
    return days_between(previous_day(first), request.end)
