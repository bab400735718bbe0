"""Per-row arithmetic of taker flow, compiled by Numba: sizes in bins, sliding ranks, orders, bar sums.

As in `kernels`: one serial pass over columns that releases the GIL, integers wherever sums must be
exact.  A sum that may pass 2^63 is held in two halves, sum = high 2^32 + low.
"""

from __future__ import annotations

import numpy as np
from numba import njit

SUB_BITS = 10
"""Bits that one level of bins resolves: 2^10 bins per power of two, then 2^10 per bin."""

SUB_BINS = 1 << SUB_BITS
N_BINS = 64 * SUB_BINS
_GROUP_BITS = 8
GROUP = 1 << _GROUP_BITS
"""Keys per group: a rank is looked for group by group, then key by key."""

LARGEST_NOTIONAL = 2**62


@njit(cache=True, nogil=True, inline="always")
def _exponent(a):
    """Position of the highest set bit of a positive integer below 2^63."""
    e = 0
    for step in (32, 16, 8, 4, 2, 1):
        if a >> (e + step):
            e += step
    return e


@njit(cache=True, nogil=True, inline="always")
def size_bin(a):
    """Bin of a size a >= 0, log-linear in integers: a itself below 2^10, else ten bits after the first.

    Never decreasing in a, at most N_BINS - 1.
    """
    if a < SUB_BINS:
        return a
    e = _exponent(a)
    return ((e - SUB_BITS + 1) << SUB_BITS) | ((a >> (e - SUB_BITS)) & (SUB_BINS - 1))


@njit(cache=True, nogil=True, inline="always")
def size_sub_bin(a):
    """Place of a size inside its bin: the next ten bits; 0 where the bin is a single integer."""
    if a < SUB_BINS:
        return 0
    e = _exponent(a)
    rest = e - SUB_BITS
    return (a >> max(rest - SUB_BITS, 0)) & ((1 << min(rest, SUB_BITS)) - 1)


@njit(cache=True, nogil=True)
def bin_sizes(size, bins, totals):
    """Bin of every size, uint16, and the number of sizes per bin (adds to totals, int64)."""
    for i in range(len(size)):
        b = size_bin(size[i])
        bins[i] = b
        totals[b] += 1


@njit(cache=True, nogil=True)
def sub_keys(size, bins, number, key):
    """Key of every size: number of its bin 2^10 + its place inside the bin."""
    for i in range(len(size)):
        key[i] = number[bins[i]] * SUB_BINS + size_sub_bin(size[i])


@njit(cache=True, nogil=True)
def keep_marked(key, size, number, edges, kept_key, kept_size, kept_edges):
    """Rows whose key is marked (number[key] >= 0), in order, and where the edges fall among them.

    `edges` are row numbers in rising order.  Returns how many rows were kept.
    """
    n, e = 0, 0
    for i in range(len(key)):
        while e < len(edges) and edges[e] <= i:
            kept_edges[e] = n
            e += 1
        if number[key[i]] >= 0:
            kept_key[n] = key[i]
            kept_size[n] = size[i]
            n += 1
    while e < len(edges):
        kept_edges[e] = n
        e += 1
    return n


@njit(cache=True, nogil=True)
def sliding_ranks(key, low, high, first, rank, count, at, rest):
    """Key that holds each wanted rank of a window that slides over `key`.

    Window i is key[low[i] : high[i]]; both edges rise.  `count` (n_keys,) is that of the rows
    key[low[0] : high[0]] and is changed.  Target t of window i is the row of rank rank[i, t] (from 0)
    among the window's rows with key >= first[i, t]; writes its key to `at` and its rank among the
    window's rows of that key to `rest`.  A rank below 0 is not looked for.
    """
    groups = np.zeros((len(count) >> _GROUP_BITS) + 1, np.int64)
    for k in range(len(count)):
        groups[k >> _GROUP_BITS] += count[k]
    lo, hi = low[0], high[0]
    for i in range(len(low)):
        for j in range(hi, high[i]):
            count[key[j]] += 1
            groups[key[j] >> _GROUP_BITS] += 1
        for j in range(lo, low[i]):
            count[key[j]] -= 1
            groups[key[j] >> _GROUP_BITS] -= 1
        lo, hi = low[i], high[i]
        for t in range(rank.shape[1]):
            left = rank[i, t]
            if left < 0:
                continue
            k = first[i, t]
            while left >= count[k]:
                left -= count[k]
                k += 1
                while k & (GROUP - 1) == 0 and left >= groups[k >> _GROUP_BITS]:
                    left -= groups[k >> _GROUP_BITS]
                    k += GROUP
            at[i, t] = k
            rest[i, t] = left


