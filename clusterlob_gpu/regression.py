"""Regressions of a forward return on flow: alone, with controls, with an interaction.

Least squares, one symbol at a time, with Newey-West errors on the grid of bars: a bar that a
regression leaves out is a row of zeros, so that no lag joins bars that are not that far apart in time.  The
coefficients and R2 do not see these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from clusterlob_gpu.evaluation import Signal, Target, hac_lags, on_grid
from clusterlob_gpu.plain_statistics import least_squares, two_sided

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

CONSTANT, INTERACTION = "constant", "interaction"
ALONE, CONTROLLED, INTERACTED = "alone", "controls", "interaction"
BPS = 1e4
LEAST_SHARE = 0.5
"""A control known at fewer of the rows than this is left out instead of costing the rows."""
LEAST_TOLERANCE = 1e-8
"""1 - R2 of a regressor on those before it, under which it is collinear."""


@dataclass(frozen=True)
class _Design:
    """Columns of one regression, chosen: what was left out is in the notes."""

    names: list[str] = field(default_factory=list)
    columns: list[Floats] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Fit:
    coef: Floats
    se: Floats


def regression_table(
    panel: pd.DataFrame,
    signals: Sequence[Signal],
    targets: Sequence[Target],
    controls: Sequence[str],
    *,
    width_us: int,
    state: str = "low_liquidity",
) -> pd.DataFrame:
    """Regressions of every target on every signal, for one symbol.

    Takes the panel of `evaluation.ic_table` with the columns of `controls` and `state`.  Models: "alone" =
    constant + signal; "controls" = + controls; "interaction" = + state + (signal x state), where signal and
    state are centred on the rows used, so that the signal's coefficient is its effect at the average state.

    Returns
    -------
    A row per target, signal, model and term (constant, signal's name, state, interaction, controls):

    - signal, target, horizon_us, model, term; n rows used; dropped: bars with signal and target, but without
      a control; lags = max(2H - 1, r + H - 1), at most n // 4.
    - coef (return per unit of the term), coef_bps (bps per standard deviation of the term; null for the
      constant), se, t, p: OLS, HAC Bartlett, factor n / (n - k), normal p.
    - vif of the term: 1 / (1 - R2 on the other terms); null for the constant.
    - r2; incremental_r2 = r2 less that of the same rows without the signal (and its interaction); partial_ic:
      correlation of the residuals of target and signal on all other terms; condition_number: largest over
      smallest singular value of the standardised terms.  Repeated on each row of a model.
    - notes: terms left out: constant; collinear with those before (the signal comes first); known at less
      than half of the rows; absent from the panel.

    A model without rows or with a constant signal or target has one row of its signal with null statistics.
    Raises InputError as `evaluation.ic_table` for a missing signal or target.
    """
    columns = [s.column for s in signals] + [t.column for t in targets]
    present = [name for name in (*controls, state) if name in panel.columns]
    columns = list(dict.fromkeys([*columns, *present]))
    values, _ = on_grid(panel, columns, width_us)
    grid = dict(zip(columns, values.T, strict=True))
    rows = [
        row
        for target in targets
        for signal in signals
        for model in (ALONE, CONTROLLED, INTERACTED)
        for row in _model_rows(grid, signal, target, model, controls, state, width_us)
    ]
    return pd.DataFrame(rows)


def _model_rows(
    grid: dict[str, Floats],
    signal: Signal,
    target: Target,
    model: str,
    controls: Sequence[str],
    state: str,
    width_us: int,
) -> list[dict[str, object]]:
    horizon = -(-target.horizon_us // width_us)
    x, y = grid[signal.column], grid[target.column]
    both = np.isfinite(x) & np.isfinite(y)
    wanted = {ALONE: [], CONTROLLED: [*controls], INTERACTED: [*controls, state]}[model]
    wanted = [name for name in wanted if name != signal.column]
    held, notes = _known(grid, wanted, both)
    used = both.copy()
    for name in held:
        used &= np.isfinite(grid[name])
    terms = {signal.name: x} | {name: grid[name] for name in held}
    if model == INTERACTED and state in held:
        terms = _with_interaction(terms, signal.name, state, used)
    design = _independent(terms, used, notes)
    n, k = int(used.sum()), len(design.names)
    lags = hac_lags(horizon, signal.rollup_bars, n)
    key = {"signal": signal.name, "target": target.name, "horizon_us": target.horizon_us, "model": model}
    shared = {"n": n, "dropped": int(both.sum()) - n, "lags": lags, "notes": "; ".join(design.notes)}
    if signal.name not in design.names or n <= k + 2 or np.ptp(y[used]) == 0:
        return [key | {"term": signal.name} | shared | dict.fromkeys(_STATISTICS, np.nan)]
    return [key | row | shared for row in _statistics(design, y, used, lags, signal.name)]


_STATISTICS = (
    "coef",
    "coef_bps",
    "se",
    "t",
    "p",
    "vif",
    "r2",
    "incremental_r2",
    "partial_ic",
    "condition_number",
)


def _known(grid: dict[str, Floats], wanted: Sequence[str], both: Mask) -> tuple[list[str], list[str]]:
    """Controls that enough of the rows have, and what is said of the others."""
    held, notes = [], []
    for name in wanted:
        if name not in grid:
            notes.append(f"{name}: absent")
            continue
        share = np.isfinite(grid[name][both]).mean() if both.any() else 0.0
        if share < LEAST_SHARE:
            notes.append(f"{name}: known at {share:.0%} of the rows")
        else:
            held.append(name)
    return held, notes


def _with_interaction(terms: dict[str, Floats], signal: str, state: str, used: Mask) -> dict[str, Floats]:
    """Signal and state centred on the rows used, and their product after the state."""
    if not used.any():
        return terms
    x, z = (terms[name] - terms[name][used].mean() for name in (signal, state))
    rest = {name: values for name, values in terms.items() if name not in (signal, state)}
    return {signal: x, state: z, INTERACTION: x * z} | rest


def _independent(terms: dict[str, Floats], used: Mask, notes: Sequence[str]) -> _Design:
    """Terms in order, without those that are constant or that the ones before explain."""
    design = _Design(notes=list(notes))
    basis = np.empty((int(used.sum()), 0))
    for name, values in terms.items():
        column = values[used]
        if not len(column) or np.ptp(column) == 0:
            design.notes.append(f"{name}: constant")
            continue
        column = column - column.mean()
        column = column / np.linalg.norm(column)
        for _ in range(2):  # one pass of Gram-Schmidt leaves rounding that a second one removes
            column = column - basis @ (basis.T @ column)
        length = float(np.linalg.norm(column))
        if length**2 < LEAST_TOLERANCE:
            design.notes.append(f"{name}: collinear")
            continue
        basis = np.column_stack([basis, column / length])
        design.names.append(name)
        design.columns.append(np.where(used, values, 0.0))
    return design


def _statistics(design: _Design, y: Floats, used: Mask, lags: int, signal: str) -> list[dict[str, object]]:
    y = np.where(used, y, 0.0)
    spread = [float(column[used].std()) for column in design.columns]
    fit, r2 = _ols(design.columns, y, used, lags), _r2(design.columns, y, used)
    others = [
        c for name, c in zip(design.names, design.columns, strict=True) if name not in (signal, INTERACTION)
    ]
    besides = [c for name, c in zip(design.names, design.columns, strict=True) if name != signal]
    x = design.columns[design.names.index(signal)]
    shared = {
        "r2": r2,
        "incremental_r2": r2 - _r2(others, y, used),
        "partial_ic": _correlation(_residual(besides, y, used), _residual(besides, x, used)),
    }
    vif, shared["condition_number"] = _collinearity(design.columns, used)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = fit.coef / fit.se
    return [
        {
            "term": name,
            "coef": fit.coef[i],
            "coef_bps": BPS * fit.coef[i] * spread[i - 1] if i else np.nan,
            "se": fit.se[i],
            "t": t[i],
            "p": two_sided(t[i]),
            "vif": vif[i - 1] if i else np.nan,
        }
        | shared
        for i, name in enumerate([CONSTANT, *design.names])
    ]


def _ols(columns: Sequence[Floats], y: Floats, used: Mask, lags: int) -> _Fit:
    """Constant first.  Terms are scaled for the solver and the results scaled back."""
    scale = np.array([1.0, *(float(np.abs(column).max()) for column in columns)])
    design = np.column_stack([used.astype(np.float64), *columns]) / scale
    coefficients, covariance = least_squares(design, y, lags)
    n, k = int(used.sum()), len(scale)
    variance = np.diag(covariance) * n / (n - k)
    return _Fit(coefficients / scale, np.sqrt(np.maximum(variance, 0)) / scale)


def _residual(columns: Sequence[Floats], y: Floats, used: Mask) -> Floats:
    """(n,) what a constant and the columns leave of y, over the rows used."""
    design = np.column_stack([np.ones(int(used.sum())), *(_standardised(c[used]) for c in columns)])
    return y[used] - design @ np.linalg.lstsq(design, y[used], rcond=None)[0]


def _r2(columns: Sequence[Floats], y: Floats, used: Mask) -> float:
    residual = _residual(columns, y, used)
    centred = y[used] - y[used].mean()
    return 1 - float(residual @ residual) / float(centred @ centred)


def _standardised(column: Floats) -> Floats:
    return (column - column.mean()) / column.std()


def _correlation(a: Floats, b: Floats) -> float:
    size = np.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 0 else np.nan


def _collinearity(columns: Sequence[Floats], used: Mask) -> tuple[Floats, float]:
    """Variance inflation of every term, and the condition number of the standardised terms."""
    z = np.column_stack([_standardised(column[used]) for column in columns])
    singular = np.linalg.svd(z, compute_uv=False)
    vif = np.diag(np.linalg.inv(z.T @ z / len(z)))
    return vif, float(singular[0] / singular[-1])
