"""Per-row arithmetic, compiled by Numba: as-of, last change, rolling z-score, Lloyd, bucket sums.

Every kernel is one serial pass over columns that releases the GIL, so that a day is a task and its
result does not depend on how many threads or workers there are.  Integers stay integers as long as
sums must be exact; what is divided is float64.

`NO_TIME` marks a time that is not known, `NO_LEVEL` a price or size that is missing.
"""

from __future__ import annotations

import numpy as np
from numba import njit

NO_TIME = -(2**63)
NO_LEVEL = -(2**63)

KEPT, SIDE_UNKNOWN, NO_BOOK, STALE_BOOK = 0, 1, 2, 3
"""Codes of `meet_book`: why a trade has no context, in the order in which it is asked."""

EMPTY_SIDE, NON_POSITIVE, CROSSED = 1, 2, 3
"""Codes of `book_fault`: why a book row is not valid, in the order in which it is asked."""


@njit(cache=True, nogil=True)
def is_sorted(ts, file_id, line):
    """Whether rows are in the lake's order (ts, file_id, line)."""
    for i in range(1, len(ts)):
        if ts[i] < ts[i - 1]:
            return False
        if ts[i] == ts[i - 1]:
            if file_id[i] < file_id[i - 1]:
                return False
            if file_id[i] == file_id[i - 1] and line[i] < line[i - 1]:
                return False
    return True


@njit(cache=True, nogil=True)
def reduce_levels(offsets, values, depth, best, total):
    """First entry and sum of the first `depth` entries of every list.

    `values` holds the lists end to end, `NO_LEVEL` where an entry is null; list i is
    values[offsets[i] : offsets[i + 1]].  Writes `best` (`NO_LEVEL` for an empty list) and `total`
    (missing and non-positive entries count 0), both int64 of length len(offsets) - 1.
    """
    for i in range(len(offsets) - 1):
        start, stop = offsets[i], offsets[i + 1]
        best[i] = values[start] if stop > start else NO_LEVEL
        acc = 0
        for j in range(start, min(stop, start + depth)):
            if values[j] > 0:
                acc += values[j]
        total[i] = acc


@njit(cache=True, nogil=True)
def book_fault(bid, ask, bid_sz, ask_sz, fault):
    """Why each book row is not valid (0 where it is): empty side, non-positive value, bid >= ask."""
    for i in range(len(bid)):
        if bid[i] == NO_LEVEL or ask[i] == NO_LEVEL or bid_sz[i] == NO_LEVEL or ask_sz[i] == NO_LEVEL:
            fault[i] = EMPTY_SIDE
        elif bid[i] <= 0 or ask[i] <= 0 or bid_sz[i] <= 0 or ask_sz[i] <= 0:
            fault[i] = NON_POSITIVE
        elif bid[i] >= ask[i]:
            fault[i] = CROSSED
        else:
            fault[i] = 0


@njit(cache=True, nogil=True)
def last_changes(ts, value, since, out):
    """Time of the last change of an integer column at every row.

    `out[i]` is the time of the last row j <= i with value[j] != value[j - 1]; before the first such
    row it is `since`.
    """
    last = since
    for i in range(len(ts)):
        if i > 0 and value[i] != value[i - 1]:
            last = ts[i]
        out[i] = last


@njit(cache=True, nogil=True)
def asof_before(book_ts, ts, inclusive, out):
    """Index of the last book row with time < ts (<= ts if `inclusive`), -1 where there is none.

    Both columns are sorted; two pointers, one pass.
    """
    j = -1
    n = len(book_ts)
    for i in range(len(ts)):
        limit = ts[i] if inclusive else ts[i] - 1
        while j + 1 < n and book_ts[j + 1] <= limit:
            j += 1
        out[i] = j


@njit(cache=True, nogil=True)
def meet_book(ts, side, book_ts, max_staleness, inclusive, book_row, fate):
    """Book row that each trade met, and whether the trade is kept.

    Writes `book_row` (index into `book_ts`, -1 where none) and `fate`: KEPT, SIDE_UNKNOWN (side is
    neither buy nor sell), NO_BOOK (no earlier row), STALE_BOOK (older than `max_staleness`).
    Returns the number of trades kept.
    """
    asof_before(book_ts, ts, inclusive, book_row)
    kept = 0
    for i in range(len(ts)):
        if side[i] > 1:
            fate[i] = SIDE_UNKNOWN
        elif book_row[i] < 0:
            fate[i] = NO_BOOK
        elif ts[i] - book_ts[book_row[i]] > max_staleness:
            fate[i] = STALE_BOOK
        else:
            fate[i] = KEPT
            kept += 1
    return kept