@njit(cache=True, nogil=True)
def merge_orders(ts, ts_exch, side, trade_id, notional, start, width, out_ts, out_side, out_notional):
    """Fills of each taker order as one row: time of the last fill, side, sum of the notionals.

    A fill goes on with the order of the fill before it if both have one exchange time, one known side
    and one bar [start + m width, start + (m + 1) width), and its id is the other's plus one.  Returns
    the number of orders, or -1 - i where fill i takes its order past LARGEST_NOTIONAL.
    """
    n, stop = 0, start + width
    for i in range(len(ts)):
        same_bar = ts[i] < stop
        while ts[i] >= stop:
            stop += width
        if (
            i > 0
            and same_bar
            and trade_id[i - 1] >= 0
            and trade_id[i] == trade_id[i - 1] + 1
            and ts_exch[i] == ts_exch[i - 1]
            and side[i] == side[i - 1]
            and side[i] <= 1
        ):
            if out_notional[n - 1] > LARGEST_NOTIONAL - notional[i]:
                return -1 - i
            out_notional[n - 1] += notional[i]
        else:
            n += 1
            out_notional[n - 1] = notional[i]
        out_ts[n - 1], out_side[n - 1] = ts[i], side[i]
    return n


@njit(cache=True, nogil=True, inline="always")
def _add(halves, value):
    halves[0] += value >> 32
    halves[1] += value & 0xFFFFFFFF


@njit(cache=True, nogil=True)
def bar_prices(ts, price, qty, start, width, prices, size):
    """First, highest, lowest and last price, and size, per bar of trades in order of time.

    Writes `prices` (n_bars, 4), which holds 0 where nothing traded, and adds to `size` (n_bars, 2) in
    halves.
    """
    b, stop = 0, start + width
    for i in range(len(ts)):
        while ts[i] >= stop:
            b += 1
            stop += width
        p = price[i]
        if prices[b, 0] == 0:
            prices[b, 0], prices[b, 1], prices[b, 2] = p, p, p
        prices[b, 1] = max(prices[b, 1], p)
        prices[b, 2] = min(prices[b, 2], p)
        prices[b, 3] = p
        _add(size[b], qty[i])


@njit(cache=True, nogil=True)
def bar_flow(ts, side, notional, start, width, count, sums, largest):
    """Count, notional by side, and largest notionals per bar of rows in order of time.

    Adds to `count` (n_bars,) and to `sums` (n_bars, 3, 2): buys, sells and unknown in halves.  Writes
    `largest` (n_bars, 5): the largest notionals, falling, 0 where there are fewer.
    """
    b, stop = 0, start + width
    for i in range(len(ts)):
        while ts[i] >= stop:
            b += 1
            stop += width
        a = notional[i]
        count[b] += 1
        _add(sums[b, min(side[i], 2)], a)
        if a > largest[b, 4]:
            j = 4
            while j > 0 and a > largest[b, j - 1]:
                largest[b, j] = largest[b, j - 1]
                j -= 1
            largest[b, j] = a


@njit(cache=True, nogil=True)
def class_flow(ts, side, notional, start, width, large_from, small_to, count, sums):
    """Large and small flow per bar: large if notional >= large_from[bar], small if <= small_to[bar].

    Adds to `count` (n_bars, 2): large and small rows of any side, and to `sums` (n_bars, 2, 3, 2):
    notional of large and small, by buys, sells and unknown, in halves.
    """
    b, stop = 0, start + width
    for i in range(len(ts)):
        while ts[i] >= stop:
            b += 1
            stop += width
        a, s = notional[i], min(side[i], 2)
        # Multiplying by 0 or 1 instead of branching: sizes and sides are as random as coins.
        large, small = np.int64(a >= large_from[b]), np.int64(a <= small_to[b])
        count[b, 0] += large
        count[b, 1] += small
        _add(sums[b, 0, s], a * large)
        _add(sums[b, 1, s], a * small)


@njit(cache=True, nogil=True)
def trailing_z(x, window, least, out):
    """z-score of every value against the `window` values before it, itself not among them, ddof = 1.

    NaN values are left out; fewer than `least` known ones, or a NaN itself, give NaN.  A constant past
    gives 0 where the value continues it and NaN where it does not.  Moments are taken in two passes
    about the first known value, so that a constant past has a variance of exactly zero.
    """
    for i in range(len(x)):
        out[i] = np.nan
        if np.isnan(x[i]):
            continue
        n, total, anchor = 0, 0.0, np.nan
        for j in range(max(0, i - window), i):
            if not np.isnan(x[j]):
                if n == 0:
                    anchor = x[j]
                n += 1
                total += x[j] - anchor
        if n < max(least, 2):
            continue
        mean, ss = total / n, 0.0
        for j in range(max(0, i - window), i):
            if not np.isnan(x[j]):
                d = x[j] - anchor - mean
                ss += d * d
        gap = x[i] - anchor - mean
        if ss > 0.0:
            out[i] = gap / np.sqrt(ss / (n - 1))
        elif gap == 0.0:
            out[i] = 0.0
