"""Size thresholds against sorted lists of Python integers, and against altered and cut lakes."""

from __future__ import annotations

import gzip
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import flow_reference as ref
import numpy as np
import pandas as pd
import pytest
from flow_reference import DAY, Taker
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlob_gpu import flow_kernels
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.thresholds import (
    NEVER_LARGE,
    NEVER_SMALL,
    Cuts,
    Sizes,
    ThresholdRule,
    day_cuts,
    day_sizes,
)

HOUR = DAY // 24
Q85, Q50 = Fraction("0.85"), Fraction("0.5")
DATA = Path(__file__).parents[2] / "shared" / "data" / "tardis"

some = settings(max_examples=60, deadline=None)


def sizes_by_day(takers: Sequence[Taker], rule: ThresholdRule, held: Sequence[int]) -> dict[int, Sizes]:
    """Sizes of the days (numbers) that the lake holds."""
    found = {}
    for day in held:
        mine = [row for row in takers if row.ts // DAY == day]
        ts, notional = (np.array([row[i] for row in mine], np.int64) for i in (0, 2))
        found[day * DAY] = day_sizes(ts, notional, start=day * DAY, width=rule.width, windows=rule.windows)
    return found


def cuts_of(takers: Sequence[Taker], rule: ThresholdRule, held: Sequence[int], day: int) -> dict[int, Cuts]:
    sizes = sizes_by_day(takers, rule, held)
    touched = {start: sizes[start] for start in rule.days(day * DAY) if start in sizes}
    return day_cuts(touched, day * DAY, rule)


def expected(
    takers: Sequence[Taker], rule: ThresholdRule, held: Sequence[int], day: int, window: int
) -> list[list[Fraction | None]]:
    return [
        [
            ref.threshold(
                takers,
                bar,
                window,
                q,
                refresh=rule.refresh,
                min_trades=rule.min_trades,
                require_full_window=rule.require_full_window,
                held=set(held),
            )
            for q in rule.quantiles
        ]
        for bar in range(day * DAY, (day + 1) * DAY, rule.width)
    ]


def tied_sizes() -> st.SearchStrategy[int]:
    """Few values far apart, neighbours across the edges of bins, and anything at all."""
    edges = [2**e + d for e in (10, 11, 20, 21, 40, 61) for d in (-1, 0, 1)]
    return st.one_of(
        st.sampled_from([0, 1, 7, 7 * 2**30, *edges]),
        st.integers(0, 5000),
        st.integers(0, 2**62),
    )


@st.composite
def lakes(draw: st.DrawFn) -> tuple[list[Taker], list[int]]:
    """Takers of days 10 to 14, often at the edges of bars and days, and the days held."""
    held = draw(st.lists(st.integers(10, 14), min_size=1, max_size=5, unique=True).map(sorted))
    near = st.builds(
        lambda day, hours, off: min(max(day * DAY + hours * HOUR + off, day * DAY), (day + 1) * DAY - 1),
        st.sampled_from(held),
        st.integers(0, 24),
        st.integers(-2, 2),
    )
    rows = draw(st.lists(st.tuples(near, st.integers(0, 2), tied_sizes()), max_size=60))
    return [Taker(*row) for row in sorted(rows, key=lambda row: row[0])], held


RULES = st.builds(
    ThresholdRule,
    width=st.sampled_from([HOUR, 4 * HOUR]),
    windows=st.lists(
        st.sampled_from([HOUR, DAY, 3 * DAY, 36 * HOUR, 1, 5 * HOUR + 3, 2 * DAY - 1]),
        min_size=1,
        max_size=3,
        unique=True,
    ).map(tuple),
    quantiles=st.lists(
        st.sampled_from(["0", "0.3", "0.5", "0.85", "0.999", "1"]).map(Fraction),
        min_size=1,
        max_size=3,
        unique=True,
    ).map(tuple),
    refresh=st.sampled_from(["day", "bar"]),
    min_trades=st.integers(0, 4),
    require_full_window=st.booleans(),
)


@some
@given(lakes(), RULES, st.integers(10, 15))
def test_day_cuts__equal_sorted_lists(
    lake: tuple[list[Taker], list[int]], rule: ThresholdRule, day: int
) -> None:
    takers, held = lake
    found = cuts_of(takers, rule, held, day)
    for window in rule.windows:
        assert found[window].exact.tolist() == expected(takers, rule, held, day, window)
        for q, column in zip(rule.quantiles, found[window].exact.T, strict=True):
            large, small = found[window].large_from(q), found[window].small_to(q)
            for cut, least, most in zip(column, large.tolist(), small.tolist(), strict=True):
                if cut is None:
                    assert (least, most) == (NEVER_LARGE, NEVER_SMALL)
                else:
                    assert least - 1 < cut <= least
                    assert most <= cut < most + 1


@some
@given(lakes(), RULES, st.integers(10, 14), st.integers(0, 2**62))
def test_day_cuts__future_alters_nothing(
    lake: tuple[list[Taker], list[int]], rule: ThresholdRule, day: int, size: int
) -> None:
    takers, held = lake
    noon = day * DAY + DAY // 2
    altered = [
        replaced if (replaced := Taker(row.ts, row.side, size)) and row.ts >= noon else row for row in takers
    ]
    rule = replace(rule, refresh="bar")
    before, after = cuts_of(takers, rule, held, day), cuts_of(altered, rule, held, day)
    for window in rule.windows:
        past = before[window].ts <= noon
        assert before[window].exact[past].tolist() == after[window].exact[past].tolist()


def test_size_bins__never_fall_and_sub_bins_tell_apart() -> None:
    rng = np.random.default_rng(0)
    powers = np.array([2**e + d for e in range(1, 62) for d in (-1, 0, 1)])
    size = np.unique(np.concatenate([np.arange(4096), powers, rng.integers(0, 2**62, 2000)]))
    bins, totals = np.empty(len(size), np.uint16), np.zeros(flow_kernels.N_BINS, np.int64)
    flow_kernels.bin_sizes(size, bins, totals)
    assert (np.diff(bins.astype(np.int64)) >= 0).all()
    assert totals.sum() == len(size)
    key = np.empty(len(size), np.int64)
    flow_kernels.sub_keys(size, bins, np.arange(flow_kernels.N_BINS), key)
    assert (np.diff(key) >= 0).all()
    small = size < 2**21
    assert (np.diff(key[small]) > 0).all()


def test_day_cuts__real__one_rounding() -> None:
    takers = [Taker(10 * DAY + i, 0, a) for i, a in enumerate([10, 20, 20, 45])]
    rule = ThresholdRule(HOUR, (DAY,), (Q85, Q50), min_trades=4)
    cuts = cuts_of(takers, rule, [10], 11)[DAY]
    # (4 - 1) 0.85 = 2.55: 20 + 0.55 * 25 = 33.75.
    assert cuts.exact[0].tolist() == [Fraction("33.75"), Fraction(20)]
    assert cuts.real(Q85, Fraction(1, 10_000)).tolist() == [0.003375] * 24
    assert cuts.large_from(Q85).tolist() == [34] * 24
    assert cuts.small_to(Q50).tolist() == [20] * 24
    assert cuts.n.tolist() == [4] * 24


def test_day_sizes__negative_notional_is_refused() -> None:
    with pytest.raises(LakeError, match="trade 1 of the day at ts_local_us = 6: notional -3 is negative"):
        day_sizes(np.array([5, 6]), np.array([1, -3]), start=0, width=HOUR, windows=[DAY])


def test_rule__days__are_those_that_the_windows_touch() -> None:
    rule = ThresholdRule(HOUR, (DAY, 3 * DAY), (Q85,))
    assert rule.days(10 * DAY) == [7 * DAY, 8 * DAY, 9 * DAY]
    assert replace(rule, refresh="bar").days(10 * DAY) == [7 * DAY, 8 * DAY, 9 * DAY, 10 * DAY]
    assert replace(rule, windows=(DAY + 1,)).days(10 * DAY) == [8 * DAY, 9 * DAY]


def test_day_cuts__million_trades_a_day__time_and_memory() -> None:
    """Ceilings far above what a quiet machine needs: they catch a change of order, not of speed."""
    n, width = 1_000_000, DAY // 288
    rule = ThresholdRule(width, (3 * DAY,), (Q85, Q50), refresh="bar")
    rng = np.random.default_rng(1)
    sizes: dict[int, Sizes] = {}
    warm = day_sizes(np.array([0]), np.array([5]), start=0, width=width, windows=rule.windows)
    day_cuts({0: warm}, 0, rule)
    peak, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for day in range(10, 14):
        ts = np.sort(rng.integers(day * DAY, (day + 1) * DAY, n))
        notional = rng.integers(600_000, 620_000, n) * np.ceil(rng.lognormal(2, 2, n)).astype(np.int64)
        started = time.perf_counter()
        sizes[day * DAY] = day_sizes(ts, notional, start=day * DAY, width=width, windows=rule.windows)
        wanted = {start: sizes[start] for start in rule.days(day * DAY) if start in sizes}
        cuts = day_cuts(wanted, day * DAY, rule)[3 * DAY]
        seconds += time.perf_counter() - started
    assert cuts.n[0] == 3 * n
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert seconds / 4 < 0.5
    assert grown < 1_000_000, "kilobytes"


def read_aig() -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """(ts, notional) of the five days, by day start; prices in units of 0.0001."""
    days = {}
    for path in sorted((DATA / "us-equity" / "trades").rglob("AIG.csv.gz")):
        with gzip.open(path) as file:
            rows = pd.read_csv(file, usecols=["local_timestamp", "price", "amount"], dtype={"price": str})
        price = np.array([int(Fraction(text) * 10_000) for text in rows["price"]], np.int64)
        ts = rows["local_timestamp"].to_numpy(np.int64)
        days[int(ts[0]) // DAY * DAY] = (ts, price * rows["amount"].to_numpy(np.int64))
    return days


@pytest.mark.skipif(not (DATA / "us-equity").exists(), reason="real captures are not there: ../shared/data")
def test_day_cuts__real_equity__thursday_and_friday_equal_sorted_lists() -> None:
    days = read_aig()
    width, window = DAY // 288, 3 * DAY
    ts, notional = (np.concatenate([rows[i] for rows in days.values()]) for i in (0, 1))
    for refresh in ("day", "bar"):
        rule = ThresholdRule(width, (window,), (Q85, Q50), refresh, require_full_window=True)  # type: ignore[arg-type]
        sizes: Mapping[int, Sizes] = {
            start: day_sizes(*rows, start=start, width=width, windows=(window,))
            for start, rows in days.items()
        }
        for number, start in enumerate(days):
            wanted = {day: sizes[day] for day in rule.days(start) if day in sizes}
            cuts = day_cuts(wanted, start, rule)[window]
            if number < 3:
                assert cuts.exact[0].tolist() == [None, None]
                continue
            for i in (0, 170, 200, 287):
                end = int(cuts.ts[i]) if refresh == "bar" else start
                low, high = np.searchsorted(ts, [end - window, end])
                past = notional[low:high].tolist()
                assert cuts.n[i] == len(past)
                assert cuts.exact[i].tolist() == [ref.quantile(past, q) for q in rule.quantiles]
                assert not math.isnan(cuts.real(Q85, Fraction(1, 10_000))[i])
