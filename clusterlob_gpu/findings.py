"""What the numbers of a cluster run allow to be said of one symbol.

Which convention named the clusters, whether the sample is in-sample, what was dropped, which ICs differ from
zero after correction, and how much data the rest would need.
"""

from __future__ import annotations

import math

import pandas as pd

from clusterlob_gpu import page
from clusterlob_gpu.config import format_duration, parse_duration
from clusterlob_gpu.evaluation import MIXED, Z_95, Z_POWER
from clusterlob_gpu.schema import ALL_CLUSTERS, US_PER_DAY
from clusterlob_gpu.view import SIDES, View, distinct_targets

HEADLINE_SIGNAL, HEADLINE_TARGET = "ofi_size", "frnb"
"""The pair for which the research log reports an IC."""

_DROPS = {
    "side_unknown": "unknown side",
    "no_book": "no book yet",
    "stale_book": "stale book",
    "warmup": "too little history",
    "null_change_time": "no change of the book seen yet",
}


def findings(view: View) -> list[str]:
    """What may be concluded for one symbol, most important first; one sentence or two each."""
    return [
        *_sample_words(view),
        *_ic_words(view),
        *_benchmark_words(view),
        *_needed_words(view),
        *_markout_words(view),
        *_name_words(view),
        *_drop_words(view),
        *_window_words(view),
    ]


def _sample_words(view: View) -> list[str]:
    if not view.in_sample:
        return ["Out of sample: no day was labelled by clusters that were fitted on that day."]
    return [
        "In-sample: the clusters were fitted on days on which their ICs are measured. Read every "
        "number as optimistic; a walk-forward run (train_days) gives out-of-sample ones."
    ]


def _predictive(view: View) -> pd.DataFrame:
    return view.ic[view.ic["predictive"].astype(bool)]


def _ic_words(view: View) -> list[str]:
    rows = _predictive(view)
    tests = int(rows["p_fdr"].notna().sum())
    corrected = f"correction for {view.tests} tests" + (" of all symbols" if tests < view.tests else "")
    sure = rows[rows["verdict"].isin(["positive", "negative"])]
    words = []
    if tests == 0:
        words.append("No IC could be tested: too few buckets have both flow and return.")
    elif sure.empty:
        words.append(
            f"No cluster's IC differs from zero after {corrected}; the smallest IC "
            f"this sample could detect is {_smallest(rows)} (80 % power, before correction)."
        )
    else:
        order = pd.DataFrame({"other": sure["signal"] != HEADLINE_SIGNAL, "small": -sure["ic"].abs()})
        best = sure.loc[order.sort_values(["other", "small"], kind="stable").index]
        best = best[best["target"].isin(distinct_targets(rows))]
        listed = "; ".join(_one_ic(view, row) for _, row in best.head(5).iterrows())
        more = "; and others" if len(sure) > 5 else ""
        words.append(f"{len(sure)} of {tests} ICs differ from zero after {corrected}: {listed}{more}.")
    thin = rows[rows["verdict"] == "thin"]
    if len(thin):
        which = ", ".join(thin["target"].unique())
        words.append(
            f"{len(thin)} of {len(rows)} rows ({which}) are too thin to judge: constant, fewer than 30 "
            "buckets, or less than four horizons."
        )
    mixed = rows.loc[rows["verdict"] == MIXED, "cluster"].unique()
    if len(mixed):
        which = "; ".join(view.name(int(cluster)) for cluster in mixed)
        words.append(f"No verdict on {which}: the number stood for other trades in other windows (mixed).")
    return words


def _smallest(rows: pd.DataFrame) -> str:
    shown = rows[(rows["signal"] == HEADLINE_SIGNAL) & (rows["target"] == HEADLINE_TARGET)]
    shown = shown[~shown["thin"].astype(bool)]
    detectable = (shown if len(shown) else rows[~rows["thin"].astype(bool)])["mde"]
    return f"{detectable.min():.3f}"


def _one_ic(view: View, row: pd.Series) -> str:
    who = view.name(int(row["cluster"]))
    return f"{row['signal']} of {who} on {row['target']} {row['ic']:+.3f} {_brackets(row, '+.3f')}"


def _brackets(row: pd.Series, form: str) -> str:
    return f"[{row['ci_low']:{form}}, {row['ci_high']:{form}}]"


def _headline(view: View) -> pd.DataFrame:
    """IC rows of the headline signal and target, one per cluster."""
    return view.ic[(view.ic["signal"] == HEADLINE_SIGNAL) & (view.ic["target"] == HEADLINE_TARGET)]


def _benchmark_words(view: View) -> list[str]:
    rows = _headline(view)
    rows = rows[rows["diff"].notna() & ~rows["verdict"].isin(["thin", MIXED])]
    if rows.empty:
        return []
    apart = int(((rows["diff_low"] > 0) | (rows["diff_high"] < 0)).sum())
    row = rows.iloc[int(rows["diff"].abs().to_numpy().argmax())]
    largest = f"{row['diff']:+.3f} [{row['diff_low']:+.3f}, {row['diff_high']:+.3f}]"
    whose = view.name(int(row["cluster"]))
    pair = f"{HEADLINE_SIGNAL} on {HEADLINE_TARGET}"
    if not apart:
        return [
            f"No cluster differs from aggregate flow ({pair}): the largest paired difference in IC is "
            f"{largest}, {whose}."
        ]
    return [
        f"{apart} of {len(rows)} clusters differ from aggregate flow ({pair}, paired bootstrap, not "
        f"corrected for the number of clusters); the largest difference in IC is {largest}, {whose}."
    ]


