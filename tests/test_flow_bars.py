"""Taker-flow bars, orders and roll-ups against the slow reference, and on altered, cut or mirrored days."""

from __future__ import annotations

import csv
import gzip
import math
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import flow_reference as ref
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from flow_reference import DAY, Fill
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.flow_bars import (
    BAR_COLUMNS,
    CLASS_COLUMNS,
    Takers,
    bar_edges,
    bar_table,
    day_bars,
    day_classes,
    empty_bar_table,
    large_set,
    order_takers,
    rolled_columns,
    trade_takers,
)
from clusterlob_gpu.lake.decode import numeric_ids
from clusterlob_gpu.schema import FACTORS, NO_ID, Trades
from clusterlob_gpu.thresholds import NEVER_LARGE, NEVER_SMALL, ThresholdRule, day_cuts, day_sizes

HOUR = DAY // 24
MINUTE = HOUR // 60
PRICE_UNIT, QTY_UNIT = Fraction("0.1"), Fraction("0.001")
UNITS = {"price_unit": PRICE_UNIT, "qty_unit": QTY_UNIT}
Q85, Q50 = Fraction("0.85"), Fraction("0.5")
DATA = Path(__file__).parents[2] / "shared" / "data" / "tardis"

some = settings(max_examples=60, deadline=None)


# ---- a day's bars, as a pipeline would make them --------------------------------------------------


@dataclass(frozen=True)
class Rule:
    unit: str
    width: int
    thresholds: ThresholdRule


def takers_of(fills: Sequence[Fill], start: int, rule: Rule) -> tuple[Trades, Takers]:
    ts, side, price, qty, ts_exch = (np.array([row[i] for row in fills], np.int64) for i in range(5))
    trades = Trades(ts, side.astype(np.uint8), price, qty)
    if rule.unit == "trade":
        return trades, trade_takers(trades)
    ids = numeric_ids(pa.chunked_array([[row.trade_id for row in fills]], pa.string()))
    return trades, order_takers(trades, ts_exch, ids, start=start, width=rule.width)


