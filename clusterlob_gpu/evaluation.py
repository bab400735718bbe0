"""Does a signal predict a target, and how sure may one be?

Tables in, tables out.  Every IC is a *time-series* IC within one symbol.  Time is a grid of equally spaced
buckets: a null, or a bucket that the panel does not hold, keeps its place.  In HAC sums such a place scores 0
(the amplitude-modulated estimator), in the bootstrap it travels with its block; so neither a lag nor a block
ever joins two buckets that are not that far apart in time.  Values that are not finite count as null.

With H the horizon in buckets and r the number of buckets summed into the signal, tests use
max(2H - 1, r + H - 1) Bartlett lags: forward returns overlap over H - 1 buckets, and a summed signal
persists.  Lags and blocks never exceed a quarter of the rows, since beyond that the estimate shrinks
towards 0; a sample in which even H does not fit under that bound is called thin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from clusterlob_gpu.beside import Each
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.plain_statistics import (
    average_ranks,
    circular_block,
    false_discovery,
    normal_quantile,
    two_sided,
)
from clusterlob_gpu.schema import ALL_CLUSTERS, US_PER_DAY

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

OFI_KINDS = ("ofi_size", "ofi_count", "ofi_notional")

MARKOUT_COLUMNS = (
    "cluster",
    "horizon_us",
    "n",
    "buckets",
    "mean_bps",
    "se_bps",
    "ci_low",
    "ci_high",
    "t",
)

MIXED = "mixed"
"""Verdict on a cluster beyond the named roles whose trades changed between windows."""
LEVEL = 0.05
MIN_ROWS = 30
"""Fewer rows than this, or than 4H, make a test thin."""
MIN_DAYS = 3
"""Fewer days than this give no statistics of daily ICs."""
Z_95 = normal_quantile(1 - LEVEL / 2)
Z_POWER = Z_95 + normal_quantile(0.8)
"""Standard errors that an effect must measure to be found with 80 % power by a two-sided 5 % test."""
SAME_TEST = ("experiment", "symbol", "cluster", "signal", "target", "n", "ic", "hac_p")
"""Columns by which one test of a sweep is known from another: equal in all, they are one measurement."""
_LONG_BLOCK = 8
"""Rows of a block from which on it is faster to add up the blocks of a draw than to multiply."""
_MOMENTS_AT_ONCE = 1 << 21
"""Moments of all buckets that are resampled at a time: memory does not grow with signals and years."""
_DRAWS_AT_ONCE = 64


@dataclass(frozen=True)
class Signal:
    """A column of the panel, known at the end of its bucket."""

    name: str
    column: str
    rollup_bars: int = 1
    """Buckets summed into one value; overlapping sums persist that long."""
    benchmark: str | None = None
    """Name of the signal of the same table that this one must beat."""


@dataclass(frozen=True)
class Target:
    """A column of the panel: the return over `horizon_us` from the end of the bucket."""

    name: str
    column: str
    horizon_us: int
    predictive: bool = True
    """False for a return that the signal's own bucket contains: described, never counted as a test."""


@dataclass(frozen=True)
class Pair:
    """Signal and target on the grid, each with mean 0 and variance 1 over the rows that have both."""

    x: Floats
    y: Floats
    used: NDArray[np.bool_]
    usable: bool

    @property
    def n(self) -> int:
        return int(self.used.sum())

    @property
    def ic(self) -> float:
        return float(self.x @ self.y) / self.n if self.usable else np.nan

    def scores(self) -> Floats:
        """x_t e_t of the regression of y on x: what the slope's error is a sum of."""
        return self.x * (self.y - self.ic * self.x)

    def ranked(self) -> Pair:
        """The same rows with average ranks for values."""
        x, y = np.zeros_like(self.x), np.zeros_like(self.y)
        x[self.used], y[self.used] = average_ranks(self.x[self.used]), average_ranks(self.y[self.used])
        return pair_of(np.where(self.used, x, np.nan), np.where(self.used, y, np.nan))


