"""The few functions of SciPy, statsmodels and arch that are asked for, without the seconds that those import.

Each gives what its model gives, to rounding; the tests hold them together.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def normal_quantile(share: float) -> float:
    """x with P(N(0, 1) <= x) = share, for 0 < share < 1; StatisticsError beyond."""
    return NormalDist().inv_cdf(share)


def two_sided(t: float) -> float:
    """P(|N(0, 1)| >= |t|); null where t is."""
    return math.erfc(abs(t) / math.sqrt(2))


def average_ranks(values: Floats) -> Floats:
    """(n,) ranks from 1 on of (n,) values without nulls; equal values share the mean of theirs."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.diff(first, append=len(values))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(first + 1 + (counts - 1) / 2, counts)
    return ranks


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's correlation of two (n,) series without nulls, neither of them constant."""
    ranks = np.column_stack([average_ranks(a), average_ranks(b)])
    return float(np.asarray(np.corrcoef(ranks, rowvar=False))[1, 0])


def false_discovery(p: Floats) -> Floats:
    """(m,) p-values of (m,) tests, without nulls, corrected after Benjamini and Hochberg (1995).

    The i-th smallest becomes the least of p_j m / j over j >= i, at most 1.
    """
    order = np.argsort(p)
    scaled = p[order] * (len(p) / np.arange(1, len(p) + 1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return np.clip(corrected, 0.0, 1.0)


def circular_block(series: Floats) -> float:
    """Optimal block length of the circular bootstrap for the mean of (n,) values, n >= 16.

    Politis and White, Econometric Reviews 23 (2004), as corrected by Patton, Politis and White, 28 (2009):
    n^(1/3) (2 G^2 / D)^(1/3) with G = sum w |k| g_k, D = 4/3 (sum w g_k)^2, g_k the autocovariances and w the
    flat-top window over twice the lag from which on they are noise.  At most ceil(min(3 n^(1/2), n / 3)).
    """
    n = len(series)
    centred = series - series.mean()
    lags = _window_lags(centred)
    k = np.arange(lags + 1)
    covariance = np.array([centred[lag:] @ centred[: n - lag] for lag in k]) / n
    weighted = np.where(k <= lags / 2, 1.0, 2 * (1 - k / lags)) * covariance
    moment, variance = 2 * (k @ weighted), 2 * weighted.sum() - covariance[0]
    block = (2 * moment**2 / (4 / 3 * variance**2)) ** (1 / 3) * n ** (1 / 3)
    return float(min(block, np.ceil(min(3 * np.sqrt(n), n / 3))))


def _window_lags(centred: Floats) -> int:
    """Twice the lag after which the next few autocorrelations are all insignificant."""
    n = len(centred)
    few = max(5, int(np.log10(n)))
    most = math.ceil(np.sqrt(n)) + few
    bound = 2 * np.sqrt(np.log10(n) / n)
    quiet = 0
    for lag in range(most):
        ahead, behind = centred[lag + 1 :], centred[: -(lag + 1)]
        size = np.sqrt((ahead @ ahead) * (behind @ behind))
        quiet = quiet + 1 if abs(centred[lag:] @ centred[: n - lag]) / size < bound else 0
        if quiet == few:
            return min(2 * max(lag + 1 - few, 1), most)
    return most


def least_squares(design: Floats, y: Floats, lags: int) -> tuple[Floats, Floats]:
    """(k,) coefficients of y (n,) on design (n, k), and their (k, k) Newey-West covariance.

    (X'X)^-1 S (X'X)^-1 with S the Bartlett sum over `lags` of the scores x_t e_t, without any factor for
    small samples.
    """
    inverse = np.linalg.pinv(design, rcond=1e-15)
    coefficients = inverse @ y
    scores = design * (y - design @ coefficients)[:, None]
    total = scores.T @ scores
    for lag in range(1, lags + 1):
        shifted = scores[lag:].T @ scores[:-lag]
        total += (1 - lag / (lags + 1)) * (shifted + shifted.T)
    bread = inverse @ inverse.T
    return coefficients, bread @ total @ bread.T
