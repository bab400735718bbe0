"""Mids at given times, and the returns and mark-outs that look into the future.

This is the one place where the future is read.  mid(t) is the mid of the last valid book row with
time < t; it is null where that row is older than `max_staleness` or where the lake does not cover
the UTC day that holds the microsecond before t.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from clusterlob_gpu import kernels
from clusterlob_gpu.config import format_duration
from clusterlob_gpu.schema import US_PER_DAY

MARKOUTS_US = (1_000_000, 5_000_000, 30_000_000, 300_000_000)
"""Mark-out horizons: 1 s, 5 s, 30 s, 5 min."""


def day_before(t: np.ndarray | int) -> np.ndarray | int:
    """Number of the UTC day that decides mid(t): the day of the microsecond before t."""
    return (t - 1) // US_PER_DAY


def bucket_times(buckets: np.ndarray, width: int, horizons: Sequence[int]) -> np.ndarray:
    """Every time (us) at which the returns of the buckets that start at `buckets` need a mid, sorted."""
    offsets = [0, width, 2 * width, *(width + h for h in horizons)]
    midnight = (buckets // US_PER_DAY + 1) * US_PER_DAY
    return np.unique(np.concatenate([*(buckets + offset for offset in offsets), midnight]))


def mids_at(times: np.ndarray, book_ts: np.ndarray, mid2: np.ndarray, max_staleness: int) -> np.ndarray:
    """Twice the mid (integer price units, as float64) at sorted times of one covered day; NaN = null."""
    row = np.empty(len(times), np.int64)
    kernels.asof_before(book_ts, times, False, row)
    known = row >= 0
    known[known] &= times[known] - book_ts[row[known]] <= max_staleness
    out = np.full(len(times), np.nan)
    out[known] = mid2[row[known]]
    return out


def return_columns(buckets: np.ndarray, mids: pd.Series, width: int, horizons: Sequence[int]) -> pd.DataFrame:
    """Returns of the buckets that start at `buckets` (us), from twice the mids, indexed by time (us).

    conr = ln mid(b + w) / mid(b), frnb = ln mid(b + 2w) / mid(b + w),
    freb = ln mid(midnight) / mid(b + w) with the midnight that ends the bucket's own UTC day, and
    r_<h> = ln mid(b + w + h) / mid(b + w).  Null when either mid is null.
    """

    def mid(times: np.ndarray) -> np.ndarray:
        return mids.reindex(times).to_numpy()

    known = mid(buckets + width)
    midnight = (buckets // US_PER_DAY + 1) * US_PER_DAY
    columns = {
        "bucket_ts": buckets,
        "conr": _log_return(mid(buckets), known),
        "frnb": _log_return(known, mid(buckets + 2 * width)),
        "freb": _log_return(known, mid(midnight)),
    }
    for h in horizons:
        columns[f"r_{format_duration(h)}"] = _log_return(known, mid(buckets + width + h))
    return pd.DataFrame(columns)


def _log_return(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """ln(last / first) of integer-valued mids: their difference is exact before it is divided."""
    return np.log1p((last - first) / first)


def day_markouts(
    ts: np.ndarray,
    sign: np.ndarray,
    row: np.ndarray,
    label: np.ndarray,
    book_ts: np.ndarray,
    mid2: np.ndarray,
    *,
    covered_until: int,
    max_staleness: int,
    start: int,
    width: int,
    numbers: Sequence[int],
) -> pd.DataFrame:
    """Signed mid moves after a day's trades, 1e4 s (mid(t + h) - mid(t)) / mid(t), summed in bps.

    mid(t) is that of the book row the trade met.  A row per (bucket_ts, cluster, horizon_us) with n
    and sum_bps, for buckets that have any.  The book may reach past the day, up to `covered_until`,
    the last time at which a mid is known.
    """
    shape = (US_PER_DAY // width, len(numbers))
    tables = []
    for horizon in MARKOUTS_US:
        count, total = np.zeros(shape, np.int64), np.zeros(shape)
        kernels.markout_sums(
            ts,
            sign,
            row,
            label,
            book_ts,
            mid2,
            covered_until,
            max_staleness,
            horizon,
            start,
            width,
            count,
            total,
        )
        b, c = np.nonzero(count)
        tables.append(
            pd.DataFrame(
                {
                    "bucket_ts": start + width * b.astype(np.int64),
                    "cluster": np.array(numbers, np.int8)[c],
                    "horizon_us": np.int64(horizon),
                    "n": count[b, c],
                    "sum_bps": total[b, c],
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
