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

_LAST_TIME = 2**63 - 1

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
def grown(share, mean, m2, x):
    """Mean and sum of squared deviations of 1 / share values, of which x is the last, from those before."""
    other = mean + (x - mean) * share
    return other, widened(m2, x, mean, other)


@jit
def widened(m2, x, mean, other):
    """Sum of squared deviations with a value more, which makes the mean another."""
    return m2 + (x - mean) * (x - other)


@jit
def merged(mean_a, m2_a, mean_b, m2_b, share, weight):
    """Mean and sum of squared deviations of two sets of values together; equal values keep 0 exactly.

    Of n_a and n_b values: share = n_b / (n_a + n_b), weight = n_a share.
    """
    gap = mean_b - mean_a
    return mean_a + gap * share, m2_a + m2_b + gap * gap * weight


@jit
def standardised(x, mean, variance):
    """(x - mean) / std, and 0 where the variance is."""
    if variance == 0.0:
        return 0.0
    return (x - mean) / math.sqrt(variance)


@jit
def clipped(x, low, high):
    """x within [low, high] as float64; NaN stays NaN."""
    x = np.float64(x)
    x = low if x < low else x
    return high if x > high else x


@jit
def point(x, i):
    """The six coordinates of column i of x (6, n)."""
    return x[0, i], x[1, i], x[2, i], x[3, i], x[4, i], x[5, i]


@jit
def squared_distance(x, y):
    """Squared Euclidean distance of two points of six coordinates."""
    d0, d1, d2, d3, d4, d5 = x[0] - y[0], x[1] - y[1], x[2] - y[2], x[3] - y[3], x[4] - y[4], x[5] - y[5]
    return d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3 + d4 * d4 + d5 * d5


@jit
def nearer(distance, c, best, label):
    """Distance and number of the nearer of two centroids, the second at ties."""
    return (distance, c) if distance < best else (best, label)


@jit
def ordered_bits(bits):
    """Float32 bits as an unsigned integer that sorts like the float."""
    return ~bits & np.uint32(0xFFFFFFFF) if bits >> np.uint32(31) else bits | np.uint32(0x80000000)


@jit
def is_nan_bits(bits):
    """Whether float32 bits are a NaN."""
    return bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)


@jit
def bps_per_unit(sign, met):
    """Signed bps of a mid that one unit is by which it moves."""
    return 1e4 * sign / met


# ---- passes on the CPU ------------------------------------------------------------------------------


@_pass
def is_sorted(ts, file_id, line):
    """Whether rows are in the lake's order (ts, file_id, line)."""
    for start in range(1, len(ts), _TILE):
        now, before = slice(start, start + _TILE), slice(start - 1, start - 1 + _TILE)
        if _falls(ts[now], file_id[now], line[now], ts[before], file_id[before], line[before]):
            return False
    return True


@_pass
def _falls(ts, file_id, line, ts_before, file_before, line_before):
    """Whether any row comes before the row before it; without a branch, since many times are the same."""
    found = 0
    for i in range(len(ts)):
        file_falls, same_file = int(file_id[i] < file_before[i]), int(file_id[i] == file_before[i])
        falls = file_falls | same_file & int(line[i] < line_before[i])
        found |= int(ts[i] < ts_before[i]) | int(ts[i] == ts_before[i]) & falls
    return found > 0


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
def take_kept(fate, ts, side, price, qty, row, kept_ts, kept_side, kept_price, kept_qty, kept_row):
    """Trades whose `fate` is KEPT, written to columns of their number."""
    at = 0
    for i in range(len(fate)):
        if fate[i] == KEPT:
            kept_ts[at], kept_side[at], kept_row[at] = ts[i], side[i], row[i]
            kept_price[at], kept_qty[at] = price[i], qty[i]
            at += 1


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
    of its own, whose moments are merged by Chan's formula, so nothing is ever subtracted from a sum.
    Moments are taken about the first value of the value's own block, which lies in every window that uses
    it: a window of equal values has a variance of exactly zero and z = 0, and a level of 1e9 costs no
    digits.  They grow value by value as Welford's do, the means by plain sums, which are sooner there.
    A NaN in the window, or fewer than `window` values, gives NaN.
    Writes out (f, n - skip): the scores without the first `skip`.

    Chan, Golub, LeVeque (1983), The American Statistician 37, 242-247.
    """
    f, n = x.shape
    size = np.arange(1, window + 1)
    part = size / window
    weight, share = (window - size) * part, 1.0 / size
    d, own, late = np.zeros(window), np.zeros((2, window)), np.zeros((2, window + 1))
    for start in range(skip // window * window, n, window):
        stop, first = min(start + window, n), max(0, skip - start)
        for j in range(f):
            _grow_own(x[j, start:stop], share, d, own)
            _grow_late(x[j, max(0, start - window) : start], x[j, start], share, late)
            _score(first, d, late, own, part, weight, out[j, start + first - skip : stop - skip])
    out[:, : max(0, window - 1 - skip)] = np.nan


@_pass
def _grow_own(block, share, d, own):
    """A block's values less its first, and mean and m2 of d[: i + 1] in own[:, i]."""
    total, mean, m2 = 0.0, 0.0, 0.0
    for i in range(len(block)):
        d[i] = block[i] - block[0]
        total += d[i]
        other = total * share[i]
        mean, m2 = other, widened(m2, d[i], mean, other)
        own[0, i], own[1, i] = mean, m2


