"""Per-row arithmetic of ClusterLOB, and the passes that apply it on the CPU.

The scalar functions are the one definition for both machines: `jit` compiles them, for the CPU when the
module is imported, for the GPU when `backend` loads the file a second time with `jit` set beforehand.
Here each pass is serial and releases the GIL, so that a day is a task and its result does not depend on
how many threads or workers there are; `device_kernels` has the same passes for the GPU.  Integers stay
integers as long as sums must be exact; what is divided is float64.

A day may come in pieces: passes that sum add to what they are given, in order of the rows.

`NO_TIME` marks a time that is not known, `NO_LEVEL` a price or size that is missing, `NO_CLUSTER` a trade
whose z-scores are null.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

NO_TIME = -(2**63)
NO_LEVEL = -(2**63)
NO_CLUSTER = -1

KEPT, SIDE_UNKNOWN, NO_BOOK, STALE_BOOK = 0, 1, 2, 3
"""Codes of `fate_of`: why a trade has no context, in the order in which it is asked."""

EMPTY_SIDE, NON_POSITIVE, CROSSED = 1, 2, 3
"""Codes of `fault_of`: why a book row is not valid, in the order in which it is asked."""

_GROUP = 3
"""Centroids whose coordinates are held in registers at a time."""
_TILE = 512
"""Rows of a pass that are held in the nearest cache."""

jit = globals().get("jit") or njit(cache=True, nogil=True, error_model="numpy")
_pass = njit(cache=True, nogil=True, error_model="numpy")


# ---- one row ----------------------------------------------------------------------------------------


@jit
def last_upto(times, limit, low, high):
    """Index of the last of the sorted times[low:high] that is <= limit, low - 1 where there is none."""
    while low < high:
        middle = (low + high) >> 1
        if times[middle] <= limit:
            low = middle + 1
        else:
            high = middle
    return low - 1


@jit
def levels_of(values, start, stop, depth):
    """First entry of values[start:stop], `NO_LEVEL` if it is empty, and the sum of its first `depth`.

    Missing and non-positive entries count 0.
    """
    best = values[start] if stop > start else NO_LEVEL
    total = 0
    for j in range(start, min(stop, start + depth)):
        if values[j] > 0:
            total += values[j]
    return best, total


@jit
def fault_of(bid, ask, bid_sz, ask_sz):
    """Why a book row is not valid, 0 where it is: empty side, non-positive value, bid >= ask."""
    if bid == NO_LEVEL or ask == NO_LEVEL or bid_sz == NO_LEVEL or ask_sz == NO_LEVEL:
        return EMPTY_SIDE
    if bid <= 0 or ask <= 0 or bid_sz <= 0 or ask_sz <= 0:
        return NON_POSITIVE
    if bid >= ask:
        return CROSSED
    return 0


@jit
def fate_of(ts, side, book_ts, row, max_staleness):
    """Whether a trade is kept that met a book row (-1: none), and why not: see KEPT and its like."""
    if side > 1:
        return SIDE_UNKNOWN
    if row < 0:
        return NO_BOOK
    if ts - book_ts[row] > max_staleness:
        return STALE_BOOK
    return KEPT


@jit
def elapsed(ts, since):
    """us since a time, NaN where it is not known."""
    return math.nan if since == NO_TIME else float(ts - since)


@jit
def grown(n, mean, m2, x):
    """Mean and sum of squared deviations of n values, the last of which is x, from those of the rest."""
    delta = x - mean
    mean += delta / n
    return mean, m2 + delta * (x - mean)


@jit
def merged(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Mean and sum of squared deviations of two sets of values together; equal values keep 0 exactly."""
    n = n_a + n_b
    gap = mean_b - mean_a
    return mean_a + gap * (n_b / n), m2_a + m2_b + gap * gap * (n_a / n * n_b)


@jit
def standardised(x, n, mean, m2):
    """(x - mean) / std with ddof = 1, and 0 where all n values are equal."""
    if m2 == 0.0:
        return 0.0
    return (x - mean) / math.sqrt(m2 / (n - 1))


@jit
def clipped(x, low, high):
    """x within [low, high] as float64; NaN stays NaN."""
    x = np.float64(x)
    if x < low:
        return low
    if x > high:
        return high
    return x


