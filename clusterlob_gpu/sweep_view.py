"""The tables of a finished sweep as its report looks at them: what was tried, and which settings matter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from clusterlob_gpu import page
from clusterlob_gpu.config import ClusterConfig, FlowConfig, RunConfig, make_config, parse_duration
from clusterlob_gpu.evaluation import SAME_TEST
from clusterlob_gpu.findings import HEADLINE_SIGNAL, HEADLINE_TARGET
from clusterlob_gpu.flow_evaluation import LARGE
from clusterlob_gpu.schema import ALL_CLUSTERS

CONFIGS: dict[str, type[RunConfig]] = {"cluster": ClusterConfig, "flow": FlowConfig}
TITLES = {"cluster": "ClusterLOB", "flow": "taker flow"}
ROLES = ("opportunistic", "directional", "passive")
LONG_SUM = f"{LARGE}_sum_3h"
STANDING = ("positive", "negative")

_TEST = ["evaluation", "cluster", "signal", "target"]
_COLUMNS = (
    *("trial", "evaluation", "experiment", "symbol", "cluster", "label", "signal", "target", "horizon_us"),
    *("n", "ic", "ci_low", "ci_high", "hac_t", "hac_p", "mde", "predictive", "thin"),
    *("p_fdr", "verdict", "p_fdr_alone", "verdict_alone"),
)
_FLAGS = ("predictive", "thin")
_TEXTS = ("experiment", "symbol", "label", "signal", "target", "verdict", "verdict_alone")


@dataclass(frozen=True)
class SweepView:
    """The tables of a sweep."""

    info: dict[str, Any]
    """run.json"""
    trials: pd.DataFrame
    ic: pd.DataFrame
    """Every test of every trial."""
    evaluations: pd.DataFrame
    """By number: experiment, symbol, sample, how many trials share it, and its settings that vary."""

    @property
    def settings(self) -> list[str]:
        """Settings in which the trials differ."""
        names = self.trials.columns[2 : list(self.trials.columns).index("status")]
        return [name for name in names if _varies(self.trials[name])]

    @property
    def failed(self) -> pd.DataFrame:
        return self.trials[self.trials["status"] != "done"]

    @property
    def rows(self) -> pd.DataFrame:
        """Every distinct row of ICs, of trials that share an evaluation once."""
        return self.ic.drop_duplicates(_TEST)

    @property
    def tests(self) -> pd.DataFrame:
        """The distinct tests for which p was corrected, the strongest first."""
        tests = counted_tests(self.rows).sort_values(["hac_p", "evaluation"], kind="stable")
        return tests.drop_duplicates(list(SAME_TEST))

    @property
    def symbols(self) -> list[str]:
        """Symbols with results."""
        return sorted(self.evaluations["symbol"].unique())

    @property
    def in_sample(self) -> bool:
        return bool((self.evaluations["sample"] == "in sample").any())


def counted_tests(rows: pd.DataFrame) -> pd.DataFrame:
    """Predictive tests that have a p and are not thin: those that are corrected for."""
    return rows[rows["predictive"] & ~rows["thin"] & rows["hac_p"].notna()]


def _varies(values: pd.Series) -> bool:
    return len(values.unique()) > 1


def is_standing(rows: pd.DataFrame) -> pd.Series:
    """Whether each test stands after correction."""
    return rows["verdict"].isin(STANDING)


def read_run(out: Path) -> SweepView:
    """The tables of a sweep; raises InputError naming a missing file."""
    info = page.read_info(out)
    trials = page.read_results(Path(out), "sweep")
    found = page.read_results(Path(out), "sweep_ic").reindex(columns=_COLUMNS)
    kinds = dict.fromkeys(_COLUMNS, "float64") | dict.fromkeys(_TEXTS, "object")
    kinds |= {"trial": "int64", "evaluation": "int64"} | dict.fromkeys(_FLAGS, "bool")
    ic = found.astype(kinds)
    view = SweepView(info, trials, ic, pd.DataFrame())
    return SweepView(info, trials, ic, _evaluations(view))


def _evaluations(view: SweepView) -> pd.DataFrame:
    shared = view.ic.groupby("evaluation")["trial"].nunique()
    first = view.ic.drop_duplicates("evaluation").set_index("evaluation").sort_index()
    trials = view.trials.set_index("trial")
    configs = [_config(view.info, trials.loc[row["trial"]], row["experiment"]) for _, row in first.iterrows()]
    return pd.DataFrame(
        {
            "experiment": first["experiment"],
            "symbol": first["symbol"],
            "sample": [_sample(config) for config in configs],
            "trials": shared,
        }
        | {name: _ordered([config.get(name) for config in configs]) for name in view.settings},
        index=first.index,
    )


def _config(info: Mapping[str, Any], trial: pd.Series, experiment: str) -> dict[str, Any]:
    """All settings of a trial's experiment, those that nobody gave at their defaults."""
    kind = CONFIGS[experiment]
    given = dict(info["sweep"]["config"])
    given |= {str(name): json.loads(trial[name]) for name in trial.index if _is_given(trial, name, kind)}
    return make_config(
        {name: given[name] for name in given if name in kind.model_fields}, (), kind
    ).resolved()