def pair_of(signal: Floats, target: Floats) -> Pair:
    """The rows that have both; not usable with fewer than 3 of them, or where one side is constant."""
    used = np.isfinite(signal) & np.isfinite(target)
    varies = [used.sum() >= 3 and np.ptp(values[used]) > 0 for values in (signal, target)]
    if not all(varies):
        return Pair(np.zeros(len(used)), np.zeros(len(used)), used, usable=False)
    return Pair(_standardised(signal, used), _standardised(target, used), used, usable=True)


def _standardised(values: Floats, used: NDArray[np.bool_]) -> Floats:
    centred = np.where(used, values - values[used].mean(), 0.0)
    centred /= np.abs(centred).max()  # squares of very small values would vanish
    return centred / np.sqrt(centred @ centred / used.sum())


def long_run_sum(scores: Floats, lags: int) -> float:
    """Bartlett (Newey-West) variance of the sum of a series with mean 0.

    g_0 + 2 sum_k (1 - k / (lags + 1)) g_k with g_k = sum_t s_t s_(t-k), k = 1..lags: never negative.
    A missing place enters as 0.
    """
    total = float(scores @ scores)
    for k in range(1, min(lags, len(scores) - 1) + 1):
        total += 2 * (1 - k / (lags + 1)) * float(scores[k:] @ scores[:-k])
    return max(total, 0.0)


def _hac_se(pair: Pair, lags: int) -> float:
    """Standard error of the IC as the slope of standardised y on standardised x, times n / (n - 2)."""
    if not pair.usable:
        return np.nan
    return float(np.sqrt(long_run_sum(pair.scores(), lags) / (pair.n * (pair.n - 2))))


def _iid_se(pair: Pair) -> float:
    """The textbook standard error of the same slope, of independent rows."""
    if not pair.usable:
        return np.nan
    residual = pair.y - pair.ic * pair.x
    return float(np.sqrt(residual @ residual / (pair.n * (pair.n - 2))))


def ratio(a: float, b: float) -> float:
    """a / b, with x / 0 = signed infinity and 0 / 0 null, without a warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(a, b))


def capped(value: int, rows: int) -> int:
    """At most a quarter of the rows."""
    return min(value, rows // 4)


def hac_lags(horizon: int, rollup: int, rows: int) -> int:
    """Bartlett lags of a test: max(2H - 1, r + H - 1), at most a quarter of the rows."""
    return capped(max(2 * horizon - 1, rollup + horizon - 1), rows)


def _grouped_ic(pair: Pair, group: Ints) -> Floats:
    """IC inside each group of rows; groups of fewer than 3 rows, or without variation, are left out."""
    g = np.unique(group[pair.used], return_inverse=True)[1]
    x, y = pair.x[pair.used], pair.y[pair.used]
    n = np.bincount(g)
    x, y = (v - (np.bincount(g, v) / n)[g] for v in (x, y))
    xx, yy, xy = (np.bincount(g, v) for v in (x * x, y * y, x * y))
    kept = (n >= 3) & (xx > 1e-20 * n) & (yy > 1e-20 * n)  # rounding leaves about 1e-32 of a constant
    return xy[kept] / np.sqrt(xx[kept] * yy[kept])


def _non_overlapping(pair: Pair, horizon: int) -> dict[str, float]:
    """IC over every H-th bucket, at all H offsets: mean, smallest, largest."""
    ics = _grouped_ic(pair, np.arange(len(pair.x)) % horizon) if pair.usable else np.empty(0)
    names = ("non_overlap_mean", "non_overlap_min", "non_overlap_max")
    if not len(ics):
        return dict.fromkeys(names, np.nan)
    return dict(zip(names, (float(ics.mean()), float(ics.min()), float(ics.max())), strict=True))


def _daily(pair: Pair, day: Ints) -> dict[str, float]:
    """ICs of UTC days: their mean, its t, and the share of days above 0."""
    ics = _grouped_ic(pair, day) if pair.usable else np.empty(0)
    if len(ics) < MIN_DAYS:
        return dict.fromkeys(("daily_ic_mean", "daily_ic_t", "daily_hit_rate"), np.nan)
    mean = float(ics.mean())
    return {
        "daily_ic_mean": mean,
        "daily_ic_t": ratio(mean, float(ics.std(ddof=1) / np.sqrt(len(ics)))),
        "daily_hit_rate": float((ics > 0).mean()),
    }


def block_length(pairs: Sequence[Pair], horizon: int) -> int:
    """One block for all signals of a target: their scores' longest optimal (circular) block, at least H."""
    rows = len(pairs[0].x)
    series = [pair.scores() for pair in pairs if pair.usable and pair.n >= MIN_ROWS]
    # a perfect fit leaves scores of rounding size, on which the rule has nothing to say
    optimal = [circular_block(s) for s in series if np.abs(s).max() > 1e-9]
    longest = max((int(np.ceil(b)) for b in optimal if np.isfinite(b)), default=1)
    return max(capped(max(horizon, longest), rows), 1)


