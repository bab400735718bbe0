"""The passes of `kernels` on the GPU, over CuPy arrays: same names, same arguments, same results.

The arithmetic of a row is that of `kernels`, compiled for the device (`scalar`).  Sums of integers are
exact in any order.  Sums of floats are made in pieces of `PIECE` rows, each by one block in a fixed order,
and the pieces are added on the host in order of the rows: the same bits on every run, and however a day
is cut, as long as it is cut at multiples of `PIECE`.  Only sums, counts and flags come to the host.

Imported only where a GPU, or Numba's simulator of one, is there.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

# A bar or a mid has few blocks, and needs no more.  Numba reads it when numba.cuda is imported.
os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")

import cupy
import numpy as np
from numba import cuda, float64, int64

from clusterlob_gpu import kernels
from clusterlob_gpu.kernels import KEPT, NO_CLUSTER

PIECE = 4096
"""Rows whose float sums one block makes."""
THREADS = 256
"""Threads of a block where rows are independent."""
TEAM = 128
"""Threads of a block that adds up; a power of two."""
MOST_BLOCKS = 4096
"""Blocks of a pass over independent rows; further rows are taken in turns."""
WIDEST = 512
"""Threads of a block that scans a window, as many as have registers for it; each has several values where the
window is longer."""


def on_device(module: ModuleType) -> ModuleType:
    """The module loaded a second time, its scalar functions compiled for the device."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_on_device", str(module.__file__))
    assert spec is not None
    assert spec.loader is not None
    twin = importlib.util.module_from_spec(spec)
    twin.jit = cuda.jit(device=True)  # type: ignore[attr-defined]
    spec.loader.exec_module(twin)
    return twin


scalar = on_device(kernels)


