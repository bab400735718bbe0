"""The synthetic market: its lake, its laws, and what is planted in it."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import statsmodels.api as sm
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from clusterlob_gpu.errors import ConfigError, LakeError
from clusterlob_gpu.lake.layout import day_start_us, partition_dir
from clusterlob_gpu.lake.symbols import find_symbol, read_dim_symbol, write_dim_symbol
from clusterlob_gpu.lake.synthetic import (
    MarketConfig,
    SyntheticDay,
    demo_market,
    ingest_synthetic,
    make_market,
    simulate,
    snapshot_tables,
)
from clusterlob_gpu.lake.synthetic_market import MarketDay, _bits
from clusterlob_gpu.schema import LAKE_TABLES, MAX_TS, SIDE_BUY, SIDE_UNKNOWN, US_PER_DAY

SMALL = make_market(days=3, trades_per_day=30_000)
TABLES = ("trades", "book_snapshot_25", "derivative_ticker", "truth")
FIVE_MINUTES = 300_000_000


@pytest.fixture(scope="module")
def days() -> list[MarketDay]:
    return list(simulate(SMALL, "BTCUSDT"))


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic")
    ingest_synthetic(root, SMALL)
    return root


def lake_file(lake: Path, table: str, day: int, symbol: str = "BTCUSDT") -> Path:
    date = SMALL.start + dt.timedelta(days=day)
    return lake / table / "exchange=synthetic" / f"date={date}" / f"{symbol}-000000.parquet"


def read(lake: Path, table: str, day: int) -> pd.DataFrame:
    return pq.ParquetFile(lake_file(lake, table, day)).read().to_pandas()


def same_day(one: MarketDay, other: MarketDay) -> bool:
    columns = zip(
        (*one.book, *one.trades, one.ticker), (*other.book, *other.trades, other.ticker), strict=True
    )
    return all(np.array_equal(a, b) for a, b in columns)


# ---- random numbers and reproducibility -------------------------------------------------------------


def test_bits__are_splitmix64():
    mask = 2**64 - 1

    def splitmix64(seed: int, n: int) -> list[int]:
        numbers = []
        for _ in range(n):
            seed = (seed + 0x9E3779B97F4A7C15) & mask
            z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            numbers.append(z ^ (z >> 31))
        return numbers

    assert splitmix64(0, 1) == [0xE220A8397B1DCDAF]
    for seed in (0, 1234567, mask):
        assert [int(_bits(np.uint64(seed), i)) for i in range(5)] == splitmix64(seed, 5)


def test_lake__is_the_same_bytes_again(lake, tmp_path):
    ingest_synthetic(tmp_path, SMALL)
    first = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.parquet"))}
    ingest_synthetic(tmp_path, SMALL)
    assert len(first) == 4 * 3 + 1
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.parquet"))} == first
    for path, content in first.items():
        assert (lake / path.relative_to(tmp_path)).read_bytes() == content


def test_days__do_not_depend_on_how_many_are_asked_for(lake, tmp_path):
    ingest_synthetic(tmp_path, replace(SMALL, days=2))
    for table in TABLES:
        for day in range(2):
            assert lake_file(tmp_path, table, day).read_bytes() == lake_file(lake, table, day).read_bytes()
    assert not lake_file(tmp_path, "trades", 2).exists()


@pytest.mark.parametrize("change", [{"seed": 8}, {"exchange": "elsewhere"}])
def test_market__follows_seed_and_name(days, change):
    other = next(simulate(replace(SMALL, **change), "BTCUSDT"))
    assert not np.array_equal(other.book.bid, days[0].book.bid)
    assert not np.array_equal(other.trades.ts, days[0].trades.ts)


def test_symbols__are_independent_markets():
    config = replace(SMALL, symbols=("BTCUSDT", "ETHUSDT"), days=1)
    btc, eth = (next(simulate(config, name)) for name in config.symbols)
    assert same_day(btc, next(simulate(SMALL, "BTCUSDT")))
    moves = [np.diff(day.book.bid) for day in (btc, eth)]
    assert abs(np.corrcoef(*moves)[0, 1]) < 0.05


# ---- the lake ---------------------------------------------------------------------------------------


def test_tables__have_the_schema_and_exact_sizes(lake):
    sizes = {"trades": 30_000, "truth": 30_000, "book_snapshot_25": 6_562, "derivative_ticker": 28_800}
    assert SMALL.snapshots_per_day == 6_562
    for table in TABLES:
        for day in range(3):
            file = pq.ParquetFile(lake_file(lake, table, day))
            assert file.schema_arrow.equals(LAKE_TABLES[table])
            assert file.metadata.num_rows == sizes[table]
            assert all(column.null_count == 0 for column in file.read().columns)


def test_rows__are_in_the_order_of_the_lake(lake):
    for table in TABLES:
        for day in range(3):
            rows = read(lake, table, day)
            start = day_start_us(SMALL.start) + day * US_PER_DAY
            assert rows["ts_local_us"].is_monotonic_increasing
            assert start <= rows["ts_local_us"].iloc[0]
            assert rows["ts_local_us"].iloc[-1] < start + US_PER_DAY
            assert rows["file_id"].unique().tolist() == [0]
            np.testing.assert_array_equal(rows["file_line_number"], np.arange(2, len(rows) + 2))


def test_exchange_time__is_a_millisecond_before_receipt(lake):
    rows = read(lake, "trades", 1)
    latency = rows["ts_local_us"] - rows["ts_exch_us"]
    assert (rows["ts_exch_us"] % 1000 == 0).all()
    assert rows["ts_exch_us"].is_monotonic_increasing
    assert latency.between(2_500, 3_499).all()


def test_truth__belongs_to_the_trades_line_by_line(lake):
    keys = ["symbol_id", "ts_local_us", "file_id", "file_line_number"]
    trades, truth = read(lake, "trades", 1), read(lake, "truth", 1)
    pd.testing.assert_frame_equal(trades[keys], truth[keys])
    assert sorted(truth["trade_type"].unique()) == [0, 1, 2]


def test_lake__holds_the_simulated_day(lake, days):
    trades, day = read(lake, "trades", 2), days[2]
    for name, column in (("ts_local_us", "ts"), ("side", "side"), ("price_int", "price"), ("qty_int", "qty")):
        np.testing.assert_array_equal(trades[name], getattr(day.trades, column))
    np.testing.assert_array_equal(read(lake, "truth", 2)["trade_type"], day.trades.trade_type)
    first = (day_start_us(SMALL.start) // US_PER_DAY + 2) * 10**8
    assert trades["trade_id"].tolist() == [str(first + i) for i in range(30_000)]
    book = read(lake, "book_snapshot_25", 2)
    np.testing.assert_array_equal(book["ts_local_us"], day.book.ts[1:])
    np.testing.assert_array_equal(np.vstack(book["bids_px"])[:, 0], day.book.bid[1:])
    np.testing.assert_array_equal(np.vstack(book["asks_px"])[:, 0], day.book.ask[1:])


def test_book__is_25_ordered_levels_with_gaps(lake):
    book = read(lake, "book_snapshot_25", 0)
    bids, asks = np.vstack(book["bids_px"]), np.vstack(book["asks_px"])
    sizes = np.hstack([np.vstack(book["bids_sz"]), np.vstack(book["asks_sz"])])
    assert bids.shape == asks.shape == (6_562, 25)
    assert (bids[:, 0] < asks[:, 0]).all()
    assert sizes.min() >= 1
    steps = np.hstack([-np.diff(bids, axis=1), np.diff(asks, axis=1)])
    assert set(np.unique(steps)) == {1, 3}
    assert 0.2 < (steps == 3).mean() < 0.3


def test_snapshot_tables__do_not_depend_on_the_row_group(days, monkeypatch):
    def levels() -> np.ndarray:
        parts = snapshot_tables(SMALL, "BTCUSDT", 0, days[0].book)
        # Copied part by part: the buffers are filled anew for the next one.
        return np.concatenate([np.array(part["asks_sz"].combine_chunks().flatten()) for part in parts])

    whole = levels()
    monkeypatch.setattr("clusterlob_gpu.lake.synthetic.SNAPSHOT_ROW_GROUP_ROWS", 3281)
    np.testing.assert_array_equal(levels(), whole)


def test_dim_symbol__gets_the_instrument_once_and_keeps_the_others(tmp_path):
    config = make_market(trades_per_day=100, days=1, tick=0.5, lot=0.01, symbols=("ETHUSD",))
    ingest_synthetic(tmp_path, config)
    foreign = read_dim_symbol(tmp_path).assign(exchange="binance", symbol_id=5)
    write_dim_symbol(tmp_path, pd.concat([read_dim_symbol(tmp_path), foreign]))
    ingest_synthetic(tmp_path, config)
    assert read_dim_symbol(tmp_path)["exchange"].tolist() == ["binance", "synthetic"]
    row = find_symbol(tmp_path, "synthetic", "ETHUSD").rows.iloc[0]
    assert (row["base_asset"], row["quote_asset"]) == ("ETH", "USD")
    assert (row["tick_size"], row["price_increment"]) == (0.5, 0.5)
    assert (row["lot_size"], row["amount_increment"]) == (0.01, 0.01)
    assert (row["valid_from_ts"], row["valid_until_ts"]) == (0, MAX_TS)


def test_ticker__moves_slowly_and_funds_every_eight_hours(lake):
    rows = pd.concat([read(lake, "derivative_ticker", day) for day in range(3)], ignore_index=True)
    ts, period = rows["ts_local_us"], 8 * 3_600_000_000
    np.testing.assert_array_equal(rows["funding_ts_us"], (ts // period + 1) * period)
    assert len(rows[["funding_ts_us", "funding_rate"]].drop_duplicates()) == 9
    assert rows["funding_rate"].nunique() == 9
    step = np.log(rows["open_interest"]).diff().abs()
    assert 0 < step.max() < 4e-4
    assert (rows["mark_px"] / rows["last_px"] - 1).abs().max() < 2e-4
    assert rows["last_px"].between(40_000, 90_000).all()


def test_file_that_cannot_be_written__ends_the_ingest_and_a_new_one_goes_on(tmp_path):
    config = make_market(trades_per_day=1_000, days=6)
    ingest_synthetic(tmp_path / "whole", config)
    lake, calls = tmp_path / "lake", []
    blocked = partition_dir(lake, "truth", config.exchange, dt.date(2024, 5, 3))
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    with pytest.raises(FileExistsError):
        ingest_synthetic(lake, config, progress=calls.append)
    assert [day.day.day for day in calls] == [1, 2]
    assert not partition_dir(lake, "trades", config.exchange, dt.date(2024, 5, 5)).exists()
    assert list(lake.rglob("*.tmp")) == []
    blocked.unlink()
    ingest_synthetic(lake, config)
    files = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("date=*/*")}
        for root in (lake, tmp_path / "whole")
    ]
    assert files[0] == files[1]


def test_report__counts_what_was_written(tmp_path):
    calls: list[SyntheticDay] = []
    config = make_market(trades_per_day=1_000, days=2, symbols=("AUSDT", "BUSDT"))
    report = ingest_synthetic(tmp_path, config, progress=calls.append)
    assert tuple(calls) == report.days
    assert [(day.symbol, day.day.day) for day in calls] == [
        ("AUSDT", 1),
        ("AUSDT", 2),
        ("BUSDT", 1),
        ("BUSDT", 2),
    ]
    assert {(day.trades, day.snapshots) for day in calls} == {(1_000, 219)}
    assert (report.trades, report.snapshots) == (4_000, 4 * 219)
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.rglob("date=*/*.parquet"))
    assert str(report).startswith(
        "AUSDT, BUSDT from 2024-05-01 to 2024-05-02: 4,000 trades and 876 snapshots"
    )


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 8}, "seed 7 (asked for: 8)"),
        (
            {"trades_per_day": 90, "tick": 0.5},
            "trades_per_day 100 (asked for: 90), tick 0.1 (asked for: 0.5)",
        ),
        ({"start": dt.date(2024, 5, 2)}, "start 2024-05-01 (asked for: 2024-05-02)"),
    ],
)
def test_other_market__in_place_of_rows_is_refused(tmp_path, change, difference):
    config = make_market(trades_per_day=100, days=2)
    ingest_synthetic(tmp_path, config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(LakeError) as caught:
        # The new symbol comes first and leaves nothing behind either.
        ingest_synthetic(tmp_path, replace(config, days=1, symbols=("AUSDT", "BTCUSDT"), **change))
    rows = lake_file(tmp_path, "book_snapshot_25", 0)
    assert str(caught.value) == (
        f"{tmp_path}: synthetic BTCUSDT is there from another market: {difference}; "
        f"ingest into another lake, or delete its files, such as {rows}"
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


def test_other_market__may_follow_when_the_rows_are_gone_or_under_another_name(tmp_path):
    config = make_market(trades_per_day=100, days=1)
    other = replace(config, seed=8)
    ingest_synthetic(tmp_path, config)
    ingest_synthetic(tmp_path, replace(other, symbols=("ETHUSDT",)))
    ingest_synthetic(tmp_path, replace(other, exchange="elsewhere"))
    for path in tmp_path.rglob("date=*/BTCUSDT-*.parquet"):
        path.unlink()
    ingest_synthetic(tmp_path, other)
    ingest_synthetic(tmp_path, replace(other, days=2))
    ingest_synthetic(tmp_path / "fresh", replace(other, days=2))
    for day in range(2):
        kept, fresh = (lake_file(root, "trades", day) for root in (tmp_path, tmp_path / "fresh"))
        assert kept.read_bytes() == fresh.read_bytes()


def test_other_market__rows_of_unknown_source_are_kept(tmp_path):
    config = make_market(trades_per_day=100, days=1)
    ingest_synthetic(tmp_path, config)
    (tmp_path / "synthetic.json").write_text("{")
    with pytest.raises(LakeError, match=r"synthetic\.json: not readable"):
        ingest_synthetic(tmp_path, config)
    (tmp_path / "synthetic.json").unlink()
    with pytest.raises(LakeError, match=r"there from a source that synthetic\.json does not know"):
        ingest_synthetic(tmp_path, config)


# ---- the market -------------------------------------------------------------------------------------


def touch_shares(day: MarketDay, side: str) -> float:
    """Share of sided trades at or through the touch of the last row before (left) or up to (right) them."""
    row = np.searchsorted(day.book.ts, day.trades.ts, side=side) - 1  # type: ignore[call-overload]
    buys = day.trades.side == SIDE_BUY
    hit = np.where(buys, day.trades.price >= day.book.ask[row], day.trades.price <= day.book.bid[row])
    return float(hit[day.trades.side != SIDE_UNKNOWN].mean())


def test_trades__meet_the_book_strictly_before_them(days):
    for day in days:
        assert touch_shares(day, "left") > 0.99
        assert touch_shares(day, "right") < 0.97
        assert 0.02 < np.isin(day.trades.ts, day.book.ts).mean() < 0.3


def test_trades__share_stamps_as_sweeps_do(days):
    for day in days:
        milliseconds = pd.Series(day.trades.ts // 1000)
        assert 0.30 < milliseconds.duplicated(keep=False).mean() < 0.78
        new_sweep = np.diff(day.trades.ts) > 0
        assert (np.diff(day.trades.side.astype(int))[~new_sweep] != 0).mean() < 0.2


def test_trades__come_in_bursts_and_follow_the_day(days):
    day = days[0]
    seconds = np.bincount((day.trades.ts - day_start_us(SMALL.start)) // 1_000_000, minlength=86_400)
    hours = seconds.reshape(24, -1).sum(axis=1)
    assert seconds.var() / seconds.mean() > 2
    assert hours.max() / hours.min() > 1.5


def test_sizes__have_a_heavy_tail():
    qty = next(simulate(make_market(days=1, trades_per_day=1_000_000), "BTCUSDT")).trades.qty
    assert qty.min() >= 1
    assert np.median(qty) == pytest.approx(29.5, abs=1)
    assert qty.max() > 300 * np.median(qty)
    assert np.sort(qty)[-10_000:].sum() / qty.sum() > 0.1


def test_sides__are_unknown_now_and_then():
    trades = next(simulate(make_market(days=1, trades_per_day=1_000_000), "BTCUSDT")).trades
    assert (trades.side == SIDE_UNKNOWN).sum() == pytest.approx(100, abs=40)
    assert (trades.side == SIDE_BUY).mean() == pytest.approx(0.5, abs=0.02)


def test_spread__is_one_tick_with_excursions(days):
    spread = np.concatenate([day.book.ask - day.book.bid for day in days])
    assert (spread == 1).mean() > 0.9
    assert set(np.unique(spread)) == {1, 2, 4}


def test_snapshots__keep_pace_with_jitter_in_spells(days):
    gaps = np.diff(days[0].book.ts[1:])
    mean = US_PER_DAY / 6_563
    assert gaps.min() >= 2
    assert np.median(gaps) == pytest.approx(mean, rel=0.05)
    assert 0.1 < (np.abs(gaps / mean - 1) > 0.2).mean() < 0.2


def test_midnight__interrupts_neither_price_nor_activity(days):
    for before, after in pairwise(days):
        assert (after.book.bid[0], after.book.ask[0]) == (before.book.bid[-1], before.book.ask[-1])
        mids = (before.book.bid + before.book.ask) / 2
        step = (after.book.bid[1] + after.book.ask[1]) / 2 - mids[-1]
        assert abs(step) <= np.abs(np.diff(mids)).max()
        midnight = before.trades.ts[-1] // US_PER_DAY * US_PER_DAY + US_PER_DAY
        assert midnight - before.trades.ts[-1] < 120_000_000
        assert after.trades.ts[0] - midnight < 120_000_000
        assert after.state.latent[0] != before.state.latent[0]


def test_types__have_their_shares():
    trades = next(simulate(make_market(days=1, trades_per_day=500_000), "BTCUSDT")).trades
    np.testing.assert_allclose(np.bincount(trades.trade_type) / 500_000, [0.43, 0.19, 0.38], atol=0.02)


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("snapshots", [1, 2, 3])
def test_tiny_market__has_every_row_it_was_asked_for(snapshots, strength):
    """With so few book rows all may lie in lulls, which share the trades evenly then."""
    for trades_per_day in range(1, 11):
        config = make_market(
            days=3, trades_per_day=trades_per_day, snapshots_per_day=snapshots, strength=strength
        )
        for number, day in enumerate(simulate(config, "BTCUSDT")):
            start = day_start_us(config.start) + number * US_PER_DAY
            assert (len(day.trades.ts), len(day.book.ts)) == (trades_per_day, snapshots + 1)
            assert start <= day.trades.ts[0] <= day.trades.ts[-1] < start + US_PER_DAY
            assert start <= day.book.ts[1] <= day.book.ts[-1] < start + US_PER_DAY
            assert (np.diff(day.trades.ts) >= 0).all()
            assert (np.diff(day.book.ts) > 0).all()
            assert (day.book.bid < day.book.ask).all()
            assert min(day.book.bid.min(), day.trades.price.min(), day.trades.qty.min()) > 0


def test_tiny_market__of_one_trade_is_a_lake(tmp_path):
    ingest_synthetic(tmp_path, make_market(days=2, trades_per_day=1))
    for day in range(2):
        rows = [len(read(tmp_path, table, day)) for table in TABLES]
        assert rows == [1, 1, 28_800, 1]


# ---- what is planted --------------------------------------------------------------------------------


def plain_features(config: MarketConfig, day: MarketDay) -> tuple[np.ndarray, np.ndarray]:
    """z-features of one day without history, and the planted types of the same trades."""
    tables = list(snapshot_tables(config, "BTCUSDT", 0, day.book))
    assert len(tables) == 1  # one set of buffers, so only a single row group may be kept
    names = ("bids_px", "bids_sz", "asks_px", "asks_sz")
    bid_px, bid_sz, ask_px, ask_sz = (
        np.array(tables[0][name].combine_chunks().flatten()).reshape(-1, 25) for name in names
    )
    ts = tables[0]["ts_local_us"].to_numpy()

    def last_change(value: np.ndarray) -> np.ndarray:
        changed = np.r_[False, value[1:] != value[:-1]]
        return np.maximum.accumulate(np.where(changed, ts, -1))

    trades = pd.DataFrame(day.trades._asdict())
    row = np.searchsorted(ts, trades["ts"], side="left") - 1
    mid_since = last_change(bid_px[:, 0] + ask_px[:, 0])
    bid_since, ask_since = last_change(bid_px[:, 0]), last_change(ask_px[:, 0])
    known = np.minimum(np.minimum(bid_since, ask_since), mid_since)[row] >= 0
    kept = (row >= 0) & known & (trades["side"] != SIDE_UNKNOWN).to_numpy()
    trades, row = trades[kept], row[kept]
    buys = (trades["side"] == SIDE_BUY).to_numpy()
    bids, asks = (np.log1p(size[:, :5].sum(axis=1) * config.lot)[row] for size in (bid_sz, ask_sz))
    raw = pd.DataFrame(
        {
            "v_rel": trades["qty"].to_numpy() / (bid_sz[row, 0] + ask_sz[row, 0]),
            "sbs": np.where(buys, bids, asks),
            "obs": np.where(buys, asks, bids),
            "spread": (ask_px[row, 0] - bid_px[row, 0]).astype(float),
            "t_m": (trades["ts"].to_numpy() - mid_since[row]).astype(float),
            "t_age": trades["ts"].to_numpy() - np.where(buys, ask_since[row], bid_since[row]).astype(float),
        }
    )
    window = raw.rolling(100)
    z = (raw - window.mean()) / window.std(ddof=1)
    z = z.mask(window.max() == window.min(), 0.0)
    full = z.notna().all(axis=1).to_numpy()
    return z[full].to_numpy(), trades["trade_type"].to_numpy()[full]


@pytest.mark.parametrize(("trades_per_day", "seed"), [(50_000, 7), (50_000, 8), (140_000, 9)])
def test_k_means__finds_the_planted_types(trades_per_day, seed):
    config = make_market(days=1, trades_per_day=trades_per_day, seed=seed)
    z, truth = plain_features(config, next(simulate(config, "BTCUSDT")))
    fit = KMeans(3, n_init=5, random_state=7).fit(z)
    assert adjusted_rand_score(truth, fit.labels_) > 0.9
    v_rel, sbs, obs, _, t_m, _ = np.array([z[truth == kind].mean(axis=0) for kind in range(3)]).T
    assert t_m[0] > 0.8 > -0.5 > max(t_m[1], t_m[2])
    assert sbs[1] > 1.2 > -1.2 > obs[1]
    assert sbs[2] < -0.7 < 0.7 < obs[2]
    assert abs(sbs[0]) < 0.5 > abs(obs[0])
    assert np.abs(v_rel).max() < 0.3


def test_strength_zero__types_do_not_know_the_book():
    config = make_market(days=1, trades_per_day=50_000, strength=0.0)
    z, truth = plain_features(config, next(simulate(config, "BTCUSDT")))
    assert abs(adjusted_rand_score(truth, KMeans(3, n_init=1, random_state=7).fit(z).labels_)) < 0.005
    # Sweeps repeat a type, so a mean over n trades has the error of fewer than n / 3 of them.
    means = np.array([z[truth == kind].mean(axis=0) for kind in range(3)])
    error = np.array([np.sqrt(3 / (truth == kind).sum()) for kind in range(3)])
    assert (np.abs(means - means.mean(axis=0)) < 4 * error[:, None]).all()


def bucket_flow(config: MarketConfig) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) signed quantity of each type and of all, and the return of the bucket after."""
    flows, mids = [], []
    for number, day in enumerate(simulate(config, "BTCUSDT")):
        start = day_start_us(config.start) + number * US_PER_DAY
        bucket = (day.trades.ts - start) // FIVE_MINUTES
        signed = np.array([1, -1, 0])[day.trades.side] * day.trades.qty
        flows.append(
            np.column_stack(
                [
                    np.bincount(bucket, np.where(day.trades.trade_type == kind, signed, 0), 288)
                    for kind in range(3)
                ]
                + [np.bincount(bucket, signed, 288)]
            )
        )
        edges = start + FIVE_MINUTES * np.arange(288)
        row = np.maximum(np.searchsorted(day.book.ts, edges, side="left") - 1, 0)
        mids.append((day.book.bid + day.book.ask)[row])
    returns = np.diff(np.log(np.concatenate(mids)))
    return np.concatenate(flows)[:-2], returns[1:]