@jit
def squared_distance(x0, x1, x2, x3, x4, x5, y0, y1, y2, y3, y4, y5):
    """Squared Euclidean distance of two points of six coordinates."""
    d0, d1, d2, d3, d4, d5 = x0 - y0, x1 - y1, x2 - y2, x3 - y3, x4 - y4, x5 - y5
    return d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3 + d4 * d4 + d5 * d5


@jit
def ordered_bits(bits):
    """Float32 bits as an unsigned integer that sorts like the float."""
    return ~bits & np.uint32(0xFFFFFFFF) if bits >> np.uint32(31) else bits | np.uint32(0x80000000)


@jit
def is_nan_bits(bits):
    """Whether float32 bits are a NaN."""
    return bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)


@jit
def move_bps(sign, met, then):
    """Signed move from one mid to another, in bps of the first."""
    return 1e4 * sign * (then - met) / met


# ---- passes on the CPU ------------------------------------------------------------------------------


@_pass
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


@_pass
def reduce_levels(offsets, values, depth, best, total):
    """`levels_of` every list: list i is values[offsets[i] : offsets[i + 1]], `NO_LEVEL` a null entry.

    Writes `best` and `total`, int64 of length len(offsets) - 1.
    """
    for i in range(len(offsets) - 1):
        best[i], total[i] = levels_of(values, offsets[i], offsets[i + 1], depth)


@_pass
def book_fault(bid, ask, bid_sz, ask_sz, fault):
    """`fault_of` every book row."""
    for i in range(len(bid)):
        fault[i] = fault_of(bid[i], ask[i], bid_sz[i], ask_sz[i])


@_pass
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


@_pass
def asof_before(book_ts, ts, inclusive, out):
    """Index of the last book row with time < ts (<= ts if `inclusive`), -1 where there is none.

    Both columns are sorted; two pointers, one pass.
    """
    n = len(book_ts)
    if len(ts) == 0:
        return
    j = last_upto(book_ts, ts[0] - 1, 0, n)
    for i in range(len(ts)):
        limit = ts[i] if inclusive else ts[i] - 1
        while j + 1 < n and book_ts[j + 1] <= limit:
            j += 1
        out[i] = j


@_pass
def meet_book(ts, side, book_ts, max_staleness, inclusive, row, fate):
    """Book row that each trade met (`row`, -1 where none), its `fate`, and how many trades are kept."""
    asof_before(book_ts, ts, inclusive, row)
    kept = 0
    for i in range(len(ts)):
        fate[i] = fate_of(ts[i], side[i], book_ts, row[i], max_staleness)
        kept += fate[i] == KEPT
    return kept


@_pass
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
        out[4, i] = elapsed(ts[i], mid_change[r])
        out[5, i] = elapsed(ts[i], ask_change[r] if buys else bid_change[r])


@_pass
def rolling_z(x, window, skip, out):
    """Rolling z-scores of the rows of x (f, n) float64, (x - mean) / std over `window` values, ddof = 1.

    Values are cut into blocks of `window`; a value's window is a suffix of the block before and a prefix
    of its own, whose Welford moments are merged by Chan's formula, so nothing is ever subtracted from
    a running sum.  Moments are taken about the first value of the value's own block, which lies in
    every window that uses it: a window of equal values has a variance of exactly zero and z = 0, and
    a level of 1e9 costs no digits.  A NaN in the window, or fewer than `window` values, gives NaN.
    Writes out (f, n - skip): the scores without the first `skip`.

    Chan, Golub, LeVeque (1983), The American Statistician 37, 242-247.
    """
    f, n = x.shape
    # Of every suffix of the block before, and of the prefix of this one, row by row: all columns at once.
    mean, m2 = np.zeros((window, f)), np.zeros((window, f))
    mu, ss = np.zeros(f), np.zeros(f)
    for start in range(0, n, window):
        mu[:], ss[:] = 0.0, 0.0
        if start > 0:
            for m in range(1, window):
                for j in range(f):
                    mu[j], ss[j] = grown(m, mu[j], ss[j], x[j, start - m] - x[j, start])
                    mean[m, j], m2[m, j] = mu[j], ss[j]
            mu[:], ss[:] = 0.0, 0.0
        for i in range(start, min(start + window, n)):
            m = i - start + 1
            before = window - m
            for j in range(f):
                d = x[j, i] - x[j, start]
                mu[j], ss[j] = grown(m, mu[j], ss[j], d)
                if i < skip:
                    continue
                if i < window - 1:
                    out[j, i - skip] = np.nan
                    continue
                whole_mean, whole_m2 = merged(before, mean[before, j], m2[before, j], m, mu[j], ss[j])
                out[j, i - skip] = standardised(d, window, whole_mean, whole_m2)


