"""A sweep: many trials over shared stages, each evaluated, all corrected together.

A trial is a point of a grid, or an entry of a list, on top of common settings.  Trials whose features are
the same form a family: its days are read once, its fits share the passes of k-means, its thresholds one
pass over the trades.  Trials that differ in nothing that an experiment looks at share its evaluation too.
A trial that fails is a row of the result, and no other trial's trouble.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clusterlob_gpu import evaluation, report
from clusterlob_gpu.config import (
    ClusterConfig,
    FlowConfig,
    RunConfig,
    config_hash,
    first_problem,
    make_config,
    read_yaml,
)
from clusterlob_gpu.errors import ClusterlobError, ConfigError, InputError
from clusterlob_gpu.files import Location
from clusterlob_gpu.output import RunDirectory, append_ledger
from clusterlob_gpu.pipeline import cluster, flow, trials
from clusterlob_gpu.pipeline.run import (
    Bad,
    Clock,
    RunRequest,
    Seen,
    Work,
    bad_day_rows,
    check_range,
    is_current,
    made_of,
    watching,
    what_was_seen,
    without_bad_days,
)
from clusterlob_gpu.pipeline.stages import PlanEnds, Stages, Tally
from clusterlob_gpu.pipeline.trials import Evaluated
from clusterlob_gpu.store import Store
from clusterlob_gpu.versions import CODE_VERSION, library_versions
from clusterlob_gpu.workers import Workers

Kind = Literal["cluster", "flow"]
CONFIGS: dict[str, type[RunConfig]] = {"cluster": ClusterConfig, "flow": FlowConfig}
OWN_OF_FLOW = {
    "quantiles",
    "threshold_window",
    "variants",
    "horizons",
    "controls",
    "fee_bps",
    "slippage_bps",
    "seed",
}
"""Settings in which the trials of one family of the taker-flow experiment may differ."""


class SweepFile(BaseModel):
    """A sweep as its file describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiments: tuple[Kind, ...] = Field(("cluster",), min_length=1)
    """What every trial runs; a setting goes to the experiments that know it."""
    exchange: str
    symbols: tuple[str, ...] = Field(min_length=1)
    start: date
    end: date
    config: dict[str, Any] = {}
    """Settings that all trials share."""
    grid: dict[str, list[Any]] = {}
    """Values by key; every combination is a trial.  The key `symbols` takes lists of symbols."""
    trials: list[dict[str, Any]] = []
    """Further trials, each a set of keys and values."""


@dataclass(frozen=True)
class Trial:
    """One point of a sweep."""

    number: int
    settings: Mapping[str, Any]
    """What the grid or the list gives it."""
    symbols: tuple[str, ...]
    configs: Mapping[str, RunConfig]
    """Its config by experiment; none where the settings are not valid."""
    problem: str | None = None

    @property
    def id(self) -> str:
        """Hash of its number and of what it computes."""
        held = {name: config.resolved() for name, config in self.configs.items()}
        return config_hash({"n": self.number, "settings": self.settings, "s": self.symbols, "c": held})


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """What the user asked for."""

    lake: Path | Location
    out: Path
    file: SweepFile
    store: Path | Location | None = None
    backend: str = "cpu"
    pictures: bool = True
    keep_current: bool = False
    """Leave a finished sweep as it is whose request, code and lake are the same; not one with failures."""

    @property
    def artefacts(self) -> Location:
        """Where the artefacts are."""
        return Location.of(self.store or self.out.absolute().parent / "store")

    @property
    def hash(self) -> str:
        """Hash of what was asked for."""
        return config_hash({"sweep": self.file.model_dump(mode="json"), "backend": self.backend})

    @property
    def identity(self) -> str:
        """`made_of` of the sweep."""
        return made_of(self.hash, self.lake)

    def run_request(self, config: RunConfig, symbols: Sequence[str]) -> RunRequest[Any]:
        """The request of a family, under the config of one of its trials."""
        return RunRequest(
            lake=self.lake,
            exchange=self.file.exchange,
            symbols=tuple(symbols),
            start=self.file.start,
            end=self.file.end,
            out=self.out,
            store=self.store,
            config=config,
            backend=self.backend,
        )