def test_strength_one__flow_predicts_as_planted():
    ics = []
    for seed in range(8):
        flow, after = bucket_flow(make_market(days=4, trades_per_day=150_000, seed=seed))
        ics.append([np.corrcoef(column, after)[0, 1] for column in flow.T])
    passive, opportunistic, directional, total = np.mean(ics, axis=0)
    assert abs(passive) < 0.035  # standard error 0.01
    assert 0.1 < opportunistic < 0.3
    assert -0.1 < directional < 0.02
    assert directional < total < opportunistic


def test_strength_zero__no_flow_predicts():
    rejected, ics = [], []
    for seed in range(100):
        flow, after = bucket_flow(make_market(days=2, trades_per_day=10_000, seed=seed, strength=0.0))
        for column in flow.T:
            fit = sm.OLS(after, sm.add_constant(column)).fit(cov_type="HAC", cov_kwds={"maxlags": 5})
            rejected.append(fit.pvalues[1] < 0.05)
            ics.append(np.corrcoef(column, after)[0, 1])
    assert abs(np.mean(ics)) < 0.007
    assert 0.02 < np.mean(rejected) < 0.095


def test_strength_zero__mid_is_a_martingale_beside_flow():
    """Neither the next move of the mid nor its last one leans with the side of the trades between."""
    signs, nexts, lasts = [], [], []
    for seed in range(20):
        day = next(simulate(make_market(days=1, trades_per_day=50_000, seed=seed, strength=0.0), "BTCUSDT"))
        mid = (day.book.bid + day.book.ask) / 2
        row = np.searchsorted(day.book.ts, day.trades.ts, side="left") - 1
        inside = (row >= 5) & (row < len(mid) - 5)
        signs.append(np.array([1, -1, 0])[day.trades.side][inside])
        nexts.append(np.sign(mid[row[inside] + 5] - mid[row[inside]]))
        lasts.append(np.sign(mid[row[inside]] - mid[row[inside] - 5]))
    sign, after, before = (np.concatenate(parts) for parts in (signs, nexts, lasts))
    assert abs(np.corrcoef(sign, after)[0, 1]) < 0.005
    assert abs(np.corrcoef(sign, before)[0, 1]) < 0.005


