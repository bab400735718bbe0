"""The statistics that are written out here against the libraries that they stand in for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from arch.bootstrap import optimal_block_length
from scipy.stats import false_discovery_control, norm, rankdata, spearmanr

from clusterlob_gpu import plain_statistics

LISTS = {
    "distinct": np.random.default_rng(1).normal(size=300),
    "ties": np.random.default_rng(2).integers(0, 9, 300).astype(float),
    "constant": np.ones(40),
    "one": np.array([3.0]),
}


@pytest.mark.parametrize("share", [1e-12, 0.025, 0.2, 0.5, 0.8, 0.975])
def test_normal_quantile__is_scipys(share: float) -> None:
    assert plain_statistics.normal_quantile(share) == pytest.approx(norm.ppf(share), rel=1e-14)


@pytest.mark.parametrize("t", [0.0, 1e-9, 0.7, -1.96, 5.0, -30.0, math.inf])
def test_two_sided__is_scipys(t: float) -> None:
    assert plain_statistics.two_sided(t) == pytest.approx(2 * norm.sf(abs(t)), rel=1e-12)
    assert math.isnan(plain_statistics.two_sided(math.nan))


@pytest.mark.parametrize("name", LISTS)
def test_average_ranks__are_scipys(name: str) -> None:
    assert (plain_statistics.average_ranks(LISTS[name]) == rankdata(LISTS[name])).all()


def test_rank_correlation__is_scipys() -> None:
    a, b = LISTS["distinct"], LISTS["ties"]
    assert plain_statistics.rank_correlation(a, b) == spearmanr(a, b).statistic


@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_false_discovery__is_scipys(count: int) -> None:
    p = np.random.default_rng(count).uniform(size=count).round(2)
    assert (plain_statistics.false_discovery(p) == false_discovery_control(p)).all()


@pytest.mark.parametrize("rows", [30, 31, 288, 2016])
@pytest.mark.parametrize("persistence", [0.0, 0.5, 0.97, -0.6])
def test_circular_block__is_archs(rows: int, persistence: float) -> None:
    shocks = np.random.default_rng(rows).normal(size=rows)
    series = np.empty(rows)
    series[0] = shocks[0]
    for i in range(1, rows):
        series[i] = persistence * series[i - 1] + shocks[i]
    wanted = optimal_block_length(series)["circular"].iloc[0]
    assert plain_statistics.circular_block(series) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("lags", [0, 1, 12])
def test_least_squares__is_statsmodels(lags: int) -> None:
    rng = np.random.default_rng(lags)
    design = np.column_stack([np.ones(200), rng.normal(size=(200, 3))])
    y = design @ [0.1, 1.0, -2.0, 0.0] + rng.normal(size=200).cumsum()
    fitted = sm.OLS(y, design).fit(cov_type="HAC", cov_kwds={"maxlags": lags, "use_correction": False})
    coefficients, covariance = plain_statistics.least_squares(design, y, lags)
    np.testing.assert_allclose(coefficients, fitted.params, rtol=1e-12)
    np.testing.assert_allclose(covariance, fitted.cov_params(), rtol=1e-10)