def _block_sums(moments: Floats, length: int) -> Floats:
    """Sum of `length` rows from each start on, around the end of the sample."""
    wrapped = np.concatenate([np.zeros((1, moments.shape[1])), moments, moments[: length - 1]])
    running = np.cumsum(wrapped, axis=0)
    return running[length:] - running[:-length]


def block_resamples(moments: Floats, block: int, draws: int, seed: int) -> Floats:
    """(draws, M) sums over circular block resamples of (T, M) moments.

    A resample is T places: whole blocks, then one cut short.  Its sums are the sums of its blocks: of few
    blocks one after the other, of many as a product of how often each start came up in each draw.
    """
    rows = len(moments)
    whole, rest = divmod(rows, block)
    sums = _block_sums(moments, block)
    tail = _block_sums(moments, rest) if rest else None
    rng = np.random.default_rng(seed)
    drawn = _added if block >= _LONG_BLOCK else _counted
    out = np.empty((draws, moments.shape[1]))
    for first in range(0, draws, _DRAWS_AT_ONCE):
        now = min(_DRAWS_AT_ONCE, draws - first)
        starts = rng.integers(rows, size=(now, whole))
        out[first : first + now] = drawn(sums, starts)
        if tail is not None:
            out[first : first + now] += tail[rng.integers(rows, size=now)]
    return out


def _added(sums: Floats, starts: Ints) -> Floats:
    """(draws, M) sums of the rows of `sums` (T, M) that each draw (draws, n) names, one after the other."""
    out = np.zeros((len(starts), sums.shape[1]))
    for column in starts.T:
        out += sums[column]
    return out


def _counted(sums: Floats, starts: Ints) -> Floats:
    """The same as a matrix product with the number of times that a draw names each row."""
    draws, rows = len(starts), len(sums)
    places = starts + np.arange(draws)[:, None] * rows
    counts = np.bincount(places.ravel(), minlength=draws * rows).reshape(draws, rows)
    product: Floats = counts.astype(np.float64) @ sums
    return product


