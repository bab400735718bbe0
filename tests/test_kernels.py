"""Every kernel against plain Python: loops, exact integers and fractions."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clusterlob_gpu import kernels
from clusterlob_gpu.kernels import NO_CLUSTER, NO_LEVEL, NO_TIME

quick = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
INF = math.inf


def ints(*values: int | None) -> np.ndarray:
    return np.array([NO_LEVEL if value is None else value for value in values], np.int64)


def sorted_times(rng: np.random.Generator, n: int, span: int) -> np.ndarray:
    """Sorted times with many ties."""
    return np.sort(rng.integers(0, span, n))


# ---- rolling z-score --------------------------------------------------------------------------------


def z_exact(window: list[float]) -> float:
    """(last - mean) / std with ddof = 1, rounded once: z^2 = (n x - S)^2 (n - 1) / (n (n Q - S^2))."""
    if any(math.isnan(value) for value in window):
        return math.nan
    fractions = [Fraction(value) for value in window]
    scale = math.lcm(*(value.denominator for value in fractions))
    whole = [int(value * scale) for value in fractions]
    n, total, squares = len(whole), sum(whole), sum(value * value for value in whole)
    spread = n * squares - total * total
    if spread == 0:
        return 0.0
    gap = n * whole[-1] - total
    return math.copysign(math.sqrt(Fraction(gap * gap * (n - 1), n * spread)), gap)


def rolling_exact(x: np.ndarray, window: int) -> list[float]:
    values = x.tolist()
    return [
        z_exact(values[i - window + 1 : i + 1]) if i >= window - 1 else math.nan for i in range(len(values))
    ]


def scores(x: np.ndarray, window: int, skip: int = 0) -> np.ndarray:
    out = np.full((len(x), x.shape[1] - skip), -7.0)
    kernels.rolling_z(x, window, skip, out)
    return out


def rolling(x: np.ndarray, window: int) -> np.ndarray:
    return scores(x[None], window)[0]


KINDS = ["level", "outliers", "constant stretches", "nulls", "wild"]


def column(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Columns on which running sums fail."""
    if kind == "level":
        return 1e9 + rng.integers(0, 4, n) * 2.0**-20
    if kind == "outliers":
        return np.where(rng.random(n) < 0.02, 1e12, 1e-3 * rng.integers(1, 9, n))
    if kind == "constant stretches":
        return np.repeat(rng.choice([0.1, 1e9 + 0.1, -1e12], n), rng.integers(1, 60, n))[:n]
    if kind == "nulls":
        return np.where(rng.random(n) < 0.01, math.nan, rng.normal(size=n))
    return np.exp(rng.normal(scale=8, size=n))


@quick
@given(
    st.sampled_from(KINDS),
    st.integers(2, 150),
    st.integers(0, 3),
    st.integers(-2, 2),
    SEEDS,
)
@example("level", 100, 3, 0, 1)
@example("outliers", 2, 3, 1, 1)
def test_rolling_z__equals_exact_fractions(kind: str, window: int, blocks: int, more: int, seed: int) -> None:
    """Within 1e-11 of the exact value at any level, with outliers, at every length around a block's."""
    x = column(kind, max(0, blocks * window + more), np.random.default_rng(seed))
    np.testing.assert_allclose(rolling(x, window), rolling_exact(x, window), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 + 0.1, -1e12, 5e-324])
def test_rolling_z__constant_window_is_exactly_zero(value: float) -> None:
    """Also right after another value has left the window."""
    x = np.full(500, value)
    x[150] = 3e5
    got = rolling(x, 100)
    assert np.isnan(got[:99]).all()
    np.testing.assert_array_equal(got[99:150], 0.0)
    assert abs(got[150]) == pytest.approx(99 / math.sqrt(100), rel=1e-12)
    np.testing.assert_array_equal(got[250:], 0.0)


def test_rolling_z__null_reaches_as_far_as_its_window() -> None:
    x = np.arange(40.0) ** 2
    x[17] = math.nan
    got = np.isnan(rolling(x, 7))
    assert np.flatnonzero(got).tolist() == [*range(6), *range(17, 24)]