def read_sweep(path: Path) -> SweepFile:
    """A sweep file; raises ConfigError naming the file and the field."""
    try:
        file = SweepFile(**read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error, SweepFile)}") from None
    known = {"symbols"}.union(*(CONFIGS[name].model_fields for name in file.experiments))
    used = [*file.config, *file.grid, *(key for trial in file.trials for key in trial)]
    unknown = [key for key in used if key not in known]
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]}: no such key of {' or '.join(file.experiments)}")
    empty = [key for key, values in file.grid.items() if not values]
    if empty:
        raise ConfigError(f"{path}: grid.{empty[0]}: has no values")
    return file


def make_trials(file: SweepFile) -> list[Trial]:
    """Every trial of a sweep, the grid first, in the order of its keys and values."""
    points: list[dict[str, Any]] = []
    if file.grid or not file.trials:
        points += [
            dict(zip(file.grid, values, strict=True)) for values in itertools.product(*file.grid.values())
        ]
    points += file.trials
    return [_trial(file, number, point) for number, point in enumerate(points)]


def _trial(file: SweepFile, number: int, point: Mapping[str, Any]) -> Trial:
    symbols = point.get("symbols", file.symbols)
    symbols = (symbols,) if isinstance(symbols, str) else tuple(symbols)
    settings = {**file.config, **{key: value for key, value in point.items() if key != "symbols"}}
    configs: dict[str, RunConfig] = {}
    problem = None
    try:
        if len(set(symbols)) < len(symbols):
            raise ConfigError(f"symbols = {list(symbols)}: each once")
        for name in file.experiments:
            kind = CONFIGS[name]
            mine = {key: value for key, value in settings.items() if key in kind.model_fields}
            configs[name] = make_config(mine, (), kind)
    except ConfigError as error:
        configs, problem = {}, str(error)
    return Trial(number, point, symbols, configs, problem)


class Key(NamedTuple):
    """An evaluation: what trials that differ in nothing that the experiment looks at share."""

    experiment: str
    config: str
    """Hash of the config."""
    symbol: str


@dataclass(frozen=True)
class Family:
    """Configs of one experiment that share their features, and the symbols that trials ask of them."""

    experiment: str
    asked: dict[Key, RunConfig] = field(default_factory=dict)
    """Config of every evaluation that some trial asks for."""

    @property
    def configs(self) -> list[RunConfig]:
        """Every config once."""
        return list({key.config: config for key, config in self.asked.items()}.values())

    @property
    def symbols(self) -> list[str]:
        """Every symbol once."""
        return list(dict.fromkeys(key.symbol for key in self.asked))

    def parted(self) -> list[Family]:
        """A family for every config; for every symbol where there is one config."""
        by = "config" if len(self.configs) > 1 else "symbol"
        parts: dict[str, Family] = {}
        for key, config in self.asked.items():
            parts.setdefault(getattr(key, by), Family(self.experiment)).asked[key] = config
        return list(parts.values())

    def without(self, results: Results) -> Family:
        """The evaluations that have no result yet."""
        return Family(self.experiment, {k: config for k, config in self.asked.items() if k not in results})


def families(made: Sequence[Trial]) -> list[Family]:
    """The families of the trials, in the order of their first trials."""
    found: dict[str, Family] = {}
    for trial in made:
        for experiment, config in trial.configs.items():
            family = found.setdefault(_family_key(experiment, config), Family(experiment))
            for name in trial.symbols:
                family.asked[Key(experiment, config_hash(config.resolved()), name)] = config
    return list(found.values())


