"""The evaluation of a taker-flow run: bars of all symbols in, every table of results out.

Which signals are tested, against what, in which slices: the choices stand here, the statistics in
`evaluation`, `differences`, `quantiles`, `regression` and `portfolio`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import pandas as pd

from clusterlob_gpu.beside import Each
from clusterlob_gpu.config import format_duration
from clusterlob_gpu.differences import difference_table, judge_differences, slice_table
from clusterlob_gpu.errors import ConfigError, InputError
from clusterlob_gpu.evaluation import Signal, Target, ic_table, judge
from clusterlob_gpu.portfolio import Costs, backtest_tables
from clusterlob_gpu.quantiles import DECILES, Edges, quantile_tables
from clusterlob_gpu.regression import regression_table
from clusterlob_gpu.schema import FACTORS, ROLL_UPS

LARGE, SMALL, TOTAL = "flow_imbalance_large", "flow_imbalance_small", "flow_imbalance_total"
HEADLINE = (LARGE, SMALL, TOTAL, f"{LARGE}_sum_30m", f"{LARGE}_sum_1h", f"{LARGE}_sum_3h")
"""Signals that are cut into quantiles, regressed, sliced and traded; every factor has its IC measured."""
CONTROLS = (
    "spread_bps",
    "depth1",
    "depth5",
    "rv_1h",
    "rv_3h",
    "ret_1h",
    "ret_3h",
    "log_notional",
    "oi",
    "d_oi_z",
    "funding",
    "funding_z",
)
REGIMES = {
    "funding_regime": ("low", "middle", "high"),
    "d_oi_regime": ("normal", "large"),
    "volatility_regime": ("low", "middle", "high"),
    "liquidity_regime": ("low", "normal"),
    "stress_regime": ("calm", "neither", "stress"),
}
"""Columns that slice time, and their labels in order."""
LASTING = ("volatility_regime", "liquidity_regime")
MONTH = "month"
TABLES = (
    "ic",
    "ic_differences",
    "quantiles",
    "spreads",
    "regressions",
    "regimes",
    "stability",
    "backtest",
    "backtest_path",
)
"""Tables of `flow_tables`, in their order."""
AT_ONCE = 7
"""Tasks that `flow_tables` has for `each` at once."""
_MARKET_RETURN = re.compile(r".+_ret_\d+[a-z]+")


class Sampling(TypedDict):
    """How every table with resamples is made."""

    width_us: int
    draws: int
    seed: int


@dataclass(frozen=True)
class FlowPlan:
    """What is asked of the bars."""

    width_us: int
    """Length of a bar."""
    horizons_us: Sequence[int]
    """Targets are the columns `ret_fwd_<horizon>`, such as ret_fwd_3h."""
    controls: Sequence[str] | None = None
    """Control columns of the regressions; None is CONTROLS and the markets' past returns."""
    costs: Costs = field(default_factory=Costs)
    edges: Edges = DECILES
    draws: int = 1000
    seed: int = 7

    @property
    def targets(self) -> list[Target]:
        names = [(f"ret_fwd_{format_duration(h)}", h) for h in self.horizons_us]
        return [Target(name, name, h) for name, h in names]

    @property
    def sampling(self) -> Sampling:
        return {"width_us": self.width_us, "draws": self.draws, "seed": self.seed}


def flow_signals(columns: Sequence[str], width_us: int) -> list[Signal]:
    """The factors, sums and accelerations that the bars have, each against total flow of the same kind."""
    present, found = set(columns), []
    for factor in FACTORS:
        for suffix, rollup in _rollups(width_us):
            name, benchmark = f"{factor}{suffix}", f"{TOTAL}{suffix}"
            if name in present:
                found.append(Signal(name, name, rollup, benchmark if benchmark in present else None))
    return found


