"""K-means over days, its clusters' names, exact quantiles, and model.json."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clusterlob_gpu import clustering, starts
from clusterlob_gpu.clustering import Bounds, Fit, Model
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.schema import FEATURES, Z_FEATURES

quick = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
CENTRES = np.array([[0, 0, 0, 0, 2, 2], [1, 2, -2, 0, -1, 0], [-1, -2, 2, 0.5, 0, -1]], float)


def blobs(n: int, seed: int, spread: float = 0.5) -> np.ndarray:
    """Rows (6, n) float32 around CENTRES."""
    rng = np.random.default_rng(seed)
    rows = CENTRES[rng.integers(0, 3, n)] + spread * rng.normal(size=(n, 6))
    return np.ascontiguousarray(rows.T.astype(np.float32))


def fit_days(days: list[np.ndarray], start: np.ndarray, bounds: Bounds | None = None) -> Fit:
    held = bounds or Bounds.none()
    return clustering.lloyd(start, lambda centres: [clustering.partial(z, held, centres) for z in days])


def cut(z: np.ndarray, at: list[int]) -> list[np.ndarray]:
    return [np.ascontiguousarray(part) for part in np.split(z, sorted(at), axis=1)]


def centroids_of(*rows: tuple[float, float, float]) -> np.ndarray:
    """Centroids from (z_sbs, z_obs, z_t_m)."""
    table = np.zeros((len(rows), 6))
    table[:, [FEATURES.index(name) for name in ("sbs", "obs", "t_m")]] = rows
    return table


def model_of(centroids: np.ndarray, **more: Any) -> Model:
    counts = np.arange(1, len(centroids) + 1)
    fit = Fit(centroids, counts, 12.5, 4, True)
    where = {
        "symbol": "A",
        "exchange": "x",
        "train_days": ["2024-05-01"],
        "features": {"window": 100},
        "fitted": {"k": len(centroids)},
    }
    return clustering.make_model(fit, 0.0, more.pop("bounds", Bounds.none()), **(where | more))


# ---- quantiles --------------------------------------------------------------------------------------


def exact_quantile(values: list[float], q: float) -> float:
    """Linear interpolation between order statistics, in fractions but for the float position."""
    ranked, position = sorted(values), q * (len(values) - 1)
    left = math.floor(position)
    right = min(left + 1, len(ranked) - 1)
    return float(
        Fraction(ranked[left])
        + (Fraction(ranked[right]) - Fraction(ranked[left])) * (Fraction(position) - left)
    )


@quick
@given(
    st.lists(
        st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40]),
            st.floats(-1e6, 1e6, width=32),
        ),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from([(0.0, 1.0), (0.01, 0.99), (0.25, 0.5), (1 / 3, 0.9)]),
    st.lists(st.integers(0, 60), max_size=3),
)
@example([-0.0, 0.0], (0.0, 1.0), [1])
def test_winsor_bounds__are_exact_quantiles(
    values: list[float], quantiles: tuple[float, float], at: list[int]
) -> None:
    """Of all days together, however they are cut, within one rounding; also those of numpy."""
    z = np.array([np.roll(np.array(values, np.float32) * (-1) ** j, j) for j in range(6)])
    days = cut(z, [min(i, len(values)) for i in at])
    high = np.sum([clustering.high_counts(day) for day in days], axis=0)
    bounds = clustering.winsor_bounds(
        quantiles, high, lambda bins: np.sum([clustering.low_counts(day, bins) for day in days], axis=0)
    )
    for q, got in zip(quantiles, (bounds.low, bounds.high), strict=True):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, [exact_quantile(row.tolist(), q) for row in z], rtol=1e-15, atol=0)
        np.testing.assert_allclose(got, np.quantile(z.astype(float), q, axis=1), rtol=1e-15, atol=1e-300)


def test_winsor_bounds__at_an_order_statistic_it_is_that_value() -> None:
    z = blobs(1001, 5)
    bounds = clustering.winsor_bounds(
        (0.1, 0.75), clustering.high_counts(z), lambda bins: clustering.low_counts(z, bins)
    )
    np.testing.assert_array_equal(bounds.low, np.sort(z, axis=1)[:, 100])
    np.testing.assert_array_equal(bounds.high, np.sort(z, axis=1)[:, 750])


def test_bounds__clip_keeps_type_and_input() -> None:
    z = blobs(50, 1)
    before = z.copy()
    bounds = Bounds(np.full(6, -1.0), np.full(6, 0.5))
    got = bounds.clip(z)
    np.testing.assert_array_equal(got, np.clip(z, np.float32(-1), np.float32(0.5)))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(z, before)
    np.testing.assert_array_equal(Bounds.none().clip(z), z)


# ---- the fit ----------------------------------------------------------------------------------------


def lloyd_by_hand(z: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Assign, average, repeat until nothing is assigned anew."""
    rows, labels = z.T.astype(float), None
    while True:
        new = ((rows[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
        if labels is not None and (new == labels).all():
            return centres, labels
        labels = new
        centres = np.array(
            [rows[labels == c].mean(axis=0) if (labels == c).any() else old for c, old in enumerate(centres)]
        )


@pytest.mark.parametrize("k", [2, 3, 5])
def test_lloyd__equals_assign_and_average(k: int) -> None:
    z = blobs(2_000, 8)
    start = z[:, :k].T.astype(float)
    fit = fit_days([z], start)
    centres, labels = lloyd_by_hand(z, start)
    np.testing.assert_allclose(fit.centroids, centres, atol=1e-3)
    np.testing.assert_array_equal(fit.counts, np.bincount(labels, minlength=k))
    assert fit.converged
    assert fit.counts.sum() == 2_000


@quick
@given(st.lists(st.integers(0, 600), max_size=6), SEEDS)
def test_lloyd__is_independent_of_the_cut(at: list[int], seed: int) -> None:
    """1e-12 for any cut, days without rows included; bitwise for the same cut."""
    z = blobs(600, seed)
    start = z[:, [0, 200, 400]].T.astype(float)
    whole, parts, again = fit_days([z], start), fit_days(cut(z, at), start), fit_days(cut(z, at), start)
    np.testing.assert_allclose(parts.centroids, whole.centroids, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(parts.counts, whole.counts)
    assert parts.inertia == pytest.approx(whole.inertia, rel=1e-12)
    np.testing.assert_array_equal(again.centroids, parts.centroids)
    assert again.inertia == parts.inertia


def test_lloyd__centre_without_rows_stays() -> None:
    z = blobs(300, 2)
    start = np.vstack([z[:, :2].T, np.full(6, 1e3)]).astype(float)
    fit = fit_days([z], start)
    np.testing.assert_array_equal(fit.centroids[2], start[2])
    assert fit.counts[2] == 0


@pytest.mark.parametrize("bound", [math.inf, 1.5])
def test_engines__sklearn_and_lloyd_reach_the_same(bound: float) -> None:
    z = blobs(5_000, 11, spread=1.0)
    bounds = Bounds(np.full(6, -bound), np.full(6, bound))
    start = starts.start(bounds.clip(z), 3, 7, 5).centres
    mine = fit_days(cut(z, [700, 701, 3_000]), start, bounds)
    theirs = clustering.fit_merged(bounds.clip(z), start)
    np.testing.assert_allclose(theirs.centroids, mine.centroids, atol=1e-3)
    assert theirs.inertia == pytest.approx(mine.inertia, rel=1e-6)
    assert theirs.counts.sum() == mine.counts.sum() == 5_000
    assert np.abs(theirs.counts - mine.counts).max() <= 5


def test_start__find_planted_centres_and_depend_on_the_seed_alone() -> None:
    z = blobs(6_000, 3, spread=0.2)
    first, again = (starts.start(z, 3, 7, 5).centres for _ in range(2))
    np.testing.assert_array_equal(first, again)
    order = np.linalg.norm(first[:, None] - CENTRES[None], axis=2).argmin(axis=0)
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_allclose(first[order], CENTRES, atol=0.03)


def test_sample_rows__share_of_the_day_and_seed() -> None:
    limit = starts.SAMPLE_ROWS
    assert starts.sample_rows(50, limit, 7, 1).tolist() == list(range(50))
    assert len(starts.sample_rows(0, limit * 4, 7, 1)) == 0
    assert len(starts.sample_rows(1, limit * 4, 7, 1)) == 1
    rows = starts.sample_rows(limit, limit * 4, 7, 1)
    assert len(rows) == limit // 4
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, starts.sample_rows(limit, limit * 4, 7, 1))
    assert (rows != starts.sample_rows(limit, limit * 4, 7, 2)).any()
    assert (rows != starts.sample_rows(limit, limit * 4, 8, 1)).any()


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_plus_plus__picks_distinct_rows_and_no_more_than_there_are(distinct: int) -> None:
    """A hundred copies of each row: chosen centres are never equal."""
    rows = np.repeat(CENTRES[:distinct], 100, axis=0).T
    for seed in range(20):
        centres = starts.plus_plus(rows.astype(np.float32), 3, np.random.default_rng(seed))
        assert len(centres) == distinct
        assert sorted(map(tuple, centres)) == sorted(map(tuple, CENTRES[:distinct]))


def test_start__fewer_distinct_rows_than_k() -> None:
    rows = np.repeat(CENTRES[:2], 50, axis=0).T.astype(np.float32)
    with pytest.raises(InputError, match=r"k = 3: the training days have fewer than 3 distinct .* in 100"):
        starts.start(rows, 3, 7, 5)
    assert InputError.exit_code == 2


# ---- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "numbers"),
    [
        ([(1, 0, 0), (0, 1, 9)], [1, 2]),
        ([(0, 1, 9), (1, 0, 0)], [2, 1]),
        ([(0, 0, 1), (2, 0, 0), (0, 2, 0)], [0, 1, 2]),
        ([(0, 2, 5), (0, 0, -3), (2, 0, 7)], [2, 0, 1]),
        ([(0, 0, 1), (2, 0, 0), (0, 2, 0), (0, 0, 3)], [3, 1, 2, 0]),
        ([(1, 0, 1), (2, 0, 0), (0, 2, 0), (1, 0, 3), (0, 1, 2)], [4, 1, 2, 0, 3]),
        ([(0, 0, -2), (0, 0, -1), (9, 0, 0), (0, 0, 4), (0, 9, 0), (0, 0, 1)], [5, 4, 1, 0, 2, 3]),
    ],
)
def test_roles__by_hand(rows: list[tuple[float, float, float]], numbers: list[int]) -> None:
    """Largest z_sbs - z_obs is 1, smallest 2; of the rest the largest z_t_m is 0, then 3, 4, ..."""
    assert clustering.roles(centroids_of(*rows)).tolist() == numbers
    assert clustering.cluster_numbers(len(rows)) == sorted(numbers)


def test_roles__ties_do_not_depend_on_the_order_of_centroids() -> None:
    """All scores and all z_t_m are equal: the first in lexicographic order of its values wins."""
    rows = [(1.0, 1.0, 0.5), (2.0, 2.0, 0.5), (3.0, 3.0, 0.5), (4.0, 4.0, 0.5)]
    expected = dict(zip(rows, [1, 0, 3, 2], strict=True))
    for order in itertools.permutations(rows):
        assert clustering.roles(centroids_of(*order)).tolist() == [expected[row] for row in order]


def test_names__need_more_than_the_margin() -> None:
    centroids = centroids_of((0, 0, 1), (0.5, -0.5, 0), (-0.25, 0.25, 0), (0, 0, 0))
    numbers = [0, 1, 2, 3]
    full = ["passive", "opportunistic", "directional", "other 3"]
    assert clustering.names(centroids, numbers, 0.0) == full
    assert clustering.names(centroids, numbers, 0.5) == ["passive", "opportunistic", "unassigned", "other 3"]
    assert clustering.names(centroids, numbers, 1.0) == ["passive", "unassigned", "unassigned", "other 3"]
    flat = centroids_of((0, 0, 1), (0, 0, 0))
    assert clustering.names(flat, [1, 2], 0.0) == ["unassigned", "unassigned"]


def test_names_other_side__exchange_the_two_sided_roles() -> None:
    centroids = centroids_of((0, 0, 1), (2, -1, 0), (-1, 2, 0))
    assert clustering.names(centroids, [0, 1, 2], 0.0) == ["passive", "opportunistic", "directional"]
    assert clustering.names_other_side(centroids, 0.0) == ["passive", "directional", "opportunistic"]
    np.testing.assert_array_equal(clustering.swap_sides(clustering.swap_sides(centroids)), centroids)


def test_make_model__clusters_in_the_order_of_their_numbers() -> None:
    centroids = centroids_of((0, 2, 5), (0, 0, -3), (2, 0, 7))
    model = model_of(centroids)
    assert model.numbers == [0, 1, 2]
    assert model.labels == ["passive", "opportunistic", "directional"]
    np.testing.assert_array_equal(model.centroids, centroids[[1, 2, 0]])
    assert model.fit == {
        "inertia": 12.5,
        "passes": 4,
        "converged": True,
        "counts": [2, 3, 1],
        "rows": 6,
    }


def test_interpret__says_what_is_far_from_the_mean() -> None:
    centroids = np.array([[0, 1.5, -0.5, 0, 0, 0], [0.3] * 6, [-1, 0, 0, 2, 0, 0.4]])
    assert clustering.interpret(centroids, "own") == [
        "thick own side, thin opposite side",
        "near the average trade",
        "wide spread, small against the touch, old best price",
    ]
    assert clustering.interpret(centroids[:1], "consumed") == ["thick consumed side, thin other side"]


@pytest.mark.parametrize("bounds", [Bounds.none(), Bounds(np.full(6, -1.0), np.full(6, 1.0))])
def test_label__nearest_centroid_of_clipped_rows(bounds: Bounds) -> None:
    model = model_of(CENTRES, bounds=bounds)
    z = blobs(500, 4, spread=1.5)
    rows = np.clip(z.T.astype(float), bounds.low, bounds.high)
    want = ((rows[:, None] - model.centroids[None]) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(model.label(z), want)


# ---- from window to window --------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_track__is_the_cheapest_of_all_permutations(k: int) -> None:
    rng = np.random.default_rng(k)
    for _ in range(10):
        now, before = model_of(rng.normal(size=(k, 6))), model_of(rng.normal(size=(k, 6)))
        table = clustering.track(now, before)

        def cost(order: tuple[int, ...], now: Model = now, before: Model = before) -> float:
            return sum(math.dist(now.centroids[i], before.centroids[j]) for i, j in enumerate(order))

        best = min(itertools.permutations(range(k)), key=cost)
        assert table["cluster"].tolist() == now.numbers
        assert table["matched"].tolist() == [before.numbers[j] for j in best]
        drifts = [math.dist(now.centroids[i], before.centroids[j]) for i, j in enumerate(best)]
        np.testing.assert_allclose(table["drift"], drifts, rtol=1e-12)
        assert table["agrees"].tolist() == [
            before.numbers[j] == number for number, j in zip(now.numbers, best, strict=True)
        ]


def test_track__first_window_has_no_match() -> None:
    for previous in (None, model_of(CENTRES[:2])):
        table = clustering.track(model_of(CENTRES), previous)
        assert table["cluster"].tolist() == [0, 1, 2]
        assert table[["matched", "drift", "agrees"]].isna().all(axis=None)
        assert table.dtypes.astype(str).tolist() == ["int64", "Int64", "float64", "boolean"]


# ---- model.json -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [Bounds.none(), Bounds(np.linspace(-3, -1, 6), np.linspace(1, 3, 6))])
def test_models__round_trip(tmp_path: Path, bounds: Bounds) -> None:
    """Every float comes back bit by bit, and labels are the same."""
    rng = np.random.default_rng(5)
    models = [
        model_of(rng.normal(size=(4, 6)), symbol=name, bounds=bounds, features={"window": 7})
        for name in ("A", "B")
    ]
    clustering.write_models(models, tmp_path / "model.json")
    back = clustering.read_models(tmp_path / "model.json")
    assert list(back) == ["A", "B"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]
    z = blobs(200, 6)
    for model in models:
        other = back[model.symbol]
        np.testing.assert_array_equal(other.centroids, model.centroids)
        for side in ("low", "high"):
            np.testing.assert_array_equal(getattr(other.bounds, side), getattr(bounds, side))
        plain = {"centroids": None, "bounds": None}
        assert replace(other, **plain) == replace(model, **plain)
        np.testing.assert_array_equal(other.label(z), model.label(z))
    assert back["A"].as_json() == models[0].as_json()


def entry(**changes: Any) -> dict[str, Any]:
    return model_of(CENTRES).as_json() | changes


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in entry().items() if key != name}


BROKEN: dict[str, tuple[Any, str]] = {
    "not json": ("{", "not a model.json"),
    "no models": ('{"version": 1}', "not a model.json"),
    "a list": ("[1]", "not a model.json"),
    "models a number": (5, "holds no model"),
    "no model": ([], "holds no model"),
    "a model a number": ([5], "model: "),
    "no centroids": ([without("centroids")], "centroids: Field required"),
    "no bounds": ([without("bounds")], "bounds: Field required"),
    "no symbol": ([without("symbol")], "symbol: Field required"),
    "unknown field": ([entry(colour="red")], "colour: "),
    "ragged centroids": ([entry(centroids=[[1.0] * 6, [1.0] * 5])], "centroids.1: "),
    "five features": ([entry(centroids=[[1.0] * 5] * 3)], "centroids.0: "),
    "words for centroids": ([entry(centroids={"a": 1})], "centroids: "),
    "not finite": ([entry(centroids=[[math.nan] * 6] * 3)], "centroids.0.0: .*finite"),
    "other order": ([entry(feature_order=list(Z_FEATURES[::-1]))], "feature_order must be z_v_rel, "),
    "no upper bounds": ([entry(bounds={"low": [0.0] * 6})], "bounds must have low and high"),
    "three bounds": ([entry(bounds={"low": [0.0] * 3, "high": [1.0] * 3})], "bounds.low: "),
    "two numbers": ([entry(numbers=[0, 1])], r"3 centroids need numbers \[0, 1, 2\]"),
    "number twice": ([entry(numbers=[0, 1, 1])], r"3 centroids need numbers \[0, 1, 2\]"),
    "one label": ([entry(labels=["passive"])], "as many labels"),
    "features a list": ([entry(features=[1])], "features: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_read_models__broken_file_is_named(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    path = tmp_path / "model.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"version": 1, "models": content}))
    with pytest.raises(InputError, match=message) as caught:
        clustering.read_models(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_read_models__absent_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json: cannot be read: No such file"):
        clustering.read_models(tmp_path / "absent.json")
