#!/usr/bin/env python3
"""Both experiments as a good Polars user would write them in one script: what the package is timed against.

    scripts/polars_baseline.py cluster|flow --lake LAKE --start 2024-05-01 --end 2024-05-07 --out DIR

Lazy scans, `join_asof`, `rolling_*`, `group_by` and scikit-learn's KMeans, one day after the other, since a
range at once takes a GiB per day.  Midnight is crossed by the last book row and the last `window - 1` trades.

It gives the same numbers as the package where Polars can: the book that each trade meets, raw features,
z-scores to float32, sums of buckets, returns, bars, and thresholds taken once a day.  (The running sums of
Polars 1.37 drift: with the spread in bps its z-scores err by up to 72 on such a lake; 2.1 has none of this.)
It cannot give thresholds at every bar, for which it would sort 72 h of trades 288 times a day, or centroids
and labels to the last digit, since this K-means is in float32.

It does less than the package: nothing is kept for another run, a symbol has one increment, one file a day
and horizons of whole buckets; no mark-outs, regressions, regimes, costs, bootstrap or report.  K-means has
the package's starting effort: five starts on 200,000 rows, then the best one on all rows.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl

FEATURES = ("v_rel", "sbs", "obs", "spread", "t_m", "t_age")
Z_FEATURES = tuple(f"z_{name}" for name in FEATURES)
DAY = 86_400_000_000
MINUTE = 60_000_000
DEPTH, WINDOW, STALENESS = 5, 100, MINUTE
BUCKET = 5 * MINUTE
SAMPLE_ROWS = 200_000
LARGE, SMALL, THRESHOLD_DAYS, MIN_TRADES = 0.85, 0.5, 3, 5000
FACTORS = (
    "flow_imbalance_large",
    "flow_imbalance_small",
    "flow_imbalance_total",
    "flow_share_large",
    "large_net_share",
    "large_small_disagreement",
    "flow_toxicity",
    "top1_share",
    "top3_share",
    "top5_share",
)


@dataclass(frozen=True)
class Market:
    """One symbol of a lake, with the one row of `dim_symbol` that it must have."""

    lake: Path
    exchange: str
    symbol: str

    def __post_init__(self) -> None:
        dim = pl.read_parquet(self.lake / "dim_symbol.parquet")
        named = dim.filter(exchange=self.exchange, exchange_symbol=self.symbol)
        vars(self).update(named.row(0, named=True))

    def scan(self, table: str, day: date) -> pl.LazyFrame:
        """The symbol's rows of a day, in the lake's order."""
        folder = self.lake / table / f"exchange={self.exchange}" / f"date={day}"
        rows = pl.scan_parquet(folder / "*.parquet").filter(symbol_id=self.symbol_id)
        return rows.with_columns(ts=pl.col("ts_local_us").set_sorted())


def midnight(day: date) -> int:
    return (day - date(1970, 1, 1)).days * DAY


def days_between(start: date, end: date) -> list[date]:
    return [start + timedelta(days=n) for n in range((end - start).days + 1)]


# ---- the book ---------------------------------------------------------------------------------------


def book_rows(market: Market, day: date, carry: pl.DataFrame | None) -> pl.DataFrame:
    """Valid book rows of a day after the last one before it, with the times of the last changes."""
    best = {"bid": "bids_px", "ask": "asks_px", "bid_sz": "bids_sz", "ask_sz": "asks_sz"}
    depth = {"bid_depth": "bids_sz", "ask_depth": "asks_sz"}
    rows = (
        market.scan("book_snapshot_25", day)
        .select(
            "ts",
            **{name: pl.col(lists).list.first() for name, lists in best.items()},
            **{name: pl.col(lists).list.head(DEPTH).list.sum() for name, lists in depth.items()},
        )
        .filter((pl.min_horizontal(*best) > 0) & (pl.col("bid") < pl.col("ask")))
        .filter(*(pl.col(name).is_not_null() for name in best))
        .with_columns(**{f"{name}_change": pl.lit(None, pl.Int64) for name in ("mid", "bid", "ask")})
        .with_columns(mid2=pl.col("bid") + pl.col("ask"))
        .collect()
    )
    if carry is not None:
        rows = pl.concat([carry.select(rows.columns), rows])
    price = {"mid_change": "mid2", "bid_change": "bid", "ask_change": "ask"}
    return rows.with_columns(
        pl.col("ts").set_sorted(),
        **{
            name: pl.when(pl.col(value) != pl.col(value).shift()).then("ts").otherwise(name).forward_fill()
            for name, value in price.items()
        },
    )


def books(market: Market, days: list[date]) -> Iterator[tuple[date, pl.DataFrame]]:
    """Every day with its book."""
    carry = None
    for day in days:
        book = book_rows(market, day, carry)
        yield day, book
        carry = book.tail(1)


def asof(left: pl.LazyFrame, book: pl.DataFrame) -> pl.LazyFrame:
    """Each row with the last book row strictly before it that is not stale."""
    return left.join_asof(
        book.lazy(), on="ts", strategy="backward", allow_exact_matches=False, tolerance=STALENESS
    )


def states(day: date, book: pl.DataFrame) -> pl.DataFrame:
    """The book at the ends of a day's buckets, its last midnight included."""
    ends = pl.int_range(midnight(day) + BUCKET, midnight(day) + DAY + 1, BUCKET, eager=True)
    return asof(pl.LazyFrame({"ts": ends.set_sorted()}), book).collect()


