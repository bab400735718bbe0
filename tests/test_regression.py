"""Regressions against normal equations and double loops written out, planted effects and odd inputs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from statsmodels.stats.outliers_influence import variance_inflation_factor

from clusterlob_gpu.evaluation import Signal, Target, ic_table
from clusterlob_gpu.regression import regression_table

WIDTH = 300_000_000
START = 1_714_521_600_000_000
CONTROLS = ("a", "b")


def market(n: int = 400, seed: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n))
    x = 0.5 * a + rng.normal(size=n)
    z = (rng.random(n) < 0.3).astype(float)
    y = 1e-3 * (0.4 * x + 0.3 * a - 0.6 * x * z + rng.normal(size=n))
    return pd.DataFrame(
        {"bucket_ts": START + np.arange(n) * WIDTH, "x": x, "a": a, "b": 50 + b, "low_liquidity": z, "y": y}
    )


def fit(
    panel: pd.DataFrame, controls: tuple[str, ...] = CONTROLS, horizon: int = 3, rollup: int = 1
) -> pd.DataFrame:
    target = Target("y", "y", horizon * WIDTH)
    return regression_table(panel, [Signal("x", "x", rollup)], [target], controls, width_us=WIDTH)


def holes(panel: pd.DataFrame) -> pd.DataFrame:
    rng = np.random.default_rng(2)
    panel = panel.copy()
    for column, share in (("x", 0.1), ("y", 0.1), ("a", 0.05)):
        panel.loc[rng.random(len(panel)) < share, column] = np.nan
    panel.loc[100:140, "y"] = np.nan
    return panel


def by_hand(panel: pd.DataFrame, names: list[str], lags: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Coefficients, Newey-West errors over pairs of rows by their distance in time, and R2."""
    rows = [t for t in range(len(panel)) if panel[[*names, "y"]].iloc[t].notna().all()]
    design = np.array([[1.0, *panel[names].iloc[t]] for t in rows])
    y = np.array([panel["y"].iloc[t] for t in rows])
    inverse = np.linalg.inv(design.T @ design)
    coef = inverse @ design.T @ y
    residual = y - design @ coef
    meat = np.zeros((design.shape[1],) * 2)
    for i, s in enumerate(rows):
        for j, t in enumerate(rows):
            if abs(s - t) <= lags:
                weight = 1 - abs(s - t) / (lags + 1)
                meat += weight * residual[i] * residual[j] * np.outer(design[i], design[j])
    n, k = design.shape
    variance = inverse @ meat @ inverse * n / (n - k)
    return coef, np.diag(variance) ** 0.5, 1 - residual @ residual / ((y - y.mean()) @ (y - y.mean()))


@pytest.mark.parametrize(("model", "names"), [("alone", ["x"]), ("controls", ["x", "a", "b"])])
def test_models__match_normal_equations_and_a_double_loop(model: str, names: list[str]) -> None:
    panel = holes(market())
    got = fit(panel, rollup=6)
    got = got[got["model"] == model].set_index("term")
    coef, se, r2 = by_hand(panel, names, 8)
    assert got["lags"].tolist() == [8] * len(got)  # max(2 * 3 - 1, 6 + 3 - 1)
    assert got.index.tolist() == ["constant", *names]
    np.testing.assert_allclose(got["coef"], coef, rtol=1e-8)
    np.testing.assert_allclose(got["se"], se, rtol=1e-7)
    np.testing.assert_allclose(got["t"], coef / se, rtol=1e-7)
    assert got["r2"].iloc[0] == pytest.approx(r2, rel=1e-9)
    both = panel[["x", "y"]].notna().all(axis=1)
    full = panel[[*names, "y"]].notna().all(axis=1)
    assert (got["n"] == full.sum()).all()
    assert (got["dropped"] == both.sum() - full.sum()).all()


def test_errors__match_statsmodels_on_a_full_grid() -> None:
    panel = market()
    got = fit(panel)
    got = got[got["model"] == "controls"].set_index("term")
    design = sm.add_constant(panel[["x", "a", "b"]])
    kwds = {"maxlags": 5, "kernel": "bartlett", "use_correction": True}
    reference = sm.OLS(panel["y"], design).fit(cov_type="HAC", cov_kwds=kwds)
    np.testing.assert_allclose(got["se"], reference.bse, rtol=1e-8)
    np.testing.assert_allclose(got["p"], reference.pvalues, rtol=1e-6)
    np.testing.assert_allclose(got["r2"], reference.rsquared, rtol=1e-10)
    vif = [variance_inflation_factor(design.to_numpy(), i) for i in (1, 2, 3)]
    np.testing.assert_allclose(got["vif"].iloc[1:], vif, rtol=1e-8)