def table_of(fills: Sequence[Fill], held: Sequence[int], wanted: Sequence[int], rule: Rule) -> pd.DataFrame:
    """Bars of the wanted days (numbers), one day at a time; `held` are those that the lake has."""
    window = rule.thresholds.windows[0]
    days, sizes = {}, {}
    for day in held:
        days[day] = takers_of([row for row in fills if row.ts // DAY == day], day * DAY, rule)
        takers = days[day][1]
        sizes[day * DAY] = day_sizes(
            takers.ts, takers.notional, start=day * DAY, width=rule.width, windows=(window,)
        )
    tables = []
    for day in wanted:
        start = day * DAY
        if day not in days:
            tables.append(empty_bar_table(start=start, width=rule.width))
            continue
        touched = {at: sizes[at] for at in rule.thresholds.days(start) if at in sizes}
        cuts = day_cuts(touched, start, rule.thresholds)[window]
        trades, takers = days[day]
        bars = day_bars(trades, takers, start=start, width=rule.width)
        bounds = [(cuts.large_from(Q85), cuts.small_to(Q50))]
        edges = bar_edges(takers.ts, start=start, width=rule.width)
        classes = day_classes(edges, takers.side, takers.notional, bounds)[0]
        tables.append(bar_table(bars, classes, start=start, width=rule.width, **UNITS))
    return pd.concat(tables, ignore_index=True)


def expected_of(
    fills: Sequence[Fill], held: Sequence[int], wanted: Sequence[int], rule: Rule
) -> pd.DataFrame:
    takers = ref.takers_of(fills) if rule.unit == "trade" else ref.orders_of(fills, rule.width)
    rows = []
    for day in wanted:
        for start in range(day * DAY, (day + 1) * DAY, rule.width):
            large, small = (
                ref.threshold(
                    takers,
                    start,
                    rule.thresholds.windows[0],
                    q,
                    refresh=rule.thresholds.refresh,
                    min_trades=rule.thresholds.min_trades,
                    require_full_window=rule.thresholds.require_full_window,
                    held=set(held),
                )
                for q in (Q85, Q50)
            )
            if day in held:
                rows.append(ref.bar(fills, takers, start, rule.width, large, small, PRICE_UNIT, QTY_UNIT))
            else:
                nothing = dict.fromkeys(BAR_COLUMNS, math.nan)
                rows.append(nothing | {"bar_ts": float(start), "trade_count": 0.0})
    return pd.DataFrame(rows)[list(BAR_COLUMNS)]


@st.composite
def lakes(draw: st.DrawFn) -> tuple[list[Fill], list[int]]:
    """Fills of days 10 to 12: bursts of sweeps near the edges of bars, gaps of hours, ties of size."""
    held = draw(st.lists(st.integers(10, 12), min_size=1, max_size=3, unique=True).map(sorted))
    times = st.builds(
        lambda day, hour, off: min(max(day * DAY + hour * HOUR + off, day * DAY), (day + 1) * DAY - 1),
        st.sampled_from(held),
        st.sampled_from([0, 1, 2, 12, 23, 24]),
        st.integers(-3, 3),
    )
    rows = draw(
        st.lists(
            st.tuples(
                times,
                st.sampled_from([0, 0, 1, 1, 2]),
                st.sampled_from([1, 99, 100, 101, 2**30]),
                st.sampled_from([0, 1, 2, 50, 100, 2**31]),
                st.integers(0, 2),
                st.sampled_from([1, 1, 1, 2]),
                st.sampled_from([0, 0, 0, 0, 1]),
            ),
            max_size=40,
        )
    )
    fills, number = [], 100
    for ts, side, price, qty, exch, step, nameless in sorted(rows, key=lambda row: row[0]):
        number += step
        trade_id = "" if nameless else str(number)
        fills.append(Fill(ts, side, price, qty, ts // HOUR * HOUR + exch // 2, trade_id))
    return fills, held


RULES = st.builds(
    lambda unit, width, window, refresh, least, full: Rule(
        unit, width, ThresholdRule(width, (window,), (Q85, Q50), refresh, least, full)
    ),
    st.sampled_from(["trade", "order"]),
    st.sampled_from([HOUR, 3 * HOUR]),
    st.sampled_from([DAY, 2 * DAY, 5 * HOUR]),
    st.sampled_from(["day", "bar"]),
    st.integers(0, 3),
    st.booleans(),
)


@some
@given(lakes(), RULES)
def test_bars__equal_slow_reference(lake: tuple[list[Fill], list[int]], rule: Rule) -> None:
    fills, held = lake
    got = table_of(fills, held, [10, 11, 12], rule)
    assert list(got.columns) == list(BAR_COLUMNS)
    pd.testing.assert_frame_equal(
        got.astype(np.float64), expected_of(fills, held, [10, 11, 12], rule), check_exact=True
    )


@some
@given(lakes(), RULES, st.integers(0, 71))
def test_bars__future_alters_nothing(lake: tuple[list[Fill], list[int]], rule: Rule, hour: int) -> None:
    """Bars that end at t or before hold what they hold, if all from t on is another market."""
    fills, _ = lake
    t = 10 * DAY + hour * HOUR // rule.width * rule.width
    altered = [row if row.ts < t else row._replace(side=0, price=7, qty=13) for row in fills]
    days = [10, 11, 12]
    before, after = (table_of(rows, days, days, rule) for rows in (fills, altered))
    cut = table_of([row for row in fills if row.ts < t], days, days, rule)
    known = before["bar_ts"] + rule.width <= t
    pd.testing.assert_frame_equal(before[known], after[known], check_exact=True)
    pd.testing.assert_frame_equal(before[known], cut[known], check_exact=True)


@some
@given(lakes(), RULES)
def test_bars__mirror_swaps_buys_and_sells(lake: tuple[list[Fill], list[int]], rule: Rule) -> None:
    fills, held = lake
    mirrored = [row._replace(side={0: 1, 1: 0, 2: 2}[row.side]) for row in fills]
    one, other = (table_of(rows, held, held, rule) for rows in (fills, mirrored))
    for name in ("", "_large", "_small"):
        assert one[f"buy_notional{name}"].equals(other[f"sell_notional{name}"])
        assert one[f"sell_notional{name}"].equals(other[f"buy_notional{name}"])
    for name in (*FACTORS[:3], "large_net_share", "large_small_disagreement"):
        np.testing.assert_array_equal(one[name], -other[name])
    for name in ("vwap", "trade_count", "total_notional", "flow_share_large", *FACTORS[6:]):
        assert one[name].equals(other[name])


# ---- one at a time ------------------------------------------------------------------------------------


def one_day(fills: Sequence[Fill], large_from: int, small_to: int, unit: str = "trade") -> pd.DataFrame:
    """Bars of 12 h of day 0 with one pair of bounds."""
    width = DAY // 2
    rule = Rule(unit, width, ThresholdRule(width, (DAY,), (Q85, Q50)))
    trades, takers = takers_of(fills, 0, rule)
    bounds = np.full(2, large_from), np.full(2, small_to)
    edges = bar_edges(takers.ts, start=0, width=width)
    classes = day_classes(edges, takers.side, takers.notional, [bounds])[0]
    return bar_table(day_bars(trades, takers, start=0, width=width), classes, start=0, width=width, **UNITS)


def test_bars__columns_by_hand() -> None:
    fills = [Fill(0, 0, 100, 3), Fill(1, 1, 90, 1), Fill(2, 2, 120, 5), Fill(DAY // 2 - 1, 0, 110, 1)]
    row = one_day(fills, large_from=300, small_to=110).iloc[0]
    # Notionals 300 (buy, large), 90 (sell, small), 600 (unknown, large), 110 (buy, small); unit 1e-4.
    assert row[["open", "high", "low", "close"]].tolist() == [10.0, 12.0, 9.0, 11.0]
    assert row["vwap"] == 11.0
    assert row[["trade_count", "large_count", "small_count"]].tolist() == [4, 2, 2]
    assert row[["total_notional", "buy_notional", "sell_notional"]].tolist() == [0.11, 0.041, 0.009]
    assert row[["buy_notional_large", "sell_notional_large"]].tolist() == [0.03, 0.0]
    assert row[["buy_notional_small", "sell_notional_small"]].tolist() == [0.011, 0.009]
    assert row["flow_imbalance_large"] == 1.0
    assert row["flow_imbalance_small"] == 0.1
    assert row["flow_imbalance_total"] == 0.64
    assert row["flow_share_large"] == 300 / 1100
    assert row["large_net_share"] == 300 / 1100
    assert row["large_small_disagreement"] == 280 / 1100
    assert row["flow_toxicity"] == 320 / 1100
    assert row[["top1_share", "top3_share", "top5_share"]].tolist() == [600 / 1100, 1010 / 1100, 1.0]


def test_bars__empty_bar__zero_flow_and_null_prices() -> None:
    row = one_day([Fill(0, 0, 100, 3)], large_from=1, small_to=0).iloc[1]
    assert row[["trade_count", "large_count", "small_count"]].tolist() == [0, 0, 0]
    flows = [name for name in BAR_COLUMNS if "notional" in name]
    assert row[flows].tolist() == [0.0] * 7
    nulls = ["open", "high", "low", "close", "vwap", *FACTORS]
    assert row[nulls].isna().all()


def test_bars__no_thresholds__classes_are_null_and_totals_are_not() -> None:
    row = one_day([Fill(0, 0, 100, 3)], NEVER_LARGE, NEVER_SMALL).iloc[0]
    assert row[list(CLASS_COLUMNS)].isna().all()
    assert row[["total_notional", "flow_imbalance_total", "top1_share"]].tolist() == [0.03, 1.0, 1.0]


def test_bars__sums_past_2_to_the_63_stay_exact() -> None:
    fills = [Fill(i, 0, 2**31, 2**31 - 1) for i in range(9)]
    row = one_day(fills, large_from=1, small_to=0).iloc[0]
    exact = float(Fraction(9 * 2**31 * (2**31 - 1), 10_000))
    assert row[["total_notional", "buy_notional_large"]].tolist() == [exact, exact]
    assert row["vwap"] == 2**31 / 10


def test_trade_takers__price_of_zero_is_refused() -> None:
    trades = Trades(np.array([5, 6]), np.zeros(2, np.uint8), np.array([1, 0]), np.array([1, 1]))
    with pytest.raises(LakeError, match="trade 1 of the day at ts_local_us = 6: price_int = 0, qty_int = 1"):
        trade_takers(trades)


def orders(*fills: Fill) -> list[tuple[int, int, int]]:
    rule = Rule("order", HOUR, ThresholdRule(HOUR, (DAY,), (Q85,)))
    _, takers = takers_of(fills, 0, rule)
    return list(zip(takers.ts.tolist(), takers.side.tolist(), takers.notional.tolist(), strict=True))


def test_orders__a_sweep_is_one_order() -> None:
    sweep = [Fill(10 + i, 0, 100 + i, 2, 5, str(41 + i)) for i in range(10)]
    assert orders(*sweep) == [(19, 0, 2 * 1045)]


@pytest.mark.parametrize(
    "second",
    [
        Fill(11, 1, 100, 1, 5, "42"),
        Fill(11, 0, 100, 1, 6, "42"),
        Fill(11, 0, 100, 1, 5, "43"),
        Fill(11, 0, 100, 1, 5, "41"),
        Fill(11, 0, 100, 1, 5, "x42"),
        Fill(11, 0, 100, 1, 5, "-42"),
        Fill(11, 0, 100, 1, 5, ""),
        Fill(HOUR, 0, 100, 1, 5, "42"),
    ],
    ids=["side", "time", "gap", "same id", "text", "negative", "no id", "next bar"],
)
def test_orders__what_ends_an_order(second: Fill) -> None:
    assert orders(Fill(10, 0, 100, 1, 5, "41"), second) == [(10, 0, 100), (second.ts, second.side, 100)]


def test_orders__id_0_does_not_follow_a_missing_id() -> None:
    assert orders(Fill(1, 0, 5, 1, 0, ""), Fill(1, 0, 5, 1, 0, "0")) == [(1, 0, 5)] * 2


def test_orders__unknown_side_is_never_merged() -> None:
    assert orders(Fill(1, 2, 5, 1, 0, "1"), Fill(1, 2, 5, 1, 0, "2")) == [(1, 2, 5), (1, 2, 5)]


def test_orders__fills_that_miss_an_id_between_are_apart() -> None:
    rows = [Fill(1, 0, 5, 1, 0, "1"), Fill(1, 0, 5, 1, 0, ""), Fill(1, 0, 5, 1, 0, "2")]
    assert orders(*rows) == [(1, 0, 5)] * 3


def test_orders__too_large_a_notional_is_refused() -> None:
    fills = [Fill(i, 0, 2**31, 2**30, 0, str(i + 1)) for i in range(3)]
    with pytest.raises(LakeError, match="trade 2 of the day at ts_local_us = 2: the notional of its order"):
        orders(*fills)


def test_numeric_ids__plain_decimals_only() -> None:
    texts = ["0", "007", "9" * 18, "9" * 19, "", "-1", "+1", "0x1F", "1.0", " 1", "\u0661", None]
    found = numeric_ids(pa.chunked_array([texts[:4], texts[4:]], pa.string()))
    assert found.tolist() == [0, 7, 10**18 - 1, *[NO_ID] * 9]
    assert numeric_ids(pa.chunked_array([["3", "12"]])).tolist() == [3, 12]
    assert numeric_ids(pa.chunked_array([], pa.string())).tolist() == []


def test_large_set__orders_make_one_large_of_ten_small() -> None:
    sweep = [Fill(10 + i, 0, 10, 1, 5, str(41 + i)) for i in range(10)]
    rest = [Fill(100 + i, 1, 10, 1, 100 + i, str(70 + i)) for i in range(10)]
    as_trades = large_set(one_day(sweep + rest, large_from=50, small_to=10))
    as_orders = large_set(one_day(sweep + rest, large_from=50, small_to=10, unit="order"))
    assert as_trades == {"bars": 2, "count": 20, "large_count": 0, "count_share": 0.0, "notional_share": 0.0}
    assert as_orders == {
        "bars": 2,
        "count": 11,
        "large_count": 1,
        "count_share": 1 / 11,
        "notional_share": 0.5,
    }


# ---- real trades ---------------------------------------------------------------------------------------


def read_aig() -> list[Fill]:
    """The five days, prices in units of 0.0001."""
    fills = []
    for path in sorted((DATA / "us-equity" / "trades").rglob("AIG.csv.gz")):
        with gzip.open(path, "rt") as file:
            for row in csv.DictReader(file):
                price = int(Fraction(row["price"]) * 10_000)
                side = {"buy": 0, "sell": 1}.get(row["side"], 2)
                times = int(row["local_timestamp"]), int(row["timestamp"])
                fills.append(Fill(times[0], side, price, int(row["amount"]), times[1], row["id"]))
    return fills


@pytest.mark.skipif(not (DATA / "us-equity").exists(), reason="real captures are not there: ../shared/data")
@pytest.mark.parametrize("unit", ["trade", "order"])
def test_bars__real_equity__thursday_equals_slow_reference(unit: str) -> None:
    fills = read_aig()
    held = sorted({row.ts // DAY for row in fills})
    thursday, width = held[3], DAY // 288
    thresholds = ThresholdRule(width, (3 * DAY,), (Q85, Q50), require_full_window=True)
    rule = Rule(unit, width, thresholds)
    got = table_of(fills, held, [thursday], rule)
    takers = ref.takers_of(fills) if unit == "trade" else ref.orders_of(fills, width)
    past = [row.notional for row in takers if held[0] * DAY <= row.ts < thursday * DAY]
    large, small = ref.quantile(past, Q85), ref.quantile(past, Q50)

    def between(rows: list[Any], start: int) -> list[Any]:
        first, last = (bisect_left(rows, at, key=lambda row: row.ts) for at in (start, start + width))
        return rows[first:last]

    expected = [
        ref.bar(
            between(fills, start), between(takers, start), start, width, large, small, PRICE_UNIT, QTY_UNIT
        )
        for start in got["bar_ts"].tolist()
    ]
    pd.testing.assert_frame_equal(
        got.astype(np.float64), pd.DataFrame(expected)[list(BAR_COLUMNS)], check_exact=True
    )
    assert (got["trade_count"] > 0).sum() == 78
    assert len(takers) == {"trade": 205_708, "order": 129_535}[unit]


# ---- sums over time ----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(lakes(), st.booleans())
def test_rolled_columns__equal_slow_sums(lake: tuple[list[Fill], list[int]], drop: bool) -> None:
    fills, held = lake
    width = 15 * MINUTE
    rule = Rule("trade", width, ThresholdRule(width, (DAY,), (Q85, Q50), "bar", 1))
    table = table_of(fills, held, held, rule)
    if drop:
        table = table.drop(index=[5, 40]).reset_index(drop=True)
    bars = {int(row["bar_ts"]): row for row in table.to_dict("records")}
    got = rolled_columns(table, width=width)
    at = np.arange(0, len(table), 7)
    for factor in FACTORS:
        sums = {}
        for name, length in (("30m", 30 * MINUTE), ("1h", HOUR), ("3h", 3 * HOUR)):
            starts = [int(start) for start in table["bar_ts"].iloc[at]]
            sums[name] = np.array([ref.rolled(bars, factor, start, length, width) for start in starts])
            np.testing.assert_allclose(
                got[f"{factor}_sum_{name}"].iloc[at], sums[name], rtol=1e-12, atol=1e-15
            )
        np.testing.assert_allclose(
            got[f"{factor}_acceleration"].iloc[at], sums["30m"] - sums["3h"] / 6, rtol=1e-12, atol=1e-14
        )


def test_rolled_columns__same_wherever_the_table_begins() -> None:
    rng = np.random.default_rng(3)
    width = 5 * MINUTE
    table = pd.DataFrame({"bar_ts": np.arange(400) * width, "total_notional": 1.0, "large_count": 1.0})
    table = table.assign(**{factor: rng.normal(size=400) for factor in FACTORS})
    whole, part = rolled_columns(table, width=width), rolled_columns(table.iloc[101:], width=width)
    pd.testing.assert_frame_equal(whole.iloc[136:], part.iloc[35:], check_exact=True)
    assert part["flow_toxicity_sum_3h"].isna().sum() == 35


def test_bars__million_trades__time() -> None:
    """A ceiling far above what a quiet machine needs."""
    n, width = 1_000_000, DAY // 288
    rng = np.random.default_rng(1)
    trades = Trades(
        np.sort(rng.integers(0, DAY, n)),
        rng.integers(0, 3, n).astype(np.uint8),
        rng.integers(600_000, 620_000, n),
        rng.integers(1, 1000, n),
    )
    bounds = np.full(288, 400_000_000, np.int64), np.full(288, 200_000_000, np.int64)
    one_day([Fill(0, 0, 1, 1)], 1, 0)
    started = time.perf_counter()
    takers = trade_takers(trades)
    bars = day_bars(trades, takers, start=0, width=width)
    edges = bar_edges(takers.ts, start=0, width=width)
    classes = day_classes(edges, takers.side, takers.notional, [bounds])[0]
    table = bar_table(bars, classes, start=0, width=width, **UNITS)
    assert time.perf_counter() - started < 0.5
    assert table["trade_count"].sum() == n
