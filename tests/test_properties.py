"""The finished pipeline against the slow reference, and against itself on altered, cut or mirrored lakes.

Every lake is written to disk and run through `pipeline.label` or `pipeline.run_cluster`; only the
evaluation and the pictures, which have tests of their own, are left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import lakes
import numpy as np
import pandas as pd
import pytest
import reference as ref
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from lakes import BUY, DAY, EXCHANGE, HOUR, MINUTE, SECOND, SELL, SYMBOL, BookIn, Market, TradeIn, at

from clusterlob_gpu import pipeline
from clusterlob_gpu.clustering import read_models
from clusterlob_gpu.config import ClusterConfig
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.pipeline import parts
from clusterlob_gpu.workers import Place, open_workers

CONFIG: dict[str, Any] = {
    "book": "book_snapshot_25",
    "depth": 5,
    "window": 5,
    "same_side": "own",
    "spread": "ticks",
    "asof": "strict",
    "max_staleness": MINUTE,
    "bucket": 5 * MINUTE,
    "horizons": [HOUR, 3 * HOUR],
}
DURATIONS = ("max_staleness", "bucket")
CENTROIDS = [
    [1.0, 0.5, -0.5, 0.0, 0.3, 0.0],
    [-0.5, -0.4, 0.6, 0.2, -0.8, -0.7],
    [0.0, 0.0, 0.0, 0.0, 1.2, 1.1],
]
Z_NAMES = [f"z_{name}" for name in ref.FEATURES]
RETURN_NAMES = {"conr": "conr", "frnb": "frnb", "freb": "freb", "r_1h": str(HOUR), "r_3h": str(3 * HOUR)}
MARKOUTS = (SECOND, 5 * SECOND, 30 * SECOND, 5 * MINUTE)

some = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# ---- running ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """Tables of a run, and the counts of its run.json."""

    trades: pd.DataFrame
    buckets: pd.DataFrame
    centroids: pd.DataFrame
    markouts: pd.DataFrame
    rows: dict[str, Any]
    model: dict[str, Any]


def product_config(config: dict[str, Any], **more: Any) -> ClusterConfig:
    text = {key: f"{config[key]}us" for key in DURATIONS} | {
        "horizons": [f"{h}us" for h in config["horizons"]]
    }
    return ClusterConfig(**(config | text | {"keep_trades": True, "on_bad_day": "skip"} | more))


@contextmanager
def without_evaluation() -> Iterator[None]:
    names = ("symbol", "cluster", "label", "signal", "target", "ic", "verdict")
    nothing = pd.DataFrame({name: [] for name in names})
    with patch.object(parts, "ic_of", lambda *_: nothing):
        yield


def run(
    lake: Path,
    config: dict[str, Any],
    first: int,
    last: int,
    *,
    fit: bool = False,
    store: Path | None = None,
    **more: Any,
) -> Output:
    """Run days `first` to `last` of lakes.DAYS, with CENTROIDS as the model or a fit of its own."""
    settled = product_config(config, **more)
    with TemporaryDirectory() as folder, open_workers(Place(kind="threads", n_workers=1), _silent) as workers:
        models = None if fit else read_models(_write_model(Path(folder), settled))
        request = pipeline.RunRequest(
            lake=lake,
            exchange=EXCHANGE,
            symbols=(SYMBOL,),
            start=date.fromisoformat(lakes.DAYS[first]),
            end=date.fromisoformat(lakes.DAYS[last]),
            out=Path(folder) / "out",
            config=settled,
            store=store,
            models=models,
            pictures=False,
        )
        with without_evaluation():
            out = (pipeline.run_cluster if fit else pipeline.label)(request, workers)
        results = out / "results"
        trades = [pd.read_parquet(path) for path in sorted((results / "trade_features.parquet").glob("*"))]
        return Output(
            pd.concat(trades, ignore_index=True),
            *(pd.read_parquet(results / f"{name}.parquet") for name in ("buckets", "centroids", "markouts")),
            rows=json.loads((out / "run.json").read_text())["rows"][SYMBOL],
            model=json.loads((out / "model.json").read_text())["models"][0],
        )


def _silent(*_: object) -> None:
    pass


def _write_model(folder: Path, config: ClusterConfig) -> Path:
    model = {
        "symbol": SYMBOL,
        "exchange": EXCHANGE,
        "centroids": CENTROIDS,
        "numbers": [0, 1, 2],
        "labels": ["passive", "opportunistic", "directional"],
        "bounds": None,
        "train_days": [],
        "features": config.model_dump(mode="json", include=set(pipeline.cluster.FEATURE_KEYS)),
        "fitted": config.model_dump(mode="json", include=set(pipeline.cluster.FIT_KEYS)),
        "margin": 0.0,
        "fit": {"inertia": 0.0, "passes": 0, "converged": True, "counts": [0, 0, 0], "rows": 0},
        "feature_order": Z_NAMES,
    }
    path = folder / "model.json"
    path.write_text(json.dumps({"version": 1, "models": [model]}))
    return path


# ---- comparing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """The reference's view of the days of a run; `covered` has trades and book."""

    rows: list[ref.Row]
    kept: list[ref.Row]
    book: list[ref.Book]
    history: ref.BookHistory
    covered: set[int]
    config: dict[str, Any]


