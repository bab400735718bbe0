"""Size thresholds: exact quantiles of the notionals of a trailing window, for every bar of a day.

A notional is the integer price_int * qty_int in the symbol's common units.  Many trades share one and
sit exactly on a threshold, so thresholds are exact rationals and comparing with them is a comparison of
integers: a >= T is a >= ceil(T), a <= T is a <= floor(T).

A day is reduced once to its `Sizes`: the notionals in order of time, the log-linear bin of each, and
where the bars begin.  The thresholds of a day come from the sizes of the days that its windows touch
(`ThresholdRule.days`) and from nothing else: counts per bin slide over the window and give the bin that
holds a quantile; the rows of those few bins are then told apart by their next ten bits, and at last by
value.  All windows and quantiles share the bins and the rows told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import Any, Literal

import numpy as np

from clusterlob_gpu.backend import CPU, Backend
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.flow_kernels import N_BINS, SUB_BINS
from clusterlob_gpu.schema import US_PER_DAY

NEVER_LARGE, NEVER_SMALL = 2**63 - 1, -1
"""Integer bounds of a bar whose thresholds are null: no notional is large, none is small."""


@dataclass(frozen=True)
class ThresholdRule:
    """Which quantiles, of which windows, how often, and when they are null.  Times in us."""

    width: int
    """Bar width."""
    windows: tuple[int, ...]
    """Lengths W of the trailing windows, any multiples of 1 us."""
    quantiles: tuple[Fraction, ...]
    """Quantiles in [0, 1], exact: Fraction("0.85")."""
    refresh: Literal["day", "bar"] = "day"
    """day: window [D - W, D) for all bars of day D; bar: [b - W, b) for the bar that starts at b."""
    min_trades: int = 5000
    """Null where the window holds fewer (an empty window is always null)."""
    require_full_window: bool = False
    """Null where the window touches a day that the lake has no trades partition for."""

    def times(self, start: int) -> np.ndarray:
        """Ends of the windows of the day that begins at `start`."""
        stop = start + US_PER_DAY if self.refresh == "bar" else start + 1
        return np.arange(start, stop, self.width, dtype=np.int64)

    def days(self, start: int) -> list[int]:
        """Starts of the days that the windows of a day touch, in order; what `day_cuts` wants to see."""
        times = self.times(start)
        first = int(times[0]) - max(self.windows)
        return list(range(first // US_PER_DAY * US_PER_DAY, int(times[-1]), US_PER_DAY))


@dataclass(frozen=True)
class Sizes:
    """A day's notionals in order of time, ready to be counted in any window.

    One value per notional is an array of the backend, the rest is the host's.
    """

    notional: Any
    """(n,) int64."""
    bins: Any
    """(n,) uint16: `flow_kernels.size_bin` of each."""
    totals: np.ndarray
    """(N_BINS,) int64: notionals per bin."""
    times: np.ndarray
    """(m,) int64: times (us) at which a window may begin or end, from the start of the day."""
    rows: np.ndarray
    """(m,) int64: first row at or after each of these times."""


def phases(width: int, windows: Sequence[int]) -> list[int]:
    """Times (us) after the start of a bar at which a window may begin or end; [0] for whole bars."""
    return sorted({0, *(-window % width for window in windows)})


def day_sizes(
    ts: Any, notional: Any, *, start: int, width: int, windows: Sequence[int], on: Backend = CPU
) -> Sizes:
    """Sizes of the trades or orders of the day that begins at `start`, given in order of time (us).

    `width` is that of the bars, `windows` the lengths that may be asked for.  Raises LakeError for a
    negative notional.
    """
    if len(notional) and notional.min() < 0:
        at = int(on.xp.argmax(notional < 0))
        raise LakeError(
            f"trade {at} of the day at ts_local_us = {int(ts[at])}: notional {int(notional[at])} is "
            "negative; prices and sizes must not be, ingest the day again"
        )
    bars = np.arange(start, start + US_PER_DAY, width, dtype=np.int64)
    times = (bars[:, None] + np.array(phases(width, windows), np.int64)).ravel()
    bins, totals = on.xp.empty(len(notional), np.uint16), np.zeros(N_BINS, np.int64)
    on.flow_kernels.bin_sizes(notional, bins, totals)
    rows = on.to_host(on.xp.searchsorted(ts, on.xp.asarray(times))).astype(np.int64)
    return Sizes(notional, bins, totals, times, rows)


@dataclass(frozen=True)
class Cuts:
    """Thresholds of every bar of a day from windows of one length."""

    ts: np.ndarray
    """(n_bars,) int64: bar starts, us."""
    n: np.ndarray
    """(n_bars,) int64: trades in the window."""
    quantiles: tuple[Fraction, ...]
    exact: np.ndarray
    """(n_bars, n_quantiles) of Fraction in common integer units, None where null."""

    def _column(self, quantile: Fraction) -> np.ndarray:
        return self.exact[:, self.quantiles.index(quantile)]

    def large_from(self, quantile: Fraction) -> np.ndarray:
        """(n_bars,) int64: least notional a with a >= threshold, NEVER_LARGE where it is null."""
        values = [NEVER_LARGE if cut is None else ceil(cut) for cut in self._column(quantile)]
        return np.array(values, np.int64)

    def small_to(self, quantile: Fraction) -> np.ndarray:
        """(n_bars,) int64: largest notional a with a <= threshold, NEVER_SMALL where it is null."""
        values = [NEVER_SMALL if cut is None else floor(cut) for cut in self._column(quantile)]
        return np.array(values, np.int64)

    def real(self, quantile: Fraction, unit: Fraction) -> np.ndarray:
        """(n_bars,) float64: the float nearest to threshold * unit, NaN where it is null."""
        values = [np.nan if cut is None else float(cut * unit) for cut in self._column(quantile)]
        return np.array(values, np.float64)


@dataclass
class _Search:
    """The ranks looked for in the windows of one length, and how far they are told apart."""

    low: np.ndarray
    high: np.ndarray
    """Window edges, as numbers of edges."""
    n: np.ndarray
    first: np.ndarray
    """(n_windows, 2 n_quantiles): least key among which `rank` counts."""
    rank: np.ndarray

    def advance(self, key: Any, rows: np.ndarray, count: np.ndarray, on: Backend) -> None:
        """Replace first and rank by the key that holds each rank, and the rank within it.

        `rows` is where the edges lie in `key`, `count` the rows per key in the first window.
        """
        rank = self.rank.copy()
        on.flow_kernels.sliding_ranks(
            key, rows[self.low], rows[self.high], self.first, rank, count, self.first, self.rank
        )

    def advance_all(self, key: Any, rows: np.ndarray, n_keys: int, on: Backend) -> None:
        """`advance`, counting the first window row by row."""
        count = np.zeros(n_keys, np.int64)
        on.flow_kernels.count_keys(key[rows[self.low[0]] : rows[self.high[0]]], count)
        self.advance(key, rows, count, on)

    def restart(self, number: np.ndarray, least: np.ndarray) -> None:
        """Pass on to finer keys: key k holds those from least[number[k]] on."""
        self.first = np.where(self.rank >= 0, least[np.maximum(number[self.first], 0)], 0)


def day_cuts(
    days: Mapping[int, Sizes], start: int, rule: ThresholdRule, *, on: Backend = CPU
) -> dict[int, Cuts]:
    """Thresholds of the bars of the day that begins at `start`, by window length.

    quantile q of the n notionals x_0 <= ... <= x_(n-1) of the window: with h = (n - 1) q and
    k = floor(h), x_k + (h - k)(x_(k+1) - x_k), an exact rational.  `days` holds the sizes by day start;
    a day of `rule.days(start)` that is not in it has no partition in the lake (a day with a partition
    but no trades has empty sizes).  Null as `ThresholdRule` says.
    """
    held = [(day, days[day]) for day in rule.days(start) if day in days]
    times = np.concatenate([sizes.times for _, sizes in held] + [[NEVER_LARGE]]).astype(np.int64)
    rows = _edges([(sizes.rows, len(sizes.notional)) for _, sizes in held])
    ends = rule.times(start)
    searches = {window: _search(ends, window, times, rows, days, rule) for window in rule.windows}
    values = _values([sizes for _, sizes in held], rows, list(searches.values()), on)
    return {
        window: _cuts(start, search, found, rule)
        for (window, search), found in zip(searches.items(), values, strict=True)
    }


def _search(
    ends: np.ndarray,
    window: int,
    times: np.ndarray,
    rows: np.ndarray,
    days: Mapping[int, Sizes],
    rule: ThresholdRule,
) -> _Search:
    low, high = (np.searchsorted(times, at) for at in (ends - window, ends))
    n = rows[high] - rows[low]
    rank = np.full((len(ends), 2 * len(rule.quantiles)), -1, np.int64)
    for i, (end, size) in enumerate(zip(ends.tolist(), n.tolist(), strict=True)):
        touched = range((end - window) // US_PER_DAY * US_PER_DAY, end, US_PER_DAY)
        short = size < max(rule.min_trades, 1)
        if short or (rule.require_full_window and not all(day in days for day in touched)):
            continue
        for t, q in enumerate(rule.quantiles):
            rank[i, 2 * t] = floor((size - 1) * q)
            rank[i, 2 * t + 1] = ceil((size - 1) * q)
    return _Search(low, high, n, np.zeros_like(rank), rank)


def _values(days: list[Sizes], rows: np.ndarray, searches: list[_Search], on: Backend) -> list[np.ndarray]:
    """The notional at every wanted rank, (n_windows, 2 n_quantiles) int64 per search; 0 where none is."""
    bins = _end_to_end([sizes.bins for sizes in days], np.uint16, on)
    for search in searches:
        counts = _bin_counts(days, rows[search.low[0]], rows[search.high[0]], on)
        search.advance(bins, rows, counts, on)
    marked, number = _numbers(searches, N_BINS)
    if not len(marked):
        return [search.first for search in searches]

    kept = [_keep(sizes.bins, sizes.notional, number, sizes.rows, on) for sizes in days]
    bins = _end_to_end([part for part, _, _ in kept], np.uint16, on)
    size = _end_to_end([part for _, part, _ in kept], np.int64, on)
    rows = _edges([(edges, len(part)) for part, _, edges in kept])
    key = on.xp.empty(len(size), np.int64)
    on.flow_kernels.sub_keys(size, bins, number, key)
    for search in searches:
        search.restart(number, np.arange(len(marked)) * SUB_BINS)
        search.advance_all(key, rows, len(marked) * SUB_BINS, on)

    marked, number = _numbers(searches, len(marked) * SUB_BINS)
    key, size, rows = _keep(key, size, number, rows, on)
    distinct, example, place = on.xp.unique(size, return_index=True, return_inverse=True)
    # Keys rise with the size, so the distinct sizes of a key are neighbours.
    least, distinct = np.searchsorted(on.to_host(key[example]), marked), on.to_host(distinct)
    for search in searches:
        search.restart(number, least)
        search.advance_all(place, rows, len(distinct), on)
    return [distinct[search.first] for search in searches]


def _end_to_end(parts: list[Any], dtype: type, on: Backend) -> Any:
    return on.xp.concatenate([on.xp.empty(0, dtype), *parts])


def _edges(parts: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """Rows of the edges of days laid end to end, from those within each day and its number of rows."""
    ends = np.cumsum([0, *(n for _, n in parts)])
    moved = [rows + at for (rows, _), at in zip(parts, ends[:-1], strict=True)]
    return np.concatenate([*moved, ends[-1:]])


def _bin_counts(days: list[Sizes], low: int, high: int, on: Backend) -> np.ndarray:
    """Notionals per bin among the rows [low, high) of the days end to end."""
    count, at = np.zeros(N_BINS, np.int64), 0
    for sizes in days:
        n = len(sizes.bins)
        first, last = max(low - at, 0), min(high - at, n)
        if first == 0 and last == n:
            count += sizes.totals
        elif first < last:
            on.flow_kernels.count_keys(sizes.bins[first:last], count)
        at += n
    return count


def _numbers(searches: list[_Search], n_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys that hold a wanted rank, rising, and the place of every key among them (-1 if not there)."""
    marked = np.unique(np.concatenate([search.first[search.rank >= 0] for search in searches]))
    number = np.full(n_keys, -1, np.int64)
    number[marked] = np.arange(len(marked))
    return marked, number


