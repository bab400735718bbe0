"""Centres to start from, fitted on the host to a seeded sample of the training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clusterlob_gpu import clustering, settling
from clusterlob_gpu.clustering import Bounds, Fit, Partial
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.kernels import _pass, point, squared_distance
from clusterlob_gpu.settling import Settling

SAMPLE_ROWS = 200_000
"""Rows on which the starting centres are fitted."""


@dataclass(frozen=True)
class Start:
    """Centres (k, 6) float64, and about how far they are from those of all rows."""

    centres: np.ndarray
    error: float
    """Standard error of the centre with the fewest rows of the sample."""


def sample_rows(n: int, total: int, seed: int, day_number: int) -> np.ndarray:
    """Sorted row numbers of a day for the sample: its share of `SAMPLE_ROWS` of all `total` rows.

    Depends on the seed, the day and the counts alone.
    """
    size = n if total <= SAMPLE_ROWS else max(1, round(SAMPLE_ROWS * n / total)) if n else 0
    rng = np.random.default_rng([seed, day_number])
    return np.sort(rng.choice(n, size=min(size, n), replace=False))


def attempt(sample: np.ndarray, k: int, seed: int, number: int) -> Fit | None:
    """K-means++ and Lloyd on a sample (6, m): one of several starts, by its number.

    None if k-means++ finds fewer than k distinct rows.
    """
    sample = np.ascontiguousarray(sample)
    centres = plus_plus(sample, k, np.random.default_rng([seed, number]))
    return _lloyd(sample, centres) if len(centres) == k else None


def best_of(attempts: Sequence[Fit | None], k: int, rows: int) -> Start:
    """The best of several starts on a sample of so many rows; the first of equals.

    Raises InputError if none of them has k centres.
    """
    fits = [fit for fit in attempts if fit is not None]
    if not fits:
        raise InputError(
            f"k = {k}: the training days have fewer than {k} distinct feature rows in {rows}; "
            "use a smaller k, a shorter window or more days"
        )
    best = min(fits, key=lambda fit: fit.inertia)
    return Start(best.centroids, float(np.sqrt(best.inertia / rows / max(1, best.counts.min()))))


def start(sample: np.ndarray, k: int, seed: int, n_init: int) -> Start:
    """`best_of` the first `n_init` attempts on a sample."""
    return best_of([attempt(sample, k, seed, number) for number in range(n_init)], k, sample.shape[1])


def _lloyd(sample: np.ndarray, centres: np.ndarray) -> Fit:
    bounds, most = Bounds.none(), sample.shape[1] // 4
    held = Settling(bounds)

    def one_pass(centres: np.ndarray) -> list[Partial]:
        reach = held.follow(centres)
        if held.days:
            return [held.days[0].partial(bounds, centres)]
        return [held.add(0, settling.passed(sample, bounds, centres, reach, most), centres)]

    return clustering.lloyd(centres, one_pass)


def plus_plus(sample: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++: k rows of a sample (6, m), fewer if it has no more distinct ones.

    Each next centre is the best of 2 + ln k rows drawn with probability proportional to the squared
    distance to the nearest centre so far.  Arthur, Vassilvitskii (2007), SODA, 1027-1035.
    """
    rows = sample.astype(np.float64)
    chosen = [int(rng.integers(rows.shape[1]))]
    distance = _distance_to(rows, chosen[0], np.full(rows.shape[1], np.inf))
    while len(chosen) < k and distance.max() > 0:
        upto = np.cumsum(distance)
        drawn = np.searchsorted(upto, rng.random(2 + int(np.log(k))) * upto[-1], side="right")
        tried = [_distance_to(rows, at, distance) for at in np.minimum(drawn, rows.shape[1] - 1)]
        best = int(np.argmin([left.sum() for left in tried]))
        chosen.append(int(min(drawn[best], rows.shape[1] - 1)))
        distance = tried[best]
    return rows[:, chosen].T


@_pass
def _distance_to(rows, at, distance):  # type: ignore[no-untyped-def]
    """Squared distance of every row of (6, m) to that row, or `distance` where it is less."""
    out, centre = np.empty(rows.shape[1]), point(rows, at)
    for i in range(len(out)):
        out[i] = min(distance[i], squared_distance(point(rows, i), centre))
    return out
