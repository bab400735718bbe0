"""The ClusterLOB experiment: its check, its results, and labelling with a model that is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clusterlob_gpu import clustering, evaluation
from clusterlob_gpu.clustering import Model
from clusterlob_gpu.config import ClusterConfig
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.pipeline import trials
from clusterlob_gpu.pipeline.parts import (
    FEATURE_KEYS,
    FIT_KEYS,
    ClusterRequest,
    ClusterRun,
    Part,
    front,
    prepare_parts,
    windows,
)
from clusterlob_gpu.pipeline.run import (
    Bad,
    Outcome,
    Work,
    added,
    check_range,
    execute,
    missing_notes,
    open_lake,
)
from clusterlob_gpu.workers import Workers


@dataclass(frozen=True)
class ClusterExperiment:
    """`run cluster`, and `label` where the request has models."""

    name: str

    def check(self, request: ClusterRequest, bad: Bad) -> list[ClusterRun]:
        """`check_range`, and whether the walk-forward and the engine are possible.

        Raises InputError naming what is not.
        """
        return check_cluster(request, [request.config], bad)

    def compute(self, request: ClusterRequest, runs: list[ClusterRun], work: Work) -> Outcome:
        """Every result of a checked request."""
        (parts,) = prepare_parts(request, [request.config], runs, work)
        problems = [part.problem for part in parts if part.problem is not None]
        if problems:
            work.stages.end_of_plan()
            raise problems[0]
        with work.clock.stage("evaluate"):
            tables = trials.tables_of(parts, work.stages)
            tables["ic"] = _judged(request, tables["ic"])
        if work.folder is not None:
            last = [part.models[part.fitted[-1].id] for part in parts]
            clustering.write_models(last, work.folder.parent / "model.json")
        summary = {
            "sample": _sample(request),
            "rows": {part.symbol: _row_counts(run, part) for run, part in zip(runs, parts, strict=True)},
            "notes": _notes(request, runs, parts, work.bad),
        }
        return Outcome(tables, summary, _headline(tables["ic"]))

    def expected(self, request: ClusterRequest, runs: Sequence[ClusterRun]) -> dict[str, int]:
        """Every day is reduced, given features and labelled; every window is fitted; a symbol has tables."""
        count = sum(len(run.wanted) for run in runs)
        found = {"book": count, "tail": count, "features": count}
        if request.models is None:
            found["fit"] = len(windows(request, request.config)) * len(runs)
        return found | {"label": count, "mids": count, "tables": len(runs)}


CLUSTER, LABEL = ClusterExperiment("cluster"), ClusterExperiment("label")


def check_cluster(request: ClusterRequest, configs: Sequence[ClusterConfig], bad: Bad) -> list[ClusterRun]:
    """The runs of a request under several configs."""
    for config in configs:
        check_config(request, config)
    return [ClusterRun(run.lake, run.wanted, run.missing) for run in check_range(request, bad)]


def check_config(request: ClusterRequest, config: ClusterConfig) -> None:
    """Raise InputError where a config is not possible on the days of a request, or on this backend."""
    if config.engine.startswith("cuml") and request.backend != "gpu":
        raise InputError(f"engine = {config.engine!r}: needs the gpu backend; use auto, lloyd or sklearn")
    if config.engine == "sklearn" and request.backend != "cpu":
        raise InputError("engine = 'sklearn': computes on the CPU; use auto, lloyd, cuml or cuml_dask")
    windows(request, config)


def run_cluster(request: ClusterRequest, workers: Workers) -> Path:
    """Run the whole experiment and return the output directory."""
    return execute(request, CLUSTER, workers)


def _judged(request: ClusterRequest, ic: pd.DataFrame) -> pd.DataFrame:
    """ICs of all symbols, corrected over the whole run."""
    ic = evaluation.judge(ic).assign(sample=_sample(request))
    return front(ic, ["symbol", "sample", "cluster", "label"])


def _sample(request: ClusterRequest) -> str:
    """Whether a model has seen the days that it labels, or days after them."""
    if request.models is None:
        return "in_sample" if request.config.train_days is None else "out_of_sample"
    known = [date.fromisoformat(day) for model in request.models.values() for day in model.train_days]
    return "in_sample" if max(known, default=date.min) >= request.start else "out_of_sample"


def _row_counts(run: ClusterRun, part: Part) -> dict[str, Any]:
    made = [run.features[day] for day in run.wanted]
    books = [run.books[day] for day in run.wanted]

    return {
        "trades": sum(day.trades for day in made),
        "kept": sum(day.kept for day in made),
        "labelled": sum(int(day.counts.sum()) for days_ in part.labelled.values() for day in days_),
        "dropped": added([day.dropped for day in made]),
        "book_rows": sum(book.rows for book in books) + sum(sum(book.skipped.values()) for book in books),
        "book_skipped": added([book.skipped for book in books]),
    }


def _notes(request: ClusterRequest, runs: Sequence[ClusterRun], parts: Sequence[Part], bad: Bad) -> list[str]:
    config = request.config
    notes = missing_notes(runs, bad)
    for part in parts:
        slow = [str(n) for n, model in part.models.items() if not model.fit.get("converged", True)]
        if slow:
            notes.append(f"{part.symbol}: the fit of window {', '.join(slow)} stopped before it converged")
        for window in part.windows:
            if window.id not in part.models:
                days_ = f"{window.test[0]} to {window.test[-1]}"
                notes.append(
                    f"{part.symbol}: too few trades to fit window {window.id}; {days_} is not tested"
                )
    tested = {day for window in windows(request, config) for day in window.test}
    left = [day for day in request.days if day not in tested]
    if config.train_days is not None and request.models is None:
        left = left[config.train_days :]
        if left:
            notes.append(f"{', '.join(map(str, left))}: no whole test window is left for these days")
    if config.asof == "inclusive":
        notes.append("asof = inclusive lets a trade see the book it has moved: a leak, for comparison only")
    for name, model in (request.models or {}).items():
        if model.train_days and max(model.train_days) > str(request.end):
            notes.append(
                f"{name}: the model was trained on days after the labelled ones: it knows their future"
            )
    return notes


def _headline(ic: pd.DataFrame) -> dict[str, float | None]:
    """What the ledger says of a finished run."""
    main = ic[(ic["signal"] == "ofi_size") & (ic["target"] == "frnb")]
    columns = (main[name].tolist() for name in ("symbol", "label", "cluster", "ic"))
    return {
        f"{symbol} ic frnb {label} ({cluster})": round(ic, 6) if np.isfinite(ic) else None
        for symbol, label, cluster, ic in zip(*columns, strict=True)
    }


def label(request: ClusterRequest, workers: Workers) -> Path:
    """Label the days of a request with given models, which must have been made with its features.

    Raises InputError naming the symbol without a model, or the field in which the two differ.
    """
    return execute(labelling_request(request), LABEL, workers)


def labelling_request(request: ClusterRequest) -> ClusterRequest:
    """The request with the models of its symbols alone and with their settings of the fit."""
    for name in request.symbols:
        open_lake(request, name, {})  # an unknown symbol is the lake's matter before it is the model's
    models = {name: _model_for(request, name) for name in request.symbols}
    settled = request.config.model_copy(update=_fitted_settings(request, list(models.values())))
    return replace(request, models=models, config=settled)


def _model_for(request: ClusterRequest, name: str) -> Model:
    models = request.models or {}
    if name not in models:
        raise InputError(f"--model: no model of {name}; the file has {', '.join(models)}")
    model = models[name]
    if model.exchange != request.exchange:
        raise InputError(f"--exchange {request.exchange}: the model of {name} is of {model.exchange}")
    mine = request.config.model_dump(mode="json", include=set(FEATURE_KEYS))
    for key, value in model.features.items():
        if mine.get(key) != value:
            raise InputError(
                f"{key} = {mine.get(key)!r}: the model of {name} was fitted with {value!r}; use that"
            )
    return model


def _fitted_settings(request: ClusterRequest, models: Sequence[Model]) -> dict[str, Any]:
    """The settings of the fit, which a model brings along; one that was given must not contradict."""
    settled = request.config.model_fields_set & set(FIT_KEYS)
    if settled:
        raise InputError(f"{min(settled)}: is the model's own when labelling; leave it out")
    fitted = ClusterConfig(**{**request.config.resolved(), **models[0].fitted})
    return {name: getattr(fitted, name) for name in FIT_KEYS}
