"""The passes of `flow_kernels` on the GPU, over CuPy arrays: same names, same arguments, same results.

The arithmetic of a row is that of `flow_kernels`, compiled for the device (`scalar`).  Everything is a
count, an integer sum or a choice of integers, so results are exact in any order.

Imported only where a GPU, or Numba's simulator of one, is there.
"""

from __future__ import annotations

import cupy
import numpy as np
from numba import cuda, int64

from clusterlob_gpu import device_kernels, flow_kernels
from clusterlob_gpu.device_kernels import grid, on_device
from clusterlob_gpu.flow_kernels import GROUP, N_LARGEST

TEAM = 128
"""Threads of a block that works on a bar; a power of two."""
MOST_BLOCKS = 2048
"""Blocks of a pass over bars, unless there are more bars; several share a bar."""
TABLE_BYTES = 1 << 28
"""Counts per window and key that are held at once."""

_LEAST, _MOST = -(2**63), 2**63 - 1

scalar, search = on_device(flow_kernels), device_kernels.scalar


# ---- kernels -----------------------------------------------------------------------------------------


@cuda.jit
def _bin_sizes(size, bins, totals):
    for i in range(cuda.grid(1), len(size), cuda.gridsize(1)):
        b = scalar.size_bin(size[i])
        bins[i] = b
        cuda.atomic.add(totals, b, 1)


@cuda.jit
def _count_keys(key, count):
    for i in range(cuda.grid(1), len(key), cuda.gridsize(1)):
        cuda.atomic.add(count, key[i], 1)


@cuda.jit
def _sub_keys(size, bins, number, key):
    for i in range(cuda.grid(1), len(size), cuda.gridsize(1)):
        key[i] = number[bins[i]] * scalar.SUB_BINS + scalar.size_sub_bin(size[i], bins[i])


@cuda.jit
def _pass_edge(key, number, edges, change, count):
    """Add `change` for every row that a rising edge passes, at the first window whose edge lies behind it.

    Keys are counted under their numbers.
    """
    for i in range(edges[0] + cuda.grid(1), edges[-1], cuda.gridsize(1)):
        window = search.last_upto(edges, i, 0, len(edges)) + 1
        cuda.atomic.add(count, (window, number[key[i]]), change)


@cuda.jit
def _cumulate(count):
    """Running sum over the windows, a thread per key."""
    for k in range(cuda.grid(1), count.shape[1], cuda.gridsize(1)):
        total = count[0, k]
        for i in range(1, count.shape[0]):
            total += count[i, k]
            count[i, k] = total


@cuda.jit
def _find_ranks(count, groups, first, rank, at, rest):
    """A thread per (window, target)."""
    for i in range(cuda.grid(1), rank.size, cuda.gridsize(1)):
        window, t = i // rank.shape[1], i % rank.shape[1]
        if rank[window, t] >= 0:
            wanted = first[window, t], rank[window, t]
            at[window, t], rest[window, t] = scalar.key_of_rank(count[window], groups[window], *wanted)


@cuda.jit
def _begins(ts, ts_exch, side, trade_id, start, width, begins):
    """Whether a fill is the first of its order."""
    for i in range(cuda.grid(1), len(ts), cuda.gridsize(1)):
        begins[i] = (
            i == 0
            or (ts[i] - start) // width != (ts[i - 1] - start) // width
            or not scalar.follows(ts_exch, side, trade_id, i)
        )


@cuda.jit
def _order_sums(edges, notional, total, passed):
    """A thread per order; `passed` is the least number of a fill that takes its order past the limit."""
    for order in range(cuda.grid(1), len(total), cuda.gridsize(1)):
        a = notional[edges[order]]
        for i in range(edges[order] + 1, edges[order + 1]):
            if scalar.passes(a, notional[i]):
                cuda.atomic.min(passed, 0, i)
                break
            a += notional[i]
        total[order] = a