def _rollups(width_us: int) -> list[tuple[str, int]]:
    """Suffix and bars summed, acceleration counting as its longest sum."""
    sums = [(f"_sum_{format_duration(us)}", max(us // width_us, 1)) for us in ROLL_UPS]
    return [("", 1), *sums, ("_acceleration", max(bars for _, bars in sums))]


def flow_pairs(columns: Sequence[str], width_us: int) -> list[tuple[Signal, Signal]]:
    """Large less small and large less total flow, for every kind of sum that the bars have."""
    known = {signal.name: signal for signal in flow_signals(columns, width_us)}
    names = [
        (f"{LARGE}{suffix}", f"{other}{suffix}")
        for suffix, _ in _rollups(width_us)
        for other in (SMALL, TOTAL)
    ]
    return [(known[a], known[b]) for a, b in names if a in known and b in known]


def flow_tables(bars: pd.DataFrame, plan: FlowPlan, each: Each = map) -> dict[str, pd.DataFrame]:
    """Every table of results of a taker-flow run, keyed by file name without suffix, those of a symbol made
    by `each`.

    Takes the bars of all symbols: symbol, bar_ts (start, int64 us; a grid per symbol), the columns of
    `flow_bars` and `controls` (sums, targets, controls, regimes), and `mid`, the mid at the bar's end.

    Gives tables with `symbol` in front:

    - ic: `evaluation.ic_table`, benchmark = total flow of the same sum; p_fdr and verdict over all symbols.
    - ic_differences: `differences.difference_table` of large less small and large less total flow.
    - quantiles, spreads: `quantiles.quantile_tables` of the HEADLINE signals.
    - regressions: `regression.regression_table` of the HEADLINE signals.
    - regimes: `differences.slice_table` of the HEADLINE signals by REGIMES.
    - stability: the same by symbol (all bars), UTC month, volatility and liquidity; by "symbol" and with a
      single month the difference to the rest is null.
    - backtest, backtest_path: `portfolio.backtest_tables` of the HEADLINE signals.

    A signal or regime that the bars do not have is left out, and so is a default control; a missing target
    or mid is an InputError that names it, an unknown control of the plan a ConfigError.  Symbols without
    bars give no rows.
    """
    panels = {str(symbol): _panel(mine) for symbol, mine in bars.groupby("symbol", sort=True)}
    if not panels:
        raise InputError("bars: no rows, so there is nothing to evaluate; check symbols and dates")
    parts = [_symbol_tables(symbol, panel, plan, each) for symbol, panel in panels.items()]
    tables = {
        name: pd.concat(
            [_with_symbol(part[name], symbol) for symbol, part in zip(panels, parts, strict=True)],
            ignore_index=True,
        )
        for name in TABLES
    }
    return judge_tables(tables)


def judge_tables(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Tables of `flow_tables` and `variants` of several symbols put together: corrected over all."""
    judges = {"ic": judge, "variants": judge}
    judges |= dict.fromkeys(("ic_differences", "regimes", "stability"), judge_differences)
    return {name: judges[name](table) if name in judges else table for name, table in tables.items()}


def flow_ic(bars: pd.DataFrame, plan: FlowPlan, each: Each = map) -> pd.DataFrame:
    """The `ic` table of `flow_tables` alone."""
    tables = []
    for symbol, mine in bars.groupby("symbol", sort=True):
        panel = _panel(mine)
        signals = flow_signals(list(panel.columns), plan.width_us)
        table = ic_table(panel, signals, plan.targets, each=each, **plan.sampling)
        tables.append(_with_symbol(table, str(symbol)))
    return judge(pd.concat(tables, ignore_index=True))


def _panel(bars: pd.DataFrame) -> pd.DataFrame:
    panel = bars.rename(columns={"bar_ts": "bucket_ts"}).sort_values("bucket_ts", kind="stable")
    months = pd.to_datetime(panel["bucket_ts"], unit="us").dt.strftime("%Y-%m")
    return panel.assign(**{MONTH: months}).reset_index(drop=True)


def _symbol_tables(symbol: str, panel: pd.DataFrame, plan: FlowPlan, each: Each) -> dict[str, pd.DataFrame]:
    signals = flow_signals(list(panel.columns), plan.width_us)
    headline = [signal for signal in signals if signal.name in HEADLINE]
    if LARGE not in {signal.name for signal in signals}:
        raise InputError(f"bars of {symbol}: no column {LARGE}; build the bars with size thresholds")
    targets, sampling, width = plan.targets, plan.sampling, plan.width_us
    pairs, controls = flow_pairs(list(panel.columns), plan.width_us), _controls(panel, plan)
    regimes = {name: labels for name, labels in REGIMES.items() if name in panel}
    stable = {"symbol": (symbol,), MONTH: tuple(sorted(panel[MONTH].unique()))}
    stable |= {name: labels for name, labels in regimes.items() if name in LASTING}

    def quantiles() -> dict[str, pd.DataFrame]:
        tables = quantile_tables(panel, headline, targets, edges=plan.edges, **sampling)
        return dict(zip(("quantiles", "spreads"), tables, strict=True))

    def backtest() -> dict[str, pd.DataFrame]:
        tables = backtest_tables(panel, headline, plan.horizons_us, width_us=width, costs=plan.costs)
        return dict(zip(("backtest", "backtest_path"), tables, strict=True))

    makers: list[Callable[[], dict[str, pd.DataFrame]]] = [  # that takes longest comes first
        lambda: {"regimes": slice_table(panel, regimes, headline, targets, **sampling)},
        lambda: {"stability": slice_table(panel, stable, headline, targets, **sampling)},
        lambda: {"regressions": regression_table(panel, headline, targets, controls, width_us=width)},
        lambda: {"ic": ic_table(panel, signals, targets, **sampling)},
        backtest,
        lambda: {"ic_differences": difference_table(panel, pairs, targets, **sampling)},
        quantiles,
    ]
    found: dict[str, pd.DataFrame] = {}
    for tables in each(lambda make: make(), makers):
        found |= tables
    return found


def _controls(panel: pd.DataFrame, plan: FlowPlan) -> list[str]:
    usual = [*CONTROLS, *(name for name in panel.columns if _MARKET_RETURN.fullmatch(name))]
    if plan.controls is None:
        return usual
    # A target, or a regime in words, is a column too, but no control.
    allowed = [name for name in (*usual, "rv_z", "low_liquidity") if name in panel.columns]
    unknown = [name for name in plan.controls if name not in allowed]
    if unknown:
        known = ", ".join(allowed)
        raise ConfigError(f"controls = {unknown[0]!r}: no such control; name some of {known}")
    return list(plan.controls)


def _with_symbol(table: pd.DataFrame, symbol: str) -> pd.DataFrame:
    table = table.copy()
    table.insert(0, "symbol", symbol)
    return table
