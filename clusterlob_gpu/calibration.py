"""Do the tests keep their size?  Markets in which nothing predicts anything, tested as a run would test."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.signal import lfilter

from clusterlob_gpu.evaluation import LEVEL, Signal, Target, ic_table, long_run_sum
from clusterlob_gpu.plain_statistics import two_sided
from clusterlob_gpu.schema import US_PER_DAY

Floats = NDArray[np.float64]

WIDTH_US = 300_000_000
BARS_PER_DAY = US_PER_DAY // WIDTH_US
HORIZON = 36
ROLLUPS = {"5m": 1, "1h": 12, "3h": 36}
TESTS = ("naive_t", "default_newey_west", "hac", "bootstrap", "both")


def null_market(days: int, seed: int, clustered: bool = False) -> pd.DataFrame:
    """Bars of 5 min with a flow that says nothing of returns.

    Plain: both are white and Gaussian.  Clustered: the sizes of returns and of flow follow one path, an AR(1)
    of the log-variance with coefficient 0.99; their signs stay independent.  Columns: bucket_ts, flow_5m, its
    sums flow_1h and flow_3h, and ret_fwd_3h, null where the path ends.
    """
    rng = np.random.default_rng(seed)
    rows, before = days * BARS_PER_DAY, max(ROLLUPS.values())
    flow, returns = rng.normal(size=(2, rows + before))
    if clustered:
        innovations = np.sqrt(1 - 0.99**2) * rng.normal(size=rows + before)
        scale = np.exp(0.25 * lfilter([1.0], [1.0, -0.99], innovations))
        flow, returns = scale * flow, scale * returns
    flows, path = (np.concatenate([[0.0], np.cumsum(v)]) for v in (flow, returns))
    end = before + np.arange(rows) + 1
    columns = {f"flow_{name}": flows[end] - flows[end - bars] for name, bars in ROLLUPS.items()}
    ahead = np.full(rows, np.nan)
    ahead[:-HORIZON] = path[end[HORIZON:]] - path[end[:-HORIZON]]
    return pd.DataFrame({"bucket_ts": np.arange(rows) * WIDTH_US, **columns, "ret_fwd_3h": ahead})


def rejections(days: int, seed: int, draws: int, clustered: bool = False) -> dict[str, dict[str, bool]]:
    """Which 5 % tests of IC = 0 reject, for each flow, in one null market.

    naive_t: rows as if independent; default_newey_west: floor(4 (n / 100)^(2/9)) lags, as statsmodels picks;
    hac, bootstrap: hac_p and the interval of `ic_table`; both: the two together, as the verdict asks.
    """
    panel = null_market(days, seed, clustered)
    signals = [Signal(name, f"flow_{name}", bars) for name, bars in ROLLUPS.items()]
    target = Target("ret_fwd_3h", "ret_fwd_3h", HORIZON * WIDTH_US)
    table = ic_table(panel, signals, [target], width_us=WIDTH_US, draws=draws, seed=seed).set_index("signal")
    found = {}
    for signal in signals:
        row = table.loc[signal.name]
        lags = int(4 * ((len(panel) - HORIZON) / 100) ** (2 / 9))
        hac = bool(row["hac_p"] < LEVEL)
        outside = bool(row["ci_low"] > 0 or row["ci_high"] < 0)
        x, y = (panel[c].to_numpy()[:-HORIZON] for c in (signal.column, target.column))
        answers = (_rejects(x, y, 0), _rejects(x, y, lags), hac, outside, hac and outside)
        found[signal.name] = dict(zip(TESTS, answers, strict=True))
    return found


def _rejects(x: Floats, y: Floats, lags: int) -> bool:
    """Two-sided 5 % test of the slope; no lags and a common variance: the textbook t-test."""
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    residual = y - slope * x
    n = len(x)
    meat = long_run_sum(x * residual, lags) if lags else (residual @ residual / n) * (x @ x)
    error = np.sqrt(meat * n / (n - 2)) / (x @ x)
    return two_sided(float(slope / error)) < LEVEL


def rejection_rates(found: Iterable[dict[str, dict[str, bool]]]) -> dict[str, dict[str, float]]:
    """Share of markets in which each test rejects, per flow."""
    markets = list(found)
    return {
        flow: {test: float(np.mean([market[flow][test] for market in markets])) for test in TESTS}
        for flow in ROLLUPS
    }