@cuda.jit
def _bar_prices(edges, price, qty, found):
    """Blocks per bar: found (n_bars, 6) is open, highest, lowest, close, and size in halves."""
    b = cuda.blockIdx.x
    share = cuda.blockIdx.y * TEAM + cuda.threadIdx.x
    first, stop = edges[b] + share, edges[b + 1]
    if first < stop:
        highest, lowest, high, low = scalar.extent(price, qty, first, stop, TEAM * cuda.gridDim.y)
        if share == 0:
            found[b, 0], found[b, 3] = price[first], price[stop - 1]
        cuda.atomic.max(found, (b, 1), highest)
        cuda.atomic.min(found, (b, 2), lowest)
        cuda.atomic.add(found, (b, 4), high)
        cuda.atomic.add(found, (b, 5), low)


@cuda.jit
def _bar_largest(edges, notional, found):
    """Blocks per bar: the largest of the rows of each, found (n_bars, blocks, N_LARGEST), falling."""
    largest = cuda.shared.array((TEAM, N_LARGEST), int64)
    b, share, t = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    for j in range(N_LARGEST):
        largest[t, j] = 0
    for i in range(edges[b] + share * TEAM + t, edges[b + 1], TEAM * cuda.gridDim.y):
        scalar.insert(largest[t], notional[i])
    step = TEAM >> 1
    while step > 0:
        cuda.syncthreads()
        if t < step:
            for j in range(N_LARGEST):
                scalar.insert(largest[t], largest[t + step, j])
        step >>= 1
    if t == 0:
        for j in range(N_LARGEST):
            found[b, share, j] = largest[0, j]


@cuda.jit
def _class_flow(edges, side, notional, least, most, found):
    """Blocks per (bar, class): adds what `class_sums` gives to found (n_classes, n_bars, 7)."""
    b, c = cuda.blockIdx.x, cuda.blockIdx.z
    first = edges[b] + cuda.blockIdx.y * TEAM + cuda.threadIdx.x
    sums = scalar.class_sums(
        side, notional, first, edges[b + 1], TEAM * cuda.gridDim.y, least[c, b], most[c, b]
    )
    if sums[0] > 0:
        cuda.atomic.add(found, (c, b, 0), sums[0])
        cuda.atomic.add(found, (c, b, 1), sums[1])
        cuda.atomic.add(found, (c, b, 2), sums[2])
        cuda.atomic.add(found, (c, b, 3), sums[3])
        cuda.atomic.add(found, (c, b, 4), sums[4])
        cuda.atomic.add(found, (c, b, 5), sums[5])
        cuda.atomic.add(found, (c, b, 6), sums[6])


# ---- the passes --------------------------------------------------------------------------------------


def bin_sizes(size, bins, totals):
    """`flow_kernels.bin_sizes`."""
    found = cupy.zeros(len(totals), np.int64)
    _bin_sizes[grid(len(size))](size, bins, found)
    totals += cupy.asnumpy(found)


def count_keys(key, count):
    """`flow_kernels.count_keys`."""
    count += cupy.asnumpy(_counted(key, len(count)))


def _counted(key, n_keys):
    """Rows per key, on the device."""
    found = cupy.zeros(n_keys, np.int64)
    _count_keys[grid(len(key))](key, found)
    return found


def sub_keys(size, bins, number, key):
    """`flow_kernels.sub_keys`."""
    _sub_keys[grid(len(size))](size, bins, cupy.asarray(number), key)


def keep_marked(key, size, number, edges, kept_key, kept_size, kept_edges):
    """`flow_kernels.keep_marked`."""
    rows = cupy.flatnonzero(cupy.asarray(number >= 0)[key])
    n = len(rows)
    kept_key[:n], kept_size[:n] = key[rows], size[rows]
    kept_edges[:] = cupy.asnumpy(cupy.searchsorted(rows, cupy.asarray(edges)))
    return n