def _family_key(experiment: str, config: RunConfig) -> str:
    if experiment == "cluster":
        kept = config.model_dump(mode="json", include={*cluster.FEATURE_KEYS, "on_bad_day"})
    else:
        kept = config.model_dump(mode="json", exclude=OWN_OF_FLOW)
    return config_hash({"experiment": experiment, "config": kept})


Results = dict[Key, Evaluated]
SeenSymbols = list[tuple[str, Seen | None]]


def run_sweep(request: SweepRequest, workers: Workers) -> Path:
    """Run every trial and return the output directory; raises only where no trial at all can run."""
    made, store, clock = make_trials(request.file), Store(request.artefacts), Clock()
    _check(request, made)
    if request.keep_current and is_current(
        request.out, request.identity, request.lake, request.file.exchange
    ):
        return request.out
    store.check_writable()
    with RunDirectory(request.out, request.identity) as directory, watching(workers, directory):
        try:
            desk = Desk(Stages(workers, store), clock)
            results: Results = {}
            told: set[int] = set()
            for family in families(made):
                results |= _evaluate_family(request, family, desk)
                ready = [trial for trial in made if trial.number not in told and _is_ready(trial, results)]
                lines = [_trial_line(request, directory, trial, results, store) for trial in ready]
                append_ledger(directory.out.parent, lines)
                told |= {trial.number for trial in ready}
            with clock.stage("compare"):
                tests = all_tests(made, results, store)
                table = trial_table(made, results, tests)
            directory.write_table("sweep", table)
            directory.write_table("sweep_ic", tests)
            directory.write_run(_summary(request, table, desk, workers))
            if request.pictures:
                with clock.stage("report"):
                    report.render_run(directory.work)
            directory.write_run(_summary(request, table, desk, workers))
            if (table["status"] == "done").all():
                directory.write_seen(what_was_seen(desk.seen))
            end = {"status": "done", "trials": len(made), "failed": int((table["status"] != "done").sum())}
            directory.publish([_line(request, directory, clock) | end])
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            end = {"status": status, "error": f"{type(error).__name__}: {error}"}
            line = _line(request, directory, clock) | end
            with suppress(OSError):  # a full disk must not hide what went wrong first
                append_ledger(directory.out.parent, [] if directory.told else [line])
            raise
    return request.out


def _check(request: SweepRequest, made: Sequence[Trial]) -> None:
    RunDirectory(request.out, request.identity)
    if not any(trial.configs for trial in made):
        raise InputError(f"none of the {len(made)} trials can run: {made[0].problem}")


@dataclass
class Desk:
    """What the families of a sweep are worked on with, and what of theirs is told at the end."""

    stages: Stages
    clock: Clock
    seen: SeenSymbols = field(default_factory=list)
    """What was looked at of every symbol; None for a market symbol that the lake does not have."""
    bad: list[Bad] = field(default_factory=list)
    """Bad days by family."""


def _evaluate_family(request: SweepRequest, family: Family, desk: Desk) -> Results:
    """Evaluations of a family; a config, a symbol or a family that fails says why."""
    results = _unable(request, family)
    return results | _evaluate_able(request, family.without(results), desk)


def _evaluate_able(request: SweepRequest, family: Family, desk: Desk) -> Results:
    """Evaluations of a family; where something fails, each config and then each symbol goes alone.

    What is done is in the store, so only what fails is tried again.
    """
    if not family.asked:
        return {}
    bad = Bad()
    desk.bad.append(bad)
    asked = request.run_request(family.configs[0], family.symbols)

    def attempt(bad: Bad) -> list[Evaluated]:
        parts, seen = _family_parts(asked, family, Work(desk.stages, desk.clock, None, bad))
        desk.seen += seen
        with desk.clock.stage("evaluate"):
            return desk.stages.make("evaluation", trials.evaluation_artefact, trials.evaluate, parts)

    try:
        return dict(zip(family.asked, without_bad_days(asked, attempt, bad), strict=True))
    except ClusterlobError as error:
        parts = family.parted()
        if len(parts) == 1:
            return dict.fromkeys(family.asked, Evaluated(None, str(error)))
    return {key: found for part in parts for key, found in _evaluate_able(request, part, desk).items()}


