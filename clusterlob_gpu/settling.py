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
from numba import njit

from clusterlob_gpu import clustering
from clusterlob_gpu.clustering import Bounds, Partial
from clusterlob_gpu.kernels import NO_CLUSTER, clipped, point, squared_distance


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


@njit(cache=True, nogil=True, error_model="numpy")
def _settle(z, low, high, centroids, reach, sums, squares, counts, is_open):  # type: ignore[no-untyped-def]
    """Add settled rows up, mark those that are not, and give their number; a row with a NaN is neither."""
    k, columns, n_open = len(centroids), centroids.T, 0
    for i in range(z.shape[1]):
        x = (
            clipped(z[0, i], low[0], high[0]),
            clipped(z[1, i], low[1], high[1]),
            clipped(z[2, i], low[2], high[2]),
            clipped(z[3, i], low[3], high[3]),
            clipped(z[4, i], low[4], high[4]),
            clipped(z[5, i], low[5], high[5]),
        )
        best, second, label = np.inf, np.inf, NO_CLUSTER
        for c in range(k):
            distance = squared_distance(x, point(columns, c))
            if distance < best:
                best, second, label = distance, best, c
            elif distance < second:
                second = distance
        is_open[i] = label != NO_CLUSTER and math.sqrt(second) - math.sqrt(best) <= 2 * reach + _SLACK
        if is_open[i]:
            n_open += 1
        elif label != NO_CLUSTER:
            counts[label] += 1
            for j in range(6):
                sums[label, j] += x[j]
                squares[label] += x[j] * x[j]
    return n_open