def _keep(
    key: Any, size: Any, number: np.ndarray, rows: np.ndarray, on: Backend
) -> tuple[Any, Any, np.ndarray]:
    """Rows whose key has a number, and where the edges fall among them."""
    kept_key, kept_size, kept_rows = on.xp.empty_like(key), on.xp.empty_like(size), np.empty_like(rows)
    n = on.flow_kernels.keep_marked(key, size, number, rows, kept_key, kept_size, kept_rows)
    return kept_key[:n].copy(), kept_size[:n].copy(), kept_rows


def _cuts(start: int, search: _Search, values: np.ndarray, rule: ThresholdRule) -> Cuts:
    """Interpolate between neighbouring ranks, and give every bar of the day its row."""
    exact = np.full((len(values), len(rule.quantiles)), None, dtype=object)
    for i, t in zip(*np.nonzero(search.rank[:, ::2] >= 0), strict=True):
        below, above = (int(value) for value in values[i, 2 * t : 2 * t + 2])
        place = (int(search.n[i]) - 1) * rule.quantiles[t]
        exact[i, t] = below + (place - floor(place)) * (above - below)
    bars = np.arange(start, start + US_PER_DAY, rule.width, dtype=np.int64)
    each = len(bars) // len(values)
    return Cuts(bars, np.repeat(search.n, each), rule.quantiles, np.repeat(exact, each, axis=0))