def grid(n: int) -> tuple[int, int]:
    """Blocks and threads of a pass over n independent rows."""
    return max(1, min(-(-n // THREADS), MOST_BLOCKS)), THREADS


# ---- rows that need nothing of each other ------------------------------------------------------------


@cuda.jit
def _unsorted(ts, file_id, line, found):
    for i in range(cuda.grid(1) + 1, len(ts), cuda.gridsize(1)):
        if ts[i] < ts[i - 1] or (
            ts[i] == ts[i - 1]
            and (file_id[i] < file_id[i - 1] or (file_id[i] == file_id[i - 1] and line[i] < line[i - 1]))
        ):
            found[0] = 1


@cuda.jit
def _reduce_levels(offsets, values, depth, best, total):
    for i in range(cuda.grid(1), len(best), cuda.gridsize(1)):
        best[i], total[i] = scalar.levels_of(values, offsets[i], offsets[i + 1], depth)


@cuda.jit
def _book_fault(bid, ask, bid_sz, ask_sz, fault):
    for i in range(cuda.grid(1), len(bid), cuda.gridsize(1)):
        fault[i] = scalar.fault_of(bid[i], ask[i], bid_sz[i], ask_sz[i])


@cuda.jit
def _asof_before(book_ts, ts, inclusive, out):
    for i in range(cuda.grid(1), len(ts), cuda.gridsize(1)):
        out[i] = scalar.last_upto(book_ts, ts[i] if inclusive else ts[i] - 1, 0, len(book_ts))


@cuda.jit
def _meet_book(ts, side, book_ts, max_staleness, inclusive, row, fate):
    for i in range(cuda.grid(1), len(ts), cuda.gridsize(1)):
        met = scalar.last_upto(book_ts, ts[i] if inclusive else ts[i] - 1, 0, len(book_ts))
        row[i] = met
        fate[i] = scalar.fate_of(ts[i], side[i], book_ts, met, max_staleness)


@cuda.jit
def _raw_features(
    ts, sign, qty, row, touch_qty, log_bid, log_ask, spread, mid_change, bid_change, ask_change, own, out
):
    for i in range(cuda.grid(1), len(ts), cuda.gridsize(1)):
        r = row[i]
        buys = sign[i] > 0
        bids_same = buys == own
        out[0, i] = qty[i] / touch_qty[r]
        out[1, i] = log_bid[r] if bids_same else log_ask[r]
        out[2, i] = log_ask[r] if bids_same else log_bid[r]
        out[3, i] = spread[r]
        out[4, i] = scalar.elapsed(ts[i], mid_change[r])
        out[5, i] = scalar.elapsed(ts[i], ask_change[r] if buys else bid_change[r])


@cuda.jit
def _void_nulls(z):
    for i in range(cuda.grid(1), z.shape[1], cuda.gridsize(1)):
        total = z[0, i]
        for j in range(1, z.shape[0]):
            total += z[j, i]
        if total != total:
            for j in range(z.shape[0]):
                z[j, i] = total


@cuda.jit
def _nearest(z, low, high, centroids, label, best):
    for i in range(cuda.grid(1), z.shape[1], cuda.gridsize(1)):
        x = (
            scalar.clipped(z[0, i], low[0], high[0]),
            scalar.clipped(z[1, i], low[1], high[1]),
            scalar.clipped(z[2, i], low[2], high[2]),
            scalar.clipped(z[3, i], low[3], high[3]),
            scalar.clipped(z[4, i], low[4], high[4]),
            scalar.clipped(z[5, i], low[5], high[5]),
        )
        distance, at = np.inf, NO_CLUSTER
        for c in range(centroids.shape[1]):
            to_c = scalar.squared_distance(x, scalar.point(centroids, c))
            distance, at = scalar.nearer(to_c, c, distance, at)
        label[i] = at
        best[i] = distance


@cuda.jit
def _clip_columns(z, low, high, out):
    for i in range(cuda.grid(1), z.shape[1], cuda.gridsize(1)):
        for j in range(z.shape[0]):
            out[j, i] = scalar.clipped(z[j, i], low[j], high[j])


@cuda.jit
def _count_high_bits(bits, counts):
    for i in range(cuda.grid(1), len(bits), cuda.gridsize(1)):
        if not scalar.is_nan_bits(bits[i]):
            cuda.atomic.add(counts, scalar.ordered_bits(bits[i]) >> np.uint32(16), 1)


@cuda.jit
def _count_low_bits(bits, high, counts):
    for i in range(cuda.grid(1), len(bits), cuda.gridsize(1)):
        ordered = scalar.ordered_bits(bits[i])
        if ordered >> np.uint32(16) == high and not scalar.is_nan_bits(bits[i]):
            cuda.atomic.add(counts, ordered & np.uint32(0xFFFF), 1)


# ---- scans and sums of a block -----------------------------------------------------------------------


@cuda.jit(device=True)
def _joined(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Moments of two sets of values together, either of which may be empty."""
    if n_a == 0:
        return n_b, mean_b, m2_b
    if n_b == 0:
        return n_a, mean_a, m2_a
    n = n_a + n_b
    share = n_b / n
    mean, m2 = scalar.merged(mean_a, m2_a, mean_b, m2_b, share, n_a * share)
    return n, mean, m2


@cuda.jit(device=True)
def _moments(x, j, low, high, anchor):
    """Number, mean and squared deviations of x[j, low:high] - anchor."""
    n, mean, m2 = 0, 0.0, 0.0
    for i in range(low, high):
        n += 1
        mean, m2 = scalar.grown(1.0 / n, mean, m2, x[j, i] - anchor)
    return n, mean, m2


@cuda.jit(device=True)
def _scanned(n_of, mean_of, m2_of, backwards):
    """Moments of all entries before this thread's (behind it, if `backwards`); changes the arrays."""
    t, width, step = cuda.threadIdx.x, cuda.blockDim.x, 1
    while step < width:
        cuda.syncthreads()
        n, mean, m2 = n_of[t], mean_of[t], m2_of[t]
        if backwards and t + step < width:
            other = t + step
            n, mean, m2 = _joined(n, mean, m2, n_of[other], mean_of[other], m2_of[other])
        if not backwards and t >= step:
            other = t - step
            n, mean, m2 = _joined(n_of[other], mean_of[other], m2_of[other], n, mean, m2)
        cuda.syncthreads()
        n_of[t], mean_of[t], m2_of[t] = n, mean, m2
        step *= 2
    cuda.syncthreads()
    other = t + 1 if backwards else t - 1
    if other < 0 or other >= width:
        return 0, 0.0, 0.0
    return n_of[other], mean_of[other], m2_of[other]


@cuda.jit
def _rolling_z(x, window, skip, out):
    """A block per (block of `window` values, column): scans of moments from both ends.

    Thread t has the values [a, b) of this block and of the block before; one each, unless the window is
    longer than the widest block.
    """
    # One on a line: the simulator tells shared arrays apart by their lines.
    n_of = cuda.shared.array(WIDEST, int64)
    mean_of = cuda.shared.array(WIDEST, float64)
    m2_of = cuda.shared.array(WIDEST, float64)
    start, j, t = (cuda.blockIdx.x + skip // window) * window, cuda.blockIdx.y, cuda.threadIdx.x
    each = (window + cuda.blockDim.x - 1) // cuda.blockDim.x
    a, b = min(window, t * each), min(window, (t + 1) * each)
    here = min(x.shape[1], start + b)
    anchor, before = x[j, start], start - window

    n_of[t], mean_of[t], m2_of[t] = _moments(x, j, start + a, here, anchor)
    n_own, mean, m2 = _scanned(n_of, mean_of, m2_of, False)
    cuda.syncthreads()
    if before >= 0:
        n_of[t], mean_of[t], m2_of[t] = _moments(x, j, before + a, before + b, anchor)
    else:
        n_of[t], mean_of[t], m2_of[t] = 0, 0.0, 0.0
    n_late, mean_late, m2_late = _scanned(n_of, mean_of, m2_of, True)

    for i in range(start + a, here):
        d = x[j, i] - anchor
        n_own += 1
        mean, m2 = scalar.grown(1.0 / n_own, mean, m2, d)
        if i < skip:
            continue
        if i < window - 1:
            out[j, i - skip] = np.nan
            continue
        n_old, mean_old, m2_old = 0, 0.0, 0.0
        if before >= 0:
            n_old, mean_old, m2_old = _moments(x, j, i - window + 1, before + b, anchor)
        n_old, mean_old, m2_old = _joined(n_old, mean_old, m2_old, n_late, mean_late, m2_late)
        _, whole_mean, whole_m2 = _joined(n_old, mean_old, m2_old, n_own, mean, m2)
        out[j, i - skip] = scalar.standardised(d, whole_mean, whole_m2 / (window - 1))


@cuda.jit(device=True)
def _added(value, shared):
    """Sum of a value over the threads of the block, in a fixed order, for thread 0."""
    t = cuda.threadIdx.x
    shared[t] = value
    step = cuda.blockDim.x >> 1
    while step > 0:
        cuda.syncthreads()
        if t < step:
            shared[t] += shared[t + step]
        step >>= 1
    cuda.syncthreads()
    total = shared[0]
    cuda.syncthreads()
    return total


@cuda.jit
def _piece_sums(x, low, high, label, out):
    """A block per (piece, column): sum of the clipped column over each label's rows, out (pieces, k, f)."""
    shared = cuda.shared.array(TEAM, float64)
    piece, j = cuda.blockIdx.x, cuda.blockIdx.y
    stop = min(x.shape[1], (piece + 1) * PIECE)
    for c in range(out.shape[1]):
        total = 0.0
        for i in range(piece * PIECE + cuda.threadIdx.x, stop, TEAM):
            if label[i] == c:
                total += scalar.clipped(x[j, i], low[j], high[j])
        total = _added(total, shared)
        if cuda.threadIdx.x == 0:
            out[piece, c, j] = total


@cuda.jit
def _bucket_flow(edges, sign, price, qty, label, out):
    """Blocks per bucket: size, trades, signs, and both halves of the notional; adds to out (b, k, 5)."""
    b = cuda.blockIdx.x
    first = edges[b] + cuda.blockIdx.y * TEAM + cuda.threadIdx.x
    for c in range(out.shape[1]):
        size, trades, signs, high, low = 0, 0, 0, 0, 0
        for i in range(first, edges[b + 1], TEAM * cuda.gridDim.y):
            if label[i] == c:
                s = int64(sign[i])
                notional = s * price[i] * qty[i]
                size += s * qty[i]
                trades += 1
                signs += s
                high += notional >> 32
                low += notional & 0xFFFFFFFF
        if trades > 0:
            cuda.atomic.add(out, (b, c, 0), size)
            cuda.atomic.add(out, (b, c, 1), trades)
            cuda.atomic.add(out, (b, c, 2), signs)
            cuda.atomic.add(out, (b, c, 3), high)
            cuda.atomic.add(out, (b, c, 4), low)


@cuda.jit
def _markouts(ts, edges, sign, row, label, book_ts, mid2, last_ts, max_staleness, horizons, count, total):
    """A block per (stretch of rows, horizon): mark-outs of each label; count and total (stretches, k, h)."""
    shared = cuda.shared.array(TEAM, float64)
    stretch, h = cuda.blockIdx.x, cuda.blockIdx.y
    for c in range(count.shape[1]):
        n, moved = 0.0, 0.0
        for i in range(edges[stretch] + cuda.threadIdx.x, edges[stretch + 1], TEAM):
            at = ts[i] + horizons[h]
            if label[i] == c and at <= last_ts:
                j = scalar.last_upto(book_ts, at - 1, 0, len(book_ts))
                if j >= 0 and at - book_ts[j] <= max_staleness:
                    n += 1.0
                    met = mid2[row[i]]
                    moved += scalar.bps_per_unit(sign[i], met) * (mid2[j] - met)
        n, moved = _added(n, shared), _added(moved, shared)
        if cuda.threadIdx.x == 0:
            count[stretch, c, h], total[stretch, c, h] = int64(n), moved


# ---- the passes --------------------------------------------------------------------------------------


def is_sorted(ts, file_id, line):
    """`kernels.is_sorted`."""
    found = cupy.zeros(1, np.int32)
    _unsorted[grid(len(ts))](ts, file_id, line, found)
    return int(found[0]) == 0


def reduce_levels(offsets, values, depth, best, total):
    """`kernels.reduce_levels`."""
    _reduce_levels[grid(len(best))](offsets, values, depth, best, total)


def book_fault(bid, ask, bid_sz, ask_sz, fault):
    """`kernels.book_fault`."""
    _book_fault[grid(len(bid))](bid, ask, bid_sz, ask_sz, fault)


def last_changes(ts, value, since, out):
    """`kernels.last_changes`."""
    out.fill(since)
    if len(ts) == 0:
        return
    changed = cupy.zeros(len(ts), np.bool_)
    changed[1:] = value[1:] != value[:-1]
    times = ts[changed]
    if len(times):
        seen = cupy.cumsum(changed, dtype=np.int64)
        out[:] = cupy.where(seen > 0, times[cupy.maximum(seen - 1, 0)], since)


def asof_before(book_ts, ts, inclusive, out):
    """`kernels.asof_before`."""
    _asof_before[grid(len(ts))](book_ts, ts, inclusive, out)


def meet_book(ts, side, book_ts, max_staleness, inclusive, row, fate):
    """`kernels.meet_book`."""
    _meet_book[grid(len(ts))](ts, side, book_ts, max_staleness, inclusive, row, fate)
    return int(cupy.count_nonzero(fate == KEPT))


def take_kept(fate, ts, side, price, qty, row, kept_ts, kept_side, kept_price, kept_qty, kept_row):
    """`kernels.take_kept`."""
    keep, kept = fate == KEPT, (kept_ts, kept_side, kept_price, kept_qty, kept_row)
    for column, out in zip((ts, side, price, qty, row), kept, strict=True):
        out[:] = column[keep]


def raw_features(
    ts, sign, qty, row, touch_qty, log_bid, log_ask, spread, mid_change, bid_change, ask_change, own, out
):
    """`kernels.raw_features`."""
    context = (touch_qty, log_bid, log_ask, spread, mid_change, bid_change, ask_change)
    _raw_features[grid(len(ts))](ts, sign, qty, row, *context, own, out)


def rolling_z(x, window, skip, out):
    """`kernels.rolling_z`; every block is scanned at once."""
    f, n = x.shape
    blocks = -(-n // window) - skip // window
    if blocks > 0:
        threads = min(WIDEST, max(32, 1 << (window - 1).bit_length()))
        _rolling_z[(blocks, f), threads](x, window, skip, out)


def void_nulls(z):
    """`kernels.void_nulls`."""
    _void_nulls[grid(z.shape[1])](z)
    return int(z.shape[1] - cupy.count_nonzero(cupy.isnan(z[0])))


def nearest_centroid(z, low, high, centroids, label):
    """`kernels.nearest_centroid`."""
    _distances(z, low, high, centroids, label)


def _distances(z, low, high, centroids, label):
    """Label every row, and give its squared distance to the centroid."""
    best = cupy.empty(z.shape[1])
    bounds = cupy.asarray(low), cupy.asarray(high)
    _nearest[grid(z.shape[1])](z, *bounds, cupy.asarray(np.ascontiguousarray(centroids.T)), label, best)
    return best


def lloyd_partial(z, low, high, centroids, sums, counts):
    """`kernels.lloyd_partial`, sums made in pieces."""
    k, n = len(centroids), z.shape[1]
    if n == 0:
        return 0.0
    label = cupy.empty(n, np.int8)
    best = _distances(z, low, high, centroids, label)
    counts += cupy.asnumpy(cupy.bincount(label.astype(np.int64) + 1, minlength=k + 1))[1:]
    _add_pieces(z, low, high, label, sums)
    inertia = np.zeros((k, 1))
    _add_pieces(best.reshape(1, n), *_unbounded(1), label, inertia)
    return float(inertia.sum())


def clip_columns(z, low, high, out):
    """`kernels.clip_columns`."""
    _clip_columns[grid(z.shape[1])](z, cupy.asarray(low), cupy.asarray(high), out)


def count_high_bits(bits, counts):
    """`kernels.count_high_bits`."""
    found = cupy.zeros(len(counts), np.int64)
    _count_high_bits[grid(len(bits))](bits, found)
    counts += cupy.asnumpy(found)


def count_low_bits(bits, high, counts):
    """`kernels.count_low_bits`."""
    found = cupy.zeros(len(counts), np.int64)
    _count_low_bits[grid(len(bits))](bits, high, found)
    counts += cupy.asnumpy(found)


def bucket_flow(ts, sign, price, qty, label, start, width, size, count, high, low):
    """`kernels.bucket_flow`."""
    found = cupy.zeros((*size.shape, 5), np.int64)
    edges = bucket_edges(ts, start, width, len(size))
    _bucket_flow[(len(size), _SHARES), TEAM](edges, sign, price, qty, label, found)
    found = cupy.asnumpy(found)
    size += found[..., 0]
    count += found[..., 1:3]
    high += found[..., 3]
    low += found[..., 4]


_SHARES = 4
"""Blocks that share a bucket."""


def bucket_edges(ts, start, width, n):
    """First row of each of n buckets, and the end of the last."""
    times = start + width * np.arange(n + 1, dtype=np.int64)
    return cupy.searchsorted(ts, cupy.asarray(times)).astype(np.int64)


def cluster_sums(x, label, sums):
    """`kernels.cluster_sums`, sums made in pieces."""
    _add_pieces(x, *_unbounded(len(x)), label, sums)


def _unbounded(f):
    return np.full(f, -np.inf), np.full(f, np.inf)


def _add_pieces(x, low, high, label, sums):
    """Add to sums (k, f) those of every piece, one after the other."""
    f, n = x.shape
    if n == 0:
        return
    pieces = cupy.empty((-(-n // PIECE), *sums.shape))
    _piece_sums[(len(pieces), f), TEAM](x, cupy.asarray(low), cupy.asarray(high), label, pieces)
    # A running sum adds in order; a plain one may pair its terms as it likes.
    sums[:] = np.cumsum(np.concatenate([sums[None], cupy.asnumpy(pieces)]), axis=0)[-1]


def markout_sums(
    ts, sign, row, label, book_ts, mid2, last_ts, max_staleness, horizons, start, width, count, total
):
    """`kernels.markout_sums`, sums made in pieces of rows of one bucket."""
    n, (_, k, h) = len(ts), count.shape
    if n == 0 or h == 0:
        return
    ends = cupy.asarray(np.append(np.arange(0, n, PIECE), n))
    edges = cupy.unique(cupy.concatenate([bucket_edges(ts, start, width, len(count)), ends]))
    counts, totals = (cupy.empty((len(edges) - 1, k, h), kind) for kind in (np.int64, np.float64))
    outcome = last_ts, max_staleness, cupy.asarray(horizons), counts, totals
    _markouts[(len(counts), h), TEAM](ts, edges, sign, row, label, book_ts, mid2, *outcome)
    bucket = cupy.asnumpy((ts[edges[:-1]] - start) // width)
    np.add.at(count, bucket, cupy.asnumpy(counts))
    np.add.at(total, bucket, cupy.asnumpy(totals))
