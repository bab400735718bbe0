"""Is one IC larger than another, on the same data?

Paired differences of two signals (`difference_table`) and of a slice of time and the rest of it
(`slice_table`).  Both ICs are drawn from the same circular blocks of the time axis, so what they share
cancels.  Grid, nulls, lags and blocks are those of `evaluation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from clusterlob_gpu.evaluation import (
    LEVEL,
    MIN_ROWS,
    Floats,
    Ints,
    Pair,
    Signal,
    Target,
    block_length,
    bootstrap_ics,
    capped,
    held,
    inference,
    is_thin,
    on_grid,
    pair_of,
    paired_difference,
    percentile_interval,
    ratio,
)
from clusterlob_gpu.plain_statistics import false_discovery, two_sided

MIN_SPANS = 20
"""Slices that hold fewer stretches of r + H - 1 buckets than this are thin: on null markets of 5 days their
nominal 5 % tests rejected 11 to 17 % of the time for sums of 1 h and 3 h."""

DIFFERENCE_COLUMNS = (
    "signal",
    "benchmark",
    "target",
    "horizon_us",
    "n",
    "ic",
    "ic_benchmark",
    "diff",
    "diff_low",
    "diff_high",
    "diff_p",
    "thin",
)


def difference_table(
    panel: pd.DataFrame,
    pairs: Sequence[tuple[Signal, Signal]],
    targets: Sequence[Target],
    *,
    width_us: int,
    draws: int = 1000,
    seed: int = 7,
) -> pd.DataFrame:
    """Paired differences in IC of one symbol: each signal less its benchmark, both on the same rows.

    Takes the panel of `evaluation.ic_table`.  A row per target and pair, in the order given: signal,
    benchmark, target, horizon_us; n = rows with both signals and the target; ic, ic_benchmark over these
    rows; diff = ic - ic_benchmark; diff_low, diff_high (95 %) from a circular block bootstrap that draws the
    same blocks for every pair of a target; diff_p: normal, of diff over the standard deviation of its draws;
    thin as in `evaluation.judge`; then p_fdr and verdict of `judge_differences`.  Raises InputError as
    `evaluation.ic_table`.
    """
    columns = [signal.column for pair in pairs for signal in pair] + [target.column for target in targets]
    columns = list(dict.fromkeys(columns))
    values, _ = on_grid(panel, columns, width_us)
    grid = dict(zip(columns, values.T, strict=True))
    rows = [row for target in targets for row in _difference_rows(grid, pairs, target, width_us, draws, seed)]
    return judge_differences(pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS)))


def _compared(pairs: Sequence[Pair], sampled: Floats, i: int, other: int) -> dict[str, float]:
    """`paired_difference` with a p that can be as small as many comparisons ask: counted draws never are."""
    found = paired_difference(pairs, sampled, i, other)
    draws = sampled[:, i] - sampled[:, other]
    draws = draws[np.isfinite(draws)]
    error = float(draws.std(ddof=1)) if len(draws) > 1 else np.nan
    return found | {"diff_p": two_sided(ratio(found["diff"], error))}


def _difference_rows(
    grid: dict[str, Floats],
    pairs: Sequence[tuple[Signal, Signal]],
    target: Target,
    width_us: int,
    draws: int,
    seed: int,
) -> list[dict[str, object]]:
    horizon = -(-target.horizon_us // width_us)
    span = held(grid[target.column])
    both = []
    for pair in pairs:
        ours, other = (grid[signal.column][span] for signal in pair)
        known = np.isfinite(ours) & np.isfinite(other)
        both += [pair_of(np.where(known, x, np.nan), grid[target.column][span]) for x in (ours, other)]
    sampled = np.full((draws, len(both)), np.nan)
    if both and len(both[0].x):
        sampled = bootstrap_ics(both, block_length(both, horizon), draws, seed)
    rows = []
    for i, (signal, benchmark) in enumerate(pairs):
        mine, theirs = both[2 * i : 2 * i + 2]
        row: dict[str, object] = {"signal": signal.name, "benchmark": benchmark.name, "target": target.name}
        row |= {"horizon_us": target.horizon_us, "n": mine.n, "ic": mine.ic, "ic_benchmark": theirs.ic}
        row |= _compared(both, sampled, 2 * i, 2 * i + 1)
        rows.append(row | {"thin": is_thin(mine, horizon) or is_thin(theirs, horizon)})
    return rows


def judge_differences(table: pd.DataFrame) -> pd.DataFrame:
    """Add `p_fdr` and `verdict` over all rows of the table: call it again on tables put together.

    p_fdr: Benjamini-Hochberg of diff_p over the rows that are not thin and have one.  verdict: "thin";
    "larger" or "smaller" where p_fdr < 0.05 and the interval excludes 0 on that side; "undecided" otherwise.
    """
    thin = table["thin"].to_numpy(bool)
    p = table["diff_p"].to_numpy(np.float64)
    p_fdr = np.full(len(table), np.nan)
    tested = np.isfinite(p) & ~thin
    if tested.any():
        p_fdr[tested] = false_discovery(p[tested])
    sure = p_fdr < LEVEL
    verdict = np.select(
        [thin, sure & (table["diff_low"] > 0), sure & (table["diff_high"] < 0)],
        ["thin", "larger", "smaller"],
        "undecided",
    )
    return table.assign(p_fdr=p_fdr, verdict=verdict)


_SLICE_STATISTICS = ("ic", "rank_ic", "hac_se", "hac_t", "hac_p", "mde")
SLICE_COLUMNS = (
    "by",
    "bucket",
    "signal",
    "target",
    "horizon_us",
    "n",
    "share",
    "ic",
    "rank_ic",
    "hac_se",
    "hac_t",
    "hac_p",
    "mde",
    "ci_low",
    "ci_high",
    "ic_rest",
    "diff",
    "diff_low",
    "diff_high",
    "diff_p",
    "thin",
)


def slice_table(
    panel: pd.DataFrame,
    labels: Mapping[str, Sequence[object]],
    signals: Sequence[Signal],
    targets: Sequence[Target],
    *,
    width_us: int,
    draws: int = 1000,
    seed: int = 7,
) -> pd.DataFrame:
    """IC inside slices of time, each tested against the rest, for one symbol.

    Parameters
    ----------
    panel : as for `evaluation.ic_table`, with a column for each key of `labels`; rows without label are in
        no slice
    labels : column of the panel -> its labels in the order wanted

    Returns
    -------
    A row per (by, target, signal, bucket): by = column, bucket = label as text; n rows and share of all rows
    with signal, target and a label; ic, rank_ic, hac_se, hac_t, hac_p, mde as in `evaluation.ic_table`,
    places outside the slice scoring 0, mean and variance those of the slice; ci_low, ci_high from a block
    bootstrap of the whole time axis, which carries the slices along; ic_rest = IC over the rows with any
    other label; diff = ic - ic_rest with diff_low, diff_high on the same blocks and the diff_p of
    `difference_table` (with two labels the two rows say the same twice), null where the rest is thin; thin:
    fewer than max(30, 20 (r + H - 1)) rows; p_fdr and verdict ("larger", "smaller") of `judge_differences`.
    Raises InputError as `evaluation.ic_table`.
    """
    columns = list(dict.fromkeys([s.column for s in signals] + [t.column for t in targets]))
    values, ts = on_grid(panel, columns, width_us)
    grid = dict(zip(columns, values.T, strict=True))
    places = (panel["bucket_ts"].to_numpy(np.int64) - ts[0]) // width_us if len(ts) else ts
    rows: list[dict[str, object]] = []
    for by, names in labels.items():
        codes = np.full(len(ts), -1)
        codes[places] = pd.Categorical(panel[by], categories=list(names)).codes
        for target in targets:
            rows += [
                {"by": by, "bucket": str(names[code])} | row
                for code, row in _slice_rows(grid, codes, len(names), signals, target, width_us, draws, seed)
            ]
    return judge_differences(pd.DataFrame(rows, columns=list(SLICE_COLUMNS)))


def _slices(x: Floats, y: Floats, codes: Ints, count: int) -> list[Pair]:
    """For each label the rows that have it, then the rows that have any other."""
    pairs = []
    for code in range(count):
        rest = (codes >= 0) & (codes != code)
        pairs += [pair_of(np.where(mask, x, np.nan), y) for mask in (codes == code, rest)]
    return pairs


def _slice_rows(
    grid: dict[str, Floats],
    codes: Ints,
    count: int,
    signals: Sequence[Signal],
    target: Target,
    width_us: int,
    draws: int,
    seed: int,
) -> list[tuple[int, dict[str, object]]]:
    """Code of the label and its row, signal by signal; all on the same blocks."""
    horizon = -(-target.horizon_us // width_us)
    span = held(grid[target.column])
    y, codes = grid[target.column][span], codes[span]
    pairs = [pair for signal in signals for pair in _slices(grid[signal.column][span], y, codes, count)]
    sampled = np.full((draws, len(pairs)), np.nan)
    if pairs and len(y):
        # Slices come and go: the length that suits their scores alone may miss how long a sum persists.
        longest = capped(max(signal.rollup_bars for signal in signals), len(y))
        sampled = bootstrap_ics(pairs, max(block_length(pairs, horizon), longest), draws, seed)
    rows = []
    for s, signal in enumerate(signals):
        mine = range(2 * count * s, 2 * count * (s + 1), 2)
        total = sum(pairs[at].n for at in mine)
        for code, at in enumerate(mine):
            row: dict[str, object] = {"signal": signal.name, "target": target.name}
            row |= {"horizon_us": target.horizon_us, "n": pairs[at].n, "share": ratio(pairs[at].n, total)}
            statistics = inference(pairs[at], horizon, signal.rollup_bars)
            row |= {name: statistics[name] for name in _SLICE_STATISTICS}
            row |= dict(zip(("ci_low", "ci_high"), percentile_interval(sampled[:, at]), strict=True))
            row |= {"ic_rest": pairs[at + 1].ic} | _compared(pairs, sampled, at, at + 1)
            least = MIN_SPANS * (signal.rollup_bars + horizon - 1)
            thin, alone = (not pair.usable or pair.n < max(MIN_ROWS, least) for pair in pairs[at : at + 2])
            row |= {"thin": thin} | ({"diff_p": np.nan} if alone else {})
            rows.append((code, row))
    return rows