def bootstrap_ics(pairs: Sequence[Pair], block: int, draws: int, seed: int) -> Floats:
    """(draws, signals) ICs of circular block resamples, the same blocks for every signal.

    A correlation needs six sums: of 1, x, y, xx, yy and xy.
    """
    ics = np.empty((draws, len(pairs)))
    at_once = max(1, _MOMENTS_AT_ONCE // (6 * max(1, len(pairs[0].x))))
    for first in range(0, len(pairs), at_once):
        some = pairs[first : first + at_once]
        used = np.column_stack([pair.used for pair in some]).astype(np.float64)
        x = np.column_stack([pair.x for pair in some])
        y = np.column_stack([pair.y for pair in some])
        total = block_resamples(np.hstack([used, x, y, x * x, y * y, x * y]), block, draws, seed)
        ics[:, first : first + len(some)] = _correlation(total.reshape(draws, 6, len(some)))
    return ics


def _correlation(total: Floats) -> Floats:
    """(draws, signals) from (draws, 6, signals) sums of 1, x, y, xx, yy, xy; null without variation."""
    n, x, y, xx, yy, xy = np.moveaxis(total, 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        vx, vy, cov = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2, xy / n - (x / n) * (y / n)
        ic = np.clip(cov / np.sqrt(vx * vy), -1.0, 1.0)
    return np.where((n >= 3) & (vx > 1e-12) & (vy > 1e-12), ic, np.nan)


def percentile_interval(draws: Floats) -> tuple[float, float]:
    """Percentile 95 % interval, over the draws that have a value."""
    kept = draws[np.isfinite(draws)]
    if not len(kept):
        return np.nan, np.nan
    low, high = np.quantile(kept, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def _bootstrap_p(draws: Floats) -> float:
    """Two-sided: twice the smaller share of draws on one side of 0, one draw added so that it is never 0."""
    kept = draws[np.isfinite(draws)]
    if not len(kept):
        return np.nan
    tail = min(int((kept <= 0).sum()), int((kept >= 0).sum()))
    return min(2 * (tail + 1) / (len(kept) + 1), 1.0)


def on_grid(panel: pd.DataFrame, columns: Sequence[str], width_us: int) -> tuple[Floats, Ints]:
    """(T, columns) values and (T,) times with every bucket from the first to the last in its place.

    Raises InputError if a column is missing or buckets are unsorted, repeated or off the grid.
    """
    missing = [name for name in ("bucket_ts", *columns) if name not in panel.columns]
    if missing:
        known = ", ".join(map(str, panel.columns))
        raise InputError(f"panel: no column {missing[0]}; it has {known}: name one of these")
    ts = panel["bucket_ts"].to_numpy(np.int64)
    if not len(ts):
        return np.empty((0, len(columns))), ts
    places, off = np.divmod(ts - ts[0], width_us)
    if off.any() or (np.diff(places) <= 0).any():
        at = int(np.argmax(off != 0)) if off.any() else int(np.argmax(np.diff(places) <= 0)) + 1
        raise InputError(
            f"panel.bucket_ts, row {at} = {ts[at]}: buckets must be sorted, unique and multiples of "
            f"{width_us} us apart; pass one symbol, sorted by bucket_ts"
        )
    values = np.full((int(places[-1]) + 1, len(columns)), np.nan)
    values[places] = panel[list(columns)].to_numpy(np.float64, na_value=np.nan)
    return values, ts[0] + np.arange(len(values)) * width_us


def _check_names(signals: Sequence[Signal], targets: Sequence[Target], width_us: int) -> None:
    names = [signal.name for signal in signals]
    if len(set(names)) < len(names):
        raise InputError(f"signals: names must be unique, found {', '.join(names)}; rename one")
    for signal in signals:
        if signal.benchmark is not None and signal.benchmark not in names:
            raise InputError(
                f"signal {signal.name}: benchmark {signal.benchmark} is not a signal of the table, which has "
                f"{', '.join(names)}; add it"
            )
    for target in targets:
        if target.horizon_us <= 0 or width_us <= 0:
            raise InputError(f"target {target.name}: horizon_us and width_us must be positive")


def ic_table(
    panel: pd.DataFrame,
    signals: Sequence[Signal],
    targets: Sequence[Target],
    *,
    width_us: int,
    draws: int = 1000,
    seed: int = 7,
    each: Each = map,
) -> pd.DataFrame:
    """Information coefficients of one symbol, with what may be concluded from them.

    Parameters
    ----------
    panel : one row per bucket, sorted by `bucket_ts` (int64 us), with the columns of signals and targets
    width_us : length of a bucket
    draws, seed : of the block bootstrap; each target starts from the seed, so no target changes another
    each : goes through the targets

    Returns
    -------
    A row per target and signal, in the order given.  H = horizon in buckets, rounded up; r = `rollup_bars`.

    - n: rows with both values.  ic: Pearson.  rank_ic: Pearson of average ranks of those rows.
    - lags = max(2H - 1, r + H - 1), at most n // 4; hac_se, hac_t, hac_p: regression of the standardised
      target on the standardised signal, Bartlett kernel, factor n / (n - 2), normal p.  hac_t_min: t with
      H - 1 lags.  rank_hac_t, rank_hac_p: the same as hac_t, hac_p for ranks.
    - n_eff = n iid variance / HAC variance.  mde = 2.80 hac_se: the IC that a two-sided 5 % test finds with
      80 % power.
    - ci_low, ci_high: percentile 95 % interval of the circular block bootstrap; block = max(H, optimal
      length), at most a quarter of the places.
    - non_overlap_mean, _min, _max: IC of every H-th bucket over the H offsets.
    - daily_ic_mean, daily_ic_t, daily_hit_rate (share of UTC days above 0): null below 3 days.
    - benchmark; diff = ic - ic of the benchmark, diff_low, diff_high, diff_p from the same resamples; null
      for the benchmark itself.
    - predictive, thin, p_fdr, verdict: see `judge`.

    A constant or missing signal or target, or n < 3, gives null statistics and the verdict "thin".

    Raises
    ------
    InputError
        If a column or benchmark is missing, names repeat, or buckets are unsorted or off the grid.
    """
    _check_names(signals, targets, width_us)
    columns = list(dict.fromkeys([s.column for s in signals] + [t.column for t in targets]))
    values, ts = on_grid(panel, columns, width_us)
    grid = dict(zip(columns, values.T, strict=True))

    def rows(target: Target) -> list[dict[str, object]]:
        return _target_rows(grid, ts // US_PER_DAY, signals, target, width_us, draws, seed)

    return judge(pd.DataFrame(list(chain.from_iterable(each(rows, targets)))))


def _target_rows(
    grid: dict[str, Floats],
    day: Ints,
    signals: Sequence[Signal],
    target: Target,
    width_us: int,
    draws: int,
    seed: int,
) -> list[dict[str, object]]:
    horizon = -(-target.horizon_us // width_us)
    span = held(grid[target.column])
    day = day[span]
    pairs = [pair_of(grid[signal.column][span], grid[target.column][span]) for signal in signals]
    block = block_length(pairs, horizon)
    sampled = bootstrap_ics(pairs, block, draws, seed) if len(day) else np.full((draws, len(signals)), np.nan)
    at = {signal.name: i for i, signal in enumerate(signals)}
    rows = []
    for i, (signal, pair) in enumerate(zip(signals, pairs, strict=True)):
        other = None if signal.benchmark in (None, signal.name) else at[signal.benchmark]
        rows.append(
            {"signal": signal.name, "target": target.name, "horizon_us": target.horizon_us, "n": pair.n}
            | inference(pair, horizon, signal.rollup_bars)
            | dict(zip(("ci_low", "ci_high"), percentile_interval(sampled[:, i]), strict=True))
            | {"block": block}
            | _non_overlapping(pair, horizon)
            | _daily(pair, day)
            | paired_difference(pairs, sampled, i, other)
            | {"benchmark": signal.benchmark, "predictive": target.predictive}
            | {"thin": is_thin(pair, horizon)}
        )
    return rows


def is_thin(pair: Pair, horizon: int) -> bool:
    """Fewer than max(30, 4H) rows, or nothing that varies."""
    return not pair.usable or pair.n < max(MIN_ROWS, 4 * horizon)


def held(target: Floats) -> slice:
    """From the first to the last value: neither lags nor blocks are counted over the empty ends."""
    known = np.flatnonzero(np.isfinite(target))
    return slice(int(known[0]), int(known[-1]) + 1) if len(known) else slice(0, 0)


def inference(pair: Pair, horizon: int, rollup: int) -> dict[str, float]:
    """The columns ic to mde of `ic_table`."""
    lags = hac_lags(horizon, rollup, pair.n)
    ranks = pair.ranked()
    se, rank_se = _hac_se(pair, lags), _hac_se(ranks, lags)
    t, rank_t = ratio(pair.ic, se), ratio(ranks.ic, rank_se)
    return {
        "ic": pair.ic,
        "rank_ic": ranks.ic,
        "lags": lags,
        "hac_se": se,
        "hac_t": t,
        "hac_p": two_sided(t),
        "hac_t_min": ratio(pair.ic, _hac_se(pair, capped(horizon - 1, pair.n))),
        "rank_hac_t": rank_t,
        "rank_hac_p": two_sided(rank_t),
        "n_eff": pair.n * ratio(_iid_se(pair) ** 2, se**2),
        "mde": Z_POWER * se,
    }


def paired_difference(pairs: Sequence[Pair], sampled: Floats, i: int, other: int | None) -> dict[str, float]:
    """Difference to the benchmark on the same blocks; the benchmark itself has none."""
    if other is None:
        return dict.fromkeys(("diff", "diff_low", "diff_high", "diff_p"), np.nan)
    difference = sampled[:, i] - sampled[:, other]
    low, high = percentile_interval(difference)
    return {
        "diff": pairs[i].ic - pairs[other].ic,
        "diff_low": low,
        "diff_high": high,
        "diff_p": _bootstrap_p(difference),
    }


def judge(table: pd.DataFrame) -> pd.DataFrame:
    """Add `p_fdr` and `verdict`, over all tests of the table: call it again on tables put together.

    p_fdr: Benjamini-Hochberg of hac_p over the predictive rows that have one and are not thin, else null.
    (A thin row's HAC error comes out too small: its p would loosen the correction of all the others.)
    verdict: "thin" where n < max(30, 4H) or the IC is null; "positive" or "negative" where p_fdr < 0.05 (for
    targets that are not predictive: hac_p < 0.05) and the bootstrap interval excludes 0 on that side;
    "undecided" otherwise.  A row that has been called MIXED stays so.
    """
    if table.empty:
        return table
    thin = table["thin"].to_numpy(bool)
    tested = table["predictive"].to_numpy(bool) & table["hac_p"].notna().to_numpy() & ~thin
    p_fdr = np.full(len(table), np.nan)
    if tested.any():
        p_fdr[tested] = false_discovery(table["hac_p"].to_numpy(np.float64)[tested])
    p = np.where(table["predictive"], p_fdr, table["hac_p"])
    sure = (p < LEVEL) & ~thin
    verdict = np.select(
        [thin, sure & (table["ci_low"] > 0), sure & (table["ci_high"] < 0)],
        ["thin", "positive", "negative"],
        "undecided",
    )
    if "verdict" in table:
        verdict = np.where(table["verdict"].eq(MIXED), MIXED, verdict)
    return table.assign(p_fdr=p_fdr, verdict=verdict)


def cluster_ic(
    buckets: pd.DataFrame,
    targets: Sequence[Target],
    *,
    width_us: int,
    draws: int = 1000,
    seed: int = 7,
    each: Each = map,
) -> pd.DataFrame:
    """`ic_table` of every cluster's order flow imbalances, for all symbols of a run.

    Takes the long table of buckets: symbol, bucket_ts, cluster (-1 = all clusters, which must be there),
    ofi_size, ofi_count, ofi_notional and the targets' columns.  Gives `ic_table`'s columns with `symbol` and
    `cluster` in front and signal = the kind of imbalance.  Benchmark of each kind: the same kind over all
    clusters.  `p_fdr` corrects for all predictive tests of all symbols.
    """
    clusters = sorted(buckets["cluster"].unique().tolist())
    signals = [
        Signal(f"{kind}:{c}", f"{kind}:{c}", benchmark=f"{kind}:{ALL_CLUSTERS}")
        for kind in OFI_KINDS
        for c in clusters
    ]
    tables = []
    for symbol, mine in buckets.groupby("symbol", sort=True):
        panel = _wide(mine, clusters, targets)
        table = ic_table(panel, signals, targets, width_us=width_us, draws=draws, seed=seed, each=each)
        parts = table["signal"].str.rsplit(":", n=1, expand=True)
        table = table.assign(signal=parts[0], benchmark=parts[0])
        table.insert(0, "cluster", parts[1].astype("int64"))
        table.insert(0, "symbol", str(symbol))
        tables.append(table)
    return judge(pd.concat(tables, ignore_index=True)) if tables else pd.DataFrame()


def _wide(buckets: pd.DataFrame, clusters: Sequence[int], targets: Sequence[Target]) -> pd.DataFrame:
    """One row per bucket: `<kind>:<cluster>` of every cluster, and the targets, which all clusters share."""
    of_cluster = {c: buckets[buckets["cluster"] == c].set_index("bucket_ts") for c in clusters}
    flows = [of_cluster[c][list(OFI_KINDS)].add_suffix(f":{c}") for c in clusters]
    shared = of_cluster[ALL_CLUSTERS][[target.column for target in targets]]
    return pd.concat([*flows, shared], axis=1).sort_index().reset_index()


def markout_table(sums: pd.DataFrame, *, width_us: int) -> pd.DataFrame:
    """Mean signed move of the mid after a trade, with an error that knows that trades come in bursts.

    Parameters
    ----------
    sums : one symbol; a row per (bucket_ts, cluster, horizon_us) with n = trades that have a mark-out and
        sum_bps = sum over them of 1e4 s (mid(t + h) - mid(t)) / mid(t).  No row: no trades.
    width_us : length of a bucket

    Returns
    -------
    A row per (cluster, horizon_us), sorted: n, buckets (B, with trades), mean_bps = sum / n; se_bps of this
    ratio with buckets as sampling units: residuals u_b = sum_b - mean n_b, Bartlett variance of their sum
    over 2H + 1 lags (a bucket's moves reach over H + 1 buckets), at most a quarter of the buckets, times
    B / (B - 1), root, over n; ci_low, ci_high = mean -+ 1.96 se; t = mean / se.  Without trades the mean is
    null, with fewer than 3 buckets the error is.
    """
    table = []
    for (cluster, horizon_us), rows in sums.groupby(["cluster", "horizon_us"], sort=True):
        table.append({"cluster": cluster, "horizon_us": horizon_us} | _mean_row(rows, width_us))
    return pd.DataFrame(table, columns=list(MARKOUT_COLUMNS))


def _mean_row(rows: pd.DataFrame, width_us: int) -> dict[str, float]:
    horizon = -(-int(rows["horizon_us"].iloc[0]) // width_us)
    rows = rows.groupby("bucket_ts", sort=True)[["n", "sum_bps"]].sum()
    rows = rows[rows["n"] > 0]
    trades, buckets = int(rows["n"].sum()), len(rows)
    mean = ratio(float(rows["sum_bps"].sum()), float(trades))
    se = np.nan
    if buckets >= 3:
        places = (rows.index.to_numpy(np.int64) - int(rows.index[0])) // width_us
        residuals = np.zeros(int(places[-1]) + 1)
        residuals[places] = rows["sum_bps"].to_numpy() - mean * rows["n"].to_numpy()
        lags = capped(2 * horizon + 1, buckets)
        se = float(np.sqrt(long_run_sum(residuals, lags) * buckets / (buckets - 1))) / trades
    return {
        "n": trades,
        "buckets": buckets,
        "mean_bps": mean,
        "se_bps": se,
        "ci_low": mean - Z_95 * se,
        "ci_high": mean + Z_95 * se,
        "t": ratio(mean, se),
    }