@quick
@given(st.integers(1, 6), st.integers(2, 40), st.integers(0, 150), SEEDS)
def test_rolling_z__columns_together_are_as_alone(f: int, window: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.stack([column(rng.choice(KINDS), n, rng) for _ in range(f)])
    together = scores(x, window)
    for j in range(f):
        np.testing.assert_array_equal(together[j], rolling(x[j], window))


@quick
@given(st.integers(2, 40), st.integers(0, 150), st.integers(0, 150), SEEDS)
def test_rolling_z__without_the_first(window: int, n: int, skip: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.stack([column(kind, n, rng) for kind in KINDS])
    np.testing.assert_array_equal(scores(x, window, min(skip, n)), scores(x, window)[:, skip:])


@quick
@given(st.integers(2, 40), st.integers(1, 4), st.integers(1, 3), st.integers(0, 100), SEEDS)
def test_rolling_z__cut_at_a_block_with_the_one_before_in_front(
    window: int, blocks: int, lead: int, more: int, seed: int
) -> None:
    """The same bits, however much of what is before comes in front, and in float32 as well."""
    rng = np.random.default_rng(seed)
    cut, lead = blocks * window, min(lead, blocks) * window
    x = np.stack([column(kind, cut + more, rng) for kind in KINDS])
    piece = np.ascontiguousarray(x[:, cut - lead :])
    np.testing.assert_array_equal(scores(piece, window, lead), scores(x, window)[:, cut:])
    single = np.empty((len(x), more), np.float32)
    kernels.rolling_z(piece, window, lead, single)
    np.testing.assert_array_equal(single, scores(x, window)[:, cut:].astype(np.float32))


def test_rolling_z__input_stays() -> None:
    x = np.random.default_rng(3).normal(size=300)
    before = x.copy()
    rolling(x, 50)
    np.testing.assert_array_equal(x, before)


def moments(x: np.ndarray) -> tuple[float, float]:
    """Mean and sum of squared deviations by `grown`."""
    mean, m2 = 0.0, 0.0
    for i in range(len(x)):
        mean, m2 = kernels.grown(1 / (i + 1), mean, m2, x[i])
    return mean, m2


def merged(n_a: int, a: tuple[float, float], n_b: int, b: tuple[float, float]) -> tuple[float, float]:
    share = n_b / (n_a + n_b)
    return kernels.merged(*a, *b, share, n_a * share)


@quick
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(KINDS), SEEDS)
def test_merged__is_all_values_one_by_one(n_a: int, n_b: int, kind: str, seed: int) -> None:
    """Of values about an anchor, as everywhere."""
    x = np.nan_to_num(column(kind, n_a + n_b, np.random.default_rng(seed)))
    x -= x[0]
    mean, m2 = merged(n_a, moments(x[:n_a]), n_b, moments(x[n_a:]))
    exact = [Fraction(value) for value in x.tolist()]
    want = sum(exact) / len(exact)
    scale = np.abs(x).max()
    assert mean == pytest.approx(float(want), rel=1e-13, abs=1e-13 * scale)
    squares = float(sum((value - want) ** 2 for value in exact))
    assert m2 == pytest.approx(squares, rel=1e-12, abs=1e-12 * scale**2)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e12, 5e-324])
def test_merged__equal_values_have_no_deviations(value: float) -> None:
    for n_a, n_b in ((1, 1), (3, 7), (99, 1)):
        assert merged(n_a, (value, 0.0), n_b, (value, 0.0)) == (value, 0.0)


def test_standardised__by_hand() -> None:
    assert kernels.standardised(7.0, 3.0, 4.0) == 2.0
    assert kernels.standardised(1.0, 3.0, 4.0) == -1.0
    assert kernels.standardised(5.0, 5.0, 0.0) == 0.0
    assert math.isnan(kernels.standardised(5.0, math.nan, math.nan))


