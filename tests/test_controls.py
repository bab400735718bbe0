"""Targets, controls and regimes: by hand, against slow loops, and on altered futures."""

from __future__ import annotations

import math
from fractions import Fraction

import flow_reference as ref
import numpy as np
import pandas as pd
import pytest

from clusterlob_gpu import flow_kernels
from clusterlob_gpu.context import ROW_COLUMNS
from clusterlob_gpu.controls import (
    CALM_RV,
    LOOKBACK_US,
    STRESS_FUNDING,
    STRESS_RV,
    TICKER_MAX_AGE_US,
    TRAILING_US,
    Trailing,
    book_at,
    control_columns,
    forward_returns,
    low_liquidity,
    past_returns,
    price_times,
    realised_volatility,
    regimes,
    state_times,
    ticker_at,
    vwap_prices,
)

SECOND = 1_000_000
MINUTE, HOUR = 60 * SECOND, 3600 * SECOND
WIDTH = 15 * MINUTE
N = 500
LEAST = TRAILING_US // WIDTH // 6

REGIMES = ("funding_regime", "d_oi_regime", "volatility_regime", "liquidity_regime", "stress_regime")


def book_rows(*rows: tuple[int, ...]) -> dict[str, np.ndarray]:
    """ts, bid, ask, bid_sz, ask_sz, bid_depth, ask_depth."""
    names = [name for name in ROW_COLUMNS if name != "tick"]
    return dict(zip(names, np.array(rows, np.int64).reshape(-1, len(names)).T, strict=True))


# ---- states ------------------------------------------------------------------------------------------


def test_book_at__last_row_strictly_before() -> None:
    rows = book_rows((10, 99, 101, 2, 3, 20, 30), (20, 199, 201, 5, 6, 50, 60))
    times = np.array([10, 11, 20, 21, 26, 31])
    got = book_at(times, rows, max_staleness=10, qty_unit=Fraction("0.1"))
    assert got.index.tolist() == times.tolist()
    np.testing.assert_array_equal(got["mid2"], [np.nan, 200, 200, 400, 400, np.nan])
    np.testing.assert_array_equal(got["spread_bps"], [np.nan, 200, 200, 100, 100, np.nan])
    np.testing.assert_array_equal(got["depth1"], [np.nan, 0.5, 0.5, 1.1, 1.1, np.nan])
    np.testing.assert_array_equal(got["depth5"], [np.nan, 5, 5, 11, 11, np.nan])


def test_book_at__no_rows_is_null() -> None:
    got = book_at(np.array([10, 11]), book_rows(), max_staleness=10, qty_unit=Fraction(1))
    assert got.isna().all().all()


def test_ticker_at__last_value_that_is_not_null_and_not_old() -> None:
    ts = np.array([0, HOUR, 2 * HOUR])
    values = {
        "open_interest": np.array([5.0, np.nan, 7.0]),
        "funding_rate": np.array([np.nan, 1e-4, np.nan]),
    }
    times = np.array([0, 1, TICKER_MAX_AGE_US, TICKER_MAX_AGE_US + 1, 2 * HOUR, 2 * HOUR + 1])
    got = ticker_at(times, ts, values)
    np.testing.assert_array_equal(got["oi"], [np.nan, 5, 5, np.nan, np.nan, 7])
    np.testing.assert_array_equal(got["funding"], [np.nan, np.nan, np.nan, 1e-4, 1e-4, np.nan])


# ---- returns -----------------------------------------------------------------------------------------


