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
from typing import Any

import numpy as np

from clusterlob_gpu import clustering, kernels
from clusterlob_gpu.backend import CPU, Backend
from clusterlob_gpu.clustering import Bounds, Partial
from clusterlob_gpu.kernels import _TILE, NO_CLUSTER, _pass, jit, nearer, point, squared_distance

_REACH = 3
"""How many times as far as in the pass before centres may move until rows have to be settled anew: from pass
to pass their moves halve."""


_BALLS = 2
"""Reaches that are held besides the first: each has a copy of the rows that are left in it."""


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

    def settled_more(self, bounds: Bounds, centroids: np.ndarray, reach: float) -> Settled:
        """With those rows that are settled for centres within `reach` of these, themselves in its own."""
        more = _settled(self.left, bounds, centroids, reach, self.left.shape[1])
        assert more is not None
        sums, squares = self.sums + more.sums, self.squares + more.squares
        return Settled(sums, squares, self.counts + more.counts, more.left)


@dataclass(frozen=True)
class _Ball:
    """Days that are settled for centres within `reach` of these."""

    centroids: np.ndarray
    reach: float
    days: dict[int, Settled]

    def holds(self, centroids: np.ndarray) -> bool:
        return furthest_move(centroids, self.centroids) <= self.reach


class Settling:
    """What of a fit's days is settled for the centres of its passes, as these come.

    `first` is the reach for its first pass, 0 where nobody knows how far the centres will move.
    """

    def __init__(self, bounds: Bounds, first: float = 0.0) -> None:
        self._bounds, self._first = bounds, first
        self._balls: list[_Ball] = []
        """Each inside the one before, with fewer rows left."""
        self._latest: np.ndarray | None = None

    @property
    def days(self) -> dict[int, Settled]:
        """Days that are settled for the latest centres."""
        return self._balls[-1].days if self._balls else {}

    def follow(self, centroids: np.ndarray) -> float:
        """Ready it for a pass from these centres; gives the reach for which days that are not settled shall
        be, 0 for a plain pass over them.

        Days that could not be settled for a reach are not asked again until a far smaller one will do.
        """
        latest, self._latest = self._latest, centroids
        reach = self._first if latest is None else _REACH * furthest_move(centroids, latest)
        while self._balls and not self._balls[-1].holds(centroids):
            self._balls.pop()
        if self._balls:
            if 4 * reach > self._balls[-1].reach:
                return 0.0
            if self.days:
                # A ball that reached out of the one before would ask days anew where it need not.
                if reach > self._balls[-1].reach - furthest_move(centroids, self._balls[-1].centroids):
                    return 0.0
                days = {at: day.settled_more(self._bounds, centroids, reach) for at, day in self.days.items()}
                self._balls.append(_Ball(centroids, reach, days))
                del self._balls[1:-_BALLS]
                return reach
        self._balls = [_Ball(centroids, reach, {})]
        return reach

    def add(self, day: int, found: Partial | Settled, centroids: np.ndarray) -> Partial:
        """A day's share of the pass, which is kept if it is settled."""
        if isinstance(found, Partial):
            return found
        self.days[day] = found
        return found.partial(self._bounds, centroids)


def passed(
    z: Any, bounds: Bounds, centroids: np.ndarray, reach: float, most: int, on: Backend = CPU
) -> Partial | Settled:
    """A day's share of a Lloyd pass from `centroids` (k, 6), or, with a reach, its rows (6, n) settled for
    centres that move by that at most, unless more than `most` rows are left."""
    if reach > 0:
        settled = _settled(z, bounds, centroids, reach, most)
        if settled is not None:
            return settled
    return clustering.partial(z, bounds, centroids, on)


def _settled(z: np.ndarray, bounds: Bounds, centroids: np.ndarray, reach: float, most: int) -> Settled | None:
    k = len(centroids)
    sums, squares, counts = np.zeros((k, 6)), np.zeros(k), np.zeros(k, np.int64)
    is_open = np.empty(z.shape[1], np.bool_)
    _settle(z, bounds.low, bounds.high, centroids, reach, sums, squares, counts, is_open)
    if np.count_nonzero(is_open) > most:
        return None
    return Settled(sums, squares, counts, z[:, is_open])


def furthest_move(one: np.ndarray, other: np.ndarray) -> float:
    """Distance by which the centre that has moved most has moved."""
    return float(np.sqrt(((one - other) ** 2).sum(axis=1).max()))


_SLACK = 1e-9
"""Far above what rounding does to a distance."""


@_pass
def _settle(z, low, high, centroids, reach, sums, squares, counts, is_open):  # type: ignore[no-untyped-def]
    """Add settled rows up, and mark those that are not; a row with a NaN is neither."""
    x, best, second = np.empty((6, _TILE)), np.empty(_TILE), np.empty(_TILE)
    label = np.empty(_TILE, np.int64)
    for start in range(0, z.shape[1], _TILE):
        stop = min(start + _TILE, z.shape[1])
        rows = kernels._clip_tile(kernels._rows(z, start, stop), low, high, x)
        _nearest_two(rows, centroids, best, second, label)
        for i in range(stop - start):
            second[i] = math.sqrt(second[i]) - math.sqrt(best[i])
        for i in range(stop - start):
            to = label[i]
            is_open[start + i] = to != NO_CLUSTER and second[i] <= 2 * reach + _SLACK
            if to != NO_CLUSTER and not is_open[start + i]:
                row = point(x, i)
                counts[to] += 1
                squares[to] += squared_distance(row, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
                for j in range(6):
                    sums[to, j] += row[j]


@_pass
def _nearest_two(rows, centroids, best, second, label):  # type: ignore[no-untyped-def]
    """Squared distances to the two nearest centres of every row, and the number of the nearest."""
    a, b, c, d, e, f = rows
    k = len(centroids)
    best[:], second[:], label[:] = np.inf, np.inf, NO_CLUSTER
    # Three at a time are held in registers.
    for at in range(0, k - 2, 3):
        one, two, three = point(centroids.T, at), point(centroids.T, at + 1), point(centroids.T, at + 2)
        for i in range(len(a)):
            row = a[i], b[i], c[i], d[i], e[i], f[i]
            nearest = best[i], second[i], label[i]
            nearest = _nearer_two(squared_distance(row, one), at, nearest)
            nearest = _nearer_two(squared_distance(row, two), at + 1, nearest)
            best[i], second[i], label[i] = _nearer_two(squared_distance(row, three), at + 2, nearest)
    for at in range(k // 3 * 3, k):
        only = point(centroids.T, at)
        for i in range(len(a)):
            row = a[i], b[i], c[i], d[i], e[i], f[i]
            best[i], second[i], label[i] = _nearer_two(
                squared_distance(row, only), at, (best[i], second[i], label[i])
            )


@jit
def _nearer_two(distance, c, nearest):  # type: ignore[no-untyped-def]
    """The two nearest distances and the number of the nearest, with a further centre."""
    best, second, label = nearest
    second = min(second, max(best, distance))
    best, label = nearer(distance, c, best, label)
    return best, second, label
