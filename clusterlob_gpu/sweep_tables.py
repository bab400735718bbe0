"""What a sweep found: every test of every trial, corrected together, and a row per trial."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from clusterlob_gpu import evaluation
from clusterlob_gpu.config import (
    config_hash,
)
from clusterlob_gpu.store import Store
from clusterlob_gpu.sweep_trials import Key, Results, Trial


def keys_of(trial: Trial) -> Iterator[Key]:
    """Evaluations that a trial asks for."""
    for experiment, config in trial.configs.items():
        for name in trial.symbols:
            yield Key(experiment, config_hash(config.resolved()), name)


def is_ready(trial: Trial, results: Results) -> bool:
    """Whether every evaluation of a trial has a result."""
    return all(key in results for key in keys_of(trial))


def problem_of_trial(trial: Trial, results: Results) -> str | None:
    """Why a trial has failed; None if it has not."""
    if trial.problem is not None:
        return trial.problem
    return next((results[key].problem for key in keys_of(trial) if results[key].made is None), None)


def all_tests(made: Sequence[Trial], results: Results, store: Store) -> pd.DataFrame:
    """ICs of every trial: its number in front, p_fdr and verdict over all distinct tests of the sweep.

    Trials may share evaluations, and evaluations that differ in another target alone repeat a test to the
    last digit: in the correction either counts once.
    """
    tables = []
    for number, (key, found) in enumerate(results.items()):
        table = found.ic(store)
        if len(table):
            tables.append(table.assign(evaluation=number, experiment=key.experiment, symbol=key.symbol))
    if not tables:
        return pd.DataFrame({"trial": np.empty(0, np.int64)})
    table = pd.concat(tables, ignore_index=True)
    same = [name for name in evaluation.SAME_TEST if name in table]
    corrected = evaluation.judge(table.drop_duplicates(same))[[*same, "p_fdr", "verdict"]]
    table = table.rename(columns={"p_fdr": "p_fdr_alone", "verdict": "verdict_alone"})
    table = table.merge(corrected, on=same, how="left", validate="many_to_one")
    number_of = {key: number for number, key in enumerate(results)}
    of_trials = pd.DataFrame(
        [(trial.number, number_of[key]) for trial in made for key in keys_of(trial) if key in number_of],
        columns=["trial", "evaluation"],
    )
    table = of_trials.merge(table, on="evaluation", how="inner")
    front = ["trial", "evaluation", "experiment", "symbol"]
    return table[[*front, *(name for name in table.columns if name not in front)]]


_BEST = (
    "experiment",
    "symbol",
    "cluster",
    "label",
    "signal",
    "target",
    "n",
    "ic",
    "rank_ic",
    "hac_t",
    "mde",
    "p_fdr",
)


def trial_table(made: Sequence[Trial], results: Results, tests: pd.DataFrame) -> pd.DataFrame:
    """A row per trial: settings, status, number of predictive tests, how many stand, and the strongest one.

    "Strongest" is the smallest hac_p of a test that is not thin: picked after looking, so its own p is
    worth nothing; p_fdr is corrected over all distinct tests of the sweep.
    """
    rows = []
    names = list(dict.fromkeys(key for trial in made for key in trial.settings))
    for trial in made:
        problem = problem_of_trial(trial, results)
        mine = tests[tests["trial"] == trial.number] if problem is None else tests.iloc[:0]
        row: dict[str, Any] = {"trial": trial.number, "id": trial.id}
        row |= {name: json.dumps(trial.settings[name]) if name in trial.settings else None for name in names}
        row |= {"status": "done" if problem is None else "failed", "error": problem}
        rows.append(row | strongest(mine))
    return pd.DataFrame(rows)


def strongest(tests: pd.DataFrame) -> dict[str, Any]:
    """Number of predictive tests, how many stand, and the one with the smallest p (`best_*`)."""
    if tests.empty:
        return {"tests": 0, "stand": 0} | dict.fromkeys(f"best_{name}" for name in _BEST)
    counted = tests[tests["predictive"] & ~tests["thin"].astype(bool) & tests["hac_p"].notna()]
    found: dict[str, Any] = {
        "tests": len(counted),
        "stand": int(counted["verdict"].isin(["positive", "negative"]).sum()),
    }
    if counted.empty:
        return found | dict.fromkeys(f"best_{name}" for name in _BEST)
    best = counted.iloc[int(np.argmin(counted["hac_p"].to_numpy()))]
    held = {name: best.get(name) for name in _BEST}
    return found | {f"best_{name}": None if pd.isna(value) else value for name, value in held.items()}
