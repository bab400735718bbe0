"""Centres to start from, fitted on the host to a seeded sample of the training rows."""

from __future__ import annotations

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


def start(sample: np.ndarray, k: int, seed: int, n_init: int) -> Start:
    """K-means++ and Lloyd on a sample (6, m), the best of `n_init` starts.

    Raises InputError if the sample has fewer than k distinct rows.
    """
    sample = np.ascontiguousarray(sample)
    rng = np.random.default_rng(seed)
    chosen = [plus_plus(sample, k, rng) for _ in range(n_init)]
    chosen = [rows for rows in chosen if len(rows) == k]
    if not chosen:
        raise InputError(
            f"k = {k}: the training days have fewer than {k} distinct feature rows in {sample.shape[1]}; "
            "use a smaller k, a shorter window or more days"
        )
    best = min((_lloyd(sample, rows) for rows in chosen), key=lambda fit: fit.inertia)
    spread = best.inertia / sample.shape[1]
    return Start(best.centroids, float(np.sqrt(spread / max(1, best.counts.min()))))


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
