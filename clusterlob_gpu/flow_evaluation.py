"""The evaluation of a taker-flow run: bars of all symbols in, every table of results out.

Which signals are tested, against what, in which slices: the choices stand here, the statistics in
`evaluation`, `quantiles`, `regression` and `portfolio`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from clusterlob_gpu.config import format_duration, parse_duration
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.evaluation import (
    Signal,
    Target,
    difference_table,
    ic_table,
    judge,
    judge_differences,
    slice_table,
)
from clusterlob_gpu.portfolio import Costs, backtest_tables
from clusterlob_gpu.quantiles import DECILES, Edges, quantile_tables
from clusterlob_gpu.regression import regression_table

LARGE, SMALL, TOTAL = "flow_imbalance_large", "flow_imbalance_small", "flow_imbalance_total"
FACTORS = (
    LARGE,
    SMALL,
    TOTAL,
    "large_net_share",
    "large_small_disagreement",
    "flow_share_large",
    "flow_toxicity",
)
"""Factors whose IC is measured, with their sums and acceleration as far as the bars have them."""
SUMS = ("30m", "1h", "3h")
ACCELERATION = "acceleration"
HEADLINE = (LARGE, SMALL, TOTAL, f"{LARGE}_30m", f"{LARGE}_1h", f"{LARGE}_3h")
"""Signals that are cut into quantiles, regressed, sliced and traded."""
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
MARKET_PREFIX, REGIME_PREFIX, TARGET_PREFIX = "mkt_", "regime_", "ret_fwd_"
LIQUIDITY, VOLATILITY, MONTH = "low_liquidity", "regime_volatility", "month"
_ORDER = ("low", "middle", "high", "calm", "neutral", "stress", "liquid", "illiquid")


@dataclass(frozen=True)
class FlowPlan:
    """What is asked of the bars."""

    width_us: int
    """Length of a bar."""
    horizons_us: Sequence[int]
    """Targets are the columns `ret_fwd_<horizon>`, such as ret_fwd_3h."""
    controls: Sequence[str] | None = None
    """Control columns of the regressions; None is CONTROLS and every column that starts with mkt_."""
    costs: Costs = field(default_factory=Costs)
    edges: Edges = DECILES
    draws: int = 1000
    seed: int = 7

    @property
    def targets(self) -> list[Target]:
        names = [(f"{TARGET_PREFIX}{format_duration(h)}", h) for h in self.horizons_us]
        return [Target(name, name, h) for name, h in names]

    @property
    def sampling(self) -> dict[str, int]:
        return {"width_us": self.width_us, "draws": self.draws, "seed": self.seed}


def flow_signals(columns: Sequence[str], width_us: int) -> list[Signal]:
    """The signals that the bars have, each against total flow of the same kind of sum."""
    present, found = set(columns), []
    for factor in FACTORS:
        for suffix, rollup in _rollups(width_us):
            name, benchmark = f"{factor}{suffix}", f"{TOTAL}{suffix}"
            if name in present:
                found.append(Signal(name, name, rollup, benchmark if benchmark in present else None))
    return found


def _rollups(width_us: int) -> list[tuple[str, int]]:
    """Suffix and bars summed, acceleration counting as its longest sum."""
    sums = [(f"_{name}", max(parse_duration(name) // width_us, 1)) for name in SUMS]
    return [("", 1), *sums, (f"_{ACCELERATION}", sums[-1][1])]


def flow_pairs(columns: Sequence[str], width_us: int) -> list[tuple[Signal, Signal]]:
    """Large less small and large less total flow, for every kind of sum that the bars have."""
    known = {signal.name: signal for signal in flow_signals(columns, width_us)}
    names = [
        (f"{LARGE}{suffix}", f"{other}{suffix}")
        for suffix, _ in _rollups(width_us)
        for other in (SMALL, TOTAL)
    ]
    return [(known[a], known[b]) for a, b in names if a in known and b in known]


def regime_labels(panel: pd.DataFrame) -> dict[str, list[str]]:
    """Columns whose names start with regime_, and low_liquidity, with their labels in order."""
    columns = [c for c in panel.columns if c.startswith(REGIME_PREFIX) or c == LIQUIDITY]
    labels = {column: sorted(panel[column].dropna().unique(), key=_place) for column in columns}
    return {column: names for column, names in labels.items() if names}


def _place(label: str) -> tuple[int, str]:
    return (_ORDER.index(label) if label in _ORDER else len(_ORDER), label)


def flow_tables(bars: pd.DataFrame, plan: FlowPlan) -> dict[str, pd.DataFrame]:
    """Every table of results of a taker-flow run, keyed by file name without suffix.

    Takes the bars of all symbols: symbol, bar_ts (start, int64 us; a grid per symbol), the factors, their
    sums, the targets, the controls, mid and spread_bps at the bar's end, low_liquidity (boolean or null) and
    text columns regime_<what> (null: no regime).

    Gives tables with `symbol` in front:

    - ic: `evaluation.ic_table`, benchmark = total flow of the same sum; p_fdr and verdict over all symbols.
    - ic_differences: `evaluation.difference_table` of large less small and large less total flow.
    - quantiles, spreads: `quantiles.quantile_tables` of the HEADLINE signals.
    - regressions: `regression.regression_table` of the HEADLINE signals.
    - regimes: `evaluation.slice_table` of the HEADLINE signals by every regime and low_liquidity.
    - stability: the same by symbol (all bars), UTC month, volatility and liquidity; by "symbol" and with a
      single month the difference to the rest is null.
    - backtest, backtest_path: `portfolio.backtest_tables` of the HEADLINE signals.

    A signal, control or regime that the bars do not have is left out; a missing target or mid is an
    InputError that names it.  Symbols without bars give no rows.
    """
    panels = {str(symbol): _panel(mine) for symbol, mine in bars.groupby("symbol", sort=True)}
    if not panels:
        raise InputError("bars: no rows, so there is nothing to evaluate; check symbols and dates")
    parts = [_symbol_tables(symbol, panel, plan) for symbol, panel in panels.items()]
    tables = {}
    for name in parts[0]:
        tables[name] = pd.concat(
            [_with_symbol(part[name], symbol) for symbol, part in zip(panels, parts, strict=True)],
            ignore_index=True,
        )
    tables["ic"] = judge(tables["ic"])
    for name in ("ic_differences", "regimes", "stability"):
        tables[name] = judge_differences(tables[name])
    return tables


def _panel(bars: pd.DataFrame) -> pd.DataFrame:
    panel = bars.rename(columns={"bar_ts": "bucket_ts"}).sort_values("bucket_ts", kind="stable")
    month = pd.to_datetime(panel["bucket_ts"], unit="us").dt.strftime("%Y-%m")
    panel = panel.assign(**{MONTH: month})
    if LIQUIDITY in panel:
        low = panel[LIQUIDITY].astype("boolean")
        panel["_liquidity"] = low.map({True: "illiquid", False: "liquid"})
        panel[LIQUIDITY] = low.astype("Float64").astype("float64")
    return panel.reset_index(drop=True)


def _symbol_tables(symbol: str, panel: pd.DataFrame, plan: FlowPlan) -> dict[str, pd.DataFrame]:
    signals = flow_signals(list(panel.columns), plan.width_us)
    headline = [signal for signal in signals if signal.name in HEADLINE]
    if LARGE not in {signal.name for signal in signals}:
        raise InputError(f"bars of {symbol}: no column {LARGE}; build the bars with size thresholds")
    targets, sampling = plan.targets, plan.sampling
    quantiles, spreads = quantile_tables(panel, headline, targets, edges=plan.edges, **sampling)
    backtest, path = backtest_tables(
        panel, headline, plan.horizons_us, width_us=plan.width_us, costs=plan.costs
    )
    sliced = panel.drop(columns=LIQUIDITY, errors="ignore").rename(columns={"_liquidity": LIQUIDITY})
    regimes = regime_labels(sliced)
    lasting = {name: regimes[name] for name in (VOLATILITY, LIQUIDITY) if name in regimes}
    stable = {"symbol": [symbol], MONTH: sorted(sliced[MONTH].unique())} | lasting
    return {
        "ic": ic_table(panel, signals, targets, **sampling),
        "ic_differences": difference_table(
            panel, flow_pairs(list(panel.columns), plan.width_us), targets, **sampling
        ),
        "quantiles": quantiles,
        "spreads": spreads,
        "regressions": regression_table(
            panel, headline, targets, _controls(panel, plan), width_us=plan.width_us
        ),
        "regimes": slice_table(sliced, regimes, headline, targets, **sampling),
        "stability": slice_table(sliced, stable, headline, targets, **sampling),
        "backtest": backtest,
        "backtest_path": path,
    }


def _controls(panel: pd.DataFrame, plan: FlowPlan) -> list[str]:
    if plan.controls is not None:
        return list(plan.controls)
    return [*CONTROLS, *(name for name in panel.columns if name.startswith(MARKET_PREFIX))]


def _with_symbol(table: pd.DataFrame, symbol: str) -> pd.DataFrame:
    table = table.copy()
    table.insert(0, "symbol", symbol)
    return table