@_pass
def _grow_late(block, first, share, late):
    """Mean and m2 of block[i:], less `first`, in late[:, i]; the first block of all has none before it."""
    total, mean, m2 = 0.0, 0.0, 0.0
    for i in range(len(block)):
        at = len(block) - 1 - i
        e = block[at] - first
        total += e
        other = total * share[i]
        mean, m2 = other, widened(m2, e, mean, other)
        late[0, at], late[1, at] = mean, m2


@_pass
def _score(first, d, late, own, part, weight, z):
    """z-scores of the values d[first:]."""
    last = 1.0 / (len(d) - 1)
    mean_a, m2_a, mean_b, m2_b = late[0, first + 1 :], late[1, first + 1 :], own[0, first:], own[1, first:]
    d, part, weight = d[first:], part[first:], weight[first:]
    for i in range(len(z)):
        mean, m2 = merged(mean_a[i], m2_a[i], mean_b[i], m2_b[i], part[i], weight[i])
        z[i] = standardised(d[i], mean, m2 * last)


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
def _rows(x, start, stop):
    """The six coordinates of rows start to stop of x (6, n), each by itself."""
    return (
        x[0][start:stop],
        x[1][start:stop],
        x[2][start:stop],
        x[3][start:stop],
        x[4][start:stop],
        x[5][start:stop],
    )


@_pass
def _clip_tile(rows, low, high, x):
    """Clipped rows in the first columns of x (6, tile), as `_rows`."""
    n = len(rows[0])
    for j in range(len(rows)):
        column, bottom, top = rows[j], low[j], high[j]
        for i in range(n):
            x[j, i] = clipped(column[i], bottom, top)
    return _rows(x, 0, n)