def _is_given(trial: pd.Series, name: Any, kind: type[RunConfig]) -> bool:
    return name in kind.model_fields and isinstance(trial[name], str)


def _sample(config: Mapping[str, Any]) -> str:
    if "train_days" not in config:
        return "nothing fitted"
    return "in sample" if config["train_days"] is None else "out of sample"


# ---- settings


def value_text(value: Any) -> str:
    """A setting in a label: `0.8, 0.5`."""
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    return page.NOTHING if value is None else str(value)


def _rank(value: Any) -> Any:
    """Where a setting stands among others of its kind; durations by length."""
    if isinstance(value, list | tuple):
        return tuple(map(_rank, value))
    try:
        return parse_duration(value)
    except ValueError:
        return value


def _ordered(values: Sequence[Any]) -> Any:
    """Settings as text, a categorical in rising order, or as they came where they have none."""
    distinct = {value_text(value): _rank(value) for value in values}
    try:
        order = sorted(distinct, key=lambda name: (name != page.NOTHING, distinct[name]))
    except TypeError:
        order = list(distinct)
    return pd.Categorical([value_text(value) for value in values], order, ordered=True)


def settings_that_matter(rows: pd.DataFrame, names: Sequence[str], within: Sequence[str]) -> list[str]:
    """Names without which the settings would not tell the ICs apart.

    A setting is left out if it does not vary, or if rows that differ in it alone all have the same IC.
    """
    kept = [name for name in names if _varies(rows[name])]
    for name in list(kept):
        others = [other for other in kept if other != name]
        same = rows.groupby([*within, *others], observed=True, dropna=False)["ic"]
        if same.size().max() > 1 and same.nunique(dropna=False).max() == 1:
            kept.remove(name)
    return kept


@dataclass(frozen=True)
class Headline:
    """ICs of the pairs that an experiment is about, of one symbol, over the settings that matter to them."""

    symbol: str
    experiment: str
    rows: pd.DataFrame
    """A row per panel and point of the settings; where a name holds for two clusters, per cluster."""
    settings: list[str]
    evaluations: int
    """How many evaluations the rows are of; those whose settings make no difference are one point."""
    in_sample: bool

    @property
    def panels(self) -> list[str]:
        return list(dict.fromkeys(self.rows["panel"]))

    @property
    def points(self) -> pd.DataFrame:
        """The settings, each point once, in order."""
        return self.rows[self.settings].drop_duplicates().sort_values(self.settings, ignore_index=True)

    @property
    def pair(self) -> str:
        """Signal and target, as text."""
        if self.experiment == "cluster":
            return f"{HEADLINE_SIGNAL} on {HEADLINE_TARGET}"
        return f"large flow on {' or '.join(dict.fromkeys(self.rows['target']))}"


def headlines(view: SweepView, symbol: str) -> list[Headline]:
    """The headline of every experiment that the sweep has of a symbol."""
    found = []
    for experiment, take in (("cluster", _cluster_pairs), ("flow", _flow_pairs)):
        rows = view.rows
        rows = take(rows[(rows["experiment"] == experiment) & (rows["symbol"] == symbol)])
        if rows["ic"].notna().any():
            found.append(_headline(view, symbol, experiment, rows))
    return found


def _headline(view: SweepView, symbol: str, experiment: str, rows: pd.DataFrame) -> Headline:
    names = [name for name in view.settings if name in CONFIGS[experiment].model_fields]
    rows = rows.join(view.evaluations[["sample", *names]], on="evaluation")
    within = ["panel", "cluster"]
    settings = settings_that_matter(rows, names, within)
    kept = rows.drop_duplicates([*within, *settings])
    in_sample = bool((rows["sample"] == "in sample").any())
    return Headline(symbol, experiment, kept, settings, rows["evaluation"].nunique(), in_sample)


def _cluster_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """ofi_size on the next bucket, of all clusters and of the named ones."""
    rows = rows[(rows["signal"] == HEADLINE_SIGNAL) & (rows["target"] == HEADLINE_TARGET)]
    role = rows["label"].astype(str).str.split(" in ").str[0]  # directional in 2 of 4 windows
    role = role.where(rows["cluster"] != ALL_CLUSTERS, "all clusters")
    return _panels(rows.assign(panel=role), ("all clusters", *ROLES))


def _flow_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Large flow of one bar and its 3 h sum, on the longest horizon of each evaluation."""
    rows = rows[rows["signal"].isin([LARGE, LONG_SUM])]
    longest = rows.groupby("evaluation")["horizon_us"].transform("max")
    rows = rows[rows["horizon_us"] == longest]
    names = {LARGE: "large, one bar", LONG_SUM: "large, 3h sum"}
    return _panels(rows.assign(panel=rows["signal"].map(names)), tuple(names.values()))


def _panels(rows: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    kept = rows[rows["panel"].isin(order)]
    return kept.sort_values("panel", key=lambda panel: panel.map(order.index), kind="stable")


def count_text(count: int, noun: str) -> str:
    """A number with its noun: `1 trial`, `60 trials`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def capital(text: str) -> str:
    """The text with its first letter large."""
    return text[:1].upper() + text[1:]