@njit(cache=True, nogil=True)
def raw_features(
    ts, sign, qty, row, touch_qty, log_bid, log_ask, spread, mid_change, bid_change, ask_change, own, out
):
    """The six raw features of every trade that met a book row, columns of `out` (6, n) float64.

    v_rel = qty / (bid_sz1 + ask_sz1); sbs, obs = ln(1 + depth) of the same and the opposite side (the
    taker's own side if `own`, else the side that the trade consumes); spread; t_m and t_age = time
    since the last change of the mid and of the best price consumed, NaN before the first change.
    """
    for i in range(len(ts)):
        r = row[i]
        buys = sign[i] > 0
        out[0, i] = qty[i] / touch_qty[r]
        bids_same = buys == own
        out[1, i] = log_bid[r] if bids_same else log_ask[r]
        out[2, i] = log_ask[r] if bids_same else log_bid[r]
        out[3, i] = spread[r]
        changed = mid_change[r]
        out[4, i] = np.nan if changed == NO_TIME else float(ts[i] - changed)
        changed = ask_change[r] if buys else bid_change[r]
        out[5, i] = np.nan if changed == NO_TIME else float(ts[i] - changed)


@njit(cache=True, nogil=True)
def rolling_z(x, window, out):
    """Rolling z-score of a float64 column, (x - mean) / std over the last `window` rows, ddof = 1.

    Rows are cut into blocks of `window`; a row's window is a suffix of the block before and a prefix
    of its own, whose Welford moments are merged by Chan's formula, so nothing is ever subtracted from
    a running sum.  Moments are taken about the first value of the row's own block, which lies in
    every window that uses it: a window of equal values has a variance of exactly zero and z = 0, and
    a level of 1e9 costs no digits.  A NaN in the window, or fewer than `window` rows, gives NaN.

    Chan, Golub, LeVeque (1983), The American Statistician 37, 242-247.
    """
    n = len(x)
    mean = np.empty(window)
    m2 = np.empty(window)
    for start in range(0, n, window):
        anchor = x[start]
        # Suffixes of the block before: entry m holds the moments of its last m rows.
        mu, ss = 0.0, 0.0
        mean[0], m2[0] = 0.0, 0.0
        if start > 0:
            for m in range(1, window):
                d = x[start - m] - anchor
                delta = d - mu
                mu += delta / m
                ss += delta * (d - mu)
                mean[m], m2[m] = mu, ss
        mu, ss = 0.0, 0.0
        for i in range(start, min(start + window, n)):
            m = i - start + 1
            d = x[i] - anchor
            delta = d - mu
            mu += delta / m
            ss += delta * (d - mu)
            if i < window - 1:
                out[i] = np.nan
                continue
            before = window - m
            gap = mu - mean[before]
            whole_mean = mean[before] + gap * (m / window) if before else mu
            whole_ss = m2[before] + ss + gap * gap * (before * m / window) if before else ss
            if whole_ss == 0.0:
                out[i] = 0.0
            else:
                out[i] = (d - whole_mean) / np.sqrt(whole_ss / (window - 1))


@njit(cache=True, nogil=True)
def nearest_centroid(z, centroids, label):
    """Nearest centroid of every row by squared Euclidean distance, the first at ties.

    z is (f, n) float32 with columns apart, centroids (k, f) float64; distances are float64.
    """
    f, n = z.shape
    k = centroids.shape[0]
    for i in range(n):
        best, nearest = np.inf, 0
        for c in range(k):
            dist = 0.0
            for j in range(f):
                gap = np.float64(z[j, i]) - centroids[c, j]
                dist += gap * gap
            if dist < best:
                best, nearest = dist, c
        label[i] = nearest