def test_incremental_r2_and_partial_ic__match_regressions_without_the_signal() -> None:
    panel = market()
    got = fit(panel)
    got = got[(got["model"] == "controls") & (got["term"] == "x")].iloc[0]
    others = sm.add_constant(panel[["a", "b"]])
    y_left, x_left = (sm.OLS(panel[name], others).fit().resid for name in ("y", "x"))
    full = sm.OLS(panel["y"], others.assign(x=panel["x"])).fit()
    assert got["partial_ic"] == pytest.approx(np.corrcoef(x_left, y_left)[0, 1], abs=1e-12)
    assert got["incremental_r2"] == pytest.approx(
        full.rsquared - sm.OLS(panel["y"], others).fit().rsquared, abs=1e-12
    )
    assert got["coef_bps"] == pytest.approx(1e4 * got["coef"] * panel["x"].std(ddof=0), rel=1e-12)
    z = panel[["x", "a", "b"]]
    z = (z - z.mean()) / z.std()
    assert got["condition_number"] == pytest.approx(np.linalg.cond(z.to_numpy()), rel=1e-9)


def test_interaction__is_centred_and_found() -> None:
    panel = market(4000)
    got = fit(panel)
    got = got[got["model"] == "interaction"].set_index("term")
    assert got.index.tolist() == ["constant", "x", "low_liquidity", "interaction", "a", "b"]
    x, z = (panel[c] - panel[c].mean() for c in ("x", "low_liquidity"))
    design = pd.DataFrame({"c": 1.0, "x": x, "z": z, "xz": x * z, "a": panel["a"], "b": panel["b"]})
    np.testing.assert_allclose(got["coef"], sm.OLS(panel["y"], design).fit().params, rtol=1e-8)
    slope, average = got.loc["interaction"], got.loc["x"]
    assert abs(slope["coef"] + 6e-4) < 3 * slope["se"]  # planted: -0.6e-3
    assert abs(average["coef"] - (4e-4 - 6e-4 * panel["low_liquidity"].mean())) < 3 * average["se"]
    assert slope["t"] < -5


def test_alone__agrees_with_the_ic() -> None:
    panel = holes(market())
    ic = ic_table(panel, [Signal("x", "x")], [Target("y", "y", 3 * WIDTH)], width_us=WIDTH, draws=5).iloc[0]
    got = fit(panel)
    got = got[(got["model"] == "alone") & (got["term"] == "x")].iloc[0]
    assert got["n"] == ic["n"]
    assert got["t"] == pytest.approx(ic["hac_t"], rel=1e-8)
    assert got["r2"] == pytest.approx(ic["ic"] ** 2, rel=1e-8)


def test_scale_of_a_control__changes_nothing_else() -> None:
    panel = market()
    base, scaled = fit(panel), fit(panel.assign(a=1e7 * panel["a"] - 3e7))
    kept = base["term"].isin(["x", "interaction"]).to_numpy()
    for name in ("coef", "t", "vif", "incremental_r2", "partial_ic"):
        np.testing.assert_allclose(scaled.loc[kept, name], base.loc[kept, name], rtol=1e-6, atol=1e-9)


def test_controls_that_cannot_serve__are_named_and_left_out() -> None:
    panel = market().assign(flat=1e-4, twin=lambda p: 2 * p["a"] - 1, empty=np.nan, copy=lambda p: -p["x"])
    panel["rare"] = panel["b"].where(np.arange(len(panel)) < 40)
    got = fit(panel, ("a", "flat", "twin", "empty", "copy", "rare", "gone", "b"))
    got = got[got["model"] == "controls"]
    assert got["term"].tolist() == ["constant", "x", "a", "b"]
    assert got["n"].tolist() == [400] * 4
    assert set(got["notes"].iloc[0].split("; ")) == {
        "empty: known at 0% of the rows",
        "rare: known at 10% of the rows",
        "gone: absent",
        "flat: constant",
        "twin: collinear",
        "copy: collinear",
    }
    np.testing.assert_allclose(got["coef"], fit(market()).query("model == 'controls'")["coef"], rtol=1e-9)


@pytest.mark.parametrize("kind", ["empty", "constant signal", "null target", "constant target", "few"])
def test_degenerate_input__gives_a_null_row(kind: str) -> None:
    panel = market({"empty": 0, "few": 4}.get(kind, 100))
    if kind == "constant signal":
        panel["x"] = 1.0
    if kind.endswith("target"):
        panel["y"] = np.nan if kind.startswith("null") else 1.0
    got = fit(panel)
    assert got["model"].tolist()[-2:] == ["controls", "interaction"]
    assert got.loc[got["model"] != "alone", ["coef", "t", "r2", "vif"]].isna().all(axis=None)


def test_state_that_never_changes__leaves_the_interaction_out() -> None:
    got = fit(market().assign(low_liquidity=0.0))
    got = got[got["model"] == "interaction"]
    assert got["term"].tolist() == ["constant", "x", "a", "b"]
    assert got["notes"].iloc[0] == "low_liquidity: constant; interaction: constant"