@quick
@given(st.integers(0, 30), st.integers(1, 6), SEEDS)
def test_void_nulls__one_null_makes_the_row_null(n: int, f: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = np.where(rng.random((f, n)) < 0.2, math.nan, rng.normal(size=(f, n))).astype(np.float32)
    null = np.isnan(z).any(axis=0)
    want = np.where(null, np.float32(math.nan), z)
    assert kernels.void_nulls(z) == n - null.sum()
    np.testing.assert_array_equal(z, want)


# ---- as-of, changes, order --------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(0, 9), max_size=20), st.integers(-1, 10), st.integers(0, 20), st.integers(0, 20))
def test_last_upto__within_a_range(values: list[int], limit: int, low: int, high: int) -> None:
    times, high = ints(*sorted(values)), min(high, len(values))
    low = min(low, high)
    upto = [j for j in range(low, high) if times[j] <= limit]
    assert kernels.last_upto(times, limit, low, high) == (upto[-1] if upto else low - 1)


@quick
@given(st.integers(0, 40), st.integers(0, 40), st.booleans(), SEEDS)
def test_asof_before__is_the_last_row_before(n: int, m: int, inclusive: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    book_ts, ts = sorted_times(rng, m, 30), sorted_times(rng, n, 30)
    row = np.full(n, -7)
    kernels.asof_before(book_ts, ts, inclusive, row)
    for t, got in zip(ts, row, strict=True):
        before = [j for j, b in enumerate(book_ts) if b < t or (inclusive and b == t)]
        assert got == (before[-1] if before else -1)


@quick
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.booleans(), SEEDS)
def test_asof_before__a_piece_is_as_the_whole(n: int, m: int, cut: int, inclusive: bool, seed: int) -> None:
    """Also a piece that starts late in the day, with the whole day's book."""
    rng = np.random.default_rng(seed)
    book_ts, ts = sorted_times(rng, m, 30), sorted_times(rng, n, 30)
    whole, pieces = np.full(n, -7), np.full(n, -7)
    kernels.asof_before(book_ts, ts, inclusive, whole)
    for part in (slice(None, cut), slice(cut, None)):
        kernels.asof_before(book_ts, ts[part], inclusive, pieces[part])
    assert pieces.tolist() == whole.tolist()


@quick
@given(st.integers(0, 40), st.integers(0, 20), st.integers(1, 15), st.booleans(), SEEDS)
def test_meet_book__first_reason_wins(n: int, m: int, staleness: int, inclusive: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    book_ts, ts = sorted_times(rng, m, 60), sorted_times(rng, n, 60)
    side = rng.integers(0, 4, n).astype(np.uint8)
    row, fate = np.empty(n, np.int64), np.empty(n, np.uint8)
    kept = kernels.meet_book(ts, side, book_ts, staleness, inclusive, row, fate)
    for t, s, code in zip(ts, side, fate, strict=True):
        known = [b for b in book_ts if b < t or (inclusive and b == t)]
        if s > 1:
            assert code == kernels.SIDE_UNKNOWN
        elif not known:
            assert code == kernels.NO_BOOK
        elif t - known[-1] > staleness:
            assert code == kernels.STALE_BOOK
        else:
            assert code == kernels.KEPT
    assert kept == int((fate == kernels.KEPT).sum())


@quick
@given(st.lists(st.integers(0, 3), max_size=20))
def test_take_kept__what_a_mask_takes(fates: list[int]) -> None:
    fate = np.array(fates, np.uint8)
    columns = [
        np.arange(len(fate), dtype=kind) + at
        for at, kind in enumerate((np.int64, np.uint8, np.int64, np.int64, np.int32))
    ]
    kept = [np.zeros(fates.count(kernels.KEPT), column.dtype) for column in columns]
    kernels.take_kept(fate, *columns, *kept)
    for column, found in zip(columns, kept, strict=True):
        assert found.tolist() == [v for v, code in zip(column.tolist(), fates, strict=True) if code == 0]


@quick
@given(st.lists(st.integers(0, 2), max_size=40), st.sampled_from([NO_TIME, 5]), SEEDS)
def test_last_changes__against_search_backwards(values: list[int], since: int, seed: int) -> None:
    ts = sorted_times(np.random.default_rng(seed), len(values), 1000) + 100
    out = np.empty(len(values), np.int64)
    kernels.last_changes(ts, ints(*values), since, out)
    for i in range(len(values)):
        changes = [j for j in range(1, i + 1) if values[j] != values[j - 1]]
        assert out[i] == (ts[changes[-1]] if changes else since)


@quick
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), max_size=6))
def test_is_sorted__is_the_order_of_tuples(rows: list[tuple[int, int, int]]) -> None:
    columns = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    assert kernels.is_sorted(*columns) == (rows == sorted(rows))


