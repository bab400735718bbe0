"""Rows of a day that stay with their centre while the centres of a fit move only a little.

Towards the end of Lloyd's algorithm the centres hardly move, and only rows about half-way between two of
them can still change sides.  A row is settled if its second nearest centre is further than its nearest by
more than twice the distance that any centre may move: then it keeps its centre (triangle inequality).
Settled rows are summed up once; a further pass is one over the few that are left, and its counts are those
of a pass over all rows.  Hamerly (2010), SDM, 130-140, with one bound for all rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from clusterlob_gpu import clustering, kernels
from clusterlob_gpu.clustering import Bounds, Partial
from clusterlob_gpu.kernels import _TILE, NO_CLUSTER, _pass, nearer, point, squared_distance


@dataclass(frozen=True)
class Settled:
    """Settled rows of a day by their centre, and the rows that are not, in their order."""

    sums: np.ndarray
    """(k, 6) float64, of clipped rows like the squares."""
    squares: np.ndarray
    """(k,) sums of squared lengths."""
    counts: np.ndarray
    left: np.ndarray
    """(6, m) float32, not clipped."""

    def partial(self, bounds: Bounds, centroids: np.ndarray) -> Partial:
        """The day's share of a Lloyd pass from centres that have not moved too far."""
        left = clustering.partial(self.left, bounds, centroids)
        # |x - c|^2 summed over settled rows
        across, lengths = (self.sums * centroids).sum(axis=1), (centroids**2).sum(axis=1)
        inertia = float((self.squares - 2 * across + self.counts * lengths).sum())
        return Partial(left.sums + self.sums, left.counts + self.counts, left.inertia + inertia)


def settle(
    z: np.ndarray, bounds: Bounds, centroids: np.ndarray, reach: float, most: int
) -> Settled | Partial:
    """A day's rows (6, n) settled for centres that move by `reach` at most.

    Where more than `most` rows are left, the day's share of a plain Lloyd pass from `centroids` (k, 6).
    """
    k = len(centroids)
    sums, squares, counts = np.zeros((k, 6)), np.zeros(k), np.zeros(k, np.int64)
    open_ = np.empty(z.shape[1], np.bool_)
    n_open = _settle(z, bounds.low, bounds.high, centroids, reach, sums, squares, counts, open_)
    if n_open > most:
        return clustering.partial(z, bounds, centroids)
    return Settled(sums, squares, counts, z[:, open_])


def furthest_move(one: np.ndarray, other: np.ndarray) -> float:
    """Distance by which the centre that has moved most has moved."""
    return float(np.sqrt(((one - other) ** 2).sum(axis=1).max()))


_SLACK = 1e-9
"""Far above what rounding does to a distance."""


@_pass
def _settle(z, low, high, centroids, reach, sums, squares, counts, is_open):  # type: ignore[no-untyped-def]
    """Add settled rows up, mark those that are not, and give their number; a row with a NaN is neither."""
    x, best, second = np.empty((6, _TILE)), np.empty(_TILE), np.empty(_TILE)
    label, n_open = np.empty(_TILE, np.int64), 0
    for start in range(0, z.shape[1], _TILE):
        stop = min(start + _TILE, z.shape[1])
        rows = kernels._clip_tile(kernels._rows(z, start, stop), low, high, x)
        _nearest_two(rows, centroids, best, second, label)
        for i in range(stop - start):
            second[i] = math.sqrt(second[i]) - math.sqrt(best[i])
        for i in range(stop - start):
            to = label[i]
            is_open[start + i] = to != NO_CLUSTER and second[i] <= 2 * reach + _SLACK
            if is_open[start + i]:
                n_open += 1
            elif to != NO_CLUSTER:
                counts[to] += 1
                for j in range(6):
                    sums[to, j] += x[j, i]
                    squares[to] += x[j, i] * x[j, i]
    return n_open


@_pass
def _nearest_two(rows, centroids, best, second, label):  # type: ignore[no-untyped-def]
    """Squared distances to the two nearest centres of every row, and the number of the nearest."""
    a, b, c, d, e, f = rows
    best[:], second[:], label[:] = np.inf, np.inf, NO_CLUSTER
    for at in range(len(centroids)):
        centre = point(centroids.T, at)
        for i in range(len(a)):
            distance = squared_distance((a[i], b[i], c[i], d[i], e[i], f[i]), centre)
            second[i] = min(second[i], max(best[i], distance))
            best[i], label[i] = nearer(distance, at, best[i], label[i])