# ---- the config -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("exchange", "a/b", "letters"),
        ("symbols", (), "at least one"),
        ("symbols", ("A", "A"), "each once"),
        ("symbols", ("../A",), "letters"),
        ("start", dt.date(1969, 1, 1), "1970"),
        ("days", 0, "whole number from 1"),
        ("days", 1.5, "whole number"),
        ("trades_per_day", 0, "whole number from 1"),
        ("snapshots_per_day", True, "whole number"),
        ("seed", -1, "whole number from 0"),
        ("strength", 1.5, "in [0, 1]"),
        ("strength", float("nan"), "in [0, 1]"),
        ("price", -1.0, "positive"),
        ("tick", float("inf"), "positive"),
        ("lot", 0.0, "positive"),
        ("price", 100.0, "1e4 to 1e9 ticks, is 1000"),
    ],
)
def test_config__names_the_field_that_is_wrong(field: str, value: Any, rule: str):
    with pytest.raises(ConfigError) as error:
        MarketConfig(**{field: value})
    assert str(error.value).startswith(f"synthetic.{field} = ")
    assert rule in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_make_market__keeps_the_ratio_of_trades_and_snapshots():
    assert make_market(trades_per_day=100_000).snapshots_per_day == 21_873
    assert make_market(trades_per_day=100_000, snapshots_per_day=9).snapshots_per_day == 9
    full = make_market(full_size=True, trades_per_day=1)
    assert (full.trades_per_day, full.snapshots_per_day) == (3_950_000, 864_000)


def test_demo_market__is_small():
    market = demo_market()
    assert (market.days, market.trades_per_day, market.end) == (3, 150_000, dt.date(2024, 5, 3))