# ---- book rows --------------------------------------------------------------------------------------


@quick
@given(
    st.lists(st.lists(st.one_of(st.none(), st.integers(-2, 10**12)), max_size=7), max_size=8),
    st.integers(1, 8),
)
def test_reduce_levels__first_entry_and_sum(lists: list[list[int | None]], depth: int) -> None:
    """Missing and non-positive sizes count nothing; a slice of a longer column starts anywhere."""
    lead = [9, 9]
    values = ints(*lead, *(value for entry in lists for value in entry))
    offsets = np.cumsum([len(lead), *(len(entry) for entry in lists)])
    best, total = np.empty(len(lists), np.int64), np.empty(len(lists), np.int64)
    kernels.reduce_levels(offsets, values, depth, best, total)
    firsts = [entry[0] if entry else None for entry in lists]
    assert best.tolist() == [NO_LEVEL if first is None else first for first in firsts]
    assert total.tolist() == [sum(v for v in entry[:depth] if v is not None and v > 0) for entry in lists]


@pytest.mark.parametrize(
    ("levels", "code"),
    [
        ((10, 11, 1, 1), 0),
        ((None, 11, 1, 1), kernels.EMPTY_SIDE),
        ((10, 11, 1, None), kernels.EMPTY_SIDE),
        ((0, None, 1, 1), kernels.EMPTY_SIDE),
        ((10, 11, 0, 1), kernels.NON_POSITIVE),
        ((-1, 11, 1, 1), kernels.NON_POSITIVE),
        ((12, 11, 1, 0), kernels.NON_POSITIVE),
        ((11, 11, 1, 1), kernels.CROSSED),
        ((12, 11, 1, 1), kernels.CROSSED),
    ],
)
def test_book_fault__by_hand(levels: tuple[int | None, ...], code: int) -> None:
    fault = np.full(1, 9, np.uint8)
    kernels.book_fault(*(ints(level) for level in levels), fault)
    assert fault[0] == code


def test_raw_features__by_hand() -> None:
    """A buy and a sell meet the same row; nothing is known of the second row's changes."""
    known, unknown = [7.0, 2.0, 3.0, 4.0], [8.0, 5.0, 6.0, 1.0]
    touch, log_bid, log_ask, spread = np.array([known, unknown]).T.copy()
    changes = [ints(10, NO_TIME), ints(20, NO_TIME), ints(30, NO_TIME)]
    ts, sign, qty, row = ints(100, 100, 200), np.array([1, -1, 1], np.int8), ints(14, 7, 4), ints(0, 0, 1)
    nan = math.nan
    want = {
        True: [[2, 2, 3, 4, 90, 70], [1, 3, 2, 4, 90, 80], [0.5, 5, 6, 1, nan, nan]],
        False: [[2, 3, 2, 4, 90, 70], [1, 2, 3, 4, 90, 80], [0.5, 6, 5, 1, nan, nan]],
    }
    for own, rows in want.items():
        out = np.empty((6, 3))
        kernels.raw_features(ts, sign, qty, row, touch, log_bid, log_ask, spread, *changes, own, out)
        np.testing.assert_array_equal(out.T, rows)


# ---- clusters ---------------------------------------------------------------------------------------


def distances(x: list[float], centroids: np.ndarray) -> list[Fraction]:
    return [
        sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(x, c.tolist(), strict=True)) for c in centroids
    ]


def unbounded(f: int = 6) -> tuple[np.ndarray, np.ndarray]:
    return np.full(f, -INF), np.full(f, INF)