def _unable(request: SweepRequest, family: Family) -> Results:
    """What cannot run at all: configs that the days or the backend do not allow, symbols without them."""
    found: Results = {}
    for config in family.configs:
        problem = _problem_of(partial(_check_config, request, family, config))
        if problem is not None:
            mine = config_hash(config.resolved())
            found |= {key: problem for key in family.asked if key.config == mine}
    for name in family.symbols:
        asked = request.run_request(family.configs[0], [name])
        problem = _problem_of(partial(without_bad_days, asked, partial(check_range, asked)))
        if problem is not None:
            found |= {key: problem for key in family.asked if key.symbol == name and key not in found}
    return found


def _problem_of(check: Callable[[], object]) -> Evaluated | None:
    try:
        check()
    except ClusterlobError as error:
        return Evaluated(None, str(error))
    return None


def _check_config(request: SweepRequest, family: Family, config: Any) -> None:
    if family.experiment == "cluster":
        cluster.check_config(request.run_request(config, family.symbols), config)


def _family_parts(asked: RunRequest[Any], family: Family, work: Work) -> tuple[list[Any], SeenSymbols]:
    """Parts of the evaluations of a family, in their order, and what was looked at for them."""
    configs: Any = family.configs
    absent: SeenSymbols = []
    if family.experiment == "cluster":
        runs: list[Any] = cluster.check_cluster(asked, configs, work.bad)
        rows: Sequence[Sequence[Any]] = cluster.prepare_parts(asked, configs, runs, work)
    else:
        runs = flow.check_flow(asked, work.bad)
        rows, markets = flow.prepare_flow(asked, configs, runs, work)
        runs = [*runs, *markets.values()]
        absent = [(name, None) for name in asked.config.markets if name not in markets]
    hashes = [config_hash(config.resolved()) for config in configs]
    found = {
        Key(family.experiment, config, part.symbol): part
        for config, row in zip(hashes, rows, strict=True)
        for part in row
    }
    seen: SeenSymbols = [(run.name, run.lake.seen()) for run in runs]
    return [found[key] for key in family.asked], [*seen, *absent]


def plan_sweep(request: SweepRequest, workers: Workers) -> tuple[list[Trial], dict[str, Tally], list[str]]:
    """Trials, what the store has and lacks of their stages as far as can be told, and what cannot run."""
    made = make_trials(request.file)
    _check(request, made)
    stages = Stages(workers, Store(request.artefacts), planning=True)
    problems: list[str] = []
    for family in families(made):
        unable = _unable(request, family)
        problems += dict.fromkeys(found.problem for found in unable.values() if found.problem)
        able = family.without(unable)
        if not able.asked:
            continue
        asked = request.run_request(able.configs[0], able.symbols)

        def attempt(bad: Bad, asked: RunRequest[Any] = asked, able: Family = able) -> None:
            with suppress(PlanEnds):
                parts, _ = _family_parts(asked, able, Work(stages, Clock(), None, bad))
                stages.make("evaluation", trials.evaluation_artefact, trials.evaluate, parts)

        try:
            without_bad_days(asked, attempt)
        except ClusterlobError as error:
            problems.append(str(error))
    return made, stages.tallies, problems


# ---- results ------------------------------------------------------------------------------------------


def _keys(trial: Trial) -> Iterator[Key]:
    for experiment, config in trial.configs.items():
        for name in trial.symbols:
            yield Key(experiment, config_hash(config.resolved()), name)


def _is_ready(trial: Trial, results: Results) -> bool:
    return all(key in results for key in _keys(trial))


def _problem(trial: Trial, results: Results) -> str | None:
    """Why a trial has failed; None if it has not."""
    if trial.problem is not None:
        return trial.problem
    return next((results[key].problem for key in _keys(trial) if results[key].made is None), None)