# ---- ClusterLOB -------------------------------------------------------------------------------------


def met_trades(market: Market, day: date, book: pl.DataFrame) -> pl.LazyFrame:
    """Trades of known side that met a book row, with their raw features."""
    trades = (
        market.scan("trades", day)
        .filter(pl.col("side") < 2)
        .select("ts", "price_int", "qty_int", sign=1 - 2 * pl.col("side").cast(pl.Int8))
    )
    buys = pl.col("sign") > 0
    unit, tick = market.amount_increment, round(market.tick_size / market.price_increment)
    bid_depth, ask_depth = ((pl.col(name) * unit).log1p() for name in ("bid_depth", "ask_depth"))
    raw = {
        "v_rel": pl.col("qty_int") / (pl.col("bid_sz") + pl.col("ask_sz")),
        "sbs": pl.when(buys).then(bid_depth).otherwise(ask_depth),
        "obs": pl.when(buys).then(ask_depth).otherwise(bid_depth),
        "spread": (pl.col("ask") - pl.col("bid")) / tick,
        "t_m": pl.col("ts") - pl.col("mid_change"),
        "t_age": pl.col("ts") - pl.when(buys).then("ask_change").otherwise("bid_change"),
    }
    columns = ("ts", "price_int", "qty_int", "sign")
    return asof(trades, book).filter(pl.col("bid").is_not_null()).select(*columns, **raw)


def scored(met: pl.LazyFrame) -> pl.LazyFrame:
    """Rolling z-scores (float32); a window without variation has 0, one with nulls or too few rows null."""
    x = pl.col(FEATURES).cast(pl.Float64)
    mean, std = x.rolling_mean(WINDOW).name.prefix("mean_"), x.rolling_std(WINDOW).name.prefix("std_")
    z = {}
    for name in FEATURES:
        spread = pl.col(f"std_{name}")
        score = (pl.col(name) - pl.col(f"mean_{name}")) / spread
        z[f"z_{name}"] = pl.when(spread > 0).then(score).otherwise(0 * spread).cast(pl.Float32)
    # In two steps: Polars would compute what `when` names twice.
    return met.with_columns(mean, std).select("ts", "price_int", "qty_int", "sign", **z)


def feature_days(market: Market, days: list[date]) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Of every day the trades with z-scores (float32), and the book at the ends of its buckets."""
    tail = None
    for day, book in books(market, days):
        met = met_trades(market, day, book).collect()
        together = met if tail is None else pl.concat([tail, met])
        kept = scored(together.lazy()).filter(pl.col("ts") >= midnight(day)).drop_nulls().collect()
        tail = together.tail(WINDOW - 1)
        yield kept, states(day, book)


def fit(z: np.ndarray, k: int, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Centres and labels of rows z (n, 6) float32."""
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(seed)
    sample = z[np.sort(rng.choice(len(z), min(len(z), SAMPLE_ROWS), replace=False))]
    first = KMeans(k, n_init=5, random_state=seed).fit(sample)
    model = KMeans(k, init=first.cluster_centers_, n_init=1, copy_x=False).fit(z)
    return model.cluster_centers_, model.labels_