@_pass
def _nearest(rows, centroids, best, label):
    """Nearest centroid (k, 6) of every row, the first at ties, and the squared distance."""
    a, b, c, d, e, f = rows
    n, k = len(a), len(centroids)
    best[:n], label[:n] = np.inf, NO_CLUSTER
    # Three at a time are held in registers.
    for at in range(0, k - 2, 3):
        first, second, third = (
            point(centroids.T, at),
            point(centroids.T, at + 1),
            point(centroids.T, at + 2),
        )
        for i in range(n):
            row = float(a[i]), float(b[i]), float(c[i]), float(d[i]), float(e[i]), float(f[i])
            distance, found = nearer(squared_distance(row, first), at, best[i], label[i])
            distance, found = nearer(squared_distance(row, second), at + 1, distance, found)
            best[i], label[i] = nearer(squared_distance(row, third), at + 2, distance, found)
    for at in range(k // 3 * 3, k):
        only = point(centroids.T, at)
        for i in range(n):
            row = float(a[i]), float(b[i]), float(c[i]), float(d[i]), float(e[i]), float(f[i])
            best[i], label[i] = nearer(squared_distance(row, only), at, best[i], label[i])


@_pass
def _add_rows(rows, best, label, sums, counts, inertia):
    """Add rows to the sums and counts of their centroids, in their order; gives the inertia with theirs."""
    a, b, c, d, e, f = rows
    for i in range(len(a)):
        to = label[i]
        if to != NO_CLUSTER:
            inertia += best[i]
            counts[to] += 1
            sums[to, 0] += a[i]
            sums[to, 1] += b[i]
            sums[to, 2] += c[i]
            sums[to, 3] += d[i]
            sums[to, 4] += e[i]
            sums[to, 5] += f[i]
    return inertia


@_pass
def _clips(low, high):
    """Whether any bound is finite; where none is, rows are taken where they lie."""
    return np.isfinite(low).any() or np.isfinite(high).any()


@_pass
def nearest_centroid(z, low, high, centroids, label):
    """Nearest centroid of every row by squared Euclidean distance, the first at ties.

    z is (6, n) float32 with columns apart, clipped to [low, high] per feature, centroids (k, 6) float64;
    distances are float64.  A row with a NaN gets NO_CLUSTER.
    """
    x, best, at, clips = np.empty((6, _TILE)), np.empty(_TILE), np.empty(_TILE, np.int64), _clips(low, high)
    for start in range(0, z.shape[1], _TILE):
        stop = min(start + _TILE, z.shape[1])
        rows = _rows(z, start, stop)
        if clips:
            _nearest(_clip_tile(rows, low, high, x), centroids, best, at)
        else:
            _nearest(rows, centroids, best, at)
        label[start:stop] = at[: stop - start]


@_pass
def lloyd_partial(z, low, high, centroids, sums, counts):
    """One pass of Lloyd's step over a day: sums and counts of every centroid's rows, and inertia.

    z is (6, n) float32, clipped to [low, high] per feature; adds to `sums` (k, 6) float64 and
    `counts` (k,) int64 in row order and returns the sum of squared distances.  Rows with a NaN count nowhere.
    """
    x, best, at, clips = np.empty((6, _TILE)), np.empty(_TILE), np.empty(_TILE, np.int64), _clips(low, high)
    inertia = 0.0
    for start in range(0, z.shape[1], _TILE):
        rows = _rows(z, start, min(start + _TILE, z.shape[1]))
        if clips:
            tile = _clip_tile(rows, low, high, x)
            _nearest(tile, centroids, best, at)
            inertia = _add_rows(tile, best, at, sums, counts, inertia)
        else:
            _nearest(rows, centroids, best, at)
            inertia = _add_rows(rows, best, at, sums, counts, inertia)
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
    """Histogram of the upper 16 ordered bits of a float32 column without NaN; adds to counts (65536,)."""
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
    b, stop = -1, start
    for i in range(len(ts)):
        if b < 0 or ts[i] >= stop:
            b = (ts[i] - start) // width
            stop = start + (b + 1) * width
            sizes, counts, highs, lows = size[b], count[b], high[b], low[b]
        c, s = label[i], np.int64(sign[i])
        if c == NO_CLUSTER:
            continue
        sizes[c] += s * qty[i]
        counts[c, 0] += 1
        counts[c, 1] += s
        notional = s * price[i] * qty[i]
        highs[c] += notional >> 32
        lows[c] += notional & 0xFFFFFFFF


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
    n, n_horizons = len(book_ts), len(horizons)
    if len(ts) == 0 or n == 0:
        return
    # Of every horizon, the last book row before it, its mid, until when it is that row, until when fresh.
    then, mid = np.full(n_horizons, -1), np.zeros(n_horizons, np.int64)
    same, known = np.full(n_horizons, NO_TIME), np.full(n_horizons, NO_TIME)
    counts, totals, stop = count[0], total[0], start + width
    for i in range(len(ts)):
        if ts[i] >= stop:
            b = (ts[i] - start) // width
            counts, totals, stop = count[b], total[b], start + (b + 1) * width
        c = label[i]
        if c == NO_CLUSTER:
            continue
        met = mid2[row[i]]
        bps = bps_per_unit(sign[i], met)
        for h in range(n_horizons):
            if ts[i] > same[h]:
                j = _row_before(book_ts, ts[i] + horizons[h], then[h])
                then[h], same[h] = j, _LAST_TIME if j + 1 == n else book_ts[j + 1] - horizons[h]
                if j >= 0:
                    mid[h] = mid2[j]
                    known[h] = min(last_ts, book_ts[j] + max_staleness) - horizons[h]
            if ts[i] <= known[h]:
                counts[c, h] += 1
                totals[c, h] += bps * (mid[h] - met)


@_pass
def _row_before(book_ts, at, row):
    """The last book row before a time, -1 if there is none, given that of an earlier time, or -1."""
    n = len(book_ts)
    if row < 0:
        return last_upto(book_ts, at - 1, 0, n)
    while row + 1 < n and book_ts[row + 1] < at:
        row += 1
    return row