@_pass
def void_nulls(z):
    """Make every row of z (f, n) that has a NaN NaN throughout; gives the number of the other rows."""
    f, n = z.shape
    known = n
    for i in range(n):
        total = z[0, i]
        for j in range(1, f):
            total += z[j, i]
        if np.isnan(total):
            known -= 1
            for j in range(f):
                z[j, i] = np.nan
    return known


@_pass
def _padded(centroids):
    """Centroids with some at infinity, which are never the nearest, so that they go up in groups."""
    k, f = centroids.shape
    out = np.full((-(-k // _GROUP) * _GROUP, f), np.inf)
    out[:k] = centroids
    return out


@_pass
def _nearest(x, n, centroids, best, label):
    """Nearest centroid of the first n rows of x (6, tile), the first at ties, and the distance."""
    for i in range(n):
        best[i], label[i] = np.inf, NO_CLUSTER
    for c in range(0, len(centroids), _GROUP):
        a0, a1, a2, a3, a4, a5 = (
            centroids[c, 0],
            centroids[c, 1],
            centroids[c, 2],
            centroids[c, 3],
            centroids[c, 4],
            centroids[c, 5],
        )
        c1 = c + 1
        b0, b1, b2, b3, b4, b5 = (
            centroids[c1, 0],
            centroids[c1, 1],
            centroids[c1, 2],
            centroids[c1, 3],
            centroids[c1, 4],
            centroids[c1, 5],
        )
        c2 = c + 2
        e0, e1, e2, e3, e4, e5 = (
            centroids[c2, 0],
            centroids[c2, 1],
            centroids[c2, 2],
            centroids[c2, 3],
            centroids[c2, 4],
            centroids[c2, 5],
        )
        for i in range(n):
            x0, x1, x2, x3, x4, x5 = x[0, i], x[1, i], x[2, i], x[3, i], x[4, i], x[5, i]
            nearest, at = best[i], label[i]
            first = squared_distance(x0, x1, x2, x3, x4, x5, a0, a1, a2, a3, a4, a5)
            second = squared_distance(x0, x1, x2, x3, x4, x5, b0, b1, b2, b3, b4, b5)
            third = squared_distance(x0, x1, x2, x3, x4, x5, e0, e1, e2, e3, e4, e5)
            at = c if first < nearest else at
            nearest = first if first < nearest else nearest
            at = c1 if second < nearest else at
            nearest = second if second < nearest else nearest
            at = c2 if third < nearest else at
            nearest = third if third < nearest else nearest
            best[i], label[i] = nearest, at


@_pass
def _clip_tile(z, start, n, low, high, x):
    for j in range(len(x)):
        for i in range(n):
            x[j, i] = clipped(z[j, start + i], low[j], high[j])


@_pass
def nearest_centroid(z, low, high, centroids, label):
    """Nearest centroid of every row by squared Euclidean distance, the first at ties.

    z is (6, n) float32 with columns apart, clipped to [low, high] per feature, centroids (k, 6) float64;
    distances are float64.  A row with a NaN gets NO_CLUSTER.
    """
    padded, x, best, at = _padded(centroids), np.empty((6, _TILE)), np.empty(_TILE), np.empty(_TILE, np.int8)
    for start in range(0, z.shape[1], _TILE):
        n = min(_TILE, z.shape[1] - start)
        _clip_tile(z, start, n, low, high, x)
        _nearest(x, n, padded, best, at)
        for i in range(n):
            label[start + i] = at[i]


@_pass
def lloyd_partial(z, low, high, centroids, sums, counts):
    """One pass of Lloyd's step over a day: sums and counts of every centroid's rows, and inertia.

    z is (6, n) float32, clipped to [low, high] per feature; adds to `sums` (k, 6) float64 and
    `counts` (k,) int64 in row order and returns the sum of squared distances.  Rows with a NaN count nowhere.
    """
    padded, x, best, at = _padded(centroids), np.empty((6, _TILE)), np.empty(_TILE), np.empty(_TILE, np.int8)
    inertia = 0.0
    for start in range(0, z.shape[1], _TILE):
        n = min(_TILE, z.shape[1] - start)
        _clip_tile(z, start, n, low, high, x)
        _nearest(x, n, padded, best, at)
        for i in range(n):
            c = at[i]
            if c != NO_CLUSTER:
                inertia += best[i]
                counts[c] += 1
                for j in range(6):
                    sums[c, j] += x[j, i]
    return inertia


@_pass
def clip_columns(z, low, high, out):
    """Clip every column of z (f, n) to its bounds; NaN stays NaN."""
    f, n = z.shape
    for j in range(f):
        for i in range(n):
            out[j, i] = clipped(z[j, i], low[j], high[j])


@_pass
def count_high_bits(bits, counts):
    """Histogram of the upper 16 of the ordered bits of a float32 column, NaN left out; adds to counts (65536,)."""
    for i in range(len(bits)):
        if not is_nan_bits(bits[i]):
            counts[ordered_bits(bits[i]) >> np.uint32(16)] += 1


@_pass
def count_low_bits(bits, high, counts):
    """Histogram of the lower 16 ordered bits of the values whose upper 16 are `high`."""
    for i in range(len(bits)):
        ordered = ordered_bits(bits[i])
        if ordered >> np.uint32(16) == high and not is_nan_bits(bits[i]):
            counts[ordered & np.uint32(0xFFFF)] += 1


@_pass
def bucket_flow(ts, sign, price, qty, label, start, width, size, count, high, low):
    """Exact integer order-flow imbalance per bucket and cluster.

    Bucket of a trade = (ts - start) // width.  Adds to (n_buckets, k) int64 tables: `size` = sum of
    s qty, `count` = (trades, sum of s) in its last axis, and the notional s price qty in two halves,
    sum = high 2^32 + low, so that a sum beyond 2^63 stays exact.  Trades of NO_CLUSTER count nowhere.
    """
    b, stop = 0, start + width
    for i in range(len(ts)):
        if ts[i] >= stop:
            b = (ts[i] - start) // width
            stop = start + (b + 1) * width
        c, s = label[i], np.int64(sign[i])
        if c == NO_CLUSTER:
            continue
        size[b, c] += s * qty[i]
        count[b, c, 0] += 1
        count[b, c, 1] += s
        notional = s * price[i] * qty[i]
        high[b, c] += notional >> 32
        low[b, c] += notional & 0xFFFFFFFF


@_pass
def cluster_sums(x, label, sums):
    """Sum of every column of x (f, n) over each label's rows; adds to sums (k, f) float64 in row order."""
    f, n = x.shape
    for i in range(n):
        c = label[i]
        if c != NO_CLUSTER:
            for j in range(f):
                sums[c, j] += x[j, i]


@_pass
def markout_sums(
    ts, sign, row, label, book_ts, mid2, last_ts, max_staleness, horizons, start, width, count, total
):
    """Signed mid move after each trade, summed per bucket, cluster and horizon, in bps of the mid it met.

    move = 1e4 s (mid(ts + horizon) - mid(ts)) / mid(ts), mid(t) strictly before t, null (not summed)
    where ts + horizon > last_ts or the row is older than `max_staleness`.  `row` is the book row that
    the trade met, ts is sorted.  Adds to (n_buckets, k, h) tables: `count` int64 and `total` float64.
    """
    n = len(book_ts)
    if len(ts) == 0:
        return
    for h in range(len(horizons)):
        horizon = horizons[h]
        j = last_upto(book_ts, ts[0] + horizon - 1, 0, n)
        b, stop = 0, start + width
        for i in range(len(ts)):
            if ts[i] >= stop:
                b = (ts[i] - start) // width
                stop = start + (b + 1) * width
            at = ts[i] + horizon
            while j + 1 < n and book_ts[j + 1] < at:
                j += 1
            c = label[i]
            if c == NO_CLUSTER or j < 0 or at > last_ts or at - book_ts[j] > max_staleness:
                continue
            count[b, c, h] += 1
            total[b, c, h] += move_bps(sign[i], mid2[row[i]], mid2[j])
