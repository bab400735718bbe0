"""Per-row arithmetic of taker flow, and the passes that apply it on the CPU: sizes in bins, sliding ranks,
orders, bar sums.

As in `kernels`: scalar functions are the one definition for both machines, each pass is serial and
releases the GIL, and `device_flow_kernels` has the same passes for the GPU.  Integers wherever sums must
be exact.  A sum that may pass 2^63 is held in two halves, sum = high 2^32 + low.

Columns of trades are arrays of the machine; tables by bin, bar or window, and edges, are the host's.
"""

from __future__ import annotations

import numpy as np
from numba import njit

SUB_BITS = 10
"""Bits that one level of bins resolves: 2^10 bins per power of two, then 2^10 per bin."""

SUB_BINS = 1 << SUB_BITS
N_BINS = 64 * SUB_BINS
GROUP_BITS = 8
GROUP = 1 << GROUP_BITS
"""Keys per group: a rank is looked for group by group, then key by key."""

LARGEST_NOTIONAL = 2**62

N_LARGEST = 5
"""Largest notionals of a bar that are kept."""

jit = globals().get("jit") or njit(cache=True, nogil=True, error_model="numpy")
_pass = njit(cache=True, nogil=True, error_model="numpy")


# ---- one row ----------------------------------------------------------------------------------------


@jit
def highest_bit(a):
    """Position of the highest set bit of a positive integer below 2^63: the exponent of its float."""
    e = (np.float64(a).view(np.int64) >> 52) - 1023
    # A float may be rounded up to the next power of two.
    return e - ((a >> e) == 0)


@jit
def size_bin(a):
    """Bin of a size a >= 0, log-linear in integers: a itself below 2^10, else ten bits after the first.

    Never decreasing in a, at most N_BINS - 1.
    """
    rest = highest_bit(a | SUB_BINS) - SUB_BITS
    return (rest << SUB_BITS) + (a >> rest)


@jit
def size_sub_bin(a, b):
    """Place of a size inside its bin b: the next ten bits; 0 where the bin is a single integer."""
    rest = max((np.int64(b) >> SUB_BITS) - 1, 0)
    return (a >> max(rest - SUB_BITS, 0)) & ((1 << min(rest, SUB_BITS)) - 1)


@jit
def key_of_rank(count, groups, k, rank):
    """Key of the row of that rank (from 0) among the rows with keys >= k, and its rank within the key.

    `count` holds the rows per key, `groups` those per GROUP keys; the row must be there.
    """
    while rank >= count[k]:
        rank -= count[k]
        k += 1
        while k & (GROUP - 1) == 0 and rank >= groups[k >> GROUP_BITS]:
            rank -= groups[k >> GROUP_BITS]
            k += GROUP
    return k, rank


@jit
def follows(ts_exch, side, trade_id, i):
    """Whether fill i goes on with the order of the fill before it, if both lie in one bar.

    Both have one exchange time and one known side, and its id is the other's plus one.
    """
    return (
        trade_id[i - 1] >= 0
        and trade_id[i] == trade_id[i - 1] + 1
        and ts_exch[i] == ts_exch[i - 1]
        and side[i] == side[i - 1]
        and side[i] <= 1
    )


@jit
def passes(total, more):
    """Whether a notional that is added to an order's takes it past LARGEST_NOTIONAL."""
    return total > LARGEST_NOTIONAL - more


@jit
def extent(price, qty, start, stop, step):
    """Highest and lowest price, and size in halves, of every `step`-th of the rows [start, stop)."""
    highest, lowest, high, low = price[start], price[start], 0, 0
    for i in range(start, stop, step):
        highest, lowest = max(highest, price[i]), min(lowest, price[i])
        high += qty[i] >> 32
        low += qty[i] & 0xFFFFFFFF
    return highest, lowest, high, low


@jit
def class_sums(side, notional, start, stop, step, least, most):
    """Number and notional of every `step`-th of the rows [start, stop) with least <= notional <= most.

    Notional in halves (high, low) of buys, of sells, and of unknown side.
    """
    n, buy_high, buy_low, sell_high, sell_low, all_high, all_low = 0, 0, 0, 0, 0, 0, 0
    for i in range(start, stop, step):
        a, s = notional[i], side[i]
        # Choosing instead of branching: sizes and sides are as random as coins.
        inside = least <= a <= most
        high, low = (a >> 32 if inside else 0), (a & 0xFFFFFFFF if inside else 0)
        n += inside
        all_high += high
        all_low += low
        buy_high += high if s == 0 else 0
        buy_low += low if s == 0 else 0
        sell_high += high if s == 1 else 0
        sell_low += low if s == 1 else 0
    other_high, other_low = all_high - buy_high - sell_high, all_low - buy_low - sell_low
    return n, buy_high, buy_low, sell_high, sell_low, other_high, other_low


