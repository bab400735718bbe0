"""`run flow` on a small synthetic lake: against sorted lists, cut into days, with another future."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clusterlob_gpu import flow_evaluation, pipeline
from clusterlob_gpu.config import FlowConfig, make_config
from clusterlob_gpu.errors import ConfigError, LakeError
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.lake.synthetic import ingest_synthetic, make_market
from clusterlob_gpu.workers import Place, open_workers

EXCHANGE, SYMBOL = "synthetic", "BTCUSDT"
DAYS = [dt.date(2024, 5, 1) + dt.timedelta(days=n) for n in range(5)]
TRADES_PER_DAY = 6_000
HOUR_US = 3_600_000_000
SETTINGS = ["threshold_window=24h", "min_trades=500", "bar=15m"]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flow") / "lake"
    market = make_market(
        symbols=(SYMBOL,), start=DAYS[0], days=5, trades_per_day=TRADES_PER_DAY, snapshots_per_day=15_000
    )
    ingest_synthetic(root, market)
    return root


@pytest.fixture
def unevaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = pd.DataFrame({name: [] for name in ("symbol", "signal", "target", "ic")})
    monkeypatch.setattr(flow_evaluation, "flow_tables", lambda *_: {"ic": nothing})


def run(
    lake: Path, out: Path, first: dt.date, last: dt.date, *settings: str, place: Place | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    request = pipeline.RunRequest(
        lake=lake,
        exchange=EXCHANGE,
        symbols=(SYMBOL,),
        start=first,
        end=last,
        out=out,
        config=make_config({}, [*SETTINGS, *settings], FlowConfig),
        pictures=False,
    )
    with open_workers(place or Place(kind="threads", n_workers=2), lambda *_: None) as workers:
        pipeline.run_flow(request, workers)
    return pd.read_parquet(out / "results" / "features.parquet"), json.loads((out / "run.json").read_text())


def trades_of(lake: Path, days: list[dt.date]) -> pd.DataFrame:
    folders = [lake / "trades" / f"exchange={EXCHANGE}" / f"date={day}" for day in days]
    return pd.concat([pq.read_table(path).to_pandas() for folder in folders for path in folder.glob("*")])


def quantile_by_sorting(values: list[int], q: Fraction) -> Fraction:
    values = sorted(values)
    place = (len(values) - 1) * q
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


@pytest.mark.usefixtures("unevaluated")
@pytest.mark.parametrize("refresh", ["day", "bar"])
def test_thresholds__equal_sorted_lists(lake: Path, tmp_path: Path, refresh: str) -> None:
    table, _ = run(lake, tmp_path / "out", DAYS[2], DAYS[3], f"refresh={refresh}")
    trades = trades_of(lake, DAYS)
    notional = (trades["price_int"] * trades["qty_int"]).to_numpy()
    ts = trades["ts_local_us"].to_numpy()
    assert len(table) == 2 * 96
    for row in table.iloc[::13].itertuples():
        end = row.bar_ts if refresh == "bar" else row.bar_ts // (24 * HOUR_US) * (24 * HOUR_US)
        inside = notional[(ts >= end - 24 * HOUR_US) & (ts < end)].tolist()
        assert row.window_trades == len(inside)
        for name, q in (("q_large", Fraction(85, 100)), ("q_small", Fraction(1, 2))):
            assert getattr(row, name) == float(quantile_by_sorting(inside, q) * Fraction(1, 10_000))


@pytest.mark.usefixtures("unevaluated")
def test_bars__equal_a_loop_over_trades(lake: Path, tmp_path: Path) -> None:
    table, summary = run(lake, tmp_path / "out", DAYS[2], DAYS[2])
    trades = trades_of(lake, [DAYS[2]])
    assert summary["rows"][SYMBOL]["trades"] == len(trades) == TRADES_PER_DAY
    for row in table.iloc[::7].itertuples():
        sums = {name: Fraction(0) for name in ("buy", "sell", "large_buy", "large_sell", "total")}
        mine = trades[
            (trades["ts_local_us"] >= row.bar_ts) & (trades["ts_local_us"] < row.bar_ts + HOUR_US // 4)
        ]
        for trade in mine.itertuples():
            notional = Fraction(trade.price_int * trade.qty_int, 10_000)
            side = {0: "buy", 1: "sell"}.get(trade.side)
            sums["total"] += notional
            if side:
                sums[side] += notional
                if notional >= Fraction(row.q_large):
                    sums[f"large_{side}"] += notional
        assert row.trade_count == len(mine)
        assert row.total_notional == pytest.approx(float(sums["total"]), rel=1e-15)
        assert row.buy_notional == pytest.approx(float(sums["buy"]), rel=1e-15)
        assert row.buy_notional_large == pytest.approx(float(sums["large_buy"]), rel=1e-15)
        assert row.sell_notional_large == pytest.approx(float(sums["large_sell"]), rel=1e-15)
        net, both = sums["large_buy"] - sums["large_sell"], sums["large_buy"] + sums["large_sell"]
        assert row.flow_imbalance_large == pytest.approx(float(net / both), rel=1e-14)


@pytest.mark.usefixtures("unevaluated")
@pytest.mark.parametrize("price", ["mid", "vwap"])
def test_cut__days_one_by_one_equal_all_at_once(lake: Path, tmp_path: Path, price: str) -> None:
    whole, _ = run(lake, tmp_path / "all", DAYS[1], DAYS[4], f"price={price}", "refresh=bar")
    parts = [run(lake, tmp_path / f"{day}", day, day, f"price={price}", "refresh=bar")[0] for day in DAYS[1:]]
    pd.testing.assert_frame_equal(whole, pd.concat(parts, ignore_index=True), check_exact=True)
    assert whole["ret_fwd_3h"].notna().sum() > 300


@pytest.mark.usefixtures("unevaluated")
def test_workers__one_and_two_give_the_same_rows(lake: Path, tmp_path: Path) -> None:
    plain, _ = run(lake, tmp_path / "threads", DAYS[2], DAYS[3])
    for n in (1, 2):
        there, _ = run(lake, tmp_path / f"dask{n}", DAYS[2], DAYS[3], place=Place(kind="local", n_workers=n))
        pd.testing.assert_frame_equal(plain, there, check_exact=True)


def thinned(lake: Path, copy: Path, table: str, at: int) -> Path:
    """A copy of the lake in which a table keeps, from a time on, only one row in three."""
    shutil.copytree(lake, copy)
    for path in sorted((copy / table).rglob("*.parquet")):
        rows = pq.read_table(path)
        ts = rows["ts_local_us"].to_numpy()
        pq.write_table(rows.filter(pa.array((ts < at) | (np.arange(len(ts)) % 3 == 0))), path)
    return copy


@pytest.mark.usefixtures("unevaluated")
@pytest.mark.parametrize("table", ["trades", "book_snapshot_25", "derivative_ticker"])
def test_future__does_not_reach_back(lake: Path, tmp_path: Path, table: str) -> None:
    at = day_start_us(DAYS[3]) + 7 * HOUR_US
    other = thinned(lake, tmp_path / "lake", table, at)
    true, _ = run(lake, tmp_path / "a", DAYS[3], DAYS[3], "refresh=bar")
    changed, _ = run(other, tmp_path / "b", DAYS[3], DAYS[3], "refresh=bar")
    width = HOUR_US // 4
    known = true["bar_ts"] + width <= at
    targets = [name for name in true.columns if name.startswith("ret_fwd_")]
    assert known.sum() == 28
    pd.testing.assert_frame_equal(
        true[known].drop(columns=targets), changed[known].drop(columns=targets), check_exact=True
    )
    settled = true["bar_ts"] + width + 3 * HOUR_US <= at
    pd.testing.assert_frame_equal(true[settled], changed[settled], check_exact=True)
    assert not true[~known].equals(changed[~known])


@pytest.mark.usefixtures("unevaluated")
def test_gap__targets_across_a_missing_day_are_null(lake: Path, tmp_path: Path) -> None:
    holed = shutil.copytree(lake, tmp_path / "lake")
    for table in ("trades", "book_snapshot_25", "derivative_ticker"):
        shutil.rmtree(holed / table / f"exchange={EXCHANGE}" / f"date={DAYS[3]}")
    with pytest.raises(LakeError, match=f"no trades for {EXCHANGE} {SYMBOL} on {DAYS[3]}"):
        run(holed, tmp_path / "fail", DAYS[2], DAYS[4])
    table, summary = run(holed, tmp_path / "out", DAYS[2], DAYS[4], "on_bad_day=skip")
    assert len(table) == 3 * 96
    day = table["bar_ts"] // (24 * HOUR_US) * (24 * HOUR_US)
    missing = table[day == day_start_us(DAYS[3])]
    assert missing["total_notional"].isna().all()
    assert (missing["trade_count"] == 0).all()
    before = table[day == day_start_us(DAYS[2])]
    assert before["ret_fwd_3h"].isna().sum() == 12
    assert before["ret_fwd_1h"].isna().sum() == 4
    after = table[day == day_start_us(DAYS[4])]
    assert after["flow_imbalance_total_sum_3h"].isna().sum() == 11
    assert any(str(DAYS[3]) in note for note in summary["notes"])


@pytest.mark.usefixtures("unevaluated")
def test_ticker__its_absence_leaves_nulls_and_a_note(lake: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(lake, tmp_path / "lake")
    shutil.rmtree(bare / "derivative_ticker")
    table, summary = run(bare, tmp_path / "out", DAYS[2], DAYS[2])
    with_it, _ = run(lake, tmp_path / "with", DAYS[2], DAYS[2])
    assert table[["oi", "funding", "funding_z", "d_oi_z"]].isna().all(axis=None)
    assert with_it[["oi", "funding"]].notna().all(axis=None)
    assert any("derivative_ticker" in note for note in summary["notes"])
    others = [name for name in table.columns if not name.startswith(("oi", "funding", "d_oi", "stress"))]
    pd.testing.assert_frame_equal(table[others], with_it[others], check_exact=True)


@pytest.mark.usefixtures("unevaluated")
def test_too_few_trades__no_thresholds_but_total_flow(lake: Path, tmp_path: Path) -> None:
    table, _ = run(lake, tmp_path / "out", DAYS[2], DAYS[2], "min_trades=1000000")
    assert table[["q_large", "q_small", "flow_imbalance_large", "large_count"]].isna().all(axis=None)
    assert table["flow_imbalance_total"].notna().sum() > 90


@pytest.mark.usefixtures("unevaluated")
def test_variants__are_the_runs_of_their_own_settings(lake: Path, tmp_path: Path) -> None:
    variants = "variants=[[48h, 0.9, 0.3], [24h, 0.8, 0.5]]"
    both, _ = run(lake, tmp_path / "both", DAYS[3], DAYS[3], variants)
    alone, _ = run(lake, tmp_path / "alone", DAYS[3], DAYS[3], "threshold_window=48h", "quantiles=[0.9, 0.3]")
    for column in ("flow_imbalance_large", "flow_imbalance_small", "flow_share_large"):
        np.testing.assert_array_equal(both[f"{column}:2d/0.9/0.3"], alone[column])
    assert "flow_imbalance_large:1d/0.8/0.5" not in alone.columns


@pytest.mark.usefixtures("unevaluated")
def test_orders__are_fewer_and_larger_than_their_fills(lake: Path, tmp_path: Path) -> None:
    fills, _ = run(lake, tmp_path / "fills", DAYS[3], DAYS[3])
    orders, summary = run(lake, tmp_path / "orders", DAYS[3], DAYS[3], "unit=order")
    assert summary["rows"][SYMBOL]["orders"] == orders["trade_count"].sum() < fills["trade_count"].sum()
    np.testing.assert_allclose(orders["total_notional"], fills["total_notional"], rtol=1e-15)
    assert (orders["q_large"] >= fills["q_large"]).all()
    assert set(summary["large_set"][SYMBOL]) == {"order", "trade"}


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("bar=7m", "bar = 7m"),
        ("quantiles=[0.5, 0.85]", "quantiles"),
        ("quantiles=[1.0, 0.5]", "quantiles"),
        ("unit=lot", "unit"),
        ("min_trades=0", "min_trades"),
        ("variants=[[24h, 0.2, 0.3]]", "quantiles"),
        ("fee_bps=-1", "fee_bps"),
        ("horizons=[]", "horizons"),
        ("k=3", "k: no such key"),
    ],
)
def test_config__a_bad_value_names_its_field(setting: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({}, [setting], FlowConfig)
    assert field in str(caught.value)