def test_returns__by_time_and_null_across_a_gap() -> None:
    starts = np.arange(0, 8 * HOUR, HOUR)
    # No price at 4 h: the lake has no book there.
    prices = pd.Series({h * HOUR: 100.0 * 2.0**h for h in range(10) if h != 4})
    ahead = forward_returns(starts, prices, HOUR, (HOUR, 3 * HOUR))
    ln2, nan = math.log(2), math.nan
    np.testing.assert_allclose(ahead["ret_fwd_1h"], [ln2, ln2, nan, nan, ln2, ln2, ln2, ln2])
    np.testing.assert_allclose(ahead["ret_fwd_3h"], [nan, *[3 * ln2] * 2, nan, 3 * ln2, 3 * ln2, nan, nan])
    back = past_returns(starts, prices, HOUR)
    np.testing.assert_allclose(back["ret_1h"], [ln2, ln2, ln2, nan, nan, ln2, ln2, ln2])
    np.testing.assert_allclose(back["ret_3h"], [nan, nan, 3 * ln2, nan, 3 * ln2, 3 * ln2, nan, 3 * ln2])
    rv = realised_volatility(starts, prices, HOUR)
    np.testing.assert_allclose(rv["rv_3h"], [nan, nan, 3**0.5 * ln2, nan, nan, nan, nan, 3**0.5 * ln2])


def test_returns__dropping_rows_shifts_nothing() -> None:
    starts = np.arange(0, 8 * HOUR, HOUR)
    prices = pd.Series(np.exp(np.random.default_rng(1).normal(size=12)), index=np.arange(12) * HOUR)
    some = starts[[0, 3, 7]]
    whole = forward_returns(starts, prices, HOUR, (3 * HOUR,)).iloc[[0, 3, 7]].reset_index(drop=True)
    pd.testing.assert_frame_equal(forward_returns(some, prices, HOUR, (3 * HOUR,)), whole)


def test_vwap_prices__belong_to_the_end_of_the_bar() -> None:
    table = pd.DataFrame({"bar_ts": [0, HOUR], "vwap": [5.0, np.nan]})
    prices = vwap_prices(table, HOUR)
    assert prices.index.tolist() == [HOUR, 2 * HOUR]
    assert prices.iloc[0] == 5.0
    assert math.isnan(prices.iloc[1])


def test_price_times__hold_all_that_is_asked() -> None:
    times = price_times(np.array([10 * HOUR]), 2 * HOUR, (HOUR,))
    # End 12 h; 3 h back on the grid of 2 h and at 1 h and 3 h; 1 h ahead.
    assert (times / HOUR).tolist() == [9, 10, 11, 12, 13]
    assert (state_times(np.array([10 * HOUR]), 2 * HOUR) / HOUR).tolist() == [10, 12]


def test_realised_volatility__null_where_the_bar_does_not_divide_it() -> None:
    prices = pd.Series(1.0, index=np.arange(20) * 2 * HOUR)
    rv = realised_volatility(np.array([8 * HOUR]), prices, 2 * HOUR)
    assert rv.isna().all().all()


# ---- trailing statistics -----------------------------------------------------------------------------


