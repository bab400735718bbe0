"""K-means of many fits at once: every pass over a day's features serves all fits that train on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import numpy as np

from clusterlob_gpu import cluster_days, clustering, starts
from clusterlob_gpu.cluster_days import FitJob, Fitted, SampleJob, Share, StartJob, TrainDay
from clusterlob_gpu.clustering import Bounds, Fit, Partial
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.pipeline.stages import Item, PlanEnds, Stages
from clusterlob_gpu.settling import Settling
from clusterlob_gpu.starts import Start

_MERGED = ("sklearn", "cuml")
"""Engines that want all rows in the memory of one worker."""
_FIRST_REACH = 10
"""How many times their standard error the centres of the sample may move in all: trades are alike from one to
the next, so a sample of them says less than its error tells."""
_MOST_LEFT = 1 << 21
"""Rows of a fit that are held here because they have not settled; of each day the same share."""
_TOGETHER = 16
"""Large answers of days that are held at once while they are added up."""


def fit_all(jobs: Sequence[FitJob], stages: Stages) -> list[Fitted | InputError]:
    """The fits, from the store where it has them; a fit that is not possible gives its reason."""
    named = {job.artefact().address: job for job in jobs}
    found: dict[str, Fitted | InputError] = {}
    for address, job in named.items():
        made = stages.find("fit", job.artefact())
        if made is not None:
            found[address] = cluster_days.load_fit(stages.store, made)
    todo = {address: job for address, job in named.items() if address not in found}
    if todo and stages.planning:
        raise PlanEnds
    if todo:
        found |= dict(zip(todo, _fit(list(todo.values()), stages), strict=True))
    return [found[job.artefact().address] for job in jobs]


def _fit(jobs: Sequence[FitJob], stages: Stages) -> list[Fitted | InputError]:
    bounds = _all_bounds(jobs, stages)
    begun = _starts(jobs, bounds, stages)
    known = {n: start for n, start in enumerate(begun) if not isinstance(start, InputError)}
    merged = [n for n in known if jobs[n].config.engine in _MERGED]
    spread = [n for n in known if jobs[n].config.engine == "cuml_dask"]
    passed = [n for n in known if n not in (*merged, *spread)]
    fits = {n: _spread_fit(jobs[n], bounds[n], known[n].centres, stages) for n in spread}
    tasks = [(jobs[n], bounds[n], known[n].centres) for n in merged]
    fits |= zip(merged, stages.map("fit", cluster_days.fit_merged, tasks), strict=True)
    together = clustering.lloyd_together(
        [known[n].centres for n in passed],
        _Passes(
            [jobs[n] for n in passed],
            [bounds[n] for n in passed],
            stages,
            [_FIRST_REACH * known[n].error for n in passed],
        ),
    )
    fits |= zip(passed, together, strict=True)
    done: list[Fitted | InputError] = []
    for n, (job, start) in enumerate(zip(jobs, begun, strict=True)):
        if isinstance(start, InputError):
            done.append(start)
        else:
            fitted = cluster_days.save_fit(stages.store, job, fits[n], bounds[n])
            stages.count("fit", fitted.made)
            done.append(fitted)
    return done


def _spread_fit(job: FitJob, bounds: Bounds, start: np.ndarray, stages: Stages) -> Fit:
    """cuML's fit over the GPUs of all workers; counts and inertia are those of one more pass of ours."""
    rows = [(day, bounds) for day in job.train]
    centres = stages.workers.kmeans(cluster_days.clipped_rows, rows, start, clustering.MAX_PASSES)
    last = _Passes([job], [bounds], stages, [0.0])({0: centres})[0]
    counts = np.sum([part.counts for part in last], axis=0)
    return Fit(centres, counts, float(np.sum([part.inertia for part in last])), 0, True)