def bucket_flow(market: Market, trades: pl.LazyFrame, days: list[date]) -> pl.DataFrame:
    """Order-flow imbalance of every bucket and cluster, -1 = all; 0 where nothing traded."""
    signed = pl.col("sign").cast(pl.Int64) * pl.col("qty_int")
    sums = (
        trades.group_by(bucket_ts=pl.col("ts") // BUCKET * BUCKET, cluster="cluster")
        .agg(
            n_trades=pl.len(),
            ofi_size=signed.sum(),
            ofi_count=pl.col("sign").cast(pl.Int64).sum(),
            ofi_notional=(signed * pl.col("price_int")).sum(),
        )
        .collect()
    )
    names = ("n_trades", "ofi_size", "ofi_count", "ofi_notional")
    every = sums.group_by("bucket_ts").agg(pl.lit(-1, sums["cluster"].dtype).alias("cluster"), pl.sum(*names))
    sums = pl.concat([every, sums.select(every.columns)])
    starts = pl.int_range(midnight(days[0]), midnight(days[-1]) + DAY, BUCKET, eager=True).alias("bucket_ts")
    grid = starts.to_frame().join(sums.select(pl.col("cluster").unique()), how="cross")
    qty = market.amount_increment
    return (
        grid.join(sums, on=["bucket_ts", "cluster"], how="left")
        .with_columns(pl.col(names).fill_null(0))
        .with_columns(
            ofi_size=pl.col("ofi_size") * qty,
            ofi_notional=pl.col("ofi_notional") * (qty * market.price_increment),
        )
        .sort("bucket_ts", "cluster")
    )


def bucket_returns(held: pl.DataFrame, horizons: tuple[int, ...] = (1, 3, 12)) -> pl.DataFrame:
    """Returns of the buckets that end at `held.ts`; horizons in buckets."""
    mid = pl.col("mid2").cast(pl.Float64).log()
    names = {f"r_{5 * n}m" if n < 12 else f"r_{n // 12}h": mid.shift(-n) - mid for n in horizons}
    last = mid.last().over((pl.col("ts") - 1) // DAY)
    return held.select(
        bucket_ts=pl.col("ts") - BUCKET,
        conr=mid - mid.shift(1),
        frnb=mid.shift(-1) - mid,
        freb=last - mid,
        **names,
    )


def correlations(table: pl.DataFrame, signals: list[str], targets: list[str], by: str) -> pl.DataFrame:
    """Pearson and Spearman correlation of signals with targets."""
    parts = []
    for signal in signals:
        for target in targets:
            pair = table.drop_nulls([signal, target])
            one = pair.group_by(by).agg(
                n=pl.len(),
                ic=pl.corr(signal, target),
                rank_ic=pl.corr(signal, target, method="spearman"),
            )
            parts.append(one.with_columns(signal=pl.lit(signal), target=pl.lit(target)))
    return pl.concat(parts).sort(by, "signal", "target")


def run_cluster(market: Market, days: list[date], k: int) -> dict[str, pl.DataFrame]:
    """Centroids, buckets with returns, and IC."""
    kept, z, held = [], [], []
    for trades, mids in feature_days(market, days):
        z.append(trades.select(Z_FEATURES).to_numpy(order="c"))
        kept.append(trades.drop(Z_FEATURES))
        held.append(mids)
    merged = np.concatenate(z)
    del z
    centres, labels = fit(merged, k)
    trades = pl.concat(kept).with_columns(cluster=pl.Series(labels, dtype=pl.Int8))
    buckets = bucket_flow(market, trades.lazy(), days).join(
        bucket_returns(pl.concat(held)), on="bucket_ts", how="left"
    )
    counts = trades.group_by("cluster").len("count").sort("cluster")
    columns = {name: centres[:, j] for j, name in enumerate(Z_FEATURES)}
    centroids = counts.with_columns(
        pl.col("count") / len(trades), **{n: pl.Series(v) for n, v in columns.items()}
    )
    targets = ["frnb", "r_15m", "r_1h", "freb"]
    ic = correlations(buckets, ["ofi_size", "ofi_count", "ofi_notional"], targets, "cluster")
    return {"centroids": centroids, "buckets": buckets, "ic": ic}


# ---- taker flow -------------------------------------------------------------------------------------


def thresholds(past: list[pl.Series]) -> tuple[float | None, float | None]:
    """Quantiles of the notionals of the days before."""
    if sum(map(len, past)) < MIN_TRADES:
        return None, None
    notional = pl.concat(past)
    large, small = (notional.quantile(q, interpolation="linear") for q in (LARGE, SMALL))
    return large, small


def day_bars(
    market: Market, day: date, cuts: tuple[float | None, float | None]
) -> tuple[pl.DataFrame, pl.Series]:
    """Bars of a day under given thresholds, every bar a row; and the day's notionals."""
    trades = (
        market.scan("trades", day)
        .select("ts", "price_int", "qty_int", "side", a=pl.col("price_int") * pl.col("qty_int"))
        .collect()
    )
    a, large, small = pl.col("a"), *(pl.lit(cut, pl.Float64) for cut in cuts)
    classes = {"": pl.lit(True), "_large": a >= large, "_small": a <= small}
    flows = {
        f"{side}_notional{name}": a.filter((pl.col("side") == code) & chosen).sum()
        for name, chosen in classes.items()
        for side, code in (("buy", 0), ("sell", 1))
    }
    price = pl.col("price_int")
    bars = (
        trades.lazy()
        .group_by(bar_ts=pl.col("ts") // BUCKET * BUCKET)
        .agg(
            open=price.first(),
            high=price.max(),
            low=price.min(),
            close=price.last(),
            vwap=a.sum() / pl.col("qty_int").sum(),
            trade_count=pl.len(),
            large_count=(a >= large).sum(),
            small_count=(a <= small).sum(),
            total_notional=a.sum(),
            top=a.top_k(5),
            **flows,
        )
    )
    starts = pl.int_range(midnight(day), midnight(day) + DAY, BUCKET, eager=True).alias("bar_ts")
    sums = [*flows, "trade_count", "large_count", "small_count", "total_notional"]
    table = (
        starts.to_frame()
        .lazy()
        .join(bars, on="bar_ts", how="left", maintain_order="left")
        .with_columns(pl.col(sums).fill_null(0), q_large=large, q_small=small)
        .collect()
    )
    unknown = [name for name in sums if "large" in name or "small" in name]
    if cuts[0] is None:
        table = table.with_columns(pl.lit(None, pl.Int64).alias(name) for name in unknown)
    return table, trades["a"]


def ratio(top: pl.Expr, bottom: pl.Expr) -> pl.Expr:
    """Null where the denominator is 0."""
    return pl.when(bottom != 0).then(top / bottom)


def with_factors(market: Market, bars: pl.DataFrame) -> pl.DataFrame:
    """Ratios of the integer sums, then everything in real units."""
    side = {
        name: (pl.col(f"buy_notional{name}"), pl.col(f"sell_notional{name}"))
        for name in ("", "_large", "_small")
    }
    net, gross = ({n: f(*s) for n, s in side.items()} for f in (lambda b, s: b - s, lambda b, s: b + s))
    total = pl.col("total_notional")
    top = pl.col("top").list.sort(descending=True)
    price = ["open", "high", "low", "close", "vwap"]
    notional = [name for name in bars.columns if "notional" in name] + ["q_large", "q_small"]
    return (
        bars.with_columns(
            flow_imbalance_large=ratio(net["_large"], gross["_large"]),
            flow_imbalance_small=ratio(net["_small"], gross["_small"]),
            flow_imbalance_total=ratio(net[""], gross[""]),
            flow_share_large=ratio(gross["_large"], total),
            large_net_share=ratio(net["_large"], total),
            large_small_disagreement=ratio(net["_large"] - net["_small"], total),
            flow_toxicity=ratio(net[""].abs(), total),
            **{f"top{n}_share": ratio(top.list.head(n).list.sum(), total) for n in (1, 3, 5)},
        )
        .with_columns(
            pl.col(price) * market.price_increment,
            pl.col(notional) * (market.price_increment * market.amount_increment),
        )
        .drop("top")
    )


def with_sums(bars: pl.DataFrame) -> pl.DataFrame:
    """Sums of the factors over 30 min, 1 h and 3 h, and their acceleration."""
    known = {name: "large_count" if "large" in name or "small" in name else "trade_count" for name in FACTORS}
    filled = {
        f: pl.when(pl.col(count).is_not_null()).then(pl.col(f).fill_null(0)) for f, count in known.items()
    }
    spans = {"30m": 6, "1h": 12, "3h": 36}
    bars = bars.with_columns(
        **{f"{f}_sum_{h}": x.rolling_sum(n) for f, x in filled.items() for h, n in spans.items()}
    )
    return bars.with_columns(
        **{f"{f}_acceleration": pl.col(f"{f}_sum_30m") - pl.col(f"{f}_sum_3h") / 6 for f in FACTORS}
    )


def with_market(market: Market, bars: pl.DataFrame, held: pl.DataFrame) -> pl.DataFrame:
    """Returns ahead and behind, volatility, spread and depth at the end of each bar."""
    mid = pl.col("mid2").cast(pl.Float64).log()
    squares = (mid - mid.shift(1)) ** 2
    spans = {"1h": 12, "3h": 36}
    known = held.select(
        bar_ts=pl.col("ts") - BUCKET,
        spread_bps=2e4 * (pl.col("ask") - pl.col("bid")) / pl.col("mid2"),
        depth1=(pl.col("bid_sz") + pl.col("ask_sz")) * market.amount_increment,
        depth5=(pl.col("bid_depth") + pl.col("ask_depth")) * market.amount_increment,
        **{f"ret_fwd_{h}": mid.shift(-n) - mid for h, n in spans.items()},
        **{f"ret_{h}": mid - mid.shift(n) for h, n in spans.items()},
        **{f"rv_{h}": squares.rolling_sum(n).sqrt() for h, n in spans.items()},
    )
    return bars.join(known, on="bar_ts", how="left", maintain_order="left")


def run_flow(market: Market, days: list[date]) -> dict[str, pl.DataFrame]:
    """Bars with factors, rolled sums, targets and book, and IC."""
    past: list[pl.Series] = []
    bars, held = [], []
    for day, book in books(market, days):
        table, notionals = day_bars(market, day, thresholds(past))
        bars.append(table)
        held.append(states(day, book))
        past = [*past, notionals][-THRESHOLD_DAYS:]
    features = with_sums(with_factors(market, pl.concat(bars, how="vertical_relaxed")))
    features = with_market(market, features, pl.concat(held)).with_columns(symbol=pl.lit(market.symbol))
    signals = ["flow_imbalance_large", "flow_imbalance_small", "flow_imbalance_total"]
    return {
        "features": features,
        "ic": correlations(features, signals, ["ret_fwd_1h", "ret_fwd_3h"], "symbol"),
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("experiment", choices=["cluster", "flow"])
    parser.add_argument("--lake", type=Path, required=True)
    parser.add_argument("--exchange", default="synthetic")
    parser.add_argument("--symbol", default="BTCUSDT")
    parser.add_argument("--start", type=date.fromisoformat, required=True)
    parser.add_argument("--end", type=date.fromisoformat, required=True)
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    market, days = Market(args.lake, args.exchange, args.symbol), days_between(args.start, args.end)
    flow = args.experiment == "flow"
    tables = run_flow(market, days) if flow else run_cluster(market, days, args.k)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.write_parquet(args.out / f"{name}.parquet")
    print(tables["ic"])


if __name__ == "__main__":
    main()
