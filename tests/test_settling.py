"""Rows that stay with their centre: passes over what is left are passes over all."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlob_gpu import clustering, settling, starts
from clusterlob_gpu.clustering import Bounds, Partial
from clusterlob_gpu.pipeline import fits
from clusterlob_gpu.settling import Settled, Settling


def rows(n: int, seed: int) -> np.ndarray:
    """z (6, n) float32 of three loose heaps, with ties and nulls."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(6, n)) + rng.integers(-2, 3, (1, n))
    z[:, : n // 4] = np.round(z[:, : n // 4])
    z[:, rng.random(n) < 0.05] = np.nan
    return z.astype(np.float32)


def assert_same(got: Partial, want: Partial) -> None:
    np.testing.assert_array_equal(got.counts, want.counts)
    np.testing.assert_allclose(got.sums, want.sums, rtol=1e-12, atol=1e-9)
    assert got.inertia == pytest.approx(want.inertia, rel=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 400),
    k=st.integers(1, 6),
    reach=st.sampled_from([1e-12, 0.01, 0.3]),
    bound=st.sampled_from([np.inf, 1.5]),
    seed=st.integers(0, 1000),
)
def test_partial__is_that_of_all_rows(n: int, k: int, reach: float, bound: float, seed: int) -> None:
    """From the centres themselves, and from some that have all moved by the reach."""
    rng, z = np.random.default_rng(seed), rows(n, seed)
    bounds = Bounds(np.full(6, -bound), np.full(6, bound))
    centroids = rng.normal(size=(k, 6))
    held = settling.passed(z, bounds, centroids, reach, n)
    assert isinstance(held, Settled)
    for _ in range(4):
        step = rng.normal(size=(k, 6))
        moved = centroids + reach * step / np.sqrt((step**2).sum(axis=1))[:, None]
        assert_same(held.partial(bounds, moved), clustering.partial(z, bounds, moved))
    assert_same(held.partial(bounds, centroids), clustering.partial(z, bounds, centroids))


def test_passed__few_rows_are_left_and_all_are_with_a_wide_reach() -> None:
    z, centroids = rows(5000, 1), np.array([[-2.0] * 6, [2.0] * 6])
    left = [settling.passed(z, Bounds.none(), centroids, reach, 5000).left.shape[1] for reach in (0.05, 50)]
    assert 0 < left[0] < 600
    assert left[1] == np.isfinite(z[0]).sum()


def test_passed__with_too_many_left_is_a_plain_pass() -> None:
    z, centroids = rows(500, 2), np.array([[-2.0] * 6, [2.0] * 6])
    got = settling.passed(z, Bounds.none(), centroids, 50.0, 100)
    assert isinstance(got, Partial)
    assert_same(got, clustering.partial(z, Bounds.none(), centroids))


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.sampled_from([0.0, 1e-4, 3e-3, 0.03, 0.3]), min_size=1, max_size=12),
    first=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 1000),
)
def test_settling__follows_centres_wherever_they_go(steps: list[float], first: float, seed: int) -> None:
    """Nearer and nearer, far away, and back: every share is that of a plain pass."""
    rng, z, bounds = np.random.default_rng(seed), rows(300, seed), Bounds(np.full(6, -2.5), np.full(6, 2.5))
    held, centroids = Settling(bounds, first), rng.normal(size=(3, 6))
    for step in [0.0, *steps]:
        centroids = centroids + step * rng.normal(size=(3, 6))
        reach = held.follow(centroids)
        if held.days:
            got = held.days[0].partial(bounds, centroids)
        else:
            got = held.add(0, settling.passed(z, bounds, centroids, reach, 200), centroids)
        assert_same(got, clustering.partial(z, bounds, centroids))


def test_settling__fewer_rows_are_left_the_nearer_the_centres_come() -> None:
    """And those that were settled first serve again where the centres leave the nearer reach."""
    z, bounds, centroids = rows(5000, 1), Bounds.none(), np.array([[-2.0] * 6, [2.0] * 6])
    held, left = Settling(bounds, 1.0), []
    for offset in (0.0, 0.02, 0.021, 0.0211, 0.2):
        reach = held.follow(centroids + offset)
        if reach:
            held.add(0, settling.passed(z, bounds, centroids + offset, reach, 5000), centroids + offset)
        left.append(held.days[0].left.shape[1])
    assert left[0] > left[1] > left[2] > left[3] >= 0
    assert left[4] == left[0]