@pytest.fixture
def walk() -> tuple[np.ndarray, np.ndarray]:
    """Starts with a gap of hours, and values with nulls, ties and a constant stretch at a high level."""
    rng = np.random.default_rng(5)
    values = 1e9 + np.round(rng.normal(size=N), 1)
    values[rng.random(N) < 0.2] = np.nan
    values[350:] = 1e9 + 0.25
    starts = WIDTH * np.array([i for i in range(N) if not 150 <= i < 170])
    return starts, values[starts // WIDTH]


def test_trailing__z_equals_exact_moments(walk: tuple[np.ndarray, np.ndarray]) -> None:
    starts, values = walk
    by_time = dict(zip(starts.tolist(), values.tolist(), strict=True))
    got = Trailing(starts, WIDTH).z(values)
    expected = [ref.z_score(by_time, start, TRAILING_US, LEAST) for start in starts.tolist()]
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    assert np.isnan(got[:LEAST]).all()
    assert not np.isnan(got[LEAST * 2 : 150][~np.isnan(values[LEAST * 2 : 150])]).any()


def test_trailing__quantile_equals_sorted_lists(walk: tuple[np.ndarray, np.ndarray]) -> None:
    starts, values = walk
    by_time = dict(zip(starts.tolist(), values.tolist(), strict=True))
    for q in (0.3, 1 / 3, 0.7):
        got = Trailing(starts, WIDTH).quantile(values, q)
        for start, value in zip(starts.tolist(), got.tolist(), strict=True):
            past = ref.trailing(by_time, start, TRAILING_US)
            if len(past) < LEAST:
                assert math.isnan(value)
            else:
                assert value == pytest.approx(ref.float_quantile(past, q), rel=1e-15)


def test_trailing_z__constant_past() -> None:
    x, out = np.array([0.1, 0.1, 0.1, 0.1, 0.2, np.nan, 0.1]), np.empty(7)
    flow_kernels.trailing_z(x, 3, 2, out)
    np.testing.assert_allclose(out, [np.nan, np.nan, 0, 0, np.nan, np.nan, -(0.5**0.5)], rtol=1e-12)


# ---- all controls ------------------------------------------------------------------------------------


def market(seed: int, n: int = N) -> tuple[pd.DataFrame, pd.Series, pd.DataFrame]:
    """Bars, prices and states of a random market of `n` bars."""
    rng = np.random.default_rng(seed)
    ends = WIDTH * np.arange(n + 1)
    table = pd.DataFrame({"bar_ts": ends[:-1], "total_notional": rng.exponential(size=n)})
    table.loc[3, "total_notional"] = 0.0
    prices = pd.Series(1000 * np.exp(np.cumsum(rng.normal(size=n + 1) / 1000)), index=ends)
    values = {
        "spread_bps": rng.integers(1, 4, n + 1).astype(float),
        "depth1": rng.exponential(size=n + 1),
        "depth5": rng.exponential(size=n + 1),
        "oi": 1e6 + np.cumsum(rng.normal(size=n + 1)),
        "funding": np.round(rng.normal(size=n + 1), 1) / 1e4,
    }
    return table, prices, pd.DataFrame(values, index=ends)


def test_control_columns__states_logs_and_market() -> None:
    table, prices, states = market(1)
    got = control_columns(table, prices, states, {"BTCUSDT": prices**2}, width=WIDTH)
    i = 400
    end = (i + 1) * WIDTH
    for name in ("spread_bps", "depth1", "depth5", "oi", "funding"):
        assert got[name][i] == states[name][end]
    assert got["log_notional"][i] == pytest.approx(math.log(table["total_notional"][i]), rel=1e-15)
    assert math.isnan(got["log_notional"][3])
    assert got["ret_1h"][i] == pytest.approx(math.log(prices[end] / prices[end - HOUR]), rel=1e-9)
    assert got["BTCUSDT_ret_3h"][i] == pytest.approx(
        2 * math.log(prices[end] / prices[end - 3 * HOUR]), rel=1e-9
    )
    steps = [math.log(prices[end - j * WIDTH] / prices[end - (j + 1) * WIDTH]) for j in range(12)]
    assert got["rv_3h"][i] == pytest.approx(math.sqrt(math.fsum(s * s for s in steps)), rel=1e-9)
    d_oi = {k * WIDTH: states["oi"].iloc[k + 1] - states["oi"].iloc[k] for k in range(N)}
    assert got["d_oi_z"][i] == pytest.approx(ref.z_score(d_oi, i * WIDTH, TRAILING_US, LEAST), rel=1e-9)


def test_control_columns__no_derivative_ticker_is_null() -> None:
    table, prices, states = market(1)
    got = control_columns(table, prices, states.drop(columns=["oi", "funding"]), {}, width=WIDTH)
    assert got[["oi", "d_oi_z", "funding", "funding_z", "funding_regime", "d_oi_regime"]].isna().all().all()
    assert got["low_liquidity"].notna().sum() == N - LEAST
    assert set(got["stress_regime"].dropna()) == {"calm", "neither"}


@pytest.mark.parametrize("last", [60, 333, 480])
def test_control_columns__future_alters_nothing(last: int) -> None:
    table, prices, states = market(2)
    whole = control_columns(table, prices, states, {"ETHUSDT": prices}, width=WIDTH)
    other_table, other_prices, other_states = market(3)
    end = (last + 1) * WIDTH
    mixed = control_columns(
        pd.concat([table.iloc[: last + 1], other_table.iloc[last + 1 :]]),
        pd.concat([prices[prices.index <= end], other_prices[other_prices.index > end]]),
        pd.concat([states[states.index <= end], other_states[other_states.index > end]]),
        {"ETHUSDT": pd.concat([prices[prices.index <= end], other_prices[other_prices.index > end]])},
        width=WIDTH,
    )
    pd.testing.assert_frame_equal(whole.iloc[: last + 1], mixed.iloc[: last + 1], check_exact=True)
    assert not whole.iloc[last + 1 :].equals(mixed.iloc[last + 1 :])


def test_control_columns__same_from_lookback_on_wherever_the_table_begins() -> None:
    table, prices, states = market(4)
    whole = control_columns(table, prices, states, {}, width=WIDTH)
    first = 123
    part = control_columns(
        table.iloc[first:],
        prices[prices.index >= first * WIDTH],
        states[states.index >= first * WIDTH],
        {},
        width=WIDTH,
    )
    settled = first + LOOKBACK_US // WIDTH
    assert settled < N - 50
    pd.testing.assert_frame_equal(whole.iloc[settled:], part.iloc[settled - first :], check_exact=True)


def test_low_liquidity__thin_or_wide() -> None:
    n = 80
    depth, spread = np.full(n, 10.0), np.full(n, 2.0)
    depth[60], spread[61], spread[62], depth[63] = 9.0, 3.0, np.nan, np.nan
    spread[63] = 4.0
    frame = pd.DataFrame({"depth5": depth, "spread_bps": spread})
    got = low_liquidity(frame, Trailing(np.arange(n) * WIDTH, WIDTH))
    np.testing.assert_array_equal(got[:LEAST], np.nan)
    assert got[59:61].tolist() == [0.0, 1.0]
    assert got[61] == 1.0
    assert math.isnan(got[62])
    assert got[63] == 1.0


def test_regimes__by_hand() -> None:
    n, nan = 60, math.nan
    wave = np.arange(n) % 10.0
    frame = pd.DataFrame(
        {
            "rv_3h": wave,
            "funding": wave,
            "d_oi_z": [nan, 2.5, -2.5, 1.0] * 15,
            "rv_z": [0.5, 1.4, 1.4, 1.4, nan, 1.0] * 10,
            "funding_z": [nan, 1.1, 1.0, nan, 2.0, nan] * 10,
            "low_liquidity": [0.0, 1.0, nan] * 20,
        }
    )
    got = regimes(frame, Trailing(np.arange(n) * WIDTH, WIDTH))
    assert list(got.columns) == list(REGIMES)
    assert got["d_oi_regime"].fillna("").tolist()[:4] == ["", "large", "large", "normal"]
    assert got["stress_regime"].fillna("").tolist()[:6] == ["calm", "stress", "neither", "", "", "neither"]
    assert got["liquidity_regime"].fillna("").tolist()[:3] == ["normal", "low", ""]
    for name, lower, upper in (("funding_regime", 0.3, 0.7), ("volatility_regime", 1 / 3, 2 / 3)):
        for i in range(LEAST, n):
            low, high = (ref.float_quantile(wave[:i].tolist(), q) for q in (lower, upper))
            expected = "low" if wave[i] < low else "high" if wave[i] > high else "middle"
            assert got[name][i] == expected
        assert set(got[name].dropna()) == {"low", "middle", "high"}
    assert got["funding_regime"][:LEAST].isna().all()


def test_thresholds_of_the_plan() -> None:
    assert (CALM_RV, STRESS_RV, STRESS_FUNDING) == (0.6, 1.3, 1.0)