def with_nulls(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of z of which some have a NaN in one column."""
    null = rng.random(z.shape[1]) < 0.2
    z[rng.integers(0, len(z), null.sum()), np.flatnonzero(null)] = math.nan
    return z


@quick
@given(st.integers(0, 30), st.integers(1, 7), st.sampled_from([INF, 0.5]), SEEDS)
def test_nearest_centroid__first_of_the_nearest(n: int, k: int, bound: float, seed: int) -> None:
    """On a small grid, where distances are exact and ties are many; rows with a NaN have none."""
    rng = np.random.default_rng(seed)
    z = with_nulls(rng.integers(-1, 2, (6, n)).astype(np.float32), rng)
    centroids = rng.integers(-1, 2, (k, 6)) / 2
    label = np.full(n, 99, np.int8)
    kernels.nearest_centroid(z, np.full(6, -bound), np.full(6, bound), centroids, label)
    for row, got in zip(np.clip(z.T, -bound, bound).tolist(), label, strict=True):
        if any(math.isnan(value) for value in row):
            assert got == NO_CLUSTER
        else:
            to_each = distances(row, centroids)
            assert got == to_each.index(min(to_each))


def test_nearest_centroid__tie_goes_to_the_first() -> None:
    z = np.zeros((6, 1), np.float32)
    label = np.full(1, 9)
    kernels.nearest_centroid(z, *unbounded(), np.array([[2.0] * 6, [-1.0] * 6, [1.0] * 6]), label)
    assert label[0] == 1


def test_nearest_centroid__bounds_are_those_of_their_column() -> None:
    z = np.full((6, 1), 9, np.float32)
    high = np.arange(6.0)
    label = np.full(1, 9)
    kernels.nearest_centroid(z, np.full(6, -1.0), high, np.array([[9.0] * 6, high]), label)
    assert label[0] == 1


@quick
@given(st.integers(0, 60), st.integers(1, 7), st.sampled_from([INF, 1.0]), SEEDS)
def test_lloyd_partial__sums_of_clipped_rows(n: int, k: int, bound: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = with_nulls(rng.normal(size=(6, n)).astype(np.float32), rng)
    centroids = rng.normal(size=(k, 6))
    sums, counts = np.ones((k, 6)), np.ones(k, np.int64)
    inertia = kernels.lloyd_partial(z, np.full(6, -bound), np.full(6, bound), centroids, sums, counts)
    want_sums, want_counts, nearest = np.ones((k, 6)), Counter(range(k)), []
    for row in np.clip(z.T.astype(float), -bound, bound).tolist():
        if any(math.isnan(value) for value in row):
            continue
        to_each = distances(row, centroids)
        nearest.append(float(min(to_each)))
        c = to_each.index(min(to_each))
        want_sums[c] += row
        want_counts[c] += 1
    np.testing.assert_allclose(sums, want_sums, rtol=1e-12, atol=1e-12)
    assert counts.tolist() == [want_counts[c] for c in range(k)]
    assert inertia == pytest.approx(math.fsum(nearest), rel=1e-12)


@quick
@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(1, 7), SEEDS)
def test_lloyd_partial__pieces_add_up_to_the_whole(n: int, cut: int, k: int, seed: int) -> None:
    """Sums have the same bits, wherever a day is cut."""
    rng = np.random.default_rng(seed)
    z = with_nulls(rng.normal(size=(6, n)).astype(np.float32), rng)
    centroids, bounds = rng.normal(size=(k, 6)), (np.full(6, -1.5), np.full(6, 1.5))
    whole, pieces = ((np.zeros((k, 6)), np.zeros(k, np.int64)) for _ in range(2))
    inertia = kernels.lloyd_partial(z, *bounds, centroids, *whole)
    parts = [
        kernels.lloyd_partial(np.ascontiguousarray(part), *bounds, centroids, *pieces)
        for part in (z[:, :cut], z[:, cut:])
    ]
    np.testing.assert_array_equal(pieces[0], whole[0])
    np.testing.assert_array_equal(pieces[1], whole[1])
    assert sum(parts) == pytest.approx(inertia, rel=1e-12)


def test_clip_columns__null_stays_null() -> None:
    z = np.array([[-5.0, 0.5, 5.0, math.nan]] * 6, np.float32)
    low, high = np.linspace(-2, -1, 6, dtype=np.float32), np.linspace(1, 2, 6, dtype=np.float32)
    out = np.empty_like(z)
    kernels.clip_columns(z, low, high, out)
    for j in range(6):
        np.testing.assert_array_equal(out[j], [low[j], 0.5, high[j], np.float32(math.nan)])


@quick
@given(st.floats(width=32, allow_nan=False), st.floats(width=32, allow_nan=False))
def test_ordered_bits__sort_like_the_floats(a: float, b: float) -> None:
    low, high = (kernels.ordered_bits(bits) for bits in np.array([a, b], np.float32).view(np.uint32))
    assert (low < high) == ((a, math.copysign(1, a)) < (b, math.copysign(1, b)))


@pytest.mark.parametrize("sign", [1, -1])
def test_counts_of_bits__leave_out_nan(sign: int) -> None:
    values = np.copysign(np.array([math.nan, 1.5, math.inf, math.nan], np.float32), np.float32(sign))
    bits = values.view(np.uint32)
    assert [bool(kernels.is_nan_bits(each)) for each in bits] == [True, False, False, True]
    high = np.zeros(1 << 16, np.int64)
    kernels.count_high_bits(bits, high)
    assert high.sum() == 2
    for bin_ in {int(kernels.ordered_bits(each)) >> 16 for each in bits}:
        low = np.zeros(1 << 16, np.int64)
        kernels.count_low_bits(bits, np.uint32(bin_), low)
        assert low.sum() == high[bin_]


@quick
@given(st.lists(st.floats(width=32, allow_nan=False), max_size=50))
def test_counts_of_bits__sort_like_floats(values: list[float]) -> None:
    """High and low halves together are the rank of every float, -0.0 right before 0.0."""
    bits = np.array(values, np.float32).view(np.uint32)
    high = np.zeros(1 << 16, np.int64)
    kernels.count_high_bits(bits, high)
    assert high.sum() == len(values)
    found = []
    for bin_ in np.flatnonzero(high):
        low = np.zeros(1 << 16, np.int64)
        kernels.count_low_bits(bits, np.uint32(bin_), low)
        assert low.sum() == high[bin_]
        for position in np.flatnonzero(low):
            ordered = int(bin_) << 16 | int(position)
            raw = ordered & 0x7FFFFFFF if ordered >> 31 else ~ordered & 0xFFFFFFFF
            found += [float(np.array(raw, np.uint32).view(np.float32))] * int(low[position])
    assert found == sorted(values)


@quick
@given(st.integers(0, 40), st.integers(0, 40), SEEDS)
def test_cluster_sums__per_label(n: int, cut: int, seed: int) -> None:
    """In pieces as in one; the second piece adds.  Rows without a cluster count nowhere."""
    rng = np.random.default_rng(seed)
    x, label = rng.integers(-9, 9, (6, n)).astype(float), rng.integers(NO_CLUSTER, 3, n)
    sums = np.zeros((3, 6))
    for part in (slice(None, cut), slice(cut, None)):
        kernels.cluster_sums(np.ascontiguousarray(x[:, part]), label[part], sums)
    for c in range(3):
        np.testing.assert_array_equal(sums[c], x[:, label == c].sum(axis=1))


# ---- sums over time ---------------------------------------------------------------------------------


@quick
@given(
    st.integers(0, 60),
    st.integers(0, 60),
    st.sampled_from([10, 2**31 - 1]),
    st.sampled_from([1, -1, 0]),
    SEEDS,
)
def test_bucket_flow__exact_beyond_2_to_the_63(
    n: int, cut: int, scale: int, one_side: int, seed: int
) -> None:
    """Single notionals reach 2^62, so that three of one sign already pass 2^63; in two pieces."""
    rng = random.Random(seed)
    start, width = 1_000, 50
    rows = [
        (
            start + rng.randrange(200),
            one_side or rng.choice((1, -1)),
            rng.randint(scale // 2, scale),
            rng.randint(scale // 2, scale),
            rng.randrange(NO_CLUSTER, 3),
        )
        for _ in range(n)
    ]
    rows.sort(key=lambda row: row[0])
    ts, sign, price, qty, label = (np.array([row[i] for row in rows], np.int64) for i in range(5))
    size, high, low = (np.zeros((4, 3), np.int64) for _ in range(3))
    count = np.zeros((4, 3, 2), np.int64)
    tables = size, count, high, low
    for part in (slice(None, cut), slice(cut, None)):
        trades = (column[part] for column in (ts, sign.astype(np.int8), price, qty, label))
        kernels.bucket_flow(*trades, start, width, *tables)
    for b in range(4):
        for c in range(3):
            mine = [row for row in rows if (row[0] - start) // width == b and row[4] == c]
            assert size[b, c] == sum(s * q for _, s, _, q, _ in mine)
            assert count[b, c].tolist() == [len(mine), sum(s for _, s, *_ in mine)]
            notional = int(high[b, c]) * 2**32 + int(low[b, c])
            assert notional == sum(s * p * q for _, s, p, q, _ in mine)


def test_bucket_flow__three_large_buys_by_hand() -> None:
    big = ints(2**31 - 1, 2**31 - 1, 2**31 - 1)
    size, high, low, count = *(np.zeros((1, 1), np.int64) for _ in range(3)), np.zeros((1, 1, 2), np.int64)
    sign = np.ones(3, np.int8)
    kernels.bucket_flow(ints(0, 1, 2), sign, big, big, ints(0, 0, 0), 0, 10, size, count, high, low)
    assert int(high[0, 0]) * 2**32 + int(low[0, 0]) == 3 * (2**31 - 1) ** 2 > 2**63


@quick
@given(
    st.integers(0, 30),
    st.integers(0, 30),
    st.lists(st.integers(0, 40), max_size=5),
    st.integers(1, 40),
    st.integers(0, 30),
    SEEDS,
)
def test_markout_sums__against_search(
    n: int, m: int, horizons: list[int], staleness: int, cut: int, seed: int
) -> None:
    """Horizons in any order, in two pieces; rows without a cluster, or before the book, count nowhere."""
    rng = np.random.default_rng(seed)
    book_ts, ts = sorted_times(rng, m, 100), sorted_times(rng, n, 100)
    mid2 = rng.integers(2_000, 2_010, m)
    sign, label = rng.choice([-1, 1], n).astype(np.int8), rng.integers(NO_CLUSTER, 2, n)
    row = rng.integers(0, max(m, 1), n)
    last_ts, width, h = 110, 25, len(horizons)
    count, total = np.zeros((4, 2, h), np.int64), np.zeros((4, 2, h))
    columns = ts, sign, row, label
    outcome = book_ts, mid2, last_ts, staleness, np.array(horizons, np.int64), 0, width, count, total
    for part in (slice(None, cut), slice(cut, None)):
        kernels.markout_sums(*(column[part] for column in columns), *outcome)
    moves: dict[tuple[int, int, int], list[float]] = {at: [] for at in np.ndindex(4, 2, h)}
    for t, s, r, c in zip(*(column.tolist() for column in columns), strict=True):
        for i, horizon in enumerate(horizons):
            before = [j for j, b in enumerate(book_ts) if b < t + horizon]
            known = t + horizon <= last_ts and before and t + horizon - book_ts[before[-1]] <= staleness
            if known and c != NO_CLUSTER:
                met, then = int(mid2[r]), int(mid2[before[-1]])
                moves[t // width, c, i].append(float(Fraction(10_000 * s * (then - met), met)))
    for at, values in moves.items():
        assert count[at] == len(values)
        assert total[at] == pytest.approx(math.fsum(values), rel=1e-12, abs=1e-12)


@quick
@given(st.integers(0, 200), st.integers(0, 200), SEEDS)
def test_markout_sums__pieces_add_up_to_the_whole(n: int, cut: int, seed: int) -> None:
    """The same bits, and every horizon as if it were the only one."""
    rng = np.random.default_rng(seed)
    book_ts, ts = sorted_times(rng, 50, 1000), sorted_times(rng, n, 1000)
    sign, row, label = (rng.choice([-1, 1], n), rng.integers(0, 50, n), rng.integers(0, 3, n))
    mid2, horizons = rng.integers(2_000, 2_010, 50), np.array([300, 0, 7])
    tables = []
    for parts, those in (
        ((slice(None),), [horizons]),
        ((slice(None, cut), slice(cut, None)), [horizons]),
        ((slice(None),), [horizons[i : i + 1] for i in range(3)]),
    ):
        together = []
        for each in those:
            count, total = np.zeros((4, 3, len(each)), np.int64), np.zeros((4, 3, len(each)))
            for part in parts:
                columns = (column[part] for column in (ts, sign, row, label))
                kernels.markout_sums(*columns, book_ts, mid2, 900, 100, each, 0, 250, count, total)
            together.append((count, total))
        tables.append([np.concatenate(column, axis=2) for column in zip(*together, strict=True)])
    for count, total in tables[1:]:
        np.testing.assert_array_equal(count, tables[0][0])
        np.testing.assert_array_equal(total, tables[0][1])