@jit
def insert(largest, a):
    """Put a value among the falling `largest` (m,), if it is above the last of them."""
    j = len(largest) - 1
    if a > largest[j]:
        while j > 0 and a > largest[j - 1]:
            largest[j] = largest[j - 1]
            j -= 1
        largest[j] = a


# ---- passes on the CPU ------------------------------------------------------------------------------


@_pass
def bin_sizes(size, bins, totals):
    """Bin of every size, uint16, and the number of sizes per bin (adds to totals, int64)."""
    for i in range(len(size)):
        bins[i] = size_bin(size[i])
    for i in range(len(size)):
        totals[bins[i]] += 1


@_pass
def count_keys(key, count):
    """Number of rows per key; adds to count (n_keys,) int64."""
    for i in range(len(key)):
        count[key[i]] += 1


@_pass
def sub_keys(size, bins, number, key):
    """Key of every size: number of its bin 2^10 + its place inside the bin."""
    for i in range(len(size)):
        key[i] = number[bins[i]] * SUB_BINS + size_sub_bin(size[i], bins[i])


@_pass
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


@_pass
def sliding_ranks(key, low, high, first, rank, count, at, rest):
    """Key that holds each wanted rank of a window that slides over `key`.

    Window i is key[low[i] : high[i]]; both edges rise.  `count` (n_keys,) is that of the rows
    key[low[0] : high[0]] and is changed.  Target t of window i is the row of rank rank[i, t] (from 0)
    among the window's rows with key >= first[i, t]; writes its key to `at` and its rank among the
    window's rows of that key to `rest`.  A rank below 0 is not looked for.
    """
    groups = np.zeros((len(count) >> GROUP_BITS) + 1, np.int64)
    for k in range(len(count)):
        groups[k >> GROUP_BITS] += count[k]
    lo, hi = low[0], high[0]
    for i in range(len(low)):
        for j in range(hi, high[i]):
            count[key[j]] += 1
            groups[key[j] >> GROUP_BITS] += 1
        for j in range(lo, low[i]):
            count[key[j]] -= 1
            groups[key[j] >> GROUP_BITS] -= 1
        lo, hi = low[i], high[i]
        for t in range(rank.shape[1]):
            if rank[i, t] >= 0:
                at[i, t], rest[i, t] = key_of_rank(count, groups, first[i, t], rank[i, t])


@_pass
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
        if i > 0 and same_bar and follows(ts_exch, side, trade_id, i):
            if passes(out_notional[n - 1], notional[i]):
                return -1 - i
            out_notional[n - 1] += notional[i]
        else:
            n += 1
            out_notional[n - 1] = notional[i]
        out_ts[n - 1], out_side[n - 1] = ts[i], side[i]
    return n


@_pass
def bar_prices(edges, price, qty, prices, size):
    """First, highest, lowest and last price, and size, per bar of trades in order of time.

    Bar b has the rows edges[b] to edges[b + 1] - 1, as in the passes below.  Writes `prices` (n_bars, 4)
    of the bars where anything traded, and adds to `size` (n_bars, 2) in halves.
    """
    for b in range(len(size)):
        first, stop = edges[b], edges[b + 1]
        if first == stop:
            continue
        highest, lowest, high, low = extent(price, qty, first, stop, 1)
        prices[b, 0], prices[b, 1], prices[b, 2], prices[b, 3] = (
            price[first],
            highest,
            lowest,
            price[stop - 1],
        )
        size[b, 0] += high
        size[b, 1] += low


@_pass
def bar_largest(edges, notional, largest):
    """Largest notionals per bar: `largest` (n_bars, N_LARGEST), falling.

    `largest` holds 0, and still does so where there are fewer.
    """
    for b in range(len(largest)):
        for i in range(edges[b], edges[b + 1]):
            insert(largest[b], notional[i])


@_pass
def class_flow(edges, side, notional, least, most, count, sums):
    """Count and notional by side of each class of sizes, per bar.

    Class c of bar b has the rows with least[c, b] <= notional <= most[c, b]; a row may be in many.  Adds to
    `count` (n_classes, n_bars) and to `sums` (n_classes, n_bars, 3, 2): buys, sells and unknown in halves.
    """
    for b in range(count.shape[1]):
        for c in range(len(count)):
            n, buy_high, buy_low, sell_high, sell_low, other_high, other_low = class_sums(
                side, notional, edges[b], edges[b + 1], 1, least[c, b], most[c, b]
            )
            count[c, b] += n
            sums[c, b, 0, 0] += buy_high
            sums[c, b, 0, 1] += buy_low
            sums[c, b, 1, 0] += sell_high
            sums[c, b, 1, 1] += sell_low
            sums[c, b, 2, 0] += other_high
            sums[c, b, 2, 1] += other_low


@_pass
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
