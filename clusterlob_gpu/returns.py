"""Mids at given times, and the returns and mark-outs that look into the future.

This is the one place where the future is read.  mid(t) is the mid of the last valid book row with
time < t; it is null where that row is older than `max_staleness` or where the lake does not cover
the UTC day that holds the microsecond before t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import pandas as pd

from clusterlob_gpu.backend import CPU, Backend
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


def mids_at(times: np.ndarray, book_ts: Any, mid2: Any, max_staleness: int, on: Backend = CPU) -> np.ndarray:
    """Twice the mid (integer price units, as float64) at sorted times of one covered day; NaN = null."""
    asked, row = on.xp.asarray(times), on.xp.empty(len(times), np.int64)
    on.kernels.asof_before(book_ts, asked, False, row)
    known = row >= 0
    at = on.xp.where(known, row, 0)
    if len(book_ts) == 0:
        return np.full(len(times), np.nan)
    known &= asked - book_ts[at] <= max_staleness
    return on.to_host(on.xp.where(known, mid2[at].astype(np.float64), np.nan))


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


@dataclass(frozen=True)
class Markouts:
    """Signed mid moves after trades, 1e4 s (mid(t + h) - mid(t)) / mid(t), summed in bps per bucket.

    mid(t) is that of the book row the trade met.
    """

    count: np.ndarray
    """(n_buckets, k, h) int64 in the order of `MARKOUTS_US`."""
    total: np.ndarray
    """(n_buckets, k, h) float64, bps."""

    @classmethod
    def none(cls, width: int, k: int) -> Self:
        """Of no trades yet."""
        shape = (US_PER_DAY // width, k, len(MARKOUTS_US))
        return cls(np.zeros(shape, np.int64), np.zeros(shape))

    def add(
        self,
        met: MetLike,
        label: Any,
        book: Mids,
        *,
        max_staleness: int,
        start: int,
        width: int,
        on: Backend = CPU,
    ) -> None:
        """Add labelled trades of the day that begins at `start`, in order of time."""
        horizons = np.array(MARKOUTS_US, np.int64)
        on.kernels.markout_sums(
            met.ts,
            met.sign,
            met.row,
            label,
            book.ts,
            book.mid2,
            book.covered_until,
            max_staleness,
            horizons,
            start,
            width,
            self.count,
            self.total,
        )

    def table(self, *, start: int, width: int, numbers: Sequence[int]) -> pd.DataFrame:
        """A row per (horizon_us, bucket_ts, cluster) with n and sum_bps, for buckets that have any."""
        tables = []
        for h, horizon in enumerate(MARKOUTS_US):
            b, c = np.nonzero(self.count[..., h])
            columns = {
                "bucket_ts": start + width * b.astype(np.int64),
                "cluster": np.array(numbers, np.int8)[c],
                "horizon_us": np.int64(horizon),
                "n": self.count[b, c, h],
                "sum_bps": self.total[b, c, h],
            }
            tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class Mids:
    """A day's mids and those soon after it, by time; arrays of the backend."""

    ts: Any
    mid2: Any
    """Twice the mid, integer price units."""
    covered_until: int
    """Last time (us) at which a mid is known."""


class MetLike(Protocol):
    """Trades and the book rows that they met, as `features.MetTrades`."""

    @property
    def ts(self) -> Any: ...
    @property
    def sign(self) -> Any: ...
    @property
    def row(self) -> Any: ...
