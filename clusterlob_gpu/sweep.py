"""A sweep: many trials over shared stages, each evaluated, all corrected together.

A trial is a point of a grid, or an entry of a list, on top of common settings.  Trials whose features are
the same form a family: its days are read once, its fits share the passes of k-means, its thresholds one
pass over the trades.  Trials that differ in nothing that an experiment looks at share its evaluation too.
A trial that fails is a row of the result, and no other trial's trouble.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from clusterlob_gpu import report
from clusterlob_gpu.backend import Name
from clusterlob_gpu.config import (
    RunConfig,
    config_hash,
)
from clusterlob_gpu.errors import ClusterlobError, InputError
from clusterlob_gpu.files import Location
from clusterlob_gpu.output import RunDirectory, append_ledger
from clusterlob_gpu.pipeline import cluster, flow, flow_parts, trials
from clusterlob_gpu.pipeline.parts import prepare_parts
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
from clusterlob_gpu.sweep_tables import all_tests, is_ready, keys_of, problem_of_trial, strongest, trial_table
from clusterlob_gpu.sweep_trials import (
    Family,
    Key,
    Results,
    SweepFile,
    Trial,
    families,
    make_trials,
    read_sweep,
)
from clusterlob_gpu.versions import CODE_VERSION, library_versions
from clusterlob_gpu.workers import Workers

__all__ = ["SweepFile", "SweepRequest", "plan_sweep", "read_sweep", "run_sweep"]


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """What the user asked for."""

    lake: Path | Location
    out: Path
    file: SweepFile
    store: Path | Location | None = None
    backend: Name = "cpu"
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
                ready = [trial for trial in made if trial.number not in told and is_ready(trial, results)]
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
        rows: Sequence[Sequence[Any]] = prepare_parts(asked, configs, runs, work)
    else:
        runs = flow.check_flow(asked, work.bad)
        rows, markets = flow_parts.prepare_flow(asked, configs, runs, work)
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
    problem = problem_of_trial(trial, results)
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
    tests = pd.concat([results[key].ic(store) for key in keys_of(trial)], ignore_index=True)
    best = strongest(tests)
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