def expect(lake: Path, config: dict[str, Any], first: int, last: int) -> Expected:
    trades = ref.read_trades(lake, EXCHANGE, SYMBOL)
    book = ref.read_book(lake, EXCHANGE, SYMBOL, config["book"], config["depth"])
    asked = set(range(at(first) // DAY, at(last) // DAY + 1))
    covered = asked & ref.days_of(trades) & ref.days_of(book)
    history = ref.BookHistory(book)
    rows = [row for row in ref.features(trades, history, config) if row.trade.ts // DAY in covered]
    book = [row for row in book if row.ts // DAY in covered]
    return Expected(rows, ref.kept(rows), book, history, covered, config)


def assert_same(got: Output, want: Expected, first: int, last: int, centroids: list[list[float]]) -> None:
    """Every number of a run against the reference."""
    assert_counts(got, want)
    assert_trades(got.trades, want)
    assert_labels(got.trades, want, centroids)
    assert_flow(got, want, first, last)
    assert_returns(got.buckets, want)
    if want.config["asof"] == "strict":  # inclusive measures from the row met, which is not mid(t)
        assert_markouts(got, want)
    assert_centroids(got, want)


def assert_counts(got: Output, want: Expected) -> None:
    assert got.rows["trades"] == len(want.rows)
    assert got.rows["kept"] == len(want.kept)
    assert {k: n for k, n in got.rows["dropped"].items() if n} == ref.drop_counts(want.rows)
    assert got.rows["book_rows"] == len(want.book)
    assert {k: n for k, n in got.rows["book_skipped"].items() if n} == ref.fault_counts(want.book)


def assert_trades(got: pd.DataFrame, want: Expected) -> None:
    trades = [row.trade for row in want.kept]
    assert got["ts_local_us"].tolist() == [trade.ts for trade in trades]
    assert got["sign"].tolist() == [trade.sign for trade in trades]
    close(got["price"], [float(trade.price) for trade in trades], 1e-14)
    close(got["qty"], [float(trade.qty) for trade in trades], 1e-14)
    for name in ref.FEATURES:
        exact = name in ("t_m", "t_age")
        close(got[name], [row.raw[name] for row in want.kept], 0.0 if exact else 1e-14)
        expected = np.array([row.z[name] for row in want.kept])
        noise = np.array([ref.zscore_noise([raw[name] for raw in row.window]) for row in want.kept])
        error = np.abs(got[f"z_{name}"].to_numpy() - expected)
        assert (error <= 1e-9 * np.maximum(1.0, np.abs(expected)) + 8 * noise).all(), name


def assert_labels(got: pd.DataFrame, want: Expected, centroids: list[list[float]]) -> None:
    """Labels are the nearest centroid's, but for ties that the stored float32 scores cannot tell apart."""
    for row, cluster in zip(want.kept, got["cluster"], strict=True):
        z = [row.z[name] for name in ref.FEATURES]
        to_each = ref.distances(z, centroids)
        near_enough = min(to_each) + 1e-5 * (1.0 + min(to_each))
        assert to_each[cluster] <= near_enough
        if sorted(to_each)[1] > near_enough:
            assert cluster == ref.nearest(z, centroids)


def assert_flow(got: Output, want: Expected, first: int, last: int) -> None:
    starts = ref.bucket_starts(lakes.DAYS[first], lakes.DAYS[last], want.config["bucket"])
    sums = ref.bucket_sums(want.kept, got.trades["cluster"].tolist(), 3, starts)
    table = got.buckets.set_index(["bucket_ts", "cluster"])
    assert sorted(table.index) == sorted(sums)
    names = ["ofi_size", "ofi_count", "ofi_notional"]
    for key, values in zip(table.index, table[names].to_numpy(), strict=True):
        if key[0] // DAY in want.covered:
            close(values, [float(value) for value in sums[key]], 1e-14)
        else:
            assert np.isnan(values).all()


def assert_returns(got: pd.DataFrame, want: Expected) -> None:
    table = got[got["cluster"] == -1].set_index("bucket_ts")[list(RETURN_NAMES)]
    for bucket_ts, values in zip(table.index, table.to_numpy(), strict=True):
        expected = ref.bucket_returns(want.history, bucket_ts, want.config)
        wanted = [expected[RETURN_NAMES[name]] for name in table.columns]
        np.testing.assert_allclose(values, np.array(wanted, float), rtol=1e-9, atol=1e-14, err_msg=bucket_ts)


def assert_markouts(got: Output, want: Expected) -> None:
    table = got.markouts.set_index(["cluster", "horizon_us"])
    for cluster in range(3):
        mine = [row.trade for row, c in zip(want.kept, got.trades["cluster"], strict=True) if c == cluster]
        for horizon in MARKOUTS:
            moves = [ref.markout_bps(t, want.history, horizon, want.config["max_staleness"]) for t in mine]
            known = [move for move in moves if move is not None]
            n = table["n"].get((cluster, horizon), 0)
            assert n == len(known)
            if known:
                close([table["mean_bps"][cluster, horizon]], [sum(known) / n], 1e-9, atol=1e-9)


def assert_centroids(got: Output, want: Expected) -> None:
    """Counts, shares and means of each cluster are those of its trades."""
    table = got.centroids.set_index("cluster")
    assert table["count"].sum() == len(want.kept)
    for cluster, trades in got.trades.groupby("cluster"):
        row = table.loc[cluster]
        assert row["count"] == len(trades)
        assert row["share"] == pytest.approx(len(trades) / len(want.kept), rel=1e-14)
        close(row[list(ref.FEATURES)].astype(float), trades[list(ref.FEATURES)].mean(), 1e-12)
        close(row[Z_NAMES].astype(float), trades[Z_NAMES].mean(), 1e-6, atol=1e-6)


def close(got: Any, want: Any, rtol: float, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(got, float), np.asarray(want, float), rtol=rtol, atol=atol)


def last_day(market: Market) -> int:
    return (max(row.ts for row in market.trades) - at(0)) // DAY


def has_a_whole_day(market: Market) -> bool:
    """Whether some day has trades and book of the symbol itself."""
    days = [
        {row.ts // DAY for row in rows if row.symbol_id != lakes.DECOY_ID}
        for rows in (market.trades, market.books)
    ]
    return bool(days[0] & days[1])


# ---- the reference ----------------------------------------------------------------------------------


@some
@given(lakes.markets(), lakes.CONFIGS)
def test_label__equals_reference(market: Market, config: dict[str, Any]) -> None:
    """Any market, any config: counts, features, labels, flow, returns and mark-outs."""
    assume(has_a_whole_day(market))
    last = last_day(market)
    with TemporaryDirectory() as folder:
        lake = market.write(Path(folder) / "lake", parts=2, shuffle=3)
        assert_same(run(lake, config, 0, last), expect(lake, config, 0, last), 0, last, CENTROIDS)


@pytest.mark.parametrize("book", ["book_snapshot_25", "quotes"])
@pytest.mark.parametrize("name", sorted(set(lakes.NAMED) - {"constant"}))
def test_fit__equals_reference(tmp_path: Path, name: str, book: str) -> None:
    """Named markets with a model fitted on them: the labels are those of the model's own centroids."""
    market = lakes.NAMED[name]()
    last = last_day(market)
    config = CONFIG | {"book": book, "window": 20}
    lake = market.write(tmp_path / "lake")
    got = run(lake, config, 0, last, fit=True)
    order = got.model["numbers"]
    centroids = [got.model["centroids"][order.index(number)] for number in range(3)]
    assert_same(got, expect(lake, config, 0, last), 0, last, centroids)


def test_constant_market__has_zero_scores_and_nothing_to_fit(tmp_path: Path) -> None:
    """Every window is constant: all z are exactly 0, all trades lie in the cluster nearest to 0."""
    lake = lakes.constant().write(tmp_path / "lake")
    got = run(lake, CONFIG, 0, 0)
    assert_same(got, expect(lake, CONFIG, 0, 0), 0, 0, CENTROIDS)
    assert (got.trades[Z_NAMES] == 0.0).all(axis=None)
    assert len(got.trades) == 600 - 4 - 1
    with pytest.raises(InputError, match="distinct feature row"):
        run(lake, CONFIG, 0, 0, fit=True)


# ---- cutting ----------------------------------------------------------------------------------------


@some
@given(lakes.markets(max_days=3), lakes.CONFIGS)
def test_cut__days_one_by_one_equal_all_at_once(market: Market, config: dict[str, Any]) -> None:
    """Each day as a run of its own gives the same rows, whatever is in the store already."""
    assume(has_a_whole_day(market))
    last = last_day(market)
    with TemporaryDirectory() as folder:
        lake = market.write(Path(folder) / "lake")
        whole = run(lake, config, 0, last)
        covered = [day - at(0) // DAY for day in sorted(expect(lake, config, 0, last).covered)]
        alone = [run(lake, config, day, day) for day in reversed(covered)][::-1]
    pd.testing.assert_frame_equal(pd.concat([out.trades for out in alone], ignore_index=True), whole.trades)
    keys = ["bucket_ts", "cluster"]
    parts = pd.concat([out.buckets for out in alone]).sort_values(keys, ignore_index=True)
    same_days = whole.buckets["bucket_ts"].isin(parts["bucket_ts"])
    pd.testing.assert_frame_equal(
        parts, whole.buckets[same_days].sort_values(keys, ignore_index=True), check_dtype=False
    )


def test_cut__before_a_day_without_a_valid_book_row(tmp_path: Path) -> None:
    """It is looked at for mark-outs alone, and is as good as one that the lake does not have."""
    lake = lakes.crossed_day().write(tmp_path / "lake")
    assert_same(run(lake, CONFIG, 0, 0), expect(lake, CONFIG, 0, 0), 0, 0, CENTROIDS)


@pytest.mark.parametrize("name", ["ties", "finer_ticks_new_id", "over_midnight"])
def test_files__their_number_and_order_do_not_matter(tmp_path: Path, name: str) -> None:
    """Three shuffled files a day give bitwise the tables of one file."""
    market = lakes.NAMED[name]()
    last = last_day(market)
    one = run(market.write(tmp_path / "one"), CONFIG, 0, last)
    many = run(market.write(tmp_path / "many", parts=3, shuffle=11), CONFIG, 0, last)
    for table in ("trades", "buckets", "centroids", "markouts"):
        pd.testing.assert_frame_equal(getattr(many, table), getattr(one, table), check_exact=True)


# ---- the future -------------------------------------------------------------------------------------


def with_another_future(market: Market, cut: int, seed: int) -> Market:
    """From `cut` on: other prices, sizes and sides at the same times."""
    rng = random.Random(seed)

    def bent(levels: Any) -> list[tuple[int | None, int | None]]:
        return [(None if p is None else p + 7, None if s is None else 3 * s + 1) for p, s in levels]

    trades = [
        t._replace(side=rng.choice((BUY, SELL)), price=t.price + 50, qty=t.qty + 9) if t.ts >= cut else t
        for t in market.trades
    ]
    books = [
        BookIn(b.ts, bent(b.bids), bent(b.asks), b.symbol_id) if b.ts >= cut else b for b in market.books
    ]
    return replace(market, trades=trades, books=books)


@some
@given(lakes.markets(), lakes.CONFIGS, st.integers(0, 2**32 - 1))
def test_future__does_not_reach_back(market: Market, config: dict[str, Any], seed: int) -> None:
    """With strict as-of, nothing stamped at or before the cut changes, bit by bit."""
    assume(has_a_whole_day(market))
    last, config = last_day(market), config | {"asof": "strict"}
    cut = random.Random(seed).choice(market.trades).ts
    other = with_another_future(market, cut, seed)
    with TemporaryDirectory() as folder:
        real = run(market.write(Path(folder) / "real"), config, 0, last)
        bent = run(other.write(Path(folder) / "bent"), config, 0, last)
    columns = [*ref.FEATURES, *Z_NAMES, "cluster"]

    def past_trades(out: Output) -> pd.DataFrame:
        return out.trades[out.trades["ts_local_us"] < cut]

    def past_buckets(out: Output, known_after: int, names: list[str]) -> pd.DataFrame:
        return out.buckets[out.buckets["bucket_ts"] + known_after <= cut][["bucket_ts", "cluster", *names]]

    width = config["bucket"]
    pairs = [
        (past_trades(real)[columns], past_trades(bent)[columns]),
        *(
            (past_buckets(real, known_after, names), past_buckets(bent, known_after, names))
            for known_after, names in (
                (width, ["ofi_size", "ofi_count", "ofi_notional", "conr"]),
                (2 * width, ["frnb"]),
                (width + HOUR, ["r_1h"]),
                (width + 3 * HOUR, ["r_3h"]),
                (DAY, ["freb"]),
            )
        ),
    ]
    for before, after in pairs:
        pd.testing.assert_frame_equal(after, before, check_exact=True)


def test_future__the_test_notices_a_leak(tmp_path: Path) -> None:
    """With inclusive as-of the book row of the trade's own moment is seen: features before do differ."""
    market, config = lakes.ties(), CONFIG | {"asof": "inclusive"}
    cut = market.trades[200].ts
    bent_books = with_another_future(market, cut, 1).books
    real = run(market.write(tmp_path / "real"), config, 0, 0).trades
    bent = run(replace(market, books=bent_books).write(tmp_path / "bent"), config, 0, 0).trades
    at_the_cut = real["ts_local_us"] == cut
    assert at_the_cut.sum() == 4
    assert (real["sbs"][at_the_cut] != bent["sbs"][at_the_cut]).all()


# ---- symmetry ---------------------------------------------------------------------------------------


def mirrored(market: Market, price: int) -> Market:
    """Buys are sells, bids are asks, and every price is as far on the other side of `price`."""

    def flip(levels: Any) -> list[tuple[int | None, int | None]]:
        return [(None if p is None else 2 * price - p, s) for p, s in levels]

    trades = [
        TradeIn(t.ts, {BUY: SELL, SELL: BUY}.get(t.side, t.side), 2 * price - t.price, t.qty)
        for t in market.trades
    ]
    return Market(trades, [BookIn(b.ts, flip(b.asks), flip(b.bids)) for b in market.books])


@pytest.mark.parametrize("name", ["plain", "ties", "unknown_sides", "over_midnight", "stale_book"])
def test_mirror__same_features_opposite_flow(tmp_path: Path, name: str) -> None:
    market = lakes.NAMED[name]()
    last = last_day(market)
    real = run(market.write(tmp_path / "real"), CONFIG, 0, last)
    twin = run(mirrored(market, 1000).write(tmp_path / "twin"), CONFIG, 0, last)
    same = [*ref.FEATURES, *Z_NAMES, "cluster", "qty"]
    pd.testing.assert_frame_equal(twin.trades[same], real.trades[same], check_exact=True)
    for column in ("ofi_size", "ofi_count"):
        np.testing.assert_array_equal(twin.buckets[column], -real.buckets[column])