@njit(cache=True, nogil=True)
def lloyd_partial(z, low, high, centroids, sums, counts):
    """One pass of Lloyd's step over a day: sums and counts of every centroid's rows, and inertia.

    z is (f, n) float32, clipped to [low, high] per feature; adds to `sums` (k, f) float64 and
    `counts` (k,) int64 in row order and returns the sum of squared distances.
    """
    f, n = z.shape
    k = centroids.shape[0]
    x = np.empty(f)
    inertia = 0.0
    for i in range(n):
        for j in range(f):
            x[j] = min(max(np.float64(z[j, i]), low[j]), high[j])
        best, nearest = np.inf, 0
        for c in range(k):
            dist = 0.0
            for j in range(f):
                gap = x[j] - centroids[c, j]
                dist += gap * gap
            if dist < best:
                best, nearest = dist, c
        inertia += best
        counts[nearest] += 1
        for j in range(f):
            sums[nearest, j] += x[j]
    return inertia


@njit(cache=True, nogil=True)
def clip_columns(z, low, high, out):
    """Clip every column of z (f, n) to its bounds; NaN stays NaN."""
    f, n = z.shape
    for j in range(f):
        for i in range(n):
            out[j, i] = min(max(z[j, i], low[j]), high[j])


@njit(cache=True, nogil=True)
def _ordered_bits(bits):
    """Float32 bits as an unsigned integer that sorts like the float."""
    return ~bits & np.uint32(0xFFFFFFFF) if bits >> np.uint32(31) else bits | np.uint32(0x80000000)


@njit(cache=True, nogil=True)
def count_high_bits(bits, counts):
    """Histogram of the upper 16 of the ordered bits of a float32 column; adds to counts (65536,)."""
    for i in range(len(bits)):
        counts[_ordered_bits(bits[i]) >> np.uint32(16)] += 1


@njit(cache=True, nogil=True)
def count_low_bits(bits, high, counts):
    """Histogram of the lower 16 ordered bits of the values whose upper 16 are `high`."""
    for i in range(len(bits)):
        ordered = _ordered_bits(bits[i])
        if ordered >> np.uint32(16) == high:
            counts[ordered & np.uint32(0xFFFF)] += 1


@njit(cache=True, nogil=True)
def bucket_flow(ts, sign, price, qty, label, start, width, size, count, high, low):
    """Exact integer order-flow imbalance per bucket and cluster.

    Bucket of a trade = (ts - start) // width.  Adds to (n_buckets, k) int64 tables: `size` = sum of
    s qty, `count` = (trades, sum of s) in its last axis, and the notional s price qty in two halves,
    sum = high 2^32 + low, so that a sum beyond 2^63 stays exact.
    """
    for i in range(len(ts)):
        b, c, s = (ts[i] - start) // width, label[i], sign[i]
        size[b, c] += s * qty[i]
        count[b, c, 0] += 1
        count[b, c, 1] += s
        notional = s * price[i] * qty[i]
        high[b, c] += notional >> 32
        low[b, c] += notional & 0xFFFFFFFF


@njit(cache=True, nogil=True)
def cluster_sums(x, label, sums):
    """Sum of every column of x (f, n) over the rows of each label; adds to sums (k, f) float64."""
    f, n = x.shape
    for j in range(f):
        for i in range(n):
            sums[label[i], j] += x[j, i]


@njit(cache=True, nogil=True)
def markout_sums(
    ts, sign, row, label, book_ts, mid2, last_ts, max_staleness, horizon, start, width, count, total
):
    """Signed mid move after each trade, summed per bucket and cluster, in bps of the mid it met.

    move = 1e4 s (mid(ts + horizon) - mid(ts)) / mid(ts), mid(t) strictly before t, null (not summed)
    where ts + horizon > last_ts or the row is older than `max_staleness`.  `row` is the book row that
    the trade met.  Adds to (n_buckets, k) tables: `count` int64 and `total` float64.
    """
    j = -1
    n = len(book_ts)
    for i in range(len(ts)):
        at = ts[i] + horizon
        while j + 1 < n and book_ts[j + 1] < at:
            j += 1
        if j < 0 or at > last_ts or at - book_ts[j] > max_staleness:
            continue
        met = mid2[row[i]]
        b, c = (ts[i] - start) // width, label[i]
        count[b, c] += 1
        total[b, c] += 1e4 * sign[i] * (mid2[j] - met) / met