def needed_buckets(row: pd.Series, difference: float) -> float:
    """Buckets with which `difference` in IC is found with 80 % power, from the row's paired interval.

    n (2.80 se / difference)^2, se = interval / (2 * 1.96); null without an interval or a difference.
    """
    se = (row["diff_high"] - row["diff_low"]) / (2 * Z_95)
    return float(row["n"] * (Z_POWER * se / difference) ** 2) if difference else math.nan


def _needed_words(view: View) -> list[str]:
    gap = _published_gap(view)
    if gap is None:
        return []
    cluster, difference = gap
    rows = _headline(view)
    rows = rows[rows["cluster"] == cluster]
    buckets = needed_buckets(rows.iloc[0], difference) if len(rows) else math.nan
    if not math.isfinite(buckets):
        return []
    days = math.ceil(buckets * parse_duration(view.info["config"]["bucket"]) / US_PER_DAY)
    return [
        f"To find the published difference of {difference:+.4f} between {view.name(cluster)} and aggregate "
        f"flow with 80 % power, about {buckets:,.0f} buckets ({days:,} days) are needed; this sample has "
        f"{int(rows['n'].iloc[0]):,}."
    ]


def _published_gap(view: View) -> tuple[int, float] | None:
    """The cluster with the largest published IC, and its lead over the published benchmark."""
    published = view.info.get("published") or {}
    ics = {
        int(entry["cluster"]): float(entry["ic"])
        for entry in published.get("ic", [])
        if (entry["signal"], entry["target"]) == (HEADLINE_SIGNAL, HEADLINE_TARGET)
    }
    benchmark = ics.pop(ALL_CLUSTERS, None)
    if benchmark is None or not ics:
        return None
    best = max(ics, key=lambda cluster: ics[cluster])
    return best, ics[best] - benchmark


def _markout_words(view: View) -> list[str]:
    if view.markouts.empty:
        return []
    longest = int(view.markouts["horizon_us"].max())
    rows = view.markouts[view.markouts["horizon_us"] == longest]
    rows = rows[rows["cluster"] != ALL_CLUSTERS]
    listed = "; ".join(
        f"{view.name(int(row['cluster']))} {row['mean_bps']:+.2f} {_brackets(row, '+.2f')}"
        for _, row in rows.head(6).iterrows()
    )
    return [f"Mark-out after {format_duration(longest)} in bps, before costs: {listed}."]


def _name_words(view: View) -> list[str]:
    table = view.latest
    other = "; ".join(
        f"cluster {int(row['cluster'])} {row['label']} becomes {row['label_other']}"
        for _, row in table.iterrows()
        if row["label"] != row["label_other"]
    )
    where = " in the last window" if view.walks else ""
    meaning = "the taker's own side" if view.side == "own" else "the side that the trade hits"
    change = other or "every cluster keeps its name"
    words = [
        f"Names follow same_side: {view.side} (sbs is the depth on {meaning}). Under "
        f"{SIDES[view.side]}{where} {change}."
    ]
    missing = int((table["label"] == "unassigned").sum())
    if missing == 1:
        words.append(f"One cluster{where} reaches no role by the margin and is called unassigned.")
    elif missing:
        words.append(f"{missing} clusters{where} reach no role by the margin and are called unassigned.")
    return words


def _drop_words(view: View) -> list[str]:
    rows = view.info["rows"].get(view.symbol)
    if not rows or not rows["trades"]:
        return []
    total, kept = int(rows["trades"]), int(rows["kept"])
    reasons = page.counted({_DROPS.get(reason, reason): count for reason, count in rows["dropped"].items()})
    dropped = f"{total - kept:,} dropped: {reasons}" if reasons else "none dropped"
    words = f"{kept:,} of {total:,} trades were kept ({kept / total:.2%}), {dropped}."
    labelled = int(rows.get("labelled", kept))
    if labelled < kept:
        words += f" A model labelled {labelled:,} of these; the others lie on days that no window tests."
    skipped = page.counted(rows["book_skipped"])
    if skipped:
        words += f" Of {int(rows['book_rows']):,} book rows these were no valid book and skipped: {skipped}."
    return [words]


def _window_words(view: View) -> list[str]:
    if not view.walks:
        return []
    agrees = view.centroids["agrees"].astype("boolean")
    known, differ = int(agrees.notna().sum()), int((~agrees).sum())
    return [
        f"Over {len(set(view.centroids['window_id']))} windows the naming rule and the tracked match "
        f"disagree {differ} of {known} times; mean drift {view.centroids['drift'].mean():.3f} in z."
    ]