class _Passes:
    """Lloyd passes of many fits; days whose rows have settled are no longer asked.

    `reaches`: how far the centres of each fit may be expected to move, 0 where nobody knows.
    """

    def __init__(
        self, jobs: Sequence[FitJob], bounds: Sequence[Bounds], stages: Stages, reaches: Sequence[float]
    ) -> None:
        self._jobs, self._bounds, self._stages = jobs, bounds, stages
        self._settlings = dict(enumerate(map(Settling, bounds, reaches)))

    def __call__(self, moving: Mapping[int, np.ndarray]) -> dict[int, list[Partial]]:
        """Partials of the days of every fit that still moves, from its centres."""
        found: dict[int, dict[int, Partial]] = {number: {} for number in moving}
        self._settlings = {number: self._settlings[number] for number in moving}
        shares: dict[str, list[Share]] = {}
        asked: dict[str, list[tuple[int, int]]] = {}
        for number, centroids in moving.items():
            job, bounds, held = self._jobs[number], self._bounds[number], self._settlings[number]
            # On a GPU a whole pass takes no time.
            reach = held.follow(centroids) if job.train[0].job.backend == "cpu" else 0.0
            for at, day in enumerate(job.train):
                if at in held.days:
                    found[number][at] = held.days[at].partial(bounds, centroids)
                    continue
                address = day.features.made.address
                share = Share(day, bounds, centroids, reach, _MOST_LEFT // len(job.train))
                shares.setdefault(address, []).append(share)
                asked.setdefault(address, []).append((number, at))
        answers = self._stages.map("fit", cluster_days.lloyd_day, list(shares.values()))
        for places, parts in zip(asked.values(), answers, strict=True):
            for (number, at), part in zip(places, parts, strict=True):
                found[number][at] = self._settlings[number].add(at, part, moving[number])
        return {number: [parts[at] for at in sorted(parts)] for number, parts in found.items()}


def _starts(jobs: Sequence[FitJob], bounds: Sequence[Bounds], stages: Stages) -> list[Start | InputError]:
    """Where every fit starts; all with the same rows and seed from the same sample."""
    wanted: dict[str, SampleJob] = {}
    of_job: list[list[str]] = []
    for job in jobs:
        tasks = [SampleJob(day, job.symbol, job.total, job.config.seed) for day in job.train]
        addresses = [cluster_days.sample_artefact(task).address for task in tasks]
        wanted |= zip(addresses, tasks, strict=True)
        of_job.append(addresses)
    stages.make("sample", cluster_days.sample_artefact, cluster_days.sample_day, list(wanted.values()))
    asked = [
        StartJob(job.train[0].job.store, tuple(addresses), bound, job.config.k, job.config.seed, number)
        for job, bound, addresses in zip(jobs, bounds, of_job, strict=True)
        for number in range(job.config.n_init)
    ]
    attempts = iter(stages.map("start", cluster_days.start_fit, asked))
    return [_start(job, list(islice(attempts, job.config.n_init))) for job in jobs]


def _start(job: FitJob, attempts: Sequence[tuple[Fit | None, int]]) -> Start | InputError:
    """The best of a fit's starts, or why there is none."""
    fits, (rows, *_) = zip(*attempts, strict=True)
    try:
        return starts.best_of(fits, job.config.k, rows)
    except InputError as error:
        return error


def _all_bounds(jobs: Sequence[FitJob], stages: Stages) -> list[Bounds]:
    """Clipping bounds of every fit; the same rows at the same quantiles are counted once."""
    known: dict[tuple[object, ...], Bounds] = {}
    found = []
    for job in jobs:
        key = (tuple(day.key for day in job.train), job.config.winsorize)
        if key not in known:
            known[key] = _bounds(job.train, job.config.winsorize, stages)
        found.append(known[key])
    return found


def _bounds(train: Sequence[TrainDay], winsorize: tuple[float, float] | None, stages: Stages) -> Bounds:
    if winsorize is None:
        return Bounds.none()
    high = _added(cluster_days.high_counts_day, train, stages)

    def low_pass(bins: np.ndarray) -> np.ndarray:
        return _added(cluster_days.low_counts_day, [(day, bins) for day in train], stages)

    return clustering.winsor_bounds(winsorize, high, low_pass)


def _added(function: Callable[[Item], np.ndarray], tasks: Sequence[Item], stages: Stages) -> np.ndarray:
    """Sum of the tasks' counts, a few days at a time: each answer is megabytes."""
    total: np.ndarray | int = 0
    for at in range(0, len(tasks), _TOGETHER):
        total = total + np.sum(stages.map("quantiles", function, tasks[at : at + _TOGETHER]), axis=0)
    return np.asarray(total)