def sliding_ranks(key, low, high, first, rank, count, at, rest):
    """`flow_kernels.sliding_ranks`; `count` stays as it is.

    The counts of many windows are held at once, of those keys that there are: each is that of the window
    before, with the rows that the upper edge passes and without those that the lower edge passes.
    """
    keys = cupy.flatnonzero(_counted(key[low[0] : high[-1]], len(count)))
    number = cupy.zeros(len(count), np.int32)
    number[keys] = cupy.arange(len(keys), dtype=np.int32)
    n, n_groups = len(low), len(keys) // GROUP + 1
    each = max(2, TABLE_BYTES // (4 * n_groups * GROUP))
    before = cupy.zeros(n_groups * GROUP, np.int32)
    before[: len(keys)] = cupy.asarray(count)[keys]
    asked = cupy.searchsorted(keys, cupy.asarray(first)), cupy.asarray(rank)
    found = cupy.zeros(first.shape, np.int64), cupy.zeros(first.shape, np.int64)
    for a in range(0, max(1, n - 1), each - 1):
        windows = slice(a, min(n, a + each))  # the first is the last of the batch before
        counts = _window_counts(key, number, low[windows], high[windows], before)
        groups = counts.reshape(len(counts), n_groups, GROUP).sum(axis=2, dtype=np.int32)
        targets = [values[windows] for values in (*asked, *found)]
        _find_ranks[grid(targets[0].size)](counts, groups, *targets)
        before = counts[-1].copy()
    wanted = rank >= 0
    at[wanted] = cupy.asnumpy(keys)[cupy.asnumpy(found[0])[wanted]]
    rest[wanted] = cupy.asnumpy(found[1])[wanted]


def _window_counts(key, number, low, high, before):
    """Rows per numbered key of every window, (n_windows, n) int32, from those of the first."""
    counts = cupy.zeros((len(low), len(before)), np.int32)
    counts[0] = before
    for edges, change in ((high, np.int32(1)), (low, np.int32(-1))):
        _pass_edge[grid(int(edges[-1] - edges[0]))](key, number, cupy.asarray(edges), change, counts)
    _cumulate[grid(len(before))](counts)
    return counts


def merge_orders(ts, ts_exch, side, trade_id, notional, start, width, out_ts, out_side, out_notional):
    """`flow_kernels.merge_orders`."""
    begins = cupy.empty(len(ts), np.bool_)
    _begins[grid(len(ts))](ts, ts_exch, side, trade_id, start, width, begins)
    edges = cupy.concatenate([cupy.flatnonzero(begins), cupy.full(1, len(ts), np.int64)])
    n, passed = len(edges) - 1, cupy.full(1, len(ts), np.int64)
    _order_sums[grid(n)](edges, notional, out_notional[:n], passed)
    last = edges[1:] - 1
    out_ts[:n], out_side[:n] = ts[last], side[last]
    return n if int(passed[0]) == len(ts) else -1 - int(passed[0])


def _blocks(n_bars):
    """Bars, and blocks that share each of them."""
    return n_bars, max(1, MOST_BLOCKS // n_bars)


def bar_prices(edges, price, qty, prices, size):
    """`flow_kernels.bar_prices`."""
    found = cupy.zeros((len(size), 6), np.int64)
    found[:, 1], found[:, 2] = _LEAST, _MOST
    _bar_prices[_blocks(len(size)), TEAM](cupy.asarray(edges), price, qty, found)
    found = cupy.asnumpy(found)
    traded = found[:, 1] >= found[:, 2]
    prices[traded] = found[traded, :4]
    size += found[:, 4:]


def bar_largest(edges, notional, largest):
    """`flow_kernels.bar_largest`."""
    n_bars = len(largest)
    found = cupy.empty((*_blocks(n_bars), N_LARGEST), np.int64)
    _bar_largest[_blocks(n_bars), TEAM](cupy.asarray(edges), notional, found)
    found = cupy.asnumpy(found).reshape(n_bars, -1)
    largest[:] = np.sort(found)[:, : -1 - N_LARGEST : -1]


def class_flow(edges, side, notional, least, most, count, sums):
    """`flow_kernels.class_flow`."""
    n_classes, n_bars = count.shape
    if n_classes == 0:
        return
    found = cupy.zeros((n_classes, n_bars, 7), np.int64)
    edges, least, most = cupy.asarray(edges), cupy.asarray(least), cupy.asarray(most)
    _class_flow[(*_blocks(n_bars), n_classes), TEAM](edges, side, notional, least, most, found)
    found = cupy.asnumpy(found)
    count += found[..., 0]
    sums += found[..., 1:].reshape(sums.shape)