def test_settling__a_day_that_would_not_settle_is_asked_again_for_a_far_smaller_reach() -> None:
    """Though another day has settled for the first one, and goes on to do so."""
    easy, hard, bounds = rows(4000, 1), rows(4000, 2), Bounds.none()
    hard[:, ::2] = 0.01 * hard[:, ::2]  # half-way between the centres
    centroids = np.array([[-2.0] * 6, [2.0] * 6])
    held, asked = Settling(bounds, 0.5), []
    for offset in (0.0, 0.01, 0.011, 0.0111):
        moved = centroids + offset
        reach = held.follow(moved)
        for at, z in enumerate((easy, hard)):
            if at in held.days:
                got = held.days[at].partial(bounds, moved)
            else:
                asked.append((at, reach > 0))
                got = held.add(at, settling.passed(z, bounds, moved, reach, 1500), moved)
            assert_same(got, clustering.partial(z, bounds, moved))
    assert asked[:2] == [(0, True), (1, True)]
    assert set(asked[2:]) == {(1, True)}
    assert set(held.days) == {0, 1}


class Stages:
    """Runs what is asked for here, and counts the days that were passed over."""

    def __init__(self) -> None:
        self.days = 0

    def map(self, _: str, function: Any, tasks: Sequence[Any]) -> list[Any]:
        self.days += sum(map(len, tasks))
        return [function(task) for task in tasks]


def job(days: Sequence[np.ndarray], backend: str = "cpu") -> Any:
    train = [
        SimpleNamespace(
            features=SimpleNamespace(made=SimpleNamespace(address=str(number))),
            job=SimpleNamespace(backend=backend, on=clustering.CPU),
            cut=None,
            z=lambda z=z: z,
        )
        for number, z in enumerate(days)
    ]
    return SimpleNamespace(train=train)


@pytest.mark.parametrize("most", [0, 1500, 1 << 20])
@pytest.mark.parametrize("first", [0.0, 0.2])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_passes__fit_as_plain_ones_do(
    monkeypatch: pytest.MonkeyPatch, most: int, first: float, backend: str
) -> None:
    """Two fits of different k on three days; where days settle most passes ask none of them."""
    monkeypatch.setattr(fits, "_MOST_LEFT", most)
    days = [rows(4000, seed) for seed in (1, 2, 3)]
    rng = np.random.default_rng(9)
    begin, bounds, stages = [rng.normal(size=(k, 6)) for k in (3, 4)], Bounds.none(), Stages()
    jobs = [job(days, backend)] * 2
    got = clustering.lloyd_together(begin, fits._Passes(jobs, [bounds] * 2, stages, [first] * 2))  # type: ignore[arg-type]
    for fit, start in zip(got, begin, strict=True):
        want = clustering.lloyd(start, lambda c: [clustering.partial(z, bounds, c) for z in days])
        np.testing.assert_allclose(fit.centroids, want.centroids, atol=1e-9)
        np.testing.assert_array_equal(fit.counts, want.counts)
        assert fit.inertia == pytest.approx(want.inertia, rel=1e-11)
        assert (fit.passes, fit.converged) == (want.passes, want.converged)
    whole = 3 * sum(fit.passes for fit in got)
    if most == 1 << 20 and backend == "cpu":
        assert stages.days < whole / 2
    if most == 0 or backend == "gpu":
        assert stages.days == whole


def test_passes__from_near_the_centres_ask_every_day_once() -> None:
    """Where the first reach holds to the end."""
    days, bounds, stages = [rows(4000, seed) for seed in (1, 2)], Bounds.none(), Stages()
    centres = clustering.lloyd(
        np.random.default_rng(9).normal(size=(3, 6)),
        lambda c: [clustering.partial(z, bounds, c) for z in days],
    ).centroids
    passes = fits._Passes([job(days)], [bounds], stages, [0.05])  # type: ignore[arg-type]
    (fit,) = clustering.lloyd_together([centres + 0.01], passes)
    assert fit.converged
    assert fit.passes > 3
    assert stages.days == 2
    plain = clustering.lloyd(centres + 0.01, lambda c: [clustering.partial(z, bounds, c) for z in days])
    np.testing.assert_array_equal(fit.counts, plain.counts)
    assert fit.passes == plain.passes


def test_start__is_the_best_of_plain_fits() -> None:
    """The centres of plain passes over the sample, and the standard error of the smallest cluster's."""
    sample = rows(3000, 5)
    sample = sample[:, ~np.isnan(sample).any(axis=0)]
    rng = np.random.default_rng(7)
    chosen = [starts.plus_plus(sample, 4, rng) for _ in range(3)]
    plain = [
        clustering.lloyd(rows_, lambda c: [clustering.partial(sample, Bounds.none(), c)]) for rows_ in chosen
    ]
    best = min(plain, key=lambda fit: fit.inertia)
    got = starts.start(sample, 4, 7, 3)
    np.testing.assert_allclose(got.centres, best.centroids, atol=1e-9)
    variance = ((sample.T[:, None] - best.centroids) ** 2).sum(axis=2).min(axis=1).mean()
    assert got.error == pytest.approx(np.sqrt(variance / best.counts.min()))
