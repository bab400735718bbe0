"""Taker-flow passes for the GPU, under Numba's simulator: equal to those for the CPU in every bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import lakes
import numpy as np
import pandas as pd
import pytest
import standin
from standin.device import Device

from clusterlob_gpu import backend, flow_bars, flow_days, thresholds
from clusterlob_gpu.backend import CPU, Backend
from clusterlob_gpu.config import FlowConfig, make_config
from clusterlob_gpu.days import DayJob
from clusterlob_gpu.errors import ClusterlobError, LakeError
from clusterlob_gpu.files import Location
from clusterlob_gpu.flow_bars import Takers
from clusterlob_gpu.flow_days import BarJob, FlowDay, TradeDay
from clusterlob_gpu.flow_kernels import GROUP, LARGEST_NOTIONAL, N_BINS, N_LARGEST
from clusterlob_gpu.lake import native
from clusterlob_gpu.schema import US_PER_DAY, Trades
from clusterlob_gpu.store import Store
from clusterlob_gpu.thresholds import NEVER_LARGE, NEVER_SMALL, ThresholdRule

pytest.importorskip("numba_cuda")

N_BARS = 4
WIDTH = US_PER_DAY // N_BARS
SIZES = [0, 120, 120, 41]
"""Rows of the days that are tried."""
NUMBERED = list(enumerate(SIZES))

Columns = dict[str, Any]


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    interval = sys.getswitchinterval()
    # The simulator polls its threads, which wait for each other: let them take turns more often.
    sys.setswitchinterval(1e-5)
    with standin.installed() as device:
        yield device
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def gpu(device: Device) -> Iterator[Backend]:
    """The GPU's backend over the stand-in; few threads, for the simulator starts one of Python's for each."""
    backend.of.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        on = backend.of("gpu")
        patch.setattr("clusterlob_gpu.device_kernels.THREADS", 8)
        patch.setattr("clusterlob_gpu.device_kernels.MOST_BLOCKS", 3)
        patch.setattr("clusterlob_gpu.device_flow_kernels.TEAM", 4)
        patch.setattr("clusterlob_gpu.device_flow_kernels.MOST_BLOCKS", 9)
        yield on
    backend.of.cache_clear()


def fills(n: int, seed: int) -> Columns:
    """n fills of day 0 in order of time: orders of several, ties of everything, a bar without any."""
    rng = np.random.default_rng(seed)
    edges = [0, WIDTH - 1, 2 * WIDTH, 3 * WIDTH - 1, 3 * WIDTH, US_PER_DAY - 1]
    ts = np.where(rng.random(n) < 0.5, rng.choice(edges, n), rng.integers(2 * WIDTH, US_PER_DAY, n))
    return {
        "ts": np.sort(ts),
        "ts_exch": np.sort(rng.integers(0, 4, n)),
        "side": np.repeat(rng.choice(np.array([0, 1, 2], np.uint8), n), 5)[:n],
        "trade_id": np.where(rng.random(n) < 0.1, -1, np.cumsum(rng.choice([1, 1, 1, 2], n))),
        "price": rng.integers(1, 2**31, n),
        "qty": rng.choice([0, 1, 50, 2**31 - 1], n),
        "notional": rng.choice([0, 1, 7, 1023, 1024, 2**40, 2**40 + 1, 2**61 + 5], n),
    }


def equal(gpu: Backend, work: Callable[[Backend, Columns], Sequence[Any]], columns: Columns) -> None:
    """Do the work on both backends, with the columns as arrays of each, and compare what it gives."""
    expected, found = (
        work(on, {name: on.xp.asarray(values) for name, values in columns.items()}) for on in (CPU, gpu)
    )
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(gpu.to_host(other) if isinstance(other, gpu.xp.ndarray) else other, one)
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None)


# ---- passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_bin_sizes_and_sub_keys(gpu: Backend, n: int) -> None:
    rng = np.random.default_rng(n)
    powers = [2**e + d for e in (1, 9, 10, 11, 20, 21, 40, 61) for d in (-1, 0, 1)]
    number = rng.integers(0, 1000, N_BINS)

    def work(on: Backend, columns: Columns) -> Sequence[Any]:
        size = columns["size"]
        bins, totals = on.xp.empty(n, np.uint16), np.ones(N_BINS, np.int64)
        on.flow_kernels.bin_sizes(size, bins, totals)
        key, count = on.xp.empty(n, np.int64), np.ones(N_BINS, np.int64)
        on.flow_kernels.sub_keys(size, bins, number, key)
        on.flow_kernels.count_keys(bins[: n // 2], count)
        return bins, totals, key, count

    equal(gpu, work, {"size": rng.permutation(np.concatenate([powers, rng.integers(0, 2**62, n)]))[:n]})


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("marked", [[], [3], [0, 2, 7], list(range(8))])
def test_keep_marked(gpu: Backend, n: int, marked: list[int]) -> None:
    rng = np.random.default_rng(n)
    number = np.full(8, -1)
    number[marked] = np.arange(len(marked))
    edges = np.sort(rng.integers(0, n + 1, 9))

    def work(on: Backend, columns: Columns) -> Sequence[Any]:
        key, size = columns["key"], columns["size"]
        kept_key, kept_size, kept_edges = on.xp.empty_like(key), on.xp.empty_like(size), np.empty_like(edges)
        kept = on.flow_kernels.keep_marked(key, size, number, edges, kept_key, kept_size, kept_edges)
        return kept, kept_key[:kept], kept_size[:kept], kept_edges

    equal(gpu, work, {"key": rng.integers(0, 8, n).astype(np.uint16), "size": rng.integers(0, 99, n)})


@pytest.mark.parametrize("windows", [1, 2, 9])
@pytest.mark.parametrize("batch", [2, 3, 100], ids=lambda batch: f"{batch} windows at once")
@pytest.mark.parametrize(("kind", "n", "step"), [(np.uint16, 90, 99), (np.int64, 700, 1)])
def test_sliding_ranks(
    gpu: Backend, monkeypatch: pytest.MonkeyPatch, windows: int, batch: int, kind: type, n: int, step: int
) -> None:
    """Few keys far apart, and more than a group of them."""
    rng, n_keys = np.random.default_rng(windows), 2 * GROUP + 5
    monkeypatch.setattr("clusterlob_gpu.device_flow_kernels.TABLE_BYTES", batch * 4 * GROUP)
    key = (rng.integers(0, n_keys, n) // step * step).astype(kind)
    low, high = (np.sort(rng.integers(*bounds, windows)) for bounds in ((0, n // 2), (n // 3, n + 1)))
    low = np.minimum(low, high)
    low[windows // 2 :] = np.maximum(low, high[0])[windows // 2 :]  # windows that share no row with the first
    low = np.minimum(low, high)
    first = rng.integers(0, 2 * GROUP, (windows, 4))
    rank = np.full((windows, 4), -1)
    for i in range(windows):
        there = np.sort(key[low[i] : high[i]])
        for t in range(3):
            size = int((there >= first[i, t]).sum())
            rank[i, t] = rng.integers(0, size) if size else -1

    def work(on: Backend, columns: Columns) -> Sequence[Any]:
        count = np.bincount(key[low[0] : high[0]], minlength=n_keys)
        # As the steps do: what is found replaces what was asked.
        at, rest = first.copy(), rank.copy()
        on.flow_kernels.sliding_ranks(columns["key"], low, high, at, rank.copy(), count, at, rest)
        return at, rest

    equal(gpu, work, {"key": key})


def merged(on: Backend, columns: Columns) -> Sequence[Any]:
    """Orders of a day, and what `merge_orders` returned."""
    out = [on.xp.empty_like(columns[name]) for name in ("ts", "side", "notional")]
    names = ("ts", "ts_exch", "side", "trade_id", "notional")
    n = on.flow_kernels.merge_orders(*(columns[name] for name in names), 0, WIDTH, *out)
    return n, *(values[: max(n, 0)] for values in out)


@pytest.mark.parametrize(("seed", "n"), NUMBERED)
def test_merge_orders(gpu: Backend, seed: int, n: int) -> None:
    columns = fills(n, seed)
    columns["notional"] >>= 5
    if n:
        assert 0 < merged(CPU, columns)[0] < n
    equal(gpu, merged, columns)


@pytest.mark.parametrize("past", [0, 1])
def test_merge_orders__past_the_limit(gpu: Backend, past: int) -> None:
    """Three orders of three fills; of the last two, the last fill may go past the limit."""
    n, last = 9, LARGEST_NOTIONAL // 4 + past
    columns: Columns = {name: np.zeros(n, np.int64) for name in ("ts", "ts_exch")}
    columns |= {"side": np.repeat(np.array([0, 1, 0], np.uint8), 3), "trade_id": np.arange(n)}
    columns["notional"] = np.tile([LARGEST_NOTIONAL // 2, LARGEST_NOTIONAL // 4, last], 3)
    columns["notional"][:3] = 1
    assert merged(CPU, columns)[0] == (-1 - 5 if past else 3)
    equal(gpu, merged, columns)


@pytest.mark.parametrize(("seed", "n"), NUMBERED)
def test_bar_sums(gpu: Backend, seed: int, n: int) -> None:
    bounds = [0, 0, NEVER_LARGE, 1], [NEVER_LARGE, 1023, NEVER_LARGE, 2**40]
    least, most = (np.tile(np.array(bound)[:, None], N_BARS) for bound in bounds)
    most[1, 1] = NEVER_SMALL

    def work(on: Backend, columns: Columns) -> Sequence[Any]:
        side, notional = columns["side"], columns["notional"]
        edges = flow_bars.bar_edges(columns["ts"], start=0, width=WIDTH, on=on)
        prices, size = np.zeros((N_BARS, 4), np.int64), np.ones((N_BARS, 2), np.int64)
        on.flow_kernels.bar_prices(edges, columns["price"], columns["qty"], prices, size)
        largest = np.zeros((N_BARS, N_LARGEST), np.int64)
        on.flow_kernels.bar_largest(edges, notional, largest)
        count, sums = np.ones((4, N_BARS), np.int64), np.ones((4, N_BARS, 3, 2), np.int64)
        on.flow_kernels.class_flow(edges, side, notional, least, most, count, sums)
        none = on.flow_kernels.class_flow(edges, side, notional, least[:0], most[:0], count[:0], sums[:0])
        return prices, size, largest, count, sums, none

    equal(gpu, work, fills(n, seed))


# ---- steps -------------------------------------------------------------------------------------------


def takers_of(columns: Columns, unit: str, on: Backend) -> tuple[Trades, Takers]:
    trades = Trades(*(columns[name] for name in ("ts", "side", "price", "qty")))
    if unit == "trade":
        return trades, flow_bars.trade_takers(trades, on=on)
    ids = columns["ts_exch"], columns["trade_id"]
    return trades, flow_bars.order_takers(trades, *ids, start=0, width=WIDTH, on=on)


def small_fills(n: int, seed: int) -> Columns:
    columns = fills(n, seed)
    return columns | {"qty": columns["qty"] % 4, "price": columns["price"] >> 20}


@pytest.mark.parametrize("unit", ["trade", "order"])
def test_flow_bars(gpu: Backend, unit: str) -> None:
    bounds = [(np.full(N_BARS, large), np.full(N_BARS, small)) for large, small in ((900, 50), (900, 0))]
    bounds.append((np.full(N_BARS, NEVER_LARGE), np.full(N_BARS, NEVER_SMALL)))

    def work(on: Backend, columns: Columns) -> Sequence[Any]:
        trades, takers = takers_of(columns, unit, on)
        bars = flow_bars.day_bars(trades, takers, start=0, width=WIDTH, on=on)
        edges = flow_bars.bar_edges(takers.ts, start=0, width=WIDTH, on=on)
        classes = flow_bars.day_classes(edges, takers.side, takers.notional, bounds, on=on)
        parts = [getattr(each, part.name) for each in (bars, *classes) for part in fields(each)]
        return [*parts, len(flow_bars.day_classes(edges, takers.side, takers.notional, [], on=on))]

    for seed, n in NUMBERED:
        equal(gpu, work, small_fills(n, seed))


@pytest.mark.parametrize("refresh", ["day", "bar"])
def test_thresholds(gpu: Backend, refresh: Any) -> None:
    width = US_PER_DAY // 2
    windows = (2 * US_PER_DAY, width + 3)
    rule = ThresholdRule(width, windows, (Fraction("0.85"), Fraction("0.5")), refresh, min_trades=2)
    days = {day * US_PER_DAY: small_fills(n, day) for day, n in NUMBERED}
    last = max(days)

    def work(on: Backend, _: Columns) -> Sequence[Any]:
        sizes = {}
        for start, columns in days.items():
            held = {name: on.xp.asarray(values) for name, values in columns.items()}
            _, takers = takers_of(held, "trade", on)
            day = {"start": start, "width": width}
            sizes[start] = thresholds.day_sizes(
                takers.ts + start, takers.notional, **day, windows=windows, on=on
            )
        wanted = {start: sizes[start] for start in rule.days(last)}
        cuts = thresholds.day_cuts(wanted, last, rule, on=on)
        found = [part for each in sizes.values() for part in (each.bins, each.totals, each.times, each.rows)]
        return [*found, *(part for window in windows for part in (cuts[window].n, cuts[window].exact))]

    equal(gpu, work, {})
    exact = work(CPU, {})[-1]
    assert (exact != np.array(None)).any()


def test_faults_are_told_alike(gpu: Backend) -> None:
    """Each wrong day, and what it is said to be; the same on both."""
    good: Columns = {name: np.arange(3) for name in ("ts", "ts_exch", "trade_id")}
    good |= {"side": np.zeros(3, np.uint8), "price": np.full(3, 2**31), "qty": np.full(3, 5)}

    def negative(on: Backend, columns: Columns) -> Any:
        return thresholds.day_sizes(columns["ts"], columns["qty"], start=0, width=WIDTH, windows=[1], on=on)

    tried: list[tuple[Callable[[Backend, Columns], Any], Columns]] = [
        (lambda on, columns: takers_of(columns, "trade", on), {"price": np.array([1, 0, 1])}),
        (lambda on, columns: takers_of(columns, "trade", on), {"qty": np.array([1, 0, -1])}),
        (
            lambda on, columns: takers_of(columns, "order", on),
            {"qty": np.full(3, 2**30), "ts_exch": np.zeros(3, np.int64)},
        ),
        (negative, {"qty": np.array([4, -5, 6])}),
    ]
    for work, wrong in tried:
        said = []
        for on in (CPU, gpu):
            columns = {name: on.xp.asarray(values) for name, values in (good | wrong).items()}
            with pytest.raises(LakeError) as caught:
                work(on, columns)
            said.append(str(caught.value))
        assert said[0] == said[1]
        assert "of the day at ts_local_us = " in said[0]


# ---- tasks -------------------------------------------------------------------------------------------

CONFIG = ["bar=6h", "horizons=[12h]", "min_trades=2", "threshold_window=24h", "variants=[[24h, 0.9, 0.5]]"]
DAYS = [date.fromisoformat(day) for day in lakes.DAYS[:3]]


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """Three days of trades: all sides, ties of size."""
    rng = np.random.default_rng(7)
    rows = [
        lakes.TradeIn(lakes.at(0, int(ts)), *rng.integers((0, 900, 1), (3, 1100, 50)).tolist())
        for ts in np.sort(rng.integers(0, 3 * US_PER_DAY, 240))
    ]
    return lakes.write_lake(tmp_path / "lake", trades=rows)


def jobs(lake: Path, machine: backend.Name) -> list[FlowDay]:
    config = make_config({}, CONFIG, FlowConfig)
    reader = native.open_symbol(lake, lakes.EXCHANGE, lakes.SYMBOL)
    return [DayJob(reader, Location.of(lake.parent / "store"), config, day, machine) for day in DAYS]


def reduced(tasks: list[FlowDay], unit: str) -> dict[date, TradeDay]:
    return {job.day: flow_days.reduce_trades((job, unit)) for job in tasks}


def bars(job: FlowDay, trades: dict[date, TradeDay], *, sized: bool = True) -> list[pd.DataFrame]:
    """Bars of a day under all settings."""
    made = flow_days.bars_of_day(BarJob(job, trades if sized else {job.day: trades[job.day]}, sized))
    return [made.table(Store(job.store), number) for number in range(len(job.config.settings))]


@pytest.mark.parametrize("unit", ["trade", "order"])
@pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
def test_tasks__bars_equal_those_of_the_cpu(gpu: Backend, lake: Path, unit: str, sized: bool) -> None:
    """Also where the device holds nothing any more and trades are made again from the lake."""
    found = []
    for machine in ("cpu", "gpu"):
        tasks = jobs(lake, machine)
        trades = reduced(tasks, unit)
        while machine == "gpu" and gpu._held:  # type: ignore[attr-defined]
            assert gpu.make_room(0)
        found.append(bars(tasks[-1], trades, sized=sized))
    for one, other in zip(*found, strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
        assert one["large_count"].notna().all() == sized


def test_tasks__a_lake_that_changed_is_found_when_trades_are_made_again(gpu: Backend, lake: Path) -> None:
    tasks = jobs(lake, "gpu")
    trades = reduced(tasks, "trade")
    while gpu._held:  # type: ignore[attr-defined]
        gpu.make_room(0)
    rows = [lakes.TradeIn(lakes.at(day), 0, 1000, 5) for day in range(3)]
    lakes.write_lake(lake, trades=rows)
    with pytest.raises(ClusterlobError, match="trades was changed in the lake while it was read"):
        bars(jobs(lake, "gpu")[-1], trades)


def test_tasks__room_is_made_where_memory_is_short(
    gpu: Backend, lake: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.keep(lake, "what was used long ago", {"x": gpu.xp.zeros(2_000_000)})
    monkeypatch.setattr(device, "limit", device.allocated + 100_000)
    made = flow_days.reduce_trades((jobs(lake, "gpu")[0], "trade"))
    assert "what was used long ago" not in gpu._held  # type: ignore[attr-defined]
    assert list(gpu._held) == [made.made.address]  # type: ignore[attr-defined]


# ---- compiled ----------------------------------------------------------------------------------------