_SAME = ("experiment", "symbol", "cluster", "signal", "target", "n", "ic", "hac_p")
"""Columns by which one test is known from another; equal numbers of another config are the same test."""


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
    table = table.rename(columns={"p_fdr": "p_fdr_alone", "verdict": "verdict_alone"})
    same = [name for name in _SAME if name in table]
    distinct = evaluation.judge(table.drop_duplicates(same))
    mixed = distinct["verdict_alone"].eq("mixed")
    distinct = distinct.assign(verdict=distinct["verdict"].mask(mixed, "mixed"))
    corrected = distinct[[*same, "p_fdr", "verdict"]]
    table = table.merge(corrected, on=same, how="left", validate="many_to_one")
    number_of = {key: number for number, key in enumerate(results)}
    of_trials = pd.DataFrame(
        [(trial.number, number_of[key]) for trial in made for key in _keys(trial) if key in number_of],
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
        problem = _problem(trial, results)
        mine = tests[tests["trial"] == trial.number] if problem is None else tests.iloc[:0]
        row: dict[str, Any] = {"trial": trial.number, "id": trial.id}
        row |= {name: json.dumps(trial.settings[name]) if name in trial.settings else None for name in names}
        row |= {"status": "done" if problem is None else "failed", "error": problem}
        rows.append(row | _strongest(mine))
    return pd.DataFrame(rows)


def _strongest(tests: pd.DataFrame) -> dict[str, Any]:
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


def _line(request: SweepRequest, directory: RunDirectory, clock: Clock) -> dict[str, Any]:
    return {
        "id": directory.attempt.id,
        "experiment": "sweep",
        "out": str(request.out),
        "config_hash": request.hash,
        "symbols": request.file.symbols,
        "start": request.file.start,
        "end": request.file.end,
        "attempts": directory.attempt.number,
        "seconds": round(clock.seconds, 3),
    }


def _trial_line(
    request: SweepRequest, directory: RunDirectory, trial: Trial, results: Results, store: Store
) -> dict[str, Any]:
    """A trial's line in the ledger; its headline is corrected over the trial alone."""
    problem = _problem(trial, results)
    line: dict[str, Any] = {
        "id": f"{directory.attempt.id}/{trial.id}",
        "experiment": "+".join(request.file.experiments),
        "sweep": directory.attempt.id,
        "trial": trial.number,
        "settings": dict(trial.settings),
        "config_hash": trial.id,
        "symbols": trial.symbols,
        "start": request.file.start,
        "end": request.file.end,
        "status": "done" if problem is None else "failed",
    }
    if problem is not None:
        return line | {"error": problem}
    tests = pd.concat([results[key].ic(store) for key in _keys(trial)], ignore_index=True)
    best = _strongest(tests)
    ic = best["best_ic"]
    return line | {"tests": best["tests"], "headline": None if ic is None else round(float(ic), 6)}


def _summary(request: SweepRequest, table: pd.DataFrame, desk: Desk, workers: Workers) -> dict[str, Any]:
    return {
        "experiment": "sweep",
        "status": "done",
        "sweep": request.file.model_dump(mode="json"),
        "config_hash": request.hash,
        "trials": len(table),
        "failed": int((table["status"] != "done").sum()),
        "code": CODE_VERSION,
        "versions": library_versions(),
        "backend": request.backend,
        "workers": workers.name,
        "lake": {"path": str(request.lake)},
        "store": str(request.artefacts),
        "artefacts": {name: tally.as_record() for name, tally in desk.stages.tallies.items()},
        "bad_days": list({str(row): row for bad in desk.bad for row in bad_day_rows(bad)}.values()),
        "timings": desk.clock.stages,
        "seconds": desk.clock.seconds,
        "started_at": desk.clock.started_at.isoformat(timespec="seconds"),
    }
